"""GGUF files: round trips, what they cannot hold, broken and hostile headers, the tokenizer inside, llama.cpp."""

from __future__ import annotations

import struct
import sys

import pytest
import torch

from anymamba import MambaOptions, ModelConfig
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.models.checkpoints import CheckpointError, convert, load_pretrained, model_tokenizer, open_checkpoint

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' installs gguf")

PLAIN = ModelConfig(d_model=32, n_layers=2, vocab_size=257)
ODD = ModelConfig(
    d_model=24,
    n_layers=2,
    vocab_size=29,
    pad_vocab_multiple=1,
    tie_embeddings=False,
    norm_eps=1e-3,
    mamba=MambaOptions(d_state=8, d_conv=3, dt_rank=5),
)
FALCON = ModelConfig(
    d_model=16,
    n_layers=2,
    vocab_size=29,
    tie_embeddings=False,
    mamba=MambaOptions(inner_norms=True, inner_norm_weights=False, norm_eps=1e-5),
)
CONFIGS = {"plain": PLAIN, "odd": ODD, "falcon": FALCON}


def ulps(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest distance of exp(a) and exp(b) in units in the last place of exp(a) in float32."""
    want = a.double().exp()
    unit = torch.nextafter(want.float(), torch.tensor(torch.inf)).double() - want.float().double()
    return ((want - b.double().exp()).abs() / unit).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(tmp_path, moved, name, dtype):
    """Every tensor is bit-identical, except A_log, which is within one ulp of exp(A_log)."""
    model = moved(CONFIGS[name], dtype)
    model.save_pretrained(tmp_path / "x.gguf", format="gguf")
    loaded = load_pretrained(tmp_path / "x.gguf")
    assert loaded.config == model.config
    for (key, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert a.dtype == b.dtype
        if key.endswith("A_log"):
            assert ulps(a.detach(), b.detach()) <= 1, key
        else:
            assert torch.equal(a, b), key


def test_A_log_over_its_whole_range(tmp_path, moved):
    model = moved(ModelConfig(d_model=64, n_layers=1, vocab_size=8))
    with torch.no_grad():
        model.blocks[0].mixer.ssm.A_log.uniform_(-8, 8)
    model.save_pretrained(tmp_path, format="gguf")
    again = load_pretrained(tmp_path).blocks[0].mixer.ssm.A_log
    assert (
        ulps(model.blocks[0].mixer.ssm.A_log.detach(), again.detach()) <= 4
    )  # half a unit of A_log = 8 is 4 of exp(8)
    near = model.blocks[0].mixer.ssm.A_log.detach().clamp(-3, 3)  # what trained models have: A between -0.05 and -20
    with torch.no_grad():
        model.blocks[0].mixer.ssm.A_log.copy_(near)
    model.save_pretrained(tmp_path, format="gguf")
    assert ulps(near, load_pretrained(tmp_path).blocks[0].mixer.ssm.A_log.detach()) <= 1


def test_q8_0(tmp_path, moved):
    """Each block of 32 within half a step of its largest entry / 127; rows that are not a multiple of 32 are BF16."""
    model = moved(PLAIN)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "q8.gguf", "gguf", dtype="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "q8.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.0.ssm_dt.weight"] == "BF16"
    assert {kinds[k] for k in ("blk.0.ssm_conv1d.weight", "blk.0.ssm_a", "blk.0.attn_norm.weight")} == {"F32"}
    loaded = load_pretrained(tmp_path / "q8.gguf")
    want, got = model.embedding.weight.view(-1, 32), loaded.embedding.weight.view(-1, 32)
    step = want.abs().amax(1, keepdim=True) / 127
    assert ((want - got).abs() <= 0.51 * step + want.abs() * 2**-10).all()
    ids = torch.randint(257, (1, 40))
    with torch.no_grad():
        assert (model(ids).logits - loaded(ids).logits).abs().max() < 0.1 * model(ids).logits.std()


def test_fields_and_names_are_those_that_llama_cpp_reads(tmp_path, moved):
    moved(FALCON).save_pretrained(tmp_path, format="gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    value = {key: reader.get_field(key).contents() for key in reader.fields if not key.startswith("GGUF.")}
    assert value["general.architecture"] == "mamba"
    assert [value[f"mamba.{k}"] for k in ("block_count", "embedding_length", "attention.head_count")] == [2, 16, 0]
    names = ("conv_kernel", "inner_size", "state_size", "time_step_rank", "dt_b_c_rms")
    assert [value[f"mamba.ssm.{k}"] for k in names] == [4, 32, 16, 1, True]
    shapes = {t.name: tuple(t.shape) for t in reader.tensors}  # the fastest dimension first
    assert shapes["blk.1.ssm_conv1d.weight"] == (4, 32) and shapes["blk.1.ssm_a"] == (16, 32)
    assert {"token_embd.weight", "output_norm.weight", "output.weight", "blk.0.ssm_dt.bias", "blk.0.ssm_d"} <= set(
        shapes
    )


def test_without_our_table(tmp_path, moved):
    """What llama.cpp's converter writes: the sizes come from the fields; a tied head may be stored a second time."""
    model = moved(PLAIN)
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "mamba")
    for key, value in {
        "embedding_length": 32, "block_count": 2, "ssm.conv_kernel": 4, "ssm.inner_size": 64, "ssm.state_size": 16,
        "ssm.time_step_rank": 2,
    }.items():  # fmt: skip
        writer.add_uint32(f"mamba.{key}", value)
    writer.add_float32("mamba.attention.layer_norm_rms_epsilon", 1e-5)
    model.save_pretrained(tmp_path / "ours.gguf", format="gguf")
    for tensor in gguf.GGUFReader(tmp_path / "ours.gguf").tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_pretrained(tmp_path / "theirs.gguf")
    assert loaded.config.norm_eps == 1e-5 and loaded.config.tie_embeddings and loaded.config.vocab_size == 264
    ids = torch.randint(257, (1, 9))
    with torch.no_grad():
        assert (loaded(ids).logits - model(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("option", "mamba", "top"),
    [
        ("b_discretization='zoh'", {"b_discretization": "zoh"}, {}),
        ("selective_delta=False", {"selective_delta": False}, {}),
        ("complex A", {"A_init": "s4d-lin"}, {}),
        ("inner_norms=True .with weights", {"inner_norms": True}, {}),
        ("mamba.norm_eps=1e-06 with norm_eps=1e-05", {"inner_norms": True, "inner_norm_weights": False}, {}),
        ("output_norm='layernorm'", {"output_norm": "layernorm"}, {}),
        ("norm='layernorm'", {}, {"norm": "layernorm"}),
        ("expand=3", {"expand": 3}, {}),
        ("bias=True", {"bias": True}, {}),
        ("conv_bias=False", {"conv_bias": False}, {}),
    ],
)
def test_what_it_cannot_hold_is_refused_by_name(tmp_path, moved, option, mamba, top):
    model = moved(ModelConfig(d_model=8, n_layers=1, vocab_size=8, mamba=MambaOptions(**mamba), **top))
    with pytest.raises(CheckpointError, match=option):
        model.save_pretrained(tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_float64_is_refused(tmp_path, moved):
    model = moved(ModelConfig(d_model=8, n_layers=1, vocab_size=8), torch.float64)
    with pytest.raises(CheckpointError, match=r"cannot hold torch\.float64; take float32"):
        model.save_pretrained(tmp_path, format="gguf")


# ------------------------------------------------------------------------------------------ tokenizers


def test_bytes_are_inside(tmp_path, moved):
    moved(PLAIN).save_pretrained(tmp_path / "x.gguf", ByteTokenizer(), format="gguf")
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    assert checkpoint.token_ids == {"eos_token_id": 256}
    convert(tmp_path / "x.gguf", tmp_path / "hf", "hf")
    from anymamba.data.tokenizer import load_tokenizer

    assert isinstance(load_tokenizer(tmp_path / "hf"), ByteTokenizer)


def test_a_folder_of_several_files(tmp_path, moved):
    for name in ("a", "b"):
        moved(ModelConfig(d_model=8, n_layers=1, vocab_size=8)).save_pretrained(
            tmp_path / f"{name}.gguf", format="gguf"
        )
    for read in (load_pretrained, model_tokenizer):
        with pytest.raises(
            FileNotFoundError, match=r"has several GGUF files \(a\.gguf, b\.gguf\); give the path of one"
        ):
            read(tmp_path)
    (tmp_path / "b.gguf").unlink()
    assert load_pretrained(tmp_path).config.d_model == 8


# ------------------------------------------------------------------------------------------ broken files


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    from tests.models.conftest import build_moved

    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    build_moved(ModelConfig(d_model=8, n_layers=1, vocab_size=8)).save_pretrained(path, format="gguf")
    return path.read_bytes()


def header(n_tensors: int, n_keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


HOSTILE = {
    "empty": (b"", "the header claims 4 bytes where 0 are left"),
    "another file": (b"PK\x03\x04" + bytes(64), "is not a GGUF file: it does not begin with b'GGUF'"),
    "version": (header(0, 0, version=9), "is of GGUF version 9"),
    "many keys": (header(0, 2**60), "the header claims 1,152,921,504,606,846,976 keys"),
    "many tensors": (header(2**60, 0), "the header claims 1,152,921,504,606,846,976 tensors"),
    "a long name": (
        header(0, 1, struct.pack("<Q", 2**50) + bytes(64)),
        "metadata key 0 claims 1,125,899,906,842,624 bytes",
    ),
    "a long array": (
        header(0, 1, text("k") + struct.pack("<IIQ", 9, 0, 2**40) + bytes(64)),
        "metadata key 'k' claims 1,099,511,627,776 entries",
    ),
    "an array of arrays": (
        header(0, 1, text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64)),
        "'k' is an array of type 9",
    ),
    "an unknown type": (header(0, 1, text("k") + struct.pack("<I", 99) + bytes(64)), "metadata key 'k' is of type 99"),
    "dimensions": (
        header(1, 0, text("t") + struct.pack("<I", 2**31) + bytes(64)),
        "tensor 't' has 2147483648 dimensions",
    ),
    "terabytes": (
        header(1, 0, text("t") + struct.pack("<IQQIQ", 2, 2**30, 2**30, 0, 0) + bytes(64)),
        "tensor 't' ends beyond the file",
    ),
    "a type of tensor": (
        header(1, 0, text("t") + struct.pack("<IQIQ", 1, 4, 77, 0) + bytes(64)),
        "tensor 't' is of type 77",
    ),
    "a name that goes on": (
        header(1, 0, text("t" * 5000) + struct.pack("<I", 2**31) + bytes(64)),
        r"tensor 't{92}\.\.\. has 2147483648 dimensions",
    ),
    "another architecture": (
        header(0, 1, text("general.architecture") + struct.pack("<I", 8) + text("llama")),
        "is of architecture 'llama'; this reader takes 'mamba'",
    ),
    "no sizes": (
        header(0, 1, text("general.architecture") + struct.pack("<I", 8) + text("mamba")),
        r"lacks the metadata key mamba\.embedding_length",
    ),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers(tmp_path, data, message):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(tmp_path / "x.gguf")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def published(data: bytes) -> bytes:
    """A file without a digest: with other keys in its place."""
    assert data.count(b"anymamba.digest") == 2
    return data.replace(b"anymamba.digest", b"another.program")


def infos(data: bytes) -> dict[str, int]:
    """Where the number of dimensions, which the name precedes, stands in each tensor info."""
    names = [t.encode() for t in ("token_embd.weight", "blk.0.ssm_a", "blk.0.attn_norm.weight", "output_norm.weight")]
    return {name.decode(): data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) for name in names}


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.ssm_a", "blk.0.attn_norm.weight", "output_norm.weight"])
def test_every_change_of_a_tensors_place_is_refused(tmp_path, moved, name):
    """Alignment, overlap, order, bounds, type and shape, where no digest tells."""
    path = tmp_path / "x.gguf"
    moved(ModelConfig(d_model=32, n_layers=1, vocab_size=8)).save_pretrained(path, format="gguf")
    data = bytearray(published(path.read_bytes()))
    path.write_bytes(data)
    load_pretrained(path)
    start = infos(data)[name]
    (n_dims,) = struct.unpack_from("<I", data, start)
    kind = start + 4 + 8 * n_dims
    (offset,) = struct.unpack_from("<Q", data, kind + 4)
    changes = [(kind + 4, "Q", other) for other in (0, 1, 16, offset - 32, offset + 1, offset + 32, 2**62, 2**64 - 32)]
    changes += [(start + 4 + 8 * i, "Q", size) for i in range(n_dims) for size in (0, 1, 3, 7, 9, 1000, 2**61)]
    changes += [(kind, "I", other) for other in (1, 8, 30, 24, 77)] + [(start, "I", other) for other in (0, 3, 5)]
    for place, code, value in changes:
        if value < 0 or struct.unpack_from(f"<{code}", data, place) == (value,):
            continue
        broken = bytearray(data)
        struct.pack_into(f"<{code}", broken, place, value)
        path.write_bytes(broken)
        with pytest.raises(CheckpointError) as caught:
            load_pretrained(path)
        assert "\n" not in str(caught.value), (place, code, value)


@pytest.mark.parametrize("alignment", [0, 3, 16, 64, 2**31])
def test_alignment(tmp_path, alignment):
    """One that is a power of 2 moves the data; then the file is not as long as its tensors say."""
    data = header(1, 1, text("general.alignment") + struct.pack("<II", 4, alignment))
    data += text("t") + struct.pack("<IQIQ", 1, 4, 0, 0)
    (tmp_path / "x.gguf").write_bytes(data + bytes(-len(data) % 32 + 16))
    words = (
        "general.alignment must be a power of 2"
        if alignment in (0, 3)
        else "beyond the file|is the last one|is of architecture"
    )
    with pytest.raises(CheckpointError, match=words):
        load_pretrained(tmp_path / "x.gguf")


def test_the_digest_tells_every_other_change(tmp_path, good):
    """In the data, the names and the metadata."""
    path = tmp_path / "x.gguf"
    for place in range(100, len(good), 997):
        broken = bytearray(good)
        broken[place] ^= 4
        path.write_bytes(broken)
        with pytest.raises(CheckpointError):
            load_pretrained(path)
    load_pretrained(path, verify=False)  # the last change is one of a weight


def test_reading_needs_no_package(tmp_path, good, monkeypatch):
    path = tmp_path / "x.gguf"
    path.write_bytes(good)
    model = load_pretrained(path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert model_tokenizer(path) is None and torch.equal(load_pretrained(path).norm.weight, model.norm.weight)
    with pytest.raises(ImportError, match=r'writing GGUF files needs the package gguf: pip install "anymamba\[gguf\]"'):
        model.save_pretrained(tmp_path / "y.gguf", format="gguf")
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".gguf"] == ["x.gguf"]


def test_llama_cpps_tools_keep_the_digest_and_write_other_bytes(tmp_path, good):
    """As llama-quantize does: our metadata are copied, the tensors are not."""
    (tmp_path / "x.gguf").write_bytes(good)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    writer = gguf.GGUFWriter(tmp_path / "y.gguf", "mamba")
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, entry.contents(), entry.types[0])
    for tensor in reader.tensors:
        half = tensor.name.endswith("proj.weight")
        writer.add_tensor(tensor.name, tensor.data.astype("float16") if half else tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert load_pretrained(tmp_path / "y.gguf").config == load_pretrained(tmp_path / "x.gguf").config


def test_truncated_anywhere(tmp_path, good):
    path = tmp_path / "x.gguf"
    for size in (*range(0, 200, 7), *range(200, len(good), 997), len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(CheckpointError):
            load_pretrained(path)


def test_a_positive_A(tmp_path, moved):
    model = moved(ModelConfig(d_model=8, n_layers=1, vocab_size=8))
    model.save_pretrained(tmp_path, format="gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf", "r+")
    next(t for t in reader.tensors if t.name == "blk.0.ssm_a").data[3] = 1.0
    del reader
    with pytest.raises(CheckpointError, match=r"blk\.0\.ssm_a must be -exp\(A_log\), below 0; got up to 1"):
        load_pretrained(tmp_path, verify=False)


def test_other_quantizations_are_refused_by_name(tmp_path, good, moved):
    moved(PLAIN).save_pretrained(tmp_path / "x.gguf", format="gguf")
    writer = gguf.GGUFWriter(tmp_path / "q4.gguf", "mamba")
    for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        if tensor.name == "token_embd.weight":
            data = gguf.quants.quantize(tensor.data, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(tensor.name, data, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    for key in ("embedding_length", "block_count", "ssm.conv_kernel", "ssm.inner_size", "ssm.state_size"):
        writer.add_uint32(f"mamba.{key}", 2)
    writer.add_float32("mamba.attention.layer_norm_rms_epsilon", 1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    known = "F32, F16, BF16, Q8_0, Q4_0, Q4_K, Q5_K, Q6_K"
    with pytest.raises(
        CheckpointError, match=rf"embd\.weight is of type Q4_1; {known} can be read: write it again with"
    ):
        load_pretrained(tmp_path / "q4.gguf")


# ------------------------------------------------------------------------------------------ llama.cpp


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_generates_the_same_tokens(tmp_path, moved, name):
    """llama-cpp-python is compiled when it is installed, by make test-all."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="make test-all installs llama-cpp-python")
    config = CONFIGS[name]
    model = moved(config)
    with torch.no_grad():  # large mixers: with a tied head and small ones the last token would repeat for ever
        for block in model.blocks:
            block.mixer.out_proj.weight.mul_(12)
    tokenizer = ByteTokenizer() if config.vocab_size == 257 else None
    seen = set()
    model.save_pretrained(tmp_path / "x.gguf", tokenizer, format="gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "x.gguf"), n_ctx=512, verbose=False, n_threads=1)
    for prompt in ([1, 2, 3, 4, 5], [7]):
        theirs.reset()
        there = [
            token for token, _ in zip(theirs.generate(prompt, temp=0.0, repeat_penalty=1.0), range(128), strict=False)
        ]
        with torch.no_grad():
            logits, state = model(torch.tensor([prompt]), num_last_logits=1)
            here = [logits[0, -1].argmax().item()]
            while len(here) < 128:
                logits, state = model.step(torch.tensor(here[-1:]), state)
                here.append(logits[0].argmax().item())
        assert here == there
        seen.update(here)
    assert len(seen) > 3, seen
