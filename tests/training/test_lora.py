"""LoRA runs: the adapters learn and nothing else, in PEFT's format, merged, resumed bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer import StopAt, assert_same_run, tensors

from anymamba.models.checkpoints import CheckpointError, convert, load_pretrained
from anymamba.models.language_model import LanguageModel
from anymamba.training.config import TrainConfig
from anymamba.training.trainer import read_config, resume, train

peft = pytest.importorskip("peft", reason="the extra 'lora' installs peft")
pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return replace(config, log=())


@pytest.fixture
def base(config: TrainConfig, tmp_path: Path) -> Path:
    torch.manual_seed(3)
    LanguageModel(config.model).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def lora(config: TrainConfig, base: Path) -> TrainConfig:
    rates = replace(config.optimizer, learning_rate=1e-2)
    return replace(config, start_from=str(base), lora=3, steps=6, checkpoint_every=4, optimizer=rates)


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(0, 257, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def test_the_adapters_learn_and_are_saved_in_pefts_format_and_merged(lora, base, tmp_path):
    result = train(lora, tmp_path / "run")
    run = tmp_path / "run"
    merged, plain = LanguageModel.from_pretrained(run), LanguageModel.from_pretrained(base)
    moved = {name for name, p in merged.named_parameters() if not torch.equal(p, plain.get_parameter(name))}
    kinds = ("in_proj", "x_proj", "dt_proj", "out_proj")
    assert moved == {f"blocks.{i}.mixer.{kind}.weight" for i in (0, 1) for kind in kinds}
    from anymamba.compat.transformers import wrap

    loaded = peft.PeftModel.from_pretrained(wrap(plain), run / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(merged), rtol=1e-4, atol=1e-5)
    values = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (values["r"], values["lora_alpha"], values["base_model_name_or_path"]) == (3, 6, str(base))
    assert result.n_parameters > merged.n_parameters() and read_config(run).lora_targets == tuple(sorted(kinds))


def test_a_checkpoint_holds_the_adapters_only_and_resumes_bit_for_bit(lora, tmp_path):
    train(lora, tmp_path / "straight")
    with pytest.raises(RuntimeError, match="crash"):
        train(lora, tmp_path / "broken", StopAt(5))
    resume(tmp_path / "broken")
    assert_same_run(tmp_path / "straight", tmp_path / "broken", 6)
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("straight", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    names = [name for name in tensors(tmp_path / "straight", 6) if name.startswith("model.")]
    assert len(names) == 16 and all(".lora_" in name for name in names)


def test_another_base_is_refused(lora, base, tmp_path):
    train(lora, tmp_path / "run")
    LanguageModel(read_config(tmp_path / "run").model).save_pretrained(base)
    with pytest.raises(CheckpointError, match=r"base has changed since .*step-00000006"):
        resume(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"base has changed since .*step-00000006"):
        load_pretrained(tmp_path / "run" / "checkpoints" / "step-00000006")


def test_a_checkpoint_and_a_merge_with_convert_are_the_model_of_the_run(lora, base, tmp_path):
    run = tmp_path / "run"
    train(lora, run)
    want = logits(LanguageModel.from_pretrained(run))
    of_checkpoint = load_pretrained(run / "checkpoints" / "step-00000006")
    convert(base, tmp_path / "merged", "hf", adapter=run / "adapter")
    of_convert = LanguageModel.from_pretrained(tmp_path / "merged")
    of_both = LanguageModel.from_pretrained(base, adapter=run / "adapter")
    for model in (of_checkpoint, of_convert, of_both):
        torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-6)


def test_adapters_of_a_narrow_base_are_merged_before_anything_is_rounded(lora, base, tmp_path):
    """The run trains in float32, and its adapter changes weights by less than bfloat16 resolves."""
    narrow = tmp_path / "narrow"
    convert(base, narrow, "anymamba", dtype=torch.bfloat16)
    run = tmp_path / "run"
    train(replace(lora, start_from=str(narrow), optimizer=replace(lora.optimizer, learning_rate=1e-4)), run)
    convert(narrow, tmp_path / "merged", "anymamba", dtype=torch.float32, adapter=run / "adapter")
    want = LanguageModel.from_pretrained(run)
    for model in (
        load_pretrained(run / "checkpoints" / "step-00000006"),
        load_pretrained(narrow, dtype=torch.float32, adapter=run / "adapter"),
        load_pretrained(tmp_path / "merged"),
    ):
        for (name, got), (_, wanted) in zip(model.named_parameters(), want.named_parameters(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-7, msg=name)


def test_an_adapter_with_the_files_own_names_fits_too(lora, base, tmp_path):
    """As PEFT saves one for the class of transformers."""
    run, other = tmp_path / "run", tmp_path / "other"
    train(lora, run)
    other.mkdir()
    (other / "adapter_config.json").write_text((run / "adapter" / "adapter_config.json").read_text())
    ours = load_file(run / "adapter" / "adapter_model.safetensors")
    save_file(
        {k.replace("model.blocks.", "model.backbone.layers."): t for k, t in ours.items()},
        other / "adapter_model.safetensors",
    )
    assert torch.equal(
        logits(load_pretrained(base, adapter=other)), logits(load_pretrained(base, adapter=run / "adapter"))
    )


def test_rank_targets_and_alpha(lora, base, tmp_path):
    chosen = replace(lora, lora_targets=("in_proj",), lora_alpha=9.0, steps=2, activation_checkpointing=True)
    train(chosen, tmp_path / "run")
    values = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (values["lora_alpha"], values["target_modules"]) == (9.0, ["in_proj"])
    merged, plain = LanguageModel.from_pretrained(tmp_path / "run"), LanguageModel.from_pretrained(base)
    moved = {name for name, p in merged.named_parameters() if not torch.equal(p, plain.get_parameter(name))}
    assert moved == {f"blocks.{i}.mixer.in_proj.weight" for i in (0, 1)}


def test_what_is_refused(config, lora, tmp_path, monkeypatch):
    for bad, words in (
        (replace(lora, start_from=None), r"name it with start_from \(--from\)"),
        (
            replace(lora, lora_targets=("q_proj",)),
            "is called 'q_proj'; the model has dt_proj, in_proj, out_proj, x_proj",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            train(bad, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"give their rank with lora \(--lora 8\)"):
        replace(config, lora_targets=("in_proj",))
    monkeypatch.setattr("anymamba.training.lora.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'anymamba\[lora\]'"):
        train(lora, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, "only adapters of peft_type LORA"),
        ({"use_dora": True}, "use_dora=True cannot be merged here; merge it with PEFT"),
        ({"r": 0}, "r must be a positive integer"),
    ],
)
def test_adapters_that_cannot_be_merged(base, tmp_path, change, words):
    folder = tmp_path / "adapter"
    folder.mkdir()
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **change}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file({"x.lora_A.weight": torch.zeros(2, 3)}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load_pretrained(base, adapter=folder)


def test_an_adapter_of_another_model(base, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    halves = {"lora_A": torch.zeros(2, 3), "lora_B": torch.zeros(5, 2)}
    for layer, words in (
        ("nothing", "has no layer nothing"),
        ("blocks.0.mixer.in_proj", r"its blocks.0.mixer.in_proj is \(5, 3\)"),
    ):
        save_file({f"{layer}.{half}.weight": t for half, t in halves.items()}, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=f"the adapter is of another model: .*{words}"):
            load_pretrained(base, adapter=folder)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        load_pretrained(base, adapter=base)
