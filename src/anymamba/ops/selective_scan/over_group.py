"""The selective scan of sequences that are spread over a group of processes.

Forward. Each rank computes the state at the end of its part from a zero state, and the sum of its steps Δ; the first
rank starts from the initial state. One all-gather gives these to every rank. A state passes a rank's part with the
decay exp(A sum of Δ), because A is the same everywhere. So each rank computes the state that arrives at its part, and
scans the part from there.

Backward goes the other way. Each rank computes the gradient of the state that arrives at its part as if nothing came
after, one all-gather follows, and each rank computes the gradient of the state that departs from it, and runs the
backward pass.

With packed sequences, only the one that crosses an edge between two ranks takes part.

A backend that scans in two phases does not repeat the first one: what that found before the exchange is made right for
the state that arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anymamba.kernels.selective_scan.arguments import N_TENSORS, ScanArguments
from anymamba.ops import dispatch, functions, observers
from anymamba.ops.checks import require_offsets
from anymamba.ops.groups import SequenceGroup, all_gather
from anymamba.ops.selective_scan import registration
from anymamba.ops.selective_scan.registration import OP

FIELDS = len(ScanArguments._fields)


def run(arguments: ScanArguments, group: SequenceGroup, backend: str) -> tuple[Tensor, Tensor]:
    """Compute y of this rank's part and the last states of the sequences that end in it.

    Raises RuntimeError for backends of torch operations, in forward mode and in transforms of `torch.func`.
    """
    if "forward" in dispatch.kernel(OP, backend).TRANSPARENT:
        raise RuntimeError(f"backend {backend!r} cannot serve a scan over a group; leave backend=None")
    if observers.transformed(*arguments.tensors):
        raise RuntimeError("a scan over a group has no forward mode and no torch.func transforms; scan on one process")
    if observers.way(*arguments.tensors) in ("function", "kernel"):  # skips torch's wrappers of a registered op
        return _Eager.apply(group, backend, arguments.options, *arguments.tensors)
    save = observers.differentiable(*arguments.tensors)
    y, last_state, *_ = forward_op(*arguments, group.name, group.rank, list(group.starts), save, backend)
    return y, last_state


class _Eager(functions.Quick):
    """The op in eager code."""

    @staticmethod
    def forward(ctx: Any, group: SequenceGroup, backend: str, options: tuple[Any, ...], *tensors: Any) -> Any:
        part = _Part(ScanArguments(*tensors, *options), group, backend)
        with dispatch.without_autocast(tensors[0].device.type):
            y, last_state, *kept = _forward(part, any(ctx.needs_input_grad))
        ctx.of_part = options, group, backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *kept)
        return y, last_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast_state: Tensor | None) -> tuple[Any, ...]:
        *tensors, saved, arriving, steps = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(tensors[0], memory_format=torch.contiguous_format)
        options, group, backend = ctx.of_part
        part = _Part(ScanArguments(*tensors, *options), group, backend)
        with dispatch.without_autocast(dy.device.type):
            grads = _backward(part, dy, dlast_state, saved, arriving, steps)
        return None, None, None, *(None if t is None else g for t, g in zip(tensors[:-1], grads, strict=True)), None


class _Part(NamedTuple):
    """This rank's part of a scan."""

    arguments: ScanArguments
    """Tensors of the part; offsets and initial states of the whole sequences."""
    group: SequenceGroup
    backend: str

    @property
    def kernel(self) -> Any:
        return dispatch.kernel(OP, self.backend)

    @property
    def has_phases(self) -> bool:
        """Whether the backend scans in two phases, of which `begin` runs the first one."""
        return hasattr(self.kernel, "begin")

    def local(self, arriving: Tensor | None) -> ScanArguments:
        """The arguments of the part alone. Its first sequence starts from an arriving state (rows, d, n), or from zero
        if that is None."""
        a, group = self.arguments, self.group
        if a.cu_seqlens is None:
            return a if group.rank == 0 else a._replace(initial_state=arriving)
        offsets, initial = group.local_offsets(a.cu_seqlens), a.initial_state
        if initial is not None or arriving is not None:
            shape = (a.n_sequences, a.d_inner, a.d_state)
            initial = a.u.new_zeros(shape, dtype=a.dtype) if initial is None else initial
            initial = torch.where(
                _per_state(group.arriving(a.cu_seqlens)), 0 if arriving is None else arriving, initial
            )
        return a._replace(cu_seqlens=offsets, initial_state=initial)

    def begin(self) -> tuple[Tensor, Tensor, Any]:
        """What departs from here if nothing arrives (rows, d, n), the sum of steps (rows, d), and the backend's first
        phase of the scan, if it has one."""
        a, is_last = self.local(None), self.group.rank == self.group.size - 1
        if a.length == 0 or (is_last and not self.has_phases):  # what is given departs, or nothing
            end = a.u.new_zeros(a.batch, a.d_inner, a.d_state, dtype=a.dtype)
            given = None if a.cu_seqlens is not None else a.initial_state
            end = end if given is None else end.copy_(given)
            return end, a.u.new_zeros(a.batch, a.d_inner, dtype=a.real_dtype), None
        dispatch.count(OP, self.backend, "summary")
        return self.kernel.begin(a) if self.has_phases else (*self.kernel.summary(a), None)

    def finish(self, begun: Any, arriving: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """y, the last states and what the backend saves, from the state that arrives (rows, d, n)."""
        a = self.local(arriving)
        if begun is None:
            return registration._forward(a, save, self.backend)
        dispatch.count(OP, self.backend, "forward")
        if self.group.rank > 0:
            begun = self.kernel.with_arrival(begun, self.given(arriving, self.group.arriving), a, reverse=False)
        return self.kernel.finish(a, save, begun)

    def begin_reverse(self, dy: Tensor, dlast_state: Tensor | None) -> tuple[Tensor, Any]:
        """The gradient of the state that arrives here (rows, d, n) if that of what departs is zero, and the backend's
        first phase of the backward pass, if it has one."""
        a = self.local(None)
        if a.length == 0 or (self.group.rank == 0 and not self.has_phases):  # nothing arrives
            return a.u.new_zeros(a.batch, a.d_inner, a.d_state, dtype=a.dtype), None
        dispatch.count(OP, self.backend, "reverse summary")
        if self.has_phases:
            gradient, begun = self.kernel.begin_reverse(dy, dlast_state, a)
        else:
            gradient, begun = self.kernel.reverse_summary(dy, a.state_gradient(dlast_state), a), None
        return self.given(gradient, self.group.arriving), begun

    def finish_reverse(
        self, begun: Any, departing: Tensor, arriving: Tensor, saved: Tensor, dy: Tensor, dlast_state: Tensor | None
    ) -> list[Tensor | None]:
        """The gradients of the part's tensors, from the gradient of the state that departs (rows, d, n)."""
        a, group = self.local(arriving), self.group
        if self.arguments.cu_seqlens is None:
            dlast_state = departing if dlast_state is None else dlast_state + departing
        else:
            dlast_state = a.state_gradient(dlast_state)
            dlast_state = torch.where(_per_state(group.departing(self.arguments.cu_seqlens)), departing, dlast_state)
        if begun is None:
            return registration._backward(dy, dlast_state, a, saved, self.backend)
        dispatch.count(OP, self.backend, "backward")
        if group.rank < group.size - 1:
            begun = self.kernel.with_arrival(begun, self.given(departing, group.departing), a, reverse=True)
        return self.kernel.finish_reverse(dy, dlast_state, a, saved, begun)

    def ended(self, states: Tensor) -> Tensor:
        """Last states (n_sequences, d, n), with zeros for sequences whose last token is on another rank."""
        if self.arguments.cu_seqlens is not None:
            return self.group.only_where_it_ends(states, self.arguments.cu_seqlens)
        return states if self.group.has_end else torch.zeros_like(states)

    def given(self, states: Tensor, which: Callable[[Tensor], Tensor]) -> Tensor:
        """The states (rows, d, n), or zeros if none of the packed sequences is one of `which`."""
        offsets = self.arguments.cu_seqlens
        return states if offsets is None else torch.where(which(offsets).any(), states, 0)

    def fold(self, leaving: Tensor, steps: Tensor, ranks: Iterable[int], *, reverse: bool) -> Tensor:
        """The state that reaches the rank after those of `ranks`, or a gradient on the way back.

        Args:
            leaving: (size, rows, d, n) what leaves each rank if nothing reaches it.
            steps: (size, rows, d) the sum of the steps of each rank.
        """
        a = self.arguments
        passing = None if a.cu_seqlens is None else self.group.passing(a.cu_seqlens)
        A, state = a.A.to(a.dtype), None
        for rank in ranks:
            if state is not None:
                decay = torch.exp(steps[rank][..., None] * A)
                state = (decay.conj() if reverse else decay) * state
                state = state if passing is None else torch.where(passing[rank], state, 0)
            state = leaving[rank] if state is None else leaving[rank] + state
        return torch.zeros_like(leaving[0]) if state is None else state

    def gather(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors (rows, ...) of all ranks, (size, rows, ...), with one exchange."""
        parts = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        flat = torch.cat([t.flatten(1) for t in parts], 1)
        gathered = all_gather(flat, self.group.name, self.group.size)
        pieces = gathered.split([t[0].numel() for t in parts], 2)
        found = [piece.reshape(-1, *t.shape) for piece, t in zip(pieces, parts, strict=True)]
        return [
            torch.view_as_complex(f.contiguous()) if t.is_complex() else f for f, t in zip(found, tensors, strict=True)
        ]


def _per_state(mask: Tensor) -> Tensor:
    """A mask of sequences, to select among states (n_sequences, d, n)."""
    return mask[:, None, None]


def _forward(part: _Part, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the last states, what the backend saves, the arriving state (rows, d, n), and all ranks' sums of steps."""
    a, group = part.arguments, part.group
    if not dispatch.clamps_offsets(OP, part.backend):
        require_offsets(a.cu_seqlens, group.length)
    end, sum_of_steps, begun = part.begin()
    leaving, steps = part.gather(end, sum_of_steps)
    arriving = part.fold(leaving, steps, range(group.rank), reverse=False)
    y, last_state, saved = part.finish(begun, arriving, save)
    return y, part.ended(last_state), saved, arriving.contiguous(), steps.contiguous()


def _backward(
    part: _Part, dy: Tensor, dlast_state: Tensor | None, saved: Tensor, arriving: Tensor, steps: Tensor
) -> list[Tensor | None]:
    """The gradients of the record's floating-point tensors."""
    group = part.group
    if dlast_state is not None:
        dlast_state = part.ended(dlast_state)
    gradient, begun = part.begin_reverse(dy, dlast_state)
    (leaving,) = part.gather(gradient)
    departing = part.fold(leaving, steps, range(group.size - 1, group.rank, -1), reverse=True)
    grads = part.finish_reverse(begun, departing, arriving, saved, dy, dlast_state)
    return [*grads[:-1], _of_given(part, grads[-1])]


def _of_given(part: _Part, dinitial: Tensor | None) -> Tensor | None:
    """The gradient of the initial states that the caller gave; that of the arriving one belongs to other ranks."""
    a, group = part.arguments, part.group
    if a.initial_state is None or dinitial is None:
        return None
    if a.cu_seqlens is not None:
        return torch.where(_per_state(group.arriving(a.cu_seqlens)), 0, dinitial).to(a.initial_state.dtype)
    return dinitial if group.rank == 0 else torch.zeros_like(a.initial_state)


# ------------------------------------------------------------------------------------------ torch's op


def _part(fields: Sequence[Any], backend: str) -> _Part:
    """From the fields of the record and those of the group."""
    name, rank, starts = fields[FIELDS:]
    return _Part(ScanArguments(*fields[:FIELDS]), SequenceGroup(name, rank, tuple(starts)), backend)


@torch.library.custom_op("anymamba::selective_scan_over_group", mutates_args=())
def forward_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    b_discretization: str,
    group: str,
    rank: int,
    starts: Sequence[int],
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    part = _part((*tensors, delta_softplus, b_discretization, group, rank, starts), backend)
    with dispatch.without_autocast(u.device.type):
        return _forward(part, save)


@torch.library.custom_op("anymamba::selective_scan_over_group_backward", mutates_args=())
def backward_op(
    dy: Tensor,
    dlast_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    b_discretization: str,
    group: str,
    rank: int,
    starts: Sequence[int],
    saved: Tensor,
    arriving: Tensor,
    steps: Tensor,
    backend: str,
) -> list[Tensor]:
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    part = _part((*tensors, delta_softplus, b_discretization, group, rank, starts), backend)
    with dispatch.without_autocast(u.device.type):
        return functions.filled(_backward(part, dy, dlast_state, saved, arriving, steps), dy)


@forward_op.register_fake
def _(*flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *fields, save, backend = flat
    part = _part(fields, backend)
    a = part.arguments
    return (
        torch.empty_like(a.u, memory_format=torch.contiguous_format),
        a.u.new_empty(a.n_sequences, a.d_inner, a.d_state, dtype=a.dtype),
        a.u.new_empty(dispatch.kernel(OP, backend).saved_shape(a) if save else (0,), dtype=a.dtype),
        a.u.new_empty(a.batch, a.d_inner, a.d_state, dtype=a.dtype),
        a.u.new_empty(part.group.size, a.batch, a.d_inner, dtype=a.real_dtype),
    )


@backward_op.register_fake
def _(dy: Tensor, dlast_state: Tensor, *flat: Any) -> list[Tensor]:
    return [
        dy.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in flat[: N_TENSORS - 1]
    ]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *fields, ctx.save, ctx.backend = inputs
    ctx.save_for_backward(*fields[:N_TENSORS], *output[2:])
    ctx.options = fields[N_TENSORS:]
    ctx.set_materialize_grads(True)


def _gradients(ctx: Any, dy: Tensor, dlast_state: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, saved, arriving, steps = ctx.saved_tensors
    if not ctx.save:  # the forward pass could not see that gradients would be needed
        _, _, saved, arriving, steps = forward_op(*tensors, *ctx.options, True, ctx.backend)
    grads = backward_op(dy, dlast_state, *tensors, *ctx.options, saved, arriving, steps, ctx.backend)
    of_tensors = (None if t is None else g for t, g in zip(tensors[:-1], grads, strict=True))
    return *of_tensors, *[None] * 8


forward_op.register_autograd(_gradients, setup_context=_save_for_backward)
