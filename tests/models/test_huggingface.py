"""Model folders: round trips, files exchanged with transformers both ways, and every kind of broken file."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anymamba import LanguageModel, MambaOptions, ModelConfig
from anymamba.base import files as written
from anymamba.base.manifest import NAME as MANIFEST
from anymamba.models.checkpoints import (
    CheckpointError,
    convert,
    load_pretrained,
    save_pretrained,
)
from anymamba.models.checkpoints.families import nearest_spelling
from anymamba.models.checkpoints.formats import files
from anymamba.models.checkpoints.formats import folder as folders
from anymamba.parts.options import AttentionOptions

PLAIN = {"d_model": 16, "n_layers": 2, "vocab_size": 29}
ODD = MambaOptions(d_state=8, d_conv=3, dt_rank=5, bias=True)
CONFIGS = {
    "plain": ModelConfig(**PLAIN),
    "odd": ModelConfig(**PLAIN, tie_embeddings=False, norm_eps=1e-3, pad_vocab_multiple=16, mamba=ODD),
    "no conv bias": ModelConfig(**PLAIN, mamba=MambaOptions(conv_bias=False, expand=3)),
    "narrow residual": ModelConfig(**PLAIN, residual_in_fp32=False, mamba=MambaOptions(A_init="random")),
    "falcon": ModelConfig(
        **PLAIN, tie_embeddings=False, mamba=MambaOptions(inner_norms=True, inner_norm_weights=False, norm_eps=1e-3)
    ),
}
MODEL_TYPE = {name: "falcon_mamba" if name == "falcon" else "mamba" for name in CONFIGS}
CLASS = {"mamba": "MambaForCausalLM", "falcon_mamba": "FalconMambaForCausalLM"}
FOREIGN = {
    "b_discretization": ModelConfig(**PLAIN, mamba=MambaOptions(b_discretization="zoh")),
    "selective_delta": ModelConfig(**PLAIN, mamba=MambaOptions(selective_delta=False)),
    "selective_B": ModelConfig(**PLAIN, mamba=MambaOptions(selective_B=False)),
    "selective_C": ModelConfig(**PLAIN, tie_embeddings=False, mamba=MambaOptions(selective_C=False)),
    "A_init": ModelConfig(**PLAIN, mamba=MambaOptions(A_init="s4d-lin", selective_B=False)),
    "output_norm": ModelConfig(**PLAIN, mamba=MambaOptions(output_norm="layernorm")),
    "inner_norms": ModelConfig(**PLAIN, mamba=MambaOptions(inner_norms=True)),
    "norm": ModelConfig(**PLAIN, norm="layernorm"),
    "positions": ModelConfig(**PLAIN, attention=AttentionOptions(positions="absolute", max_positions=9)),
}


def build(config: ModelConfig, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model moved away from its initialisation."""
    torch.manual_seed(0)
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def saved(folder: Path, name: str = "plain") -> Path:
    save_pretrained(build((CONFIGS | FOREIGN)[name]), folder)
    return folder


