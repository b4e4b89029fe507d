"""The causal convolution in CUDA C++ for NVIDIA GPUs: `fast.cu` for up to four taps, `general.cu` for the rest.

Nothing here waits for the GPU, and every sum has an order of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anymamba.kernels.causal_conv1d.arguments import ConvArguments
from anymamba.kernels.causal_conv1d.cuda import call as calls
from anymamba.runtimes import nvrtc
from anymamba.runtimes.launching import Call, aligned, copied, resolved
from anymamba.runtimes.replaying import replayed

NAME = "cuda"
TRANSPARENT: frozenset[str] = frozenset()
CLAMPS_OFFSETS = True


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot serve tensors on a device, in words; None where it can."""
    return "it serves tensors on an NVIDIA GPU" if device_type != "cuda" else nvrtc.reason()


def refuses(arguments: ConvArguments) -> str | None:
    device = arguments.x.device
    return nvrtc.refuses_gpu(device.index) if device.type == "cuda" else None


def description() -> str:
    return f"CUDA C++: {nvrtc.description()}"


def forward(a: ConvArguments) -> tuple[Tensor, Tensor]:
    """y (b, l, d) and the last width - 1 inputs of each sequence."""
    a = _by_taps(a)
    y, last_state = replayed("convolution", a.tensors, a.options, lambda: _forward(a))
    return y, last_state


def _forward(a: ConvArguments) -> tuple[Tensor, Tensor]:
    y, last_state = a.x.new_empty(a.x.shape), a.x.new_empty(a.state_shape)
    if a.x.numel() == 0:
        return y, last_state.zero_() if a.initial_state is None else last_state.copy_(a.initial_state)
    call = _start(a, y=y)
    call.dense(last_state=last_state)
    if calls.is_fast(a):
        pieces = calls.FORWARD_PIECES_OF_FLOATS if _has_floats(a) else calls.FORWARD_PIECES
        n_blocks = _pieces(call, a, calls.FORWARD_BLOCKS, pieces)
        n_blocks += 0 if a.cu_seqlens is None else a.n_sequences  # whose last states they write
        shared = calls.SHARED_OF_WEIGHTS + calls.shared_of_slots(a.x.dtype, 1)
        call.launch(calls.fast("forward", a.x.dtype), n_blocks, calls.THREADS, shared, early=True)
    else:
        call.set(n_blocks=_blocks(_runs(a)))
        n_blocks = call["n_blocks"] + _blocks(last_state.numel())
        call.launch(calls.general("forward", a.dtype), n_blocks, calls.THREADS)
    return y, last_state


def backward(dy: Tensor, dlast_state: Tensor | None, a: ConvArguments) -> list[Tensor | None]:
    """Gradients of x, weight, bias and initial_state (None where the input is absent)."""
    dy, dlast_state, a = resolved(dy), resolved(dlast_state), _by_taps(a)
    tensors = (dy, dlast_state, *a.tensors)
    return list(replayed("convolution backward", tensors, a.options, lambda: _backward(dy, dlast_state, a)))


def _backward(dy: Tensor, dlast_state: Tensor | None, a: ConvArguments) -> list[Tensor | None]:
    inputs = (a.x, a.weight, a.bias, a.initial_state)
    dx, dweight, dbias, dinitial = (None if t is None else t.new_empty(t.shape) for t in inputs)
    assert dx is not None and dweight is not None
    if a.x.numel() == 0:
        summed = None if dbias is None else dbias.zero_()
        return [dx, dweight.zero_(), summed, None if dinitial is None else copied(dinitial, dlast_state)]
    call = _start(a, dy=dy.to(a.x.dtype), dx=dx)
    states = None if dinitial is None else a.x.new_empty(dinitial.shape)
    call.dense(dlast_state=None if dlast_state is None else dlast_state.to(a.x.dtype), dinitial_state=states)
    call.typed(dweight=dweight, dbias=dbias)
    _fast_backward(call, a) if calls.is_fast(a) else _general_backward(call, a)
    initial = None if dinitial is None or states is None else states.to(dinitial.dtype)
    return [dx, dweight, dbias, initial]


def step(a: ConvArguments) -> tuple[Tensor, Tensor]:
    """One token: y (b, 1, d) and the new state (b, width - 1, d)."""
    y, state = a.x.new_empty(a.x.shape), a.x.new_empty(a.state_shape)
    if a.x.numel():
        call = _start(a, y=y)
        call.dense(last_state=state)
        variant = calls.fast("step", a.x.dtype) if calls.is_fast(a) else calls.general("step", a.dtype)
        call.launch(variant, _blocks(a.x.numel()), calls.THREADS, early=calls.is_fast(a))
    return y, state


