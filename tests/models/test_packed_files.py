"""Weights in blocks of integers in files: written, run as they lie in the mapped file, read as numbers, broken."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anymamba import ModelConfig
from anymamba.base.errors import CheckpointWarning
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.models.checkpoints import CheckpointError, convert, load_pretrained, open_checkpoint, save_pretrained
from anymamba.models.inference import InferenceModel
from anymamba.models.weight_formats import BLOCK_FORMATS, format_table
from anymamba.ops.packed_linear import unpack
from anymamba.training.config import DataConfig, TrainConfig
from anymamba.training.trainer import train

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' installs gguf")

WIDE = ModelConfig(d_model=256, n_layers=1, vocab_size=40)
"""Rows of 256 and 512 columns: every block format fits."""
IDS = torch.arange(24)[None]


def mapped_files(model: InferenceModel) -> dict[str, str]:
    """The file in whose mapping the bytes of each packed weight lie; "" for memory of the process."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, path = [*line.split(maxsplit=5), ""][:6] if len(line.split()) > 5 else [line.split()[0], ""]
        ranges.append((*(int(end, 16) for end in addresses.split("-")), path))

    def file_of(place: int) -> str:
        return next(path for start, stop, path in ranges if start <= place < stop)

    return {name: file_of(weight.data.data_ptr()) for name, weight in model.packed_weights().items()}


@pytest.fixture
def folder(tmp_path, moved) -> Path:
    moved(WIDE).save_pretrained(tmp_path / "m", ByteTokenizer() if WIDE.vocab_size >= 257 else None)
    return tmp_path / "m"


@pytest.mark.parametrize("dtype", BLOCK_FORMATS)
def test_gguf_of_each_format(tmp_path, folder, dtype):
    """The blocks are those of `quantise`, gguf's own reader gives the same numbers, and both ways of loading agree."""
    convert(folder, tmp_path / "x.gguf", "gguf", dtype=dtype)
    kinds = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    table = format_table(WIDE, dtype)
    assert kinds["token_embd.weight"] == table["embedding.weight"]
    assert kinds["blk.0.ssm_in.weight"] == table["blocks.0.mixer.in_proj.weight"] == dtype
    assert kinds["blk.0.ssm_dt.weight"] == "bf16" and kinds["blk.0.ssm_x.weight"] == "q8_0"
    assert {kinds[f"blk.0.{n}"] for n in ("ssm_conv1d.weight", "ssm_a", "ssm_d", "attn_norm.weight")} == {"f32"}
    packed, plain = InferenceModel.from_pretrained(tmp_path / "x.gguf"), load_pretrained(tmp_path / "x.gguf")
    assert packed.weight_formats == table and open_checkpoint(tmp_path / "x.gguf").in_blocks
    theirs = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors
    }
    values = dict(plain.named_parameters())
    for name, weight in packed.packed_weights().items():
        assert torch.equal(unpack(weight), values[name]), name
    assert torch.equal(values["blocks.0.mixer.in_proj.weight"], torch.from_numpy(theirs["blk.0.ssm_in.weight"]))
    with torch.no_grad():
        off = packed(IDS).logits - plain(IDS).logits
    assert off.pow(2).mean().sqrt() < 0.02 * plain(IDS).logits.std()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("kind", ["gguf", "int8", "plain"])
def test_weights_stay_in_the_mapped_file(tmp_path, folder, kind):
    """Also after they have been used: nothing makes a copy of them."""
    path = tmp_path / ("x.gguf" if kind == "gguf" else "x")
    if kind == "gguf":
        convert(folder, path, "gguf", dtype="q4_0")
    elif kind == "int8":
        convert(folder, path, "hf", weights="int8")
    else:
        path = folder
    packed = InferenceModel.from_pretrained(path)
    packed.step(torch.tensor([1]), packed(IDS).state)
    files = mapped_files(packed)
    assert set(files.values()) == {str(path if kind == "gguf" else path / "model.safetensors")}, files


