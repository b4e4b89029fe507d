"""Converting: every pair of formats, dtypes, shards, memory, errors; names on the hub; random damage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from anymamba import LanguageModel, MambaOptions, ModelConfig
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.models.checkpoints import CheckpointError, convert, load_pretrained, save_pretrained
from anymamba.models.inference import InferenceModel
from anymamba.models.mixers import MIXERS
from anymamba.parts.options import HyenaOptions

PLAIN = ModelConfig(d_model=16, n_layers=2, vocab_size=29)
ZOH = ModelConfig(d_model=16, n_layers=2, vocab_size=29, mamba=MambaOptions(b_discretization="zoh"))
FORMATS = ("hf", "state-spaces", "gguf", "anymamba")


def equal_but_A_log(a: LanguageModel, b: LanguageModel, through_gguf: bool) -> None:
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        if name.endswith("A_log") and through_gguf:
            torch.testing.assert_close(x, y, atol=3e-7, rtol=3e-7)
        else:
            assert x.dtype == y.dtype and torch.equal(x, y), name


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_every_pair(tmp_path, moved, source, to):
    model = moved(PLAIN)
    save_pretrained(model, tmp_path / "a", format=source)
    convert(tmp_path / "a", tmp_path / "b", to)
    loaded = load_pretrained(tmp_path / "b")
    assert loaded.config == model.config
    equal_but_A_log(model, loaded, "gguf" in (source, to))


@pytest.mark.parametrize("to", ["hf", "state-spaces", "gguf"])
def test_what_cannot_be_held_is_refused_and_nothing_is_written(tmp_path, moved, to):
    moved(ZOH).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=f"the format {to} cannot hold this model: b_discretization='zoh'"):
        convert(tmp_path / "a", tmp_path / "b", to)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("to", FORMATS)
def test_dtype(tmp_path, moved, to):
    """The weights become narrower; A_log, D and the step's bias do not."""
    model = moved(PLAIN)
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to, dtype=torch.bfloat16)
    equal_but_A_log(
        load_pretrained(tmp_path / "a", dtype=torch.bfloat16), load_pretrained(tmp_path / "b"), to == "gguf"
    )
    if to in ("hf", "anymamba"):
        assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_makes_kernels_stays_wide(tmp_path, moved, mixer):
    """Saved, converted and loaded in a narrow dtype, all parameters are those of the narrow model, and it runs."""
    config = ModelConfig(d_model=16, n_layers=2, vocab_size=29, mixers=(mixer,), hyena=HyenaOptions(max_length=32))
    model = moved(config)
    model.save_pretrained(tmp_path / "wide")
    narrow = model.to(torch.bfloat16)
    narrow.save_pretrained(tmp_path / "narrow")
    convert(tmp_path / "wide", tmp_path / "converted", "anymamba", dtype=torch.bfloat16)
    loaded = [load_pretrained(tmp_path / name) for name in ("narrow", "converted")]
    loaded.append(load_pretrained(tmp_path / "wide", dtype=torch.bfloat16))
    ids = torch.randint(29, (2, 20))
    with torch.no_grad():
        want = narrow(ids).logits
        for other in loaded:
            equal_but_A_log(narrow, other, False)
            assert torch.equal(other(ids).logits, want)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("format", ["anymamba", "gguf"])
def test_tensors_that_are_wider_than_the_embedding_are_not_rounded(tmp_path, moved, format, weights):
    """A model for inference has narrow matrices; all else is float32, also after another conversion."""
    model = moved(ModelConfig(d_model=48, n_layers=1, vocab_size=64))
    model.for_inference(weights).save_pretrained(tmp_path / "a", format=format)
    convert(tmp_path / "a", tmp_path / "b", format)
    convert(tmp_path / "a", tmp_path / "c", "anymamba", dtype=torch.float32)
    packed = [InferenceModel.from_pretrained(tmp_path / name) for name in ("a", "b")]
    plain = [load_pretrained(tmp_path / name, dtype=torch.float32) for name in ("a", "b", "c")]
    for name in ("norm.weight", "blocks.0.norm.weight", "blocks.0.mixer.conv.weight", "blocks.0.mixer.conv.bias"):
        for other in (*packed, *plain):
            assert torch.equal(other.get_parameter(name), model.get_parameter(name)), name
    logits = [other(torch.arange(9)[None]).logits for other in packed]
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_gguf_keeps_in_float32_is_not_rounded(tmp_path, moved, dtype):
    model = moved(PLAIN)
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "gguf", dtype=dtype)
    loaded = load_pretrained(tmp_path / "b", dtype=torch.float32)
    for name in ("norm.weight", "blocks.0.mixer.conv.weight", "blocks.0.mixer.conv.bias"):
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name)), name
    assert not torch.equal(loaded.embedding.weight, model.embedding.weight)
    assert load_pretrained(tmp_path / "b").norm.weight.dtype == dtype