def _by_taps(a: ConvArguments) -> ConvArguments:
    """The weight as the general kernels want it: neighbouring threads read it for neighbouring channels."""
    return a if calls.is_fast(a) else a._replace(weight=a.weight.T.contiguous().T)


def _has_floats(a: ConvArguments) -> bool:
    return a.x.dtype == torch.float32


def _runs(a: ConvArguments) -> int:
    """Threads of the general kernels, which have neighbouring tokens of a channel each."""
    batch, length, d_inner = a.x.shape
    return batch * -(-length // calls.RUN) * d_inner


def _blocks(n_threads: int) -> int:
    return -(-n_threads // calls.THREADS)


def _start(a: ConvArguments, **rows: Tensor) -> Call:
    """A call with the op's inputs and these tensors like x."""
    call = Call(calls.LAYOUT, a.x)
    (batch, length, d_inner), weight = a.x.shape, a.weight
    call.set(batch=batch, length=length, d_inner=d_inner, width=a.width, n_sequences=a.n_sequences, silu=a.silu)
    dense = {k: t if t.stride(-1) == 1 or d_inner == 1 else t.contiguous() for k, t in (("x", a.x), *rows.items())}
    call.strided(**dense, weight=weight[:, :, None])
    call.typed(bias=a.bias)
    state = None if a.initial_state is None else a.initial_state.to(a.x.dtype)
    call.dense(initial_state=state)
    if a.cu_seqlens is not None:
        call.dense(offsets=a.cu_seqlens)
        call.set(offsets_are_long=a.cu_seqlens.dtype == torch.int64)
    call.set(aligned=all(aligned(t, calls.CHANNELS) for t in dense.values()))
    return call


def _pieces(call: Call, a: ConvArguments, blocks_of_multiprocessor: int, pieces: range) -> int:
    """Cut time into the fast kernels' pieces; returns the number of blocks."""
    batch, length, d_inner = a.x.shape
    rows = batch * -(-d_inner // calls.BLOCK_CHANNELS)
    piece = calls.piece_of(length, rows, call.n_multiprocessors, blocks_of_multiprocessor, pieces)
    n_groups = -(-length // (piece * calls.WARPS))
    call.set(piece=piece, n_groups=n_groups, n_blocks=rows * n_groups, n_parts=batch * n_groups)
    return rows * n_groups


def _states(a: ConvArguments) -> int:
    """Blocks that write the gradient of the initial state."""
    return 0 if a.initial_state is None else _blocks(a.initial_state.numel())


def _fast_backward(call: Call, a: ConvArguments) -> None:
    pieces = calls.BACKWARD_PIECES_OF_FLOATS if _has_floats(a) else calls.BACKWARD_PIECES
    n_blocks = _pieces(call, a, calls.BACKWARD_BLOCKS, pieces) + _states(a)
    call.set(taps=calls.TAPS)
    call.scratch("parts", call["n_parts"], calls.TAPS + 1, a.x.shape[2], dtype=torch.float32)
    shared = calls.SHARED_OF_WEIGHTS * calls.WARPS + calls.shared_of_slots(a.x.dtype, 2)
    call.launch(calls.fast("backward", a.x.dtype), n_blocks, calls.THREADS, shared, early=True)
    _sum_parts(call, calls.fast("sum_parts", a.x.dtype), 4, early=True)


def _general_backward(call: Call, a: ConvArguments) -> None:
    batch, length, d_inner = a.x.shape
    n_groups = -(-length // calls.GENERAL_PIECE)
    call.set(piece=calls.GENERAL_PIECE, n_groups=n_groups, n_parts=batch * n_groups, taps=a.width)
    call.scratch("slopes", *a.x.shape, dtype=a.dtype)
    call.scratch("parts", batch * n_groups, a.width + 1, d_inner, dtype=a.dtype)
    of_weights = batch * n_groups * (-(-a.width // calls.RUN) + 1) * d_inner
    n_threads = {"slopes": _runs(a), "inputs": _runs(a), "weights": of_weights}
    for kernel, n in n_threads.items():
        call.launch(calls.general(kernel, a.dtype), _blocks(n), calls.THREADS)
    call.launch(calls.general("states", a.dtype), _states(a), calls.THREADS)
    _sum_parts(call, calls.general("sum_parts", a.dtype), a.dtype.itemsize)


def _sum_parts(call: Call, variant: nvrtc.Variant, width: int, early: bool = False) -> None:
    threads = 32 * calls.WAYS
    call.launch(variant, (call["taps"] + 1) * -(-call["d_inner"] // 32), threads, threads * width, early=early)