ANONYMOUS = """
import sys, torch
from anymamba.models.inference import InferenceModel

def anonymous():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0]) << 10

def use(path):
    packed = InferenceModel.from_pretrained(path)
    with torch.inference_mode():
        packed.step(torch.tensor([1]), packed(torch.tensor([[1, 2, 3]])).state)
    return packed

torch.set_num_threads(1)
small, before = use(sys.argv[1]), anonymous()
large = use(sys.argv[2])
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_run_takes_less_memory_than_its_weights(tmp_path):
    """Memory that is not of the file grows by the small tensors and the activations."""
    for name, config in (("small", WIDE), ("large", ModelConfig(d_model=512, n_layers=2, vocab_size=20000))):
        InferenceModel.random(config, "int8").save_pretrained(tmp_path / f"{name}.gguf", format="gguf")
    size = (tmp_path / "large.gguf").stat().st_size
    command = [sys.executable, "-c", ANONYMOUS, str(tmp_path / "small.gguf"), str(tmp_path / "large.gguf")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < size / 3, f"{grown:,} bytes for a file of {size:,}"


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("to", ["hf", "anymamba", "gguf"])
def test_converted_is_the_same_as_packed_in_memory(tmp_path, folder, weights, to):
    convert(folder, tmp_path / "out", to, weights=weights)
    found, wanted = InferenceModel.from_pretrained(tmp_path / "out"), load_pretrained(folder).for_inference(weights)
    assert found.weight_formats == wanted.weight_formats
    for name, weight in wanted.packed_weights().items():
        assert torch.equal(found.packed_weights()[name].data, weight.data), name
    assert torch.allclose(found(IDS).logits, wanted(IDS).logits, atol=1e-4)
    if to != "gguf":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["model_type"] == "anymamba" and config["format_version"] == 2
        assert torch.equal(found(IDS).logits, wanted(IDS).logits)


@pytest.mark.parametrize("format", [None, "hf", "gguf"])
def test_a_packed_model_is_saved_as_it_is(tmp_path, moved, format):
    packed = moved(WIDE).for_inference("int4")
    packed.save_pretrained(tmp_path / "x", format=format)
    again = InferenceModel.from_pretrained(tmp_path / "x")
    assert again.weight_formats == packed.weight_formats
    for name, weight in packed.packed_weights().items():
        assert torch.equal(again.packed_weights()[name].data, weight.data), name
    plain = load_pretrained(tmp_path / "x")
    name = "blocks.0.mixer.in_proj.weight"
    assert torch.equal(plain.state_dict()[name], unpack(packed.packed_weights()[name]))


def test_plain_numbers_are_saved_for_other_programs(tmp_path, moved):
    moved(WIDE).for_inference("bfloat16").save_pretrained(tmp_path / "x")
    assert json.loads((tmp_path / "x" / "config.json").read_text())["model_type"] == "mamba"
    assert set(InferenceModel.from_pretrained(tmp_path / "x").weight_formats.values()) == {"bfloat16"}


def test_shards(tmp_path, folder):
    convert(folder, tmp_path / "whole", "anymamba", weights="int8")
    convert(folder, tmp_path / "shards", "anymamba", weights="int8", shard_bytes=300_000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    whole, parts = (
        InferenceModel.from_pretrained(tmp_path / "whole"),
        InferenceModel.from_pretrained(tmp_path / "shards"),
    )
    assert torch.equal(whole(IDS).logits, parts(IDS).logits) and whole.weight_formats == parts.weight_formats
    assert torch.equal(
        load_pretrained(tmp_path / "shards")(IDS).logits, load_pretrained(tmp_path / "whole")(IDS).logits
    )


def test_another_choice_than_the_stored_one(tmp_path, folder):
    """Packed again from the stored numbers; the same choice keeps the bytes."""
    convert(folder, tmp_path / "x", "anymamba", weights="int4")
    assert set(InferenceModel.from_pretrained(tmp_path / "x", "float32").weight_formats.values()) == {"float32"}
    same = InferenceModel.from_pretrained(tmp_path / "x", "int4").packed_weights()
    for name, weight in InferenceModel.from_pretrained(tmp_path / "x").packed_weights().items():
        assert torch.equal(same[name].data, weight.data)
    with pytest.raises(ValueError, match="weights must be one of float32, bfloat16, int8, int4, got 'q9'"):
        InferenceModel.from_pretrained(tmp_path / "x", "q9")  # type: ignore[arg-type]


def test_blocks_are_kept_where_they_can_be(tmp_path, folder):
    convert(folder, tmp_path / "x.gguf", "gguf", dtype="q4_k")
    convert(tmp_path / "x.gguf", tmp_path / "y", "anymamba")
    convert(tmp_path / "y", tmp_path / "z.gguf", "gguf")
    with pytest.warns(CheckpointWarning, match="blocks become float32 in hf; anymamba and gguf keep blocks"):
        convert(tmp_path / "x.gguf", tmp_path / "hf", "hf")
    wanted = InferenceModel.from_pretrained(tmp_path / "x.gguf").packed_weights()
    for name in ("y", "z.gguf"):
        found = InferenceModel.from_pretrained(tmp_path / name).packed_weights()
        assert {key: weight.format for key, weight in found.items()} == {k: w.format for k, w in wanted.items()}
        assert all(torch.equal(found[key].data, weight.data) for key, weight in wanted.items())
    plain = InferenceModel.from_pretrained(tmp_path / "hf").packed_weights()
    assert {weight.format for weight in plain.values()} == {"float32"}
    assert all(torch.equal(unpack(plain[key]), unpack(weight)) for key, weight in wanted.items())


def test_a_checkpoint_of_a_run(tmp_path):
    (tmp_path / "a.txt").write_text("some words, and some more words " * 20)
    data = DataConfig(paths=(str(tmp_path / "a.txt"),), held_out_fraction=0, cache_dir=str(tmp_path / "cache"))
    model = ModelConfig(d_model=32, n_layers=1, vocab_size=257)
    train(TrainConfig(data=data, model=model, steps=1, batch_size=1, context=8, threads=1, log=()), tmp_path / "run")
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    for weights in (None, "int8"):
        packed = InferenceModel.from_pretrained(checkpoint, weights)
        assert torch.equal(
            packed(IDS).logits, load_pretrained(checkpoint).for_inference(weights or "float32")(IDS).logits
        )


def test_norms_of_a_narrow_file_keep_their_digits(tmp_path, moved):
    """What llama.cpp's converter writes in BF16 has norms in F32; reading them through bfloat16 would round them."""
    model = moved(WIDE)
    model.save_pretrained(tmp_path / "x.gguf", format="gguf")
    writer = gguf.GGUFWriter(tmp_path / "y.gguf", "mamba")
    for key, entry in gguf.GGUFReader(tmp_path / "x.gguf").fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, entry.contents(), entry.types[0])
    for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        narrow = tensor.name.endswith(("embd.weight", "in.weight", "out.weight"))
        kind = gguf.GGMLQuantizationType.BF16
        data = gguf.quants.quantize(tensor.data, kind) if narrow else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=kind if narrow else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    packed = InferenceModel.from_pretrained(tmp_path / "y.gguf", verify=False)
    assert torch.equal(packed.norm.weight, model.norm.weight)
    assert packed.weight_formats["blocks.0.mixer.in_proj.weight"] == "bfloat16"
    assert packed.weight_formats["blocks.0.mixer.x_proj.weight"] == "float32"


