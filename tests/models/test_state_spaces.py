"""The original format: we load mamba_ssm's folders, it loads ours, and hostile archives run no code."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anymamba import LanguageModel, MambaOptions, ModelConfig
from anymamba.models.checkpoints import CheckpointError, convert, load_pretrained

ODD = ModelConfig(
    d_model=16,
    n_layers=2,
    vocab_size=29,
    tie_embeddings=False,
    mamba=MambaOptions(d_state=8, d_conv=3, dt_rank=5, bias=True, conv_bias=False),
)
PLAIN = ModelConfig(d_model=16, n_layers=2, vocab_size=29)
LAYERNORM = ModelConfig(d_model=16, n_layers=1, vocab_size=29, norm="layernorm", residual_in_fp32=False)
CONFIGS = {"plain": PLAIN, "odd": ODD, "layernorm": LAYERNORM}


def original_folder(folder: Path, weights: str = "pytorch_model.bin", **config) -> dict[str, torch.Tensor]:
    """A folder like the published ones, made from the description of the format, and its tensors."""
    torch.manual_seed(3)
    width, inner, rank, state = 16, 32, 1, 16
    layer = {
        "norm.weight": (width,),
        "mixer.in_proj.weight": (2 * inner, width),
        "mixer.conv1d.weight": (inner, 1, 4),
        "mixer.conv1d.bias": (inner,),
        "mixer.x_proj.weight": (rank + 2 * state, inner),
        "mixer.dt_proj.weight": (inner, rank),
        "mixer.dt_proj.bias": (inner,),
        "mixer.A_log": (inner, state),
        "mixer.D": (inner,),
        "mixer.out_proj.weight": (width, inner),
    }
    tensors = {
        f"backbone.layers.{i}.{name}": 0.3 * torch.randn(shape) for i in range(2) for name, shape in layer.items()
    }
    tensors["backbone.embedding.weight"] = torch.randn(32, width)
    tensors["backbone.norm_f.weight"] = torch.randn(width)
    folder.mkdir(exist_ok=True)
    if weights == "model.safetensors":
        save_file(tensors, folder / weights)
    else:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
        torch.save(tensors, folder / weights)
    released = {"d_model": width, "n_layer": 2, "vocab_size": 29, "ssm_cfg": {}, "rms_norm": True}
    released |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    (folder / "config.json").write_text(json.dumps(released | config))
    return tensors


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_a_published_folder(tmp_path, weights):
    """The same function as transformers computes with these weights under its names."""
    transformers = pytest.importorskip("transformers", reason="the extra 'test' installs transformers")
    tensors = original_folder(tmp_path, weights)
    ours = load_pretrained(tmp_path)
    assert (ours.config.vocab_size, ours.config.padded_vocab_size, ours.config.dt_rank) == (29, 32, 1)
    theirs = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=16)
    ).eval()
    named = {name.replace("embedding.", "embeddings."): t for name, t in tensors.items()}
    theirs.load_state_dict(named | {"lm_head.weight": named["backbone.embeddings.weight"]})
    ids = torch.randint(29, (2, 17))
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_bit_for_bit(tmp_path, moved, name, dtype):
    model = moved(CONFIGS[name], dtype)
    model.save_pretrained(tmp_path, format="state-spaces")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["anymamba_manifest.json", "config.json", "pytorch_model.bin"]
    loaded = load_pretrained(tmp_path)
    assert loaded.config == model.config
    for (key, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), key


def test_the_archive_is_as_mamba_ssm_reads_it(tmp_path, moved):
    moved(PLAIN).save_pretrained(tmp_path, format="state-spaces")
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert set(tensors) == set(original_folder(tmp_path / "published"))
    assert tensors["lm_head.weight"].data_ptr() == tensors["backbone.embedding.weight"].data_ptr()
    assert tensors["backbone.layers.0.mixer.conv1d.weight"].shape == (32, 1, 4)
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin") as archive:
        assert archive.testzip() is None
    values = json.loads((tmp_path / "config.json").read_text())
    assert "model_type" not in values and values["vocab_size"] == 29 and values["ssm_cfg"] == {}


@pytest.mark.parametrize("name", ["plain", "odd"])
def test_between_both_formats_bit_for_bit(tmp_path, moved, name):
    moved(CONFIGS[name]).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "original", "state-spaces")
    convert(tmp_path / "original", tmp_path / "again", "hf")
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("hf", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads(
        (tmp_path / "again" / "config.json").read_text()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_layer_idx": [1]}, r"attn_layer_idx=\[1\] asks for layers other than Mamba"),
        ({"d_intermediate": 64}, "d_intermediate=64"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer must be 'Mamba1', got 'Mamba2'"),
        ({"ssm_cfg": {"d_stat": 8}}, "unknown key 'd_stat' in ssm_cfg; did you mean 'd_state'"),
        ({"ssm_cfg": 3}, "ssm_cfg must be a table, got 3"),
        (
            {"ssm_cfg": {"d_state": 8}},
            r"mixer\.x_proj\.weight must have shape \(17, 32\), got \(33, 16\)|must have shape",
        ),
        ({"d_model": "wide"}, "config.json: "),
        ({"n_layer": 10**12}, "too few for the 1000000000000 layers"),
        ({"rms_norm": False}, "norm.bias"),
    ],
)
def test_configs_that_are_refused(tmp_path, change, message):
    original_folder(tmp_path, **change)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path)


def test_auto_rank_and_expand(tmp_path):
    original_folder(tmp_path, ssm_cfg={"dt_rank": "auto", "expand": 2, "layer": "Mamba1", "use_fast_path": True})
    assert load_pretrained(tmp_path).config.mamba == MambaOptions()


@pytest.mark.parametrize(
    ("option", "mamba", "top"),
    [
        ("b_discretization='zoh'", {"b_discretization": "zoh"}, {}),
        ("selective_B=False", {"selective_B": False}, {}),
        ("complex A", {"A_init": "s4d-lin"}, {}),
        ("output_norm='rmsnorm'", {"output_norm": "rmsnorm"}, {}),
        ("inner_norms=True", {"inner_norms": True, "inner_norm_weights": False}, {}),
        ("norm_eps=0.001", {}, {"norm_eps": 1e-3}),
    ],
)
def test_what_it_cannot_hold_is_refused_by_name(tmp_path, moved, option, mamba, top):
    model = moved(ModelConfig(d_model=8, n_layers=1, vocab_size=8, mamba=MambaOptions(**mamba), **top))
    with pytest.raises(CheckpointError, match=option):
        model.save_pretrained(tmp_path / "out", format="state-spaces")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------ hostile archives


class Trace:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_an_archive_that_would_run_code(tmp_path):
    tensors = original_folder(tmp_path)
    torch.save(tensors | {"extra": Trace(tmp_path / "trace")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused: reading it would call \w+\.mkdir"):
        load_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trace(tmp_path / "trace")))
    with pytest.raises(CheckpointError, match="is not opened"):
        load_pretrained(tmp_path)
    assert not (tmp_path / "trace").exists()


def damaged(folder: Path, edit) -> None:
    tensors = original_folder(folder)
    torch.save(edit(tensors), folder / "pytorch_model.bin")


def compressed(folder: Path) -> None:
    original_folder(folder)
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)


def truncated(folder: Path) -> None:
    original_folder(folder)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-100])


EMBEDDING = "backbone.embedding.weight"
BROKEN = {
    "compressed": (compressed, "is not as torch.save writes it"),
    "truncated": (truncated, "is truncated or not an archive of torch.save"),
    "a list": (lambda f: damaged(f, lambda t: list(t.values())), "must be a dict of tensors by name, got list"),
    "a word": (lambda f: damaged(f, lambda t: t | {"x": "y"}), "'x' must be a tensor, got str"),
    "nested": (lambda f: damaged(f, lambda t: {"state": t}), "'state' must be a tensor, got"),
    "a number as name": (lambda f: damaged(f, lambda t: t | {3: torch.zeros(1)}), "3 must be a tensor"),
    "integers": (
        lambda f: damaged(f, lambda t: t | {EMBEDDING: torch.zeros(32, 16, dtype=torch.int32)}),
        f"{EMBEDDING} must be floating point, got torch.int32",
    ),
    "a shape that is not stored": (
        lambda f: damaged(f, lambda t: t | {EMBEDDING: torch.zeros(1, 1).expand(2**20, 2**20)}),
        rf"{EMBEDDING} claims 4,398,046,511,104 bytes for its shape \(1048576, 1048576\), but 4 are stored",
    ),
    "sparse": (
        lambda f: damaged(f, lambda t: t | {EMBEDDING: torch.zeros(32, 16).to_sparse()}),
        f"'{EMBEDDING}' must be a tensor|{EMBEDDING}|is refused|corrupt",
    ),
    "missing": (
        lambda f: damaged(f, lambda t: {k: v for k, v in t.items() if k != EMBEDDING}),
        f"tensors 1 missing .first: {EMBEDDING}",
    ),
    "unexpected": (lambda f: damaged(f, lambda t: t | {"x": torch.zeros(1)}), "tensors 1 unexpected .first: x"),
    "wrong shape": (
        lambda f: damaged(f, lambda t: t | {EMBEDDING: torch.zeros(31, 16)}),
        rf"{EMBEDDING} must have shape \(32, 16\), got \(31, 16\)",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_archives(tmp_path, damage, message):
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        LanguageModel.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
