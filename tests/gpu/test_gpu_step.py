"""The step of a whole model as CUDA graphs, on a GPU: its numbers, states as values, changing rows, prompts.

python -m pytest tests/gpu
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_cuda_step_emulated import OPTIONS, SMALL, random_state

from anymamba import generate
from anymamba.models.config import ModelConfig
from anymamba.models.inference import InferenceModel
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.models.presets import preset
from anymamba.parts.options import MambaOptions
from anymamba.parts.state import concatenate_rows, map_state, select_rows, state_tensors
from anymamba.runtimes import nvrtc

if nvrtc.reason():
    pytest.skip(f"the CUDA kernels do not run here: {nvrtc.reason()}", allow_module_level=True)

WIDE: dict[str, Any] = {"d_model": 256, "n_layers": 3, "vocab_size": 1000}


def model_of(weights: Any, **options: Any) -> InferenceModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(**SMALL | options)).for_inference(weights, device="cuda")


def error(got: Any, want: Any) -> float:
    pairs = [(got.logits, want.logits), *zip(state_tensors(got.state), state_tensors(want.state), strict=True)]
    return max(float((a - b).abs().float().norm() / b.abs().float().norm().clamp(min=1e-6)) for a, b in pairs)


def ids_of(model: InferenceModel, rows: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (rows,), device="cuda")


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 70])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_numbers_are_those_of_the_layers(name, rows):
    model = model_of("float32", **OPTIONS[name])
    assert model.gpu_step is not None and all(block.native for block in model.report())
    ids, state = ids_of(model, rows), random_state(model, rows)
    want = LanguageModel.step(model, ids, state)
    for _ in range(3):  # the first call records the graph
        assert error(model.step(ids, state), want) < 5e-6


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_short_weights(weights, rows):
    model = model_of(weights, **WIDE)
    ids, state = ids_of(model, rows), random_state(model, rows)
    assert error(model.step(ids, state), LanguageModel.step(model, ids, state)) < 2e-2


def test_a_state_is_a_value():
    model = model_of("bfloat16", **WIDE)
    ids, state = ids_of(model, 3), random_state(model, 3)
    first = model.step(ids, state)
    second = model.step(ids, first.state)
    other = model.step(ids_of(model, 3), random_state(model, 3))
    again = model.step(ids, first.state, reuse_state=True)
    assert torch.equal(second.logits, again.logits) and not torch.equal(other.logits, again.logits)
    for a, b, c in zip(*(state_tensors(s) for s in (second.state, again.state, first.state)), strict=True):
        assert torch.equal(a, b) and b.data_ptr() == c.data_ptr()


def test_rows_come_and_go_on_two_streams():
    model = model_of("float32", **WIDE)
    ids = ids_of(model, 5)
    state = model.step(ids, random_state(model, 5)).state
    whole = model.step(ids, state).logits
    rows = torch.tensor([4, 0, 2], device="cuda")
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        fewer = model.step(ids[rows], select_rows(state, rows)).logits
    more = model.step(ids.repeat(20), concatenate_rows([state] * 20)).logits
    torch.cuda.synchronize()
    torch.testing.assert_close(fewer, whole[rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(more, whole.repeat(20, 1), rtol=1e-4, atol=1e-4)


def test_the_same_bits_each_time():
    model = model_of("bfloat16", **WIDE)
    ids, state = ids_of(model, 4), random_state(model, 4)
    first = model.step(ids, state)
    for _ in range(200):
        assert torch.equal(model.step(ids, state).logits, first.logits)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_prompt_and_steps_agree(weights):
    """In bfloat16 within what rounding of activations costs."""
    model = model_of(weights, **WIDE)
    ids = torch.randint(1000, (2, 70), device="cuda")
    whole, state = model(ids)
    assert whole.dtype == torch.float32 and whole.isfinite().all()
    _, before = model(ids[:, :-5])
    for t in range(65, 70):
        logits, before = model.step(ids[:, t], before, reuse_state=True)
    size = float(whole[:, -1].norm())
    assert float((logits - whole[:, -1]).norm()) < (1e-4 if weights == "float32" else 3e-2) * size
    assert isinstance(state, LanguageModelState)


def test_generation_takes_graphs():
    model = model_of("float32", **WIDE)
    assert generate(model, [[1, 2, 3], [4, 5]], max_new_tokens=20, seed=1).ids
    assert model.gpu_step is not None and model.gpu_step.recorded == [2]


def test_a_hybrid_with_a_cache_runs_block_by_block():
    model = model_of("bfloat16", **WIDE | {"attention_layers": (1,), "n_layers": 3})
    assert model.gpu_step is None
    assert "Attention" in model.report()[1].reason
    logits, _ = model.step(ids_of(model, 2), model.init_state(2))
    assert logits.isfinite().all()


@pytest.mark.parametrize("mixer", ["s4d", "h3-s4d", "retention", "linear-attention", "gau", "rwkv", "mlp", "mamba-s4d"])
def test_other_mixers_are_recorded_block_by_block(mixer):
    model = model_of("bfloat16", **WIDE | {"mixers": ("mamba", mixer)})
    if model.grows:
        pytest.skip(f"the state of {mixer} grows")
    ids, state = ids_of(model, 3), random_state(model, 3)
    want = LanguageModel.step(model, ids, state)
    for _ in range(3):
        assert error(model.step(ids, state), want) < 1e-4
    assert model.report()[0].reason.endswith("the step is recorded as a graph, block by block"), model.report()


def test_falcon_mamba_and_large_shapes_fit():
    options = {"d_model": 4096, "n_layers": 1, "mamba": MambaOptions(inner_norms=True, inner_norm_weights=False)}
    model = model_of("bfloat16", **options, vocab_size=64)
    for rows in (1, 8):
        ids, state = ids_of(model, rows), random_state(model, rows)
        assert error(model.step(ids, state), LanguageModel.step(model, ids, state)) < 2e-2


def test_a_published_shape_in_float32():
    model = InferenceModel.random(preset("mamba-130m"), "float32", device="cuda")
    ids, state = ids_of(model, 1), map_state(torch.randn_like, model.init_state(1))
    assert error(model.step(ids, state), LanguageModel.step(model, ids, state)) < 1e-4