# ------------------------------------------------------------------------------------------ bad input


def test_what_does_not_go_together(tmp_path, folder):
    for options, message in (
        ({"to": "hf", "dtype": "q8_0"}, r"dtype q8_0 is for gguf, not for hf; .* weights int8 or int4"),
        ({"to": "gguf", "dtype": "q5_k"}, r"one of q8_0, q4_0, q4_k, q6_k, got 'q5_k'"),
        ({"to": "gguf", "dtype": "q8_0", "weights": "int8"}, r"both choose the format of the weights; give one"),
        ({"to": "anymamba", "weights": "bfloat16"}, r"weights must be int8 or int4, got 'bfloat16'"),
        ({"to": "state-spaces", "weights": "int8"}, r"are for hf, anymamba and gguf, not for state-spaces"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding.weight": "q9"}, r"embedding\.weight is in 'q9'; .* write the model again with anymamba convert"),
        ({"norm.weight": "q8_0"}, r"norm\.weight must be rows of q8_0 blocks, .* got \(256,\) in F32"),
        ({"embedding.weight": "q6_k"}, r"embedding\.weight must be rows of q6_k blocks"),
    ],
)
def test_a_table_that_does_not_fit(tmp_path, folder, change, message):
    convert(folder, tmp_path / "x", "anymamba", weights="int8")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config["weight_formats"] |= change
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    for load in (load_pretrained, InferenceModel.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "x", verify=False)


def test_bytes_without_their_table(tmp_path, folder):
    convert(folder, tmp_path / "x", "anymamba", weights="int8")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "weight_formats"}))
    with pytest.raises(CheckpointError, match="must be floating point, got U8"):
        InferenceModel.from_pretrained(tmp_path / "x", verify=False)


def test_a_truncated_file(tmp_path, folder):
    convert(folder, tmp_path / "x.gguf", "gguf", dtype="q4_k")
    data = (tmp_path / "x.gguf").read_bytes()
    for size in (len(data) // 3, len(data) - 40):
        (tmp_path / "x.gguf").write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"x\.gguf: .*(truncated|ends beyond the file)"):
            InferenceModel.from_pretrained(tmp_path / "x.gguf")


# ------------------------------------------------------------------------------------------ llama.cpp


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BLOCK_FORMATS)
def test_llama_cpp_reads_our_blocks(tmp_path, moved, dtype):
    """The logits of a text agree with those of the numbers in the file, as far as its int8 activations allow."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="make test-all installs llama-cpp-python")
    config = replace(WIDE, n_layers=2, vocab_size=257)
    save_pretrained(moved(config), tmp_path / "m", ByteTokenizer())
    convert(tmp_path / "m", tmp_path / "x.gguf", "gguf", dtype=dtype)
    theirs = llama_cpp.Llama(str(tmp_path / "x.gguf"), n_ctx=64, verbose=False, n_threads=1, logits_all=True)
    ids = IDS[0].tolist()
    theirs.eval(ids)
    there = torch.from_numpy(theirs.scores[: len(ids)].copy())[:, :257]
    with torch.no_grad():
        here = load_pretrained(tmp_path / "x.gguf")(IDS).logits[0, :, :257]
    assert (there - here).pow(2).mean().sqrt() < 0.08 * here.std()