def test_shards(tmp_path, moved):
    model = moved(PLAIN)
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "hf", shard_bytes=10_000)
    shards = sorted((tmp_path / "b").glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "b" / "model.safetensors").exists()
    assert all(path.stat().st_size < 12_000 for path in shards)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    equal_but_A_log(model, load_pretrained(tmp_path / "b"), False)
    convert(tmp_path / "b", tmp_path / "c", "hf")
    before, after = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "c" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_saving_whole_over_shards_and_back(tmp_path, moved):
    """No file of the earlier model remains that could be read instead."""
    first, second = moved(PLAIN), moved(PLAIN, seed=1)
    save_pretrained(first, tmp_path, shard_bytes=10_000)
    save_pretrained(second, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["anymamba_manifest.json", "config.json", "model.safetensors"]
    equal_but_A_log(load_pretrained(tmp_path), second, False)
    save_pretrained(first, tmp_path, shard_bytes=10_000)
    assert not (tmp_path / "model.safetensors").exists()
    equal_but_A_log(load_pretrained(tmp_path), first, False)


def test_broken_shards(tmp_path, moved):
    save_pretrained(moved(PLAIN), tmp_path, shard_bytes=10_000)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    name, shard = next(iter(values["weight_map"].items()))
    for table, message in (
        (
            values["weight_map"] | {name: "../other.safetensors"},
            r"'\.\./other\.safetensors' in weight_map must be a file",
        ),
        (
            values["weight_map"] | {name: "absent.safetensors"},
            r"names the shard absent\.safetensors, which is not there",
        ),
        (values["weight_map"] | {"x": shard}, rf"{shard} lacks x, which"),
        ([1], "weight_map must map tensor names to file names"),
    ):
        index.write_text(json.dumps({"weight_map": table}))
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(tmp_path, verify=False)


def test_what_is_there_is_not_overwritten(tmp_path, moved):
    moved(PLAIN).save_pretrained(tmp_path / "a")
    with pytest.raises(FileExistsError, match="exists already; name a new folder"):
        convert(tmp_path / "a", tmp_path / "a", "gguf")
    (tmp_path / "x.gguf").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        convert(tmp_path / "a", tmp_path / "x.gguf", "gguf")
    assert (tmp_path / "x.gguf").read_bytes() == b"mine"


@pytest.mark.parametrize("to", FORMATS)
def test_a_conversion_that_fails_leaves_nothing(tmp_path, moved, to):
    """Here the disk is full in the middle of the tensors."""
    moved(PLAIN).save_pretrained(tmp_path / "a")

    def full(done: int, total: int) -> None:
        if done > total / 2:
            raise OSError(28, "No space left on device")

    (tmp_path / "b").mkdir()
    for out in ("b", "c", *(("d.gguf",) if to == "gguf" else ())):
        with pytest.raises(OSError, match="No space left"):
            convert(tmp_path / "a", tmp_path / out, to, progress=full)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"] and not list((tmp_path / "b").iterdir())
    convert(tmp_path / "a", tmp_path / "b", to)
    assert load_pretrained(tmp_path / "b").config == PLAIN


FULL = """
import sys
from anymamba.cli import main
sys.exit(main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("to", FORMATS)
def test_a_disk_that_is_full(tmp_path, to):
    """A real full disk of 2 MB, in a mount namespace: one line, no file remains, and the process is not killed."""
    LanguageModel(ModelConfig(d_model=128, n_layers=4, vocab_size=2000)).save_pretrained(tmp_path / "a")
    (tmp_path / "full").mkdir()
    script = (
        'disk=$1; mount -t tmpfs -o size=2M none "$disk" || exit 77; shift; "$@"; code=$?; ls -A "$disk"; exit $code'
    )
    out = tmp_path / "full" / "out"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(out.parent)]
    try:
        done = subprocess.run(
            [*command, sys.executable, "-c", FULL, str(tmp_path / "a"), str(out), "--to", to],
            capture_output=True,
            text=True,
            timeout=120,
        )
    except FileNotFoundError:
        pytest.skip("needs unshare of util-linux")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 1 and done.stdout == "", done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and ("No space left" in last or "is the disk full?" in last), done.stderr


@pytest.mark.parametrize("name", [".", ".."])
def test_a_path_without_a_name(tmp_path, moved, name, monkeypatch):
    moved(PLAIN).save_pretrained(tmp_path / "a")
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    with pytest.raises(ValueError, match="has no name of its own; give a folder that does not exist yet"):
        convert(tmp_path / "a", name, "hf")
    assert not list((tmp_path / "here" / "below").iterdir())


def test_misuse(tmp_path, moved):
    moved(PLAIN).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="unknown format 'onnx'; the formats are hf, state-spaces, gguf, anymamba"):
        convert(tmp_path / "a", tmp_path / "b", "onnx")
    with pytest.raises(ValueError, match="dtype q8_0 is for gguf, not for hf"):
        convert(tmp_path / "a", tmp_path / "b", "hf", dtype="q8_0")
    with pytest.raises(FileNotFoundError, match="no tokenizer at nowhere"):
        convert(tmp_path / "a", tmp_path / "b", "hf", tokenizer="nowhere")
    assert not (tmp_path / "b").exists()


def test_the_tokenizer_goes_along(tmp_path, moved):
    config = ModelConfig(d_model=8, n_layers=1, vocab_size=257)
    save_pretrained(moved(config), tmp_path / "a", ByteTokenizer())
    convert(tmp_path / "a", tmp_path / "b", "state-spaces")
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in (tmp_path / "b").iterdir()}
    convert(tmp_path / "a", tmp_path / "c", "hf", without_tokenizer=True)
    listed = ["anymamba_manifest.json", "config.json", "model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == listed
    assert json.loads((tmp_path / "c" / "config.json").read_text())["eos_token_id"] == 256
    convert(tmp_path / "c", tmp_path / "d", "hf", tokenizer=tmp_path / "a" / "tokenizer.json")
    assert (tmp_path / "d" / "tokenizer.json").exists()


def test_a_folder_may_be_called_as_a_gguf_file_is(tmp_path, moved):
    model = moved(ModelConfig(d_model=8, n_layers=1, vocab_size=257))
    save_pretrained(model, tmp_path / "x.gguf", ByteTokenizer(), format="hf")
    assert (tmp_path / "x.gguf" / "tokenizer.json").is_file()


# ------------------------------------------------------------------------------------------ memory

PEAK = """
import sys, threading, time, torch
from pathlib import Path
from anymamba.models.checkpoints import convert, load_pretrained

def anonymous():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

action, source, out, *rest = sys.argv[1:]
if action == "load":
    load_pretrained(rest[0])
else:
    convert(rest[0], out + "-small", action)
peak, running, before = 0, True, anonymous()

def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
if action == "load":
    model = load_pretrained(source, dtype=torch.bfloat16)
else:
    convert(source, out, action, shard_bytes=40_000_000)
running = False
thread.join()
print(peak - before)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """269 MB in float32, its largest tensor 41 MB."""
    folder = tmp_path_factory.mktemp("big")
    LanguageModel(ModelConfig(d_model=512, n_layers=34, vocab_size=20000)).save_pretrained(folder / "hf")
    LanguageModel(PLAIN).save_pretrained(folder / "small")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("source", "action"),
    [(source, "load") for source in ("hf", "state-spaces", "gguf")]
    + [("hf", "state-spaces"), ("state-spaces", "gguf"), ("gguf", "hf")],
)
def test_memory(big, tmp_path, action, source):
    """Loading: the weights in the target dtype and one tensor. Converting: one shard (40 MB, or one tensor, 41 MB)."""
    if not (big / source).exists():
        convert(big / "hf", big / source, source)
    command = [sys.executable, "-c", PEAK, action, str(big / source), str(tmp_path / "out"), str(big / "small")]
    used = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    weights, tensor = sum(p.stat().st_size for p in (big / "hf").glob("*.safetensors")), 20000 * 512 * 4
    allowed = weights / 2 + tensor if action == "load" else 2.2 * tensor
    assert used < 1.1 * allowed + 8e6, f"{used / 1e6:.0f} MB; {allowed / 1e6:.0f} are allowed"