def assert_equal_models(a: LanguageModel, b: LanguageModel) -> None:
    assert a.config == b.config
    for (name, x), (other, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other and x.dtype == y.dtype and torch.equal(x, y), name
        assert x.requires_grad and y.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", (CONFIGS | FOREIGN).values(), ids=CONFIGS | FOREIGN)
def test_round_trip_bit_for_bit(tmp_path, config, dtype):
    model = build(config, dtype)
    model.save_pretrained(tmp_path / "a" / "b")
    loaded = LanguageModel.from_pretrained(tmp_path / "a" / "b")
    assert_equal_models(loaded, model)
    ids = torch.randint(29, (2, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [MANIFEST, "config.json", "model.safetensors"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pure_model_is_written_as_mamba(tmp_path, name):
    values = json.loads((saved(tmp_path, name) / "config.json").read_text())
    kind = MODEL_TYPE[name]
    assert values["model_type"] == kind and values["architectures"] == [CLASS[kind]]
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"backbone.embeddings.weight", "backbone.norm_f.weight", "backbone.layers.1.mixer.A_log"} <= names
    assert ("lm_head.weight" in names) == (not CONFIGS[name].tie_embeddings)


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_options_are_written_as_anymamba(tmp_path, name):
    values = json.loads((saved(tmp_path, name) / "config.json").read_text())
    assert values["model_type"] == "anymamba" and "architectures" not in values
    assert any(option.startswith(name) for option in nearest_spelling(FOREIGN[name], "hf")[1])
    assert "embedding.weight" in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("name", "ssm"), [("plain", torch.float32), ("A_init", torch.float32)])
def test_dtype_on_loading(tmp_path, name, ssm):
    saved(tmp_path, name)
    for dtype, wide in ((torch.bfloat16, ssm), (torch.float16, ssm), (torch.float64, torch.float64)):
        model = load_pretrained(tmp_path, dtype=dtype)
        kinds = {p.dtype for n, p in model.named_parameters() if ".ssm." not in n}
        assert kinds == {dtype}
        assert {p.dtype for n, p in model.named_parameters() if ".ssm." in n} == {wide}
        assert model(torch.zeros(1, 3, dtype=torch.int64)).logits.dtype == dtype


def test_device_on_loading(tmp_path):
    model = load_pretrained(saved(tmp_path), device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert load_pretrained(tmp_path, device="cpu").embedding.weight.device.type == "cpu"


def test_loaded_weights_do_not_depend_on_the_file(tmp_path):
    """Not even if the file is replaced while the model is in use."""
    model = load_pretrained(saved(tmp_path))
    before = {n: p.clone() for n, p in model.named_parameters()}
    (tmp_path / "model.safetensors").write_bytes(b"\0" * (tmp_path / "model.safetensors").stat().st_size)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


LOADING = """
import resource, sys, torch
from anymamba import LanguageModel
import anymamba.models.checkpoints
LanguageModel.from_pretrained(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = LanguageModel.from_pretrained(sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * model.n_parameters()))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_loading_holds_the_weights_and_little_more(tmp_path):
    """The file's mapped pages count as resident too, so a reader needs at most twice the weights."""
    saved(tmp_path / "small")
    big = LanguageModel(ModelConfig(d_model=512, n_layers=12, vocab_size=20000))
    save_pretrained(big, tmp_path / "big")
    command = [sys.executable, "-c", LOADING, str(tmp_path / "small"), str(tmp_path / "big")]
    used = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert used < 2.3, f"{used:.2f} times the weights"


# ------------------------------------------------------------------------------------------ transformers


transformers = pytest.importorskip("transformers", reason="the extra 'test' installs transformers")


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_ours(tmp_path, name):
    ours = livelier(build(CONFIGS[name]))
    save_pretrained(ours, tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == CLASS[MODEL_TYPE[name]]
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    theirs.eval()
    assert_same_function(ours, theirs, 29)


@torch.no_grad()
def livelier(model: torch.nn.Module):
    """Large mixers: with a tied head and small ones, a small model would repeat its last token."""
    for name, parameter in model.named_parameters():
        if name.endswith("out_proj.weight"):
            parameter.mul_(12)
    return model


@torch.no_grad()
def assert_same_function(ours: LanguageModel, theirs, vocab_size: int) -> None:
    """Logits, and 128 greedy tokens that are not all the same."""
    ids = torch.randint(vocab_size, (2, 13))
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4
    prompts = torch.randint(vocab_size, (3, 5))
    options = {"max_new_tokens": 128, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    there = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, 5:]
    logits, state = ours(prompts, num_last_logits=1)
    here = [logits[:, -1].argmax(-1)]
    while len(here) < 128:
        logits, state = ours.step(here[-1], state)
        here.append(logits.argmax(-1))
    assert torch.equal(torch.stack(here, dim=1), there) and len(there.unique()) > 5, there


THEIRS = {
    "plain": {},
    "odd": {
        "state_size": 8,
        "conv_kernel": 3,
        "time_step_rank": 5,
        "tie_word_embeddings": False,
        "use_bias": True,
        "layer_norm_epsilon": 1e-3,
        "residual_in_fp32": False,
    },
    "wide": {"expand": 3, "use_conv_bias": False},
    "falcon": {"model_type": "falcon_mamba", "tie_word_embeddings": False, "mixer_rms_eps": 1e-3},
}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("shard_size", ["1GB", "10KB"])
def test_we_read_what_transformers_writes(tmp_path, name, shard_size):
    options = dict(THEIRS[name])
    torch.manual_seed(1)
    kind = options.pop("model_type", "mamba")
    config = transformers.AutoConfig.for_model(kind, vocab_size=31, hidden_size=20, num_hidden_layers=2, **options)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    livelier(theirs).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "10KB")
    ours = load_pretrained(tmp_path)
    assert ours.config.padded_vocab_size == 31
    assert_same_function(ours, theirs, 31)
    save_pretrained(ours, tmp_path / "again")
    assert_equal_models(load_pretrained(tmp_path / "again"), ours)


@pytest.mark.parametrize("spelling", ["an older name", "no head"])
def test_other_spellings_that_transformers_reads(tmp_path, spelling):
    """The older name of the embedding, and the names in a model without a head."""
    theirs = transformers.MambaModel(transformers.MambaConfig(vocab_size=31, hidden_size=20, num_hidden_layers=2))
    if spelling == "no head":
        theirs.save_pretrained(tmp_path)
        assert "embeddings.weight" in load_file(tmp_path / "model.safetensors")
    else:
        theirs.config.save_pretrained(tmp_path)
        older = {f"backbone.{name.replace('embeddings', 'embedding')}": t for name, t in theirs.state_dict().items()}
        save_file(older, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = load_pretrained(tmp_path)
    ids = torch.randint(31, (1, 9))
    with torch.no_grad():
        hidden = theirs.eval()(ids).last_hidden_state
        assert (ours.hidden(ids)[0] - hidden).abs().max() < 1e-5
        assert (ours(ids).logits - hidden @ theirs.embeddings.weight.T).abs().max() < 1e-4
    convert(tmp_path, tmp_path / "again", "hf")
    assert EMBEDDING in load_file(tmp_path / "again" / "model.safetensors")


def test_ours_through_transformers_and_back(tmp_path):
    """transformers keeps our own config in config.json; if it changes its own fields, those count."""
    ours = build(CONFIGS["odd"])
    save_pretrained(ours, tmp_path / "a")
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    assert_equal_models(load_pretrained(tmp_path / "b"), ours)
    theirs.resize_token_embeddings(40)
    theirs.save_pretrained(tmp_path / "c")
    bigger = load_pretrained(tmp_path / "c")
    assert bigger.config.padded_vocab_size == 40
    ids = torch.randint(40, (1, 7))
    with torch.no_grad():
        assert (bigger(ids).logits - theirs.eval()(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize(("d_model", "expand"), [(49, 1.03), (22, 1.7), (20, 2.5), (13, 0.7)])
def test_fractional_expansion(tmp_path, d_model, expand):
    """int(d_inner / d_model * d_model) may be d_inner - 1: sizes must survive with and without our own table."""
    model = build(ModelConfig(d_model=d_model, n_layers=1, vocab_size=8, mamba=MambaOptions(expand=expand)))
    save_pretrained(model, tmp_path)
    assert_equal_models(load_pretrained(tmp_path), model)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    if values["model_type"] == "mamba":
        del values["anymamba"]
        path.write_text(json.dumps(values))
        assert load_pretrained(tmp_path, verify=False).config.d_inner == model.config.d_inner
        theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path).eval()
        ids = torch.randint(8, (1, 7))
        with torch.no_grad():
            assert (theirs(ids).logits - model(ids).logits).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------ broken files


def assert_one_line(error: BaseException) -> None:
    message = str(error)
    assert message and "\n" not in message and len(message) < 400, message


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def edit_weights(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"harmless": 1}))


def disguised_pickle(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"harmless": 1}))


EMBEDDING = "backbone.embeddings.weight"


def claim(length: int, shape: list[int], end: int):
    """A safetensors header that claims its own length, and a tensor of a shape and an end."""
    header = json.dumps({EMBEDDING: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return lambda f: (f / "model.safetensors").write_bytes((length or len(header)).to_bytes(8, "little") + header)


BROKEN = {
    "header of terabytes": (claim(2**42, [32, 16], 2048), "is truncated or not a safetensors file"),
    "tensor of terabytes": (claim(0, [2**20, 2**20], 2**42), "is truncated or not a safetensors file"),
    "shape of terabytes": (claim(0, [2**20, 2**20], 0), "is truncated or not a safetensors file"),
    "truncated": (truncate, r"model\.safetensors is truncated or not a safetensors file"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is truncated or not a safetensors file"),
    "pickle in disguise": (disguised_pickle, "is truncated or not a safetensors file"),
    "only a pickle": (only_a_pickle, r"pytorch_model\.bin is .* not an archive of torch\.save .* is not opened"),
    "wrong shape": (
        lambda f: edit_weights(f, lambda t: t.update({EMBEDDING: torch.zeros(31, 16)})),
        rf"{EMBEDDING} must have shape \(32, 16\), got \(31, 16\)",
    ),
    "missing tensor": (
        lambda f: edit_weights(f, lambda t: t.pop(EMBEDDING)),
        rf"does not hold the model described by config.json: tensors 1 missing \(first: {EMBEDDING}\)",
    ),
    "unexpected tensor": (
        lambda f: edit_weights(f, lambda t: t.update({"extra": torch.zeros(1)})),
        r"tensors 1 unexpected \(first: extra\)",
    ),
    "integers": (
        lambda f: edit_weights(f, lambda t: t.update({EMBEDDING: torch.zeros(32, 16, dtype=torch.int8)})),
        f"{EMBEDDING} must be floating point, got I8",
    ),
    "other model": (
        lambda f: edit_config(f, model_type="llama"),
        "is of model_type 'llama'; this reader takes 'mamba'",
    ),
    "no model type": (lambda f: edit_config(f, model_type=...), "is of model_type None"),
    "other activation": (
        lambda f: edit_config(f, anymamba=..., hidden_act="gelu"),
        "hidden_act must be 'silu', got 'gelu'",
    ),
    "no size": (lambda f: edit_config(f, anymamba=..., hidden_size=...), "lacks the key 'hidden_size'"),
    "size zero": (lambda f: edit_config(f, anymamba=..., hidden_size=0), "hidden_size|d_model"),
    "size of a word": (lambda f: edit_config(f, anymamba=..., hidden_size="16"), "config.json: "),
    "rank zero": (
        lambda f: edit_config(f, anymamba=..., time_step_rank=0),
        "dt_rank must be at least 1, got 0",
    ),
    "our table": (lambda f: edit_config(f, anymamba={"d_modle": 3}), "unknown key 'd_modle' in anymamba; did you mean"),
    "our table's kind": (lambda f: edit_config(f, anymamba=3), "anymamba must be a table of keys and values, got 3"),
    "a mixer": (
        lambda f: edit_config(f, model_type="anymamba", anymamba={"mixers": ["x"], "n_layers": 1}),
        "unknown mixer 'x' in mixers",
    ),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not JSON"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json is not JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a table of keys and values, got list"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_folders(tmp_path, damage, message):
    """Without a manifest, as published folders are."""
    damage(saved(tmp_path))
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(tmp_path)
    assert_one_line(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_absent(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model folder .*nowhere; give one with config\.json"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: it is not a model folder"):
        load_pretrained(tmp_path)
    (saved(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json is a file; give the folder"):
        load_pretrained(tmp_path / "config.json")


def test_a_pickle_is_never_opened(tmp_path):
    """Not even if there are good weights beside it: the pickle's trace does not appear."""

    class Trace:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trace"),))

    saved(tmp_path)
    for name in (files.TORCH, *files.OTHER_PICKLES):
        (tmp_path / name).write_bytes(pickle.dumps(Trace()))
    load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        load_pretrained(tmp_path)
    assert not (tmp_path / "trace").exists()


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def half_written(tensors, path, **options):
    Path(path).write_bytes(b"half")
    full_disk()


@pytest.mark.parametrize(
    ("where", "name", "failure"),
    [
        ("replace", "os.replace", full_disk),
        ("weights", "save_file", half_written),
        ("sync", "os.fsync", full_disk),
        ("config", "write_json", full_disk),
    ],
)
def test_a_save_that_fails_leaves_the_model_that_was_there(tmp_path, monkeypatch, where, name, failure):
    saved(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = build(ModelConfig(**PLAIN))
    with monkeypatch.context() as patch:
        target, _, attribute = name.rpartition(".")
        module = written if target else folders
        patch.setattr(getattr(module, target) if target else module, attribute, failure)
        with pytest.raises(OSError, match="No space left"):
            save_pretrained(other, tmp_path)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    if where == "config":
        assert after["config.json"] == before["config.json"]
        assert before.keys() - after.keys() == {MANIFEST}, "the new weights are not what it lists"
    else:
        assert after == before
    load_pretrained(tmp_path)


def test_saving_over_a_model_replaces_it(tmp_path):
    saved(tmp_path)
    other = build(CONFIGS["odd"])
    save_pretrained(other, tmp_path)
    assert_equal_models(load_pretrained(tmp_path), other)


def test_the_tokenizer_is_saved_beside(tmp_path):
    from anymamba.data.tokenizer import ByteTokenizer

    tokenizer = ByteTokenizer()
    save_pretrained(build(ModelConfig(d_model=8, n_layers=1, vocab_size=257)), tmp_path, tokenizer)
    assert (tmp_path / "tokenizer.json").exists()
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["eos_token_id"] == tokenizer.eos_id == 256 and values["vocab_size"] == 264
