"""The CUDA kernels of the selective scan on a GPU: values, equal bits, streams, graphs, the largest sizes.

python -m pytest tests/gpu
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scan_backends import arguments, contract, moved, results, same_bits
from scan_cases import assert_close, assert_within_budget, scan_inputs, widened
from torch import Tensor

from anymamba.kernels.selective_scan import cuda, reference
from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.runtimes import nvrtc, replaying

if nvrtc.reason():
    pytest.skip(f"the CUDA kernels do not run here: {nvrtc.reason()}", allow_module_level=True)

SHORT = torch.float32, torch.bfloat16, torch.float16


def check(a: ScanArguments, factor: float = 2) -> None:
    """The GPU's errors against float64 are at most twice those of the reference and one rounding."""
    got = {k: t.cpu() for k, t in results(cuda, moved(a, "cuda")).items()}
    peer = results(reference, a)
    if a.real_dtype == torch.float64:
        assert_close(got, peer, 1e-12)
    else:
        assert_within_budget(got, peer, results(reference, ScanArguments(**widened(a._asdict()))), factor)


# ------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 63, 64, 65, 127, 129, 251, 1000, 2503])
def test_lengths(length, dtype):
    check(arguments(scan_inputs(2, length, 40, 16, dtype=dtype)))


@pytest.mark.parametrize("d_state", [1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 48, 64, 65, 100, 128, 200, 256, 300])
def test_states(d_state):
    check(arguments(scan_inputs(1, 70, 33, d_state, dtype=torch.float32)))


@pytest.mark.parametrize("d_inner", [1, 2, 3, 31, 32, 33, 100, 511, 1000, 1536, 4097, 5120])
def test_channels(d_inner):
    check(arguments(scan_inputs(1, 70, d_inner, 16, dtype=torch.float32)))


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("lengths", [[0, 1, 3, 0, 40, 226, 0], [1, 2, 3, 4, 5, 6, 7, 8, 9] * 14 + [10], [700, 900]])
def test_packed(lengths, dtype):
    check(arguments(scan_inputs(1, sum(lengths), 40, 16, lengths=lengths, dtype=dtype)))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(200))
def test_random_contracts(block):
    """Ten random calls; of many small tensors some are those on which the reference is lucky: eight times its error."""
    for seed in range(10 * block, 10 * block + 10):
        try:
            check(contract(seed), factor=8)
        except AssertionError as error:
            raise AssertionError(f"contract {seed}: {error}") from error


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("lengths", [(1 << 20, 32), (100_003, 256)])
def test_long_rows_equal_their_halves(lengths, dtype):
    """No oracle is as long: the state that leaves one half arrives at the other."""
    length, d_inner = lengths
    whole = on_gpu(1, length, d_inner, dtype)
    y, last, _ = cuda.forward(whole, False)
    half = length // 2 + 3
    y1, state, _ = cuda.forward(whole.of_sequence(0, 0, half), False)
    y2, last2, _ = cuda.forward(whole.of_sequence(0, half, length)._replace(initial_state=state), False)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert_close({"y": torch.cat([y1, y2], 1), "last": last2}, {"y": y, "last": last}, tolerance)


