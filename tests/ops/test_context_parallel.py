"""Sequences that are spread over processes: the scan and the convolution of the parts are those of one process."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scan_cases import TENSORS, offsets, scan_inputs
from torch import Tensor

from anymamba import causal_conv1d, selective_scan
from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.ops.groups import exchange, transport
from anymamba.ops.selective_scan import over_group
from anymamba.parallel import SequenceGroup, sequence_group

TOLERANCE = 1e-10


def cut(length: int, lengths: list[int], rank: int) -> slice:
    """The tokens of a rank."""
    start = sum(lengths[:rank])
    assert sum(lengths) == length
    return slice(start, start + lengths[rank])


def part_of(name: str, tensor: Any, tokens: slice) -> Any:
    """A rank's part of an argument of the scan."""
    along = name in ("u", "delta", "z", "x") or (name in "BC" and tensor.ndim > 2)
    return tensor[:, tokens] if along and tensor is not None else tensor


def normal(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def loss_of(y: Tensor, last: Tensor, dy: Tensor, dlast: Tensor) -> Tensor:
    return (y * dy).sum() + (last * dlast.conj()).real.sum()


def error(got: Tensor, want: Tensor) -> float:
    """The largest error, relative to the largest entry."""
    assert got.shape == want.shape and got.dtype == want.dtype
    return (got - want).abs().max().item() / max(1.0, want.abs().max().item()) if want.numel() else 0.0


def summed(x: Tensor, group: Any) -> Tensor:
    """The sum over ranks."""
    total = torch.view_as_real(x).contiguous() if x.is_complex() else x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return torch.view_as_complex(total) if x.is_complex() else total


def check(group: Any, lengths: list[int], tensors: dict[str, Any], function: Any, order: tuple[str, ...]) -> None:
    """Results and gradients of the parts are those of `function` on the whole tensors."""

    def run(given: dict[str, Any], tokens: slice | None, **more: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        leaves = {
            k: v.detach().clone().requires_grad_() if k in order and v is not None else v for k, v in given.items()
        }
        y, last = function(**leaves, **more)
        dy = normal(whole_y, 1) if tokens is None else normal(whole_y, 1)[:, tokens]
        present = [k for k in order if leaves[k] is not None]
        loss = loss_of(y, last, dy, normal(last, 2))
        grads = torch.autograd.grad(loss, [leaves[k] for k in present], materialize_grads=True)
        return y.detach(), last.detach(), dict(zip(present, grads, strict=True))

    whole_y = tensors[order[0]]
    tokens = cut(whole_y.shape[1], lengths, group.rank())
    y, last, grads = run(tensors, None)
    spread = sequence_group(group, lengths[group.rank()])
    assert spread.lengths == tuple(lengths)
    part = {k: part_of(k, v, tokens) for k, v in tensors.items()}
    part_y, part_last, part_grads = run(part, tokens, group=spread)
    errors = {"y": error(part_y, y[:, tokens]), "last_state": error(summed(part_last, group), last)}
    for name, want in grads.items():
        mine = part_of(name, want, tokens)
        got = part_grads[name]
        errors[name] = error(got, mine) if mine is not want else error(summed(got, group), want)
    assert max(errors.values()) < TOLERANCE, (lengths, errors)


def check_scans(group: Any, cases: list[tuple[list[int], dict[str, Any]]], backend: str | None) -> None:
    for lengths, options in cases:
        inputs = scan_inputs(length=sum(lengths), **options)
        check(group, lengths, inputs, lambda **given: selective_scan(**given, backend=backend), TENSORS)


CASES: list[tuple[list[int], dict[str, Any]]] = [
    ([40, 40], {}),
    ([1, 66], {"rule": "zoh", "initial": False, "z": False}),
    ([30, 7], {"B": "constant", "C": "constant"}),
    ([9, 12], {"B": 2, "C": 2, "D": False, "bias": False, "softplus": False}),
    ([0, 5], {}),
    ([5, 0], {"initial": False}),
    ([10, 10, 10, 10], {}),
    ([33, 0, 2, 40], {"rule": "zoh", "B": "constant"}),
    ([0, 0, 3, 0], {}),
    ([1, 1, 1, 1], {"batch": 3, "d_inner": 1, "d_state": 1, "initial": False}),
]


@pytest.mark.parametrize("name", [None, "portable"])
def test_whole_rows(ranks, name):
    """Uneven and empty parts, both rules, constant, selective and grouped B and C."""
    for n in (2, 4):
        ranks.run(n, check_scans, [case for case in CASES if len(case[0]) == n], name)


@pytest.mark.parametrize("name", [None])
def test_complex_A(ranks, name):
    cases = [([17, 20], {}), ([4, 0, 30, 9], {"rule": "zoh", "B": "constant", "z": False})]
    for n in (2, 4):
        chosen = [(lengths, {"is_complex": True, **more}) for lengths, more in cases if len(lengths) == n]
        ranks.run(n, check_scans, chosen, name)


DOCUMENTS = [
    [10, 10],  # an offset on an edge
    [4, 0, 32, 4],  # a document over all ranks, between others, and an empty one
    [40],
    [1] * 12,
    [0, 9, 0, 1, 0],
    [37, 1, 2],
]


def packed_cases(n: int) -> list[tuple[list[int], list[int]]]:
    """Lengths of parts and of documents."""
    cases = []
    choose = random.Random(n)
    for documents in [*DOCUMENTS, *([choose.choice((0, 1, 2, 7, 20)) for _ in range(5)] + [3] for _ in range(6))]:
        length = sum(documents)
        edges = sorted(choose.randint(0, length) for _ in range(n - 1))
        even = [length * (i + 1) // n - length * i // n for i in range(n)]
        cases += [(even, documents), ([b - a for a, b in zip([0, *edges], [*edges, length], strict=True)], documents)]
    return cases


@pytest.mark.parametrize("name", [None, "portable"])
@pytest.mark.parametrize("n", [2, 4])
def test_packed_sequences(ranks, n, name):
    """Only the sequence that crosses an edge takes part; the others stay where they are."""
    cases = [
        (
            lengths,
            {"batch": 1, "lengths": documents, "initial": bool(i % 3), "d_inner": 3, "d_state": 2, "z": i % 2 == 0},
        )
        for i, (lengths, documents) in enumerate(packed_cases(n))
    ]
    ranks.run(n, check_scans, cases, name)


def check_packed_complex(group: Any) -> None:
    for lengths in ([3, 4, 5, 8], [12, 0, 1, 7]):
        options = {"batch": 1, "lengths": [2, 13, 5], "is_complex": True, "rule": "zoh"}
        check_scans(group, [(lengths, options)], None)


def test_packed_sequences_with_complex_A(ranks):
    ranks.run(4, check_packed_complex)


# ------------------------------------------------------------------------------------------ the convolution


def conv_inputs(length: int, width: int, documents: list[int] | None, initial: bool, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    n = batch if documents is None else len(documents)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "x": make(batch if documents is None else 1, length, 5),
        "weight": make(5, width),
        "bias": make(5),
        "initial_state": make(n, width - 1, 5) if initial else None,
        "activation": "silu",
        "cu_seqlens": None if documents is None else offsets(documents),
    }


def check_convolutions(group: Any, cases: list[tuple[list[int], list[int] | None]]) -> None:
    for lengths, documents in cases:
        for width, initial in ((4, True), (4, False), (1, True), (6, True)):
            inputs = conv_inputs(sum(lengths), width, documents, initial)
            check(group, lengths, inputs, causal_conv1d, ("x", "weight", "bias", "initial_state"))


@pytest.mark.parametrize("n", [2, 4])
def test_convolution(ranks, n):
    """Parts and documents shorter than the halo, empty parts, offsets on edges."""
    rows = {2: [[8, 8], [1, 9], [9, 1], [0, 4], [4, 0]], 4: [[4, 4, 4, 4], [1, 1, 1, 1], [3, 0, 2, 5], [0, 0, 1, 2]]}
    ranks.run(n, check_convolutions, [*((lengths, None) for lengths in rows[n]), *packed_cases(n)])


def test_a_group_of_one(ranks):
    ranks.run(1, check_scans, [([20], {}), ([20], {"batch": 1, "lengths": [7, 0, 13]})], None)
    ranks.run(1, check_convolutions, [([8], None), ([8], [3, 5])])


# ------------------------------------------------------------------------------------------ what is sent


def bytes_sent(group: Any, length: int) -> int:
    """Bytes that this rank sends for a scan and a convolution of its part, forward and backward."""
    sent = 0

    def counting(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal sent
            tensors = [args[1]] if function is not sends else [op.tensor for op in args[0] if op.op is dist.isend]
            sent += sum(t.numel() * t.element_size() for t in tensors)
            return function(*args, **options)

        return call

    sends = dist.batch_isend_irecv
    gathers = transport.all_gather_single
    size, rank = group.size(), group.rank()
    spread = SequenceGroup(group.group_name, rank, tuple(range(0, length * size + 1, length)))
    inputs = part_inputs(length, rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", counting(sends))
        patch.setattr(transport, "all_gather_single", counting(gathers))
        patch.setattr(transport, "reduce_scatter_single", None)  # not called
        for name in ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send", "gather"):
            patch.setattr(dist, name, None)  # not called
        x = causal_conv1d(inputs["u"], inputs.pop("weight"), group=spread).y
        y, _ = selective_scan(**inputs | {"u": x}, group=spread)
        y.sum().backward()
    return sent


ROWS, D_INNER, D_STATE, WIDTH = 3, 5, 7, 4


def part_inputs(length: int, rank: int) -> dict[str, Any]:
    """Tensors in float32 that need gradients."""
    sizes = {"batch": ROWS, "length": length, "d_inner": D_INNER, "d_state": D_STATE}
    inputs = scan_inputs(**sizes, dtype=torch.float32, seed=rank, initial=False)
    inputs["weight"] = torch.ones(D_INNER, WIDTH)
    return {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in inputs.items()}


@pytest.mark.parametrize("length", [8, 200])
def test_bytes_sent_do_not_depend_on_the_length(ranks, length):
    """For each row the states, the sums of steps and the gradients of states; and the inputs at edges with their
    gradients, which the last and the first rank do not send."""
    states, inputs = 4 * D_INNER * (2 * D_STATE + 1), 4 * (WIDTH - 1) * D_INNER
    wanted = [ROWS * (states + n * inputs) for n in (1, 2, 2, 1)]
    assert ranks.run(4, bytes_sent, length) == wanted


# ------------------------------------------------------------------------------------------ torch.compile


def layer(inputs: dict[str, Any], weight: Tensor, spread: SequenceGroup) -> Tensor:
    x = causal_conv1d(inputs["u"], weight, group=spread).y
    y, last_state = selective_scan(**inputs | {"u": x}, group=spread)
    return y.square().sum() + last_state.sum()


def compiled_gradients(group: Any) -> None:
    spread = sequence_group(group, 9)
    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        inputs = part_inputs(9, group.rank())
        weight = inputs.pop("weight")
        loss = function(inputs, weight, spread)
        loss.backward()
        results.append([loss.detach(), weight.grad, *(inputs[k].grad for k in TENSORS if inputs[k] is not None)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_compiled_without_a_graph_break(ranks):
    ranks.run(2, compiled_gradients)


def check_ops(group: Any) -> None:
    spread = sequence_group(group, 5)
    x = torch.randn(2, 5, 3, requires_grad=True)
    torch.library.opcheck(exchange._shift, (x, spread.name, spread.rank, 2, 1))
    torch.library.opcheck(exchange._gather, (x, spread.name, 2))
    inputs = part_inputs(5, group.rank())
    fields = [inputs.get(name) for name in ScanArguments._fields]
    fields[3], fields[4] = (matrix[:, :, None].detach().requires_grad_() for matrix in fields[3:5])
    last = (spread.name, spread.rank, list(spread.starts), True, "portable")
    torch.library.opcheck(over_group.forward_op, (*fields, *last))


def test_registration(ranks):
    """Schemas, shapes and gradients of the registered operators are what torch expects."""
    ranks.run(2, check_ops)


def refused(group: Any) -> None:
    spread = sequence_group(group, 3)
    inputs = scan_inputs(length=3)
    with pytest.raises(RuntimeError, match="backend 'reference' cannot serve a scan over a group"):
        selective_scan(**inputs, group=spread, backend="reference")
    with pytest.raises(RuntimeError, match=r"no forward mode and no torch\.func transforms"):
        torch.func.vmap(lambda u: selective_scan(**inputs | {"u": u}, group=spread).y)(inputs["u"][None])
    wrong = scan_inputs(batch=1, length=3, lengths=[3, 4])
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the length 6, got"):
        selective_scan(**wrong, group=spread)
    with pytest.raises(ValueError, match=r"lengths must be the tokens of each of the 2 ranks, 3 on rank \d, got \(4,"):
        sequence_group(group, 3, [4, 4])


def test_refusals(ranks):
    ranks.run(2, refused)
