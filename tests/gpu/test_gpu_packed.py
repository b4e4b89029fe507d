"""Packed weights on a GPU: products and weights, whole models, speculation, and what bench measures.

python -m pytest tests/gpu
"""

from __future__ import annotations

import pytest
import torch

from anymamba import generate, stream
from anymamba.evaluation.inference_speed import measure_limits, measure_speed, speed_limit
from anymamba.generation.sampling import SamplingConfig
from anymamba.generation.speculation import Speculation
from anymamba.generation.speculation.pacing import Pacing
from anymamba.kernels.packed_linear import cuda
from anymamba.models.config import ModelConfig
from anymamba.models.inference import InferenceModel
from anymamba.models.language_model import LanguageModel
from anymamba.ops import dispatch
from anymamba.ops.packed_linear import pack, packed_linear, unpack, unpack_rows
from anymamba.runtimes import nvrtc

if nvrtc.reason():
    pytest.skip(f"the CUDA kernels do not run here: {nvrtc.reason()}", allow_module_level=True)

SHAPES = {"small": (3, 512), "many outputs": (6001, 256), "long rows": (80, 5120), "odd outputs": (777, 1536)}
WRITTEN = [name for name in cuda.BLOCKS if name != "q5_k"]


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16, 17, 200])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", WRITTEN)
def test_products(format, shape, rows):
    torch.manual_seed(0)
    n_out, n_in = SHAPES[shape]
    weight = pack(torch.randn(n_out, n_in, device="cuda"), format)
    x, bias = torch.randn(rows, n_in, device="cuda").bfloat16().float(), torch.randn(n_out, device="cuda")
    exact = unpack(weight).double()
    want, scale = x.double() @ exact.T + bias.double(), x.double().abs() @ exact.abs().T + bias.double().abs()
    dispatch.calls.clear()
    got = packed_linear(x, weight, bias)
    assert {name for _, name, _ in dispatch.calls} == {"cuda"}
    limit = 1e-6 if rows <= 8 else 4e-3  # many or long rows: weights are rounded to bfloat16
    assert ((got - want).abs() / scale).max() < limit
    assert torch.equal(packed_linear(x, weight, bias), got)
    assert ((packed_linear(x.bfloat16(), weight, bias) - want).abs() / scale).max() < limit + 2**-8


@pytest.mark.parametrize("format", WRITTEN)
def test_weights_are_those_of_the_processor(format):
    matrix = torch.randn(33, 512)
    weight = pack(matrix, format)
    there = weight._replace(data=weight.data.cuda())
    assert torch.allclose(unpack(there).cpu(), unpack(weight), rtol=1e-6, atol=1e-6)
    index = torch.tensor([3, 32, 0])
    assert torch.allclose(unpack_rows(there, index.cuda()).cpu(), unpack(weight)[index], rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def plain() -> LanguageModel:
    """A model that likes to say again what it has just said."""
    torch.manual_seed(2)
    model = LanguageModel(ModelConfig(d_model=256, n_layers=4, vocab_size=400))
    with torch.no_grad():
        model.embedding.weight.mul_(30)
    return model


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_reading_is_stepping(plain, weights):
    model, ids = plain.for_inference(weights, device="cuda"), torch.randint(400, (3, 20), device="cuda")
    read, state = model(ids), model.init_state(3)
    assert all(block.native for block in model.report())
    for t in range(20):
        logits, state = model.step(ids[:, t], state, reuse_state=True)
        assert (logits - read.logits[:, t]).norm() < 3e-2 * logits.norm()


def test_a_packed_model_is_saved_and_loaded(plain, tmp_path):
    model = plain.for_inference("int4", device="cuda")
    model.save_pretrained(tmp_path)
    again = InferenceModel.from_pretrained(tmp_path, device="cuda")
    ids = torch.randint(400, (2, 9), device="cuda")
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("kind", ["lookup", "model"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_speculation_gives_the_same_text_but_for_near_ties(plain, weights, kind, monkeypatch):
    monkeypatch.setattr(Pacing, "best", lambda self, chances: len(chances))
    model = plain.for_inference(weights, device="cuda")
    options = {"max_new_tokens": 60, "sampling": SamplingConfig(temperature=0)}
    prompt = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]
    wanted = generate(model, [prompt], **options).ids[0]
    steps = stream(model, [prompt], speculation=Speculation(4, draft=model if kind == "model" else None), **options)
    ids = [step.ids[0] for step in steps]
    report = steps.speculation
    assert report is not None and report.n_passes > 0 and report.n_right > 0
    assert ids == wanted or report.n_near_ties > 0


def test_bench_measures_a_gpu(plain, monkeypatch):
    monkeypatch.setattr("anymamba.evaluation.inference_speed.LEAST_SECONDS", 0.01)
    model = plain.for_inference("int8", device="cuda")
    limits = measure_limits(["q8_0"], torch.device("cuda"))
    assert limits.bytes_per_second > 1e11 and limits.fastest_product.startswith("torch")
    speeds = measure_speed(model, [1, 3], 32)
    assert [s.rows for s in speeds] == [32, 1, 3]
    assert all(0 < s.tokens_per_second < speed_limit(model, limits, s) for s in speeds)