# ------------------------------------------------------------------------------------------ the hub


@pytest.fixture
def cached(tmp_path, monkeypatch, moved):
    """A cache of the hub that holds one repository, offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--owner--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    moved(PLAIN).save_pretrained(repository / "snapshots" / commit)
    moved(PLAIN).save_pretrained(repository / "snapshots" / commit / "tiny.gguf", format="gguf")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return commit


def test_a_name_on_the_hub(cached, moved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    equal_but_A_log(LanguageModel.from_pretrained("owner/tiny"), moved(PLAIN), False)
    equal_but_A_log(LanguageModel.from_pretrained("owner/tiny", revision=cached), moved(PLAIN), False)
    equal_but_A_log(LanguageModel.from_pretrained("owner/tiny/tiny.gguf"), moved(PLAIN), True)
    convert("owner/tiny", "copy", "state-spaces")
    equal_but_A_log(LanguageModel.from_pretrained("copy"), moved(PLAIN), False)


@pytest.mark.parametrize("name", ["owner/absent", "owner/tiny/absent.gguf"])
def test_a_name_that_is_not_in_the_cache(cached, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no model {name} here, and none on the hub: .*; unset it") as caught:
        LanguageModel.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_a_repository_of_gguf_files_only(cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "hub" / "models--owner--tiny" / "snapshots" / cached).glob("*"):
        if path.suffix != ".gguf":
            path.unlink()
    with pytest.raises(FileNotFoundError, match=r"for a GGUF file give owner/tiny/NAME\.gguf"):
        LanguageModel.from_pretrained("owner/tiny")
    assert LanguageModel.from_pretrained("owner/tiny/tiny.gguf").config == PLAIN


def test_a_folder_wins_over_the_hub(cached, moved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved(PLAIN, seed=1).save_pretrained("owner/tiny")
    equal_but_A_log(LanguageModel.from_pretrained("owner/tiny"), moved(PLAIN, seed=1), False)
    with pytest.raises(ValueError, match="revision='main' is for names on the hub"):
        LanguageModel.from_pretrained("owner/tiny", revision="main")


# ------------------------------------------------------------------------------------------ random damage


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    from tests.models.conftest import build_moved

    found = {}
    for kind in FORMATS:
        folder = tmp_path_factory.mktemp("good") / kind
        build_moved(ModelConfig(d_model=4, n_layers=1, vocab_size=8)).save_pretrained(folder, format=kind)
        found[kind] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes(kind, files, tmp_path):
    """If any bytes of a header or an archive change, it loads or gives a one-line error; nothing else happens."""

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.data())
    def attempt(data):
        name = data.draw(st.sampled_from(sorted(files[kind])))
        content = bytearray(files[kind][name])
        for _ in range(data.draw(st.integers(1, 4))):
            near_end = data.draw(st.booleans()) and name.endswith(".bin")
            place = data.draw(st.integers(max(0, len(content) - 1500) if near_end else 0, min(len(content), 10**9) - 1))
            place = place if near_end else place % 2500 % len(content)
            content[place] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content)))]
        for path, good in files[kind].items():
            (tmp_path / path).write_bytes(bytes(content) if path == name else good)
        try:
            load_pretrained(tmp_path, verify=False)  # with a digest, only that would be tested
        except (CheckpointError, FileNotFoundError) as error:
            assert str(error) and "\n" not in str(error)

    attempt()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats(allow_nan=True) | st.text(max_size=4) | st.just(10**30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize("kind", ["hf", "state-spaces", "anymamba"])
def test_damaged_configs(kind, files, tmp_path):
    """With any value in any field of config.json, it loads or gives a one-line error."""
    good = json.loads(files[kind]["config.json"])
    for path, content in files[kind].items():
        (tmp_path / path).write_bytes(content)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.sampled_from(sorted(good)), JSON_VALUES, st.booleans())
    def attempt(key, value, without_ours):
        values = good | {key: value}
        if without_ours and kind == "hf":
            values.pop("anymamba", None)
        (tmp_path / "config.json").write_text(json.dumps(values))
        try:
            load_pretrained(tmp_path, verify=False)
        except CheckpointError as error:
            assert str(error) and "\n" not in str(error)

    attempt()