def on_gpu(batch: int, length: int, d_inner: int, dtype: torch.dtype, d_state: int = 16) -> ScanArguments:
    """Arguments that are made on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

    u, delta, z = (normal(batch, length, d_inner) for _ in range(3))
    A = -torch.exp(normal(d_inner, d_state).float())
    B, C = (normal(batch, length, 1, d_state) for _ in range(2))
    D, bias = (normal(d_inner).float() for _ in range(2))
    state = normal(batch, d_inner, d_state).float()
    return ScanArguments(u, delta, A, B, C, D, z, bias - 3, state, delta_softplus=True)


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    length, d_inner = (1 << 21) + 1, 1040
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free memory")
    a = on_gpu(1, length, d_inner, torch.bfloat16)
    assert a.u.numel() > 1 << 31
    y, last, _ = cuda.forward(a, False)
    half = length // 2
    _, state, _ = cuda.forward(a.of_sequence(0, 0, half), False)
    y2, last2, _ = cuda.forward(a.of_sequence(0, half, length)._replace(initial_state=state), False)
    assert_close({"y": y2, "last": last2}, {"y": y[:, half:], "last": last}, 8e-3)


# ------------------------------------------------------------------------------------------------- how it runs

CALLS: dict[str, dict[str, Any]] = {
    "fast": {"batch": 2, "length": 700, "d_inner": 160, "d_state": 16, "dtype": torch.bfloat16},
    "packed": {"batch": 1, "length": 700, "d_inner": 40, "d_state": 40, "lengths": [0, 1, 99, 600], "dtype": SHORT[0]},
    "general": {"batch": 2, "length": 300, "d_inner": 40, "d_state": 6, "B": "constant", "is_complex": True},
}


@pytest.fixture(params=CALLS)
def call(request) -> ScanArguments:
    return arguments(scan_inputs(**CALLS[request.param]), "cuda")


@pytest.fixture
def load() -> Iterator[Any]:
    """Queues work on another stream."""
    stream, x = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")

    def queue() -> None:
        with torch.cuda.stream(stream):
            for _ in range(4):
                x @ x

    yield queue
    stream.synchronize()


def test_equal_bits_a_hundred_times_under_load(call, load):
    first = results(cuda, call)
    for _ in range(100):
        load()
        assert same_bits(results(cuda, call), first)


def test_rows_do_not_depend_on_the_batch(load):
    a = arguments(scan_inputs(3, 200, 64, 16, dtype=torch.bfloat16), "cuda")
    one = a._replace(**{k: getattr(a, k)[1:2] for k in ("u", "delta", "B", "C", "z", "initial_state")})
    whole, row = cuda.forward(a, False), cuda.forward(one, False)
    torch.testing.assert_close(whole[0][1:2], row[0], rtol=8e-3, atol=1e-3)
    torch.testing.assert_close(whole[1][1:2], row[1], rtol=1e-5, atol=1e-6)


def test_several_streams(call):
    want = results(cuda, call)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            found.append(results(cuda, call))
    torch.cuda.synchronize()
    assert all(same_bits(one, want) for one in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_device_that_is_not_the_current_one(call):
    want = results(cuda, call)
    found = results(cuda, moved(call, "cuda:1"))
    assert {t.device.index for t in found.values()} == {1} and torch.cuda.current_device() == 0
    assert same_bits({k: t.cpu() for k, t in found.items()}, {k: t.cpu() for k, t in want.items()})


def everything(a: ScanArguments, dy: Tensor, dlast: Tensor) -> list[Tensor]:
    y, last, saved = cuda.forward(a, True)
    return [y, last, *(t for t in cuda.backward(dy, dlast, a, saved) if t is not None)]


def test_nothing_waits_for_the_gpu_and_a_graph_holds_it(call):
    y, last, _ = cuda.forward(call, True)
    dy, dlast = torch.randn_like(y), torch.randn_like(last)
    everything(call, dy, dlast)
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(call, dy, dlast)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = everything(call, dy, dlast)
    call.u.mul_(-0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(held, everything(call, dy, dlast), strict=True))


def test_a_graph_may_be_captured_with_the_first_call(call, monkeypatch):
    monkeypatch.setattr(nvrtc, "_kernels", {})
    monkeypatch.setattr(replaying, "_plans", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = cuda.forward(call, False)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(held, cuda.forward(call, False), strict=True))


@pytest.mark.parametrize("batch", [1, 2, 255])
@pytest.mark.parametrize("d_state", [16, 64, 5])
@pytest.mark.parametrize("dtype", SHORT)
def test_a_step_and_its_graph(dtype, d_state, batch):
    inputs = scan_inputs(batch, 1, 100, d_state, dtype=dtype)
    a = arguments(inputs)
    on_device = moved(a, "cuda")
    got, peer, exact = (
        {"y": y.cpu(), "last_state": state.cpu()}
        for y, state in (cuda.step(on_device), reference.step(a), reference.step(arguments(widened(inputs))))
    )
    assert_within_budget(got, peer, exact)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = cuda.step(on_device)
    on_device.u.mul_(2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(held, cuda.step(on_device), strict=True))


def test_out_of_memory_in_backward_leaves_the_next_call_fine():
    a = on_gpu(4, 4096, 1536, torch.bfloat16)
    y, last, saved = cuda.forward(a, True)
    dy, dlast = torch.randn_like(y), torch.randn_like(last)
    want = cuda.backward(dy, dlast, a, saved)
    del want
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (96 << 20)) / total)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            cuda.backward(dy, dlast, a, saved)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    first, second = (cuda.backward(dy, dlast, a, saved) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True) if p is not None and q is not None)


def test_states_are_saved_every_64_tokens():
    a = on_gpu(2, 640, 128, torch.bfloat16)
    _, _, saved = cuda.forward(a, True)
    assert saved.nbytes == 2 * 10 * 16 * 128 * 4
