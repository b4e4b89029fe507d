"""The kernels of the step of a whole model, run on the processor: every option of the model, and any number of rows."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulation import emulate

from anymamba import backend
from anymamba.kernels.model_step import cuda as kernels
from anymamba.kernels.model_step.cuda import call as calls
from anymamba.models.config import ModelConfig
from anymamba.models.inference import InferenceModel, gpu_step
from anymamba.models.inference.captured_step import CapturedStep
from anymamba.models.inference.gpu_step import GpuStep
from anymamba.models.inference.gpu_weights import obstacles, require_bfloat16
from anymamba.models.inference.graphs import Graphs, bucket_of
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.parts.options import MambaOptions
from anymamba.parts.state import concatenate_rows, map_state, select_rows, state_tensors
from anymamba.runtimes import nvrtc

if emulate.missing():
    pytest.skip(f"kernels cannot be emulated: {emulate.missing()}", allow_module_level=True)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate.patch(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


SMALL: dict[str, Any] = {"vocab_size": 37, "d_model": 24, "n_layers": 2}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd sizes": {"d_model": 20, "mamba": MambaOptions(d_state=5, d_conv=3, dt_rank=3)},
    "biases and an untied head": {"mamba": MambaOptions(bias=True), "tie_embeddings": False},
    "layer norms": {"norm": "layernorm", "mamba": MambaOptions(output_norm="layernorm")},
    "inner norms": {"mamba": MambaOptions(inner_norms=True, output_norm="rmsnorm")},
    "zero-order hold": {"mamba": MambaOptions(b_discretization="zoh", conv_bias=False)},
    "constant B": {"mamba": MambaOptions(selective_B=False)},
    "nothing selective": {"mamba": MambaOptions(selective_delta=False, selective_B=False, selective_C=False, d_conv=1)},
    "wide": {"d_model": 520, "n_layers": 1, "mamba": MambaOptions(d_state=40)},
}


def model_of(weights: Any = "float32", **options: Any) -> InferenceModel:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**SMALL | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight", ".D")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.for_inference(weights)


def random_state(model: InferenceModel, rows: int) -> LanguageModelState:
    return map_state(lambda t: torch.randn_like(t) if t.is_floating_point() else t, model.init_state(rows))


def check(model: InferenceModel, rows: int, tolerance: float) -> None:
    ids, state = torch.randint(model.config.vocab_size, (rows,)), random_state(model, rows)
    got = GpuStep(model).step(ids, state)
    with backend("reference"):  # the compiled products round activations to blocks of integers
        want = LanguageModel.step(model, ids, state)
    pairs = [(got.logits, want.logits), *zip(state_tensors(got.state), state_tensors(want.state), strict=True)]
    errors = [float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in pairs]
    assert max(errors, default=0) < tolerance, errors


CASES = [("plain", 1), ("inner norms", 3), ("odd sizes", 9), ("constant B", 9)]
"""With these every branch of the kernels runs; the rest is slow, because a compiler runs for every size."""
MORE = [("odd sizes", 1), *((name, rows) for name in OPTIONS for rows in (3, 9))]


@pytest.mark.parametrize(("name", "rows"), CASES)
def test_the_numbers_are_those_of_the_layers(name, rows):
    check(model_of(**OPTIONS[name]), rows, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows"), [case for case in MORE if case not in CASES])
def test_more_numbers_are_those_of_the_layers(name, rows):
    check(model_of(**OPTIONS[name]), rows, 2e-6)


@pytest.mark.parametrize("rows", [1, 16])
def test_bfloat16_weights(rows):
    check(model_of("bfloat16"), rows, 1e-2)


@pytest.mark.parametrize(("rank", "rows"), [(8, 9), (40, 70), (136, 20)])
def test_many_rows_multiply_by_dt_proj_in_the_recurrence(rank, rows, monkeypatch):
    """Blocks of several rows and of fewer at the end, and weights of more columns than a lane loads at once."""
    model = model_of("bfloat16", d_model=40, n_layers=1, mamba=MambaOptions(dt_rank=rank))
    monkeypatch.setattr(model.blocks[0].mixer.dt_proj, "forward", None)
    ids, state = torch.randint(37, (rows,)), random_state(model, rows)
    got = GpuStep(model).step(ids, state)
    monkeypatch.undo()
    want = LanguageModel.step(model, ids, state)
    for a, b in zip((got.logits, *state_tensors(got.state)), (want.logits, *state_tensors(want.state)), strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-2


Outcome = tuple[torch.Tensor, torch.Tensor]


def recurrence_of_rows(rows: int, d_state: int, delta: torch.Tensor | None) -> tuple[Outcome, Outcome]:
    """y and the states of the first `rows` of the same 70 rows by the kernel, which multiplies by dt_proj if delta is
    None, and by the formula."""
    torch.manual_seed(0)
    d_inner, rank = 72, 40
    ssm, u, z = torch.randn(1, 70, d_inner, d_state), torch.randn(70, d_inner), torch.randn(70, d_inner)
    dt, B, C = torch.randn(70, rank), torch.randn(70, d_state), torch.randn(70, d_state)
    matrix = kernels.Matrix(torch.randn(d_inner, rank).bfloat16(), None, rank)
    A, D, bias = -torch.rand(d_inner, d_state), torch.randn(d_inner), torch.randn(d_inner)
    weights = kernels.Recurrence(matrix, A, D, bias, B=None, C=None, zoh=False, norms=None, eps=0.0)
    record, residual, new = kernels.new_record(ssm.device), torch.zeros(rows, 8), torch.zeros(1, rows, d_inner, d_state)
    old = ssm[:, :rows].contiguous()
    ids = torch.zeros(rows, dtype=torch.int64)
    kernels.Start(record, None, residual)(ids, (0, old.data_ptr()), (0, new.data_ptr()), None)
    u, z, dt, B, C = (t[:rows].bfloat16() for t in (u, z, dt, B, C))
    y = torch.zeros_like(u)
    given = None if delta is None else delta[:rows]
    kernels.recur_rows(record, 0, weights, u, z, dt if delta is None else None, given, B, C, y)
    u, z, dt, B, C = (t.float() for t in (u, z, dt, B, C))
    step = F.softplus((dt @ matrix.weight.float().T if given is None else given.float()) + bias)
    h = torch.exp(step[..., None] * A) * old[0] + (step * u)[..., None] * B[:, None]
    return (y, new[0]), (((h * C[:, None]).sum(-1) + D * u) * F.silu(z), h)


@pytest.mark.parametrize("d_state", [4, 16, 128])
def test_a_row_of_the_recurrence_has_the_same_bits_in_any_batch(d_state):
    """Rows share threads, two, four or eight of them by the size of the batch."""
    delta = None if d_state > 4 else torch.randn(70, 72).bfloat16()
    all_rows, (y, h) = recurrence_of_rows(70, d_state, delta)
    torch.testing.assert_close(all_rows[1], h, rtol=1e-4, atol=1e-4)
    assert float((all_rows[0] - y).norm() / y.norm()) < 4e-3  # it is rounded to bfloat16
    for rows in (3, 40):
        for got, want in zip(recurrence_of_rows(rows, d_state, delta)[0], all_rows, strict=True):
            assert torch.equal(got, want[:rows])


def test_the_recurrence_takes_as_many_rows_a_thread_as_keep_the_gpu_full():
    taken = [calls.rows_of_recurrence(rows, 128, d_state, 132) for d_state in (16, 128) for rows in (9, 24, 64, 256)]
    assert taken == [2, 4, 8, 8, 2, 4, 4, 4]


@pytest.mark.parametrize(("weights", "rows"), [("int8", 1), ("int4", 3)])
def test_weights_in_blocks_take_the_kernels_for_few_rows(weights, rows, monkeypatch):
    model = model_of(weights, d_model=256, n_layers=1, mamba=MambaOptions(output_norm="rmsnorm", bias=True))
    monkeypatch.setattr(gpu_step, "_ManyRows", None)
    check(model, rows, 1e-2)


def test_norms_with_a_bias_take_the_kernels_for_many_rows_before_weights_in_blocks(monkeypatch):
    model = model_of("int8", d_model=256, n_layers=1, norm="layernorm", mamba=MambaOptions(expand=1))
    monkeypatch.setattr(gpu_step, "_FusedStep", None)
    check(model, 1, 2e-2)


def test_a_step_leaves_the_state_that_it_was_given():
    model = model_of()
    step, ids, state = GpuStep(model), torch.tensor([3, 4, 5]), random_state(model, 3)
    old = map_state(torch.clone, state)
    first = step.step(ids, state)
    second = step.step(ids, first.state)
    again = step.step(ids, first.state, reuse=True)
    assert all(torch.equal(a, b) for a, b in zip(state_tensors(state), state_tensors(old), strict=True))
    assert torch.equal(second.logits, again.logits)
    for a, b, c in zip(*(state_tensors(s) for s in (second.state, again.state, first.state)), strict=True):
        assert torch.equal(a, b)
        assert b.data_ptr() == c.data_ptr() and a.data_ptr() != b.data_ptr()


def test_rows_come_and_go():
    """A row has the same logits whatever the number of rows, also after rows were selected and joined."""
    model = model_of()
    step, ids = GpuStep(model), torch.tensor([1, 2, 3])
    state = step.step(ids, random_state(model, 3)).state
    whole = step.step(ids, state).logits
    rows = torch.tensor([2, 0])
    fewer = step.step(ids[rows], select_rows(state, rows)).logits
    more = step.step(ids.repeat(2), concatenate_rows([state, state])).logits
    torch.testing.assert_close(fewer, whole[rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(more, whole.repeat(2, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("d_model", "width"), [(24, 4), (21, 1)])
def test_the_convolution_of_many_rows_shares_a_thread_between_rows_and_channels(d_model, width, monkeypatch):
    """The last thread has one row of two, and channels that are no multiple of four have a thread each."""
    calls, logits, widths = gpu_step.kernels.calls, [], set()
    for rows_of_thread in (1, 2):

        def chosen(*sizes: int, rows: int = rows_of_thread) -> int:
            widths.add(sizes[2])
            return rows

        monkeypatch.setattr(calls, "rows_of_convolution", chosen)
        model = model_of(d_model=d_model)
        check(model, 9, 2e-6)
        torch.manual_seed(1)
        logits.append(GpuStep(model).step(torch.arange(9), random_state(model, 9)).logits)
    assert torch.equal(*logits) and widths == {width}


def test_an_unknown_id_gives_no_number():
    model = model_of()
    logits = GpuStep(model).step(torch.tensor([1, 37 + 11]), random_state(model, 2)).logits
    assert model.config.padded_vocab_size <= 48
    assert logits[0].isfinite().all() and logits[1].isnan().all()


def test_states_are_copied_as_plain_tuples():
    model = model_of()
    state = GpuStep(model).step(torch.tensor([1]), random_state(model, 1)).state
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), map_state(torch.clone, state)):
        assert GpuStep(model).step(torch.tensor([2]), other).logits.isfinite().all()


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (9, 16), (64, 64), (65, 128), (130, 192)])
def test_buckets(rows, bucket):
    assert bucket_of(rows) == bucket


def test_too_little_memory_names_the_way_out(monkeypatch):
    def capture(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "Stream", capture)
    with pytest.raises(torch.OutOfMemoryError, match=r"to record a step of 64 rows: .*; step fewer rows at once"):
        Graphs(torch.device("cuda")).capture(lambda: None, 64)


def test_what_the_kernels_do_not_serve_is_reported(monkeypatch):
    monkeypatch.setattr(nvrtc, "reason", lambda: None)
    monkeypatch.setattr(nvrtc, "refuses_gpu", lambda index: None)
    hybrid = model_of(d_model=32, n_layers=3, attention_layers=(1,))
    assert obstacles(hybrid) == {1: "its mixer is Attention, and the kernels of a step are for a plain Mamba"}
    assert "taps" in obstacles(model_of(mamba=MambaOptions(d_conv=9)))[0]
    assert obstacles(model_of()) == {}


@pytest.mark.parametrize("rows", [1, 3])
def test_any_model_steps_block_by_block_in_a_graph(rows):
    model = model_of(d_model=32, mixers=("mamba", "s4d", "retention"), n_layers=3)
    step, ids, state = CapturedStep(model), torch.randint(37, (rows,)), random_state(model, rows)
    assert step.serves(ids, state) and not step.serves(ids, model.init_state(rows + 1))
    want, old = LanguageModel.step(model, ids, state), map_state(torch.clone, state)
    for reuse in (False, True):
        got = step.step(ids, state, reuse=reuse)
        torch.testing.assert_close(got.logits, want.logits)
        for a, b, c, d in zip(*map(state_tensors, (got.state, want.state, state, old)), strict=True):
            torch.testing.assert_close(a, b)
            assert torch.equal(c, b if reuse else d)


def test_a_step_that_cannot_be_recorded_runs_as_it_is(monkeypatch):
    def refuse(*args: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graphs, "capture", refuse)
    model = model_of()
    step, ids, state = CapturedStep(model), torch.tensor([1, 2]), random_state(model, 2)
    assert torch.equal(step.step(ids, state).logits, LanguageModel.step(model, ids, state).logits)
    assert "operation not permitted" in str(step.failure) and not step.serves(ids, state)


def test_an_old_gpu_has_no_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    require_bfloat16(model_of("float32"), torch.device("cuda"))
    with pytest.raises(ValueError, match=r'Tesla T4 has compute capability 7\.5, .* take weights="float32"'):
        require_bfloat16(model_of("int8"), torch.device("cuda"))
