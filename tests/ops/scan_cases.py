"""Inputs of the selective scan for the tests, and how two results are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymamba import selective_scan

HERE = torch.empty(0).device
"""Where the tests' tensors are: see tests/conftest.py."""

TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def scan_inputs(
    batch: int = 2,
    length: int = 19,
    d_inner: int = 6,
    d_state: int = 4,
    *,
    B: str | int = "selective",
    C: str | int = "selective",
    is_complex: bool = False,
    D: bool = True,
    z: bool = True,
    bias: bool = True,
    softplus: bool = True,
    rule: str = "euler",
    initial: bool = True,
    lengths: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `selective_scan`. B and C are "constant", "selective", or a number of groups; lengths packs."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.float64

    def random(*shape: int, dtype: torch.dtype = real) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device="cpu").to(HERE)

    def normal(*shape: int, complex_too: bool = False) -> Tensor:
        values = random(*shape, dtype=real.to_complex() if complex_too else real)
        target = torch.promote_types(dtype, torch.float32).to_complex() if complex_too else dtype
        return values.to(target)

    def matrix(kind: str | int) -> Tensor:
        if kind == "constant":
            return normal(d_inner, d_state, complex_too=is_complex)
        if kind == "selective":
            return normal(batch, length, d_state, complex_too=is_complex)
        return normal(batch, length, int(kind), d_state, complex_too=is_complex)

    wide = torch.promote_types(dtype, torch.float32)
    rate = -torch.exp(random(d_inner, d_state) * 0.5)
    A = torch.complex(rate, 3 * random(d_inner, d_state)) if is_complex else rate
    n_sequences = batch if lengths is None else len(lengths)
    delta = random(batch, length, d_inner)
    state = random(n_sequences, d_inner, d_state, dtype=A.dtype)
    return {
        "u": normal(batch, length, d_inner),
        "delta": (delta if softplus else delta.abs() * 0.3).to(dtype),
        "A": A.to(wide.to_complex() if is_complex else wide),
        "B": matrix(B),
        "C": matrix(C),
        "D": normal(d_inner).to(wide) if D else None,
        "z": normal(batch, length, d_inner) if z else None,
        "delta_bias": normal(d_inner).abs().to(wide) * 0.1 if bias else None,
        "delta_softplus": softplus,
        "b_discretization": rule,
        "initial_state": state.to(wide.to_complex() if is_complex else wide) if initial else None,
        "cu_seqlens": None if lengths is None else offsets(lengths),
    }


def offsets(lengths: list[int]) -> Tensor:
    """cu_seqlens of packed sequences of these lengths."""
    return torch.tensor(
        [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32, device=HERE
    )


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values in float64."""
    return {
        k: v.to(torch.promote_types(v.dtype, torch.float64)) if k in TENSORS and v is not None else v
        for k, v in inputs.items()
    }


def run_scan(inputs: dict[str, Any], backend: str, gradients: bool = True) -> dict[str, Tensor]:
    """y, last_state and, from fixed random cotangents of both, the gradient of every tensor."""
    leaves = {
        k: v.detach().requires_grad_(gradients) if k in TENSORS and v is not None else v for k, v in inputs.items()
    }
    y, last_state = selective_scan(**leaves, backend=backend)
    results = {"y": y.detach(), "last_state": last_state.detach()}
    if gradients:
        generator = torch.Generator().manual_seed(1)
        cotangents = [
            torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu").to(t) for t in (y, last_state)
        ]
        present = [k for k in TENSORS if leaves[k] is not None]
        pairs = zip((y, last_state), cotangents, strict=True)
        loss = sum(((t * c.conj()).real.sum() for t, c in pairs), start=torch.zeros((), requires_grad=True))
        found = torch.autograd.grad(loss, [leaves[k] for k in present], materialize_grads=True)
        results |= {f"d{k}": g for k, g in zip(present, found, strict=True)}
    return results


def assert_within_budget(
    got: dict[str, Tensor], peer: dict[str, Tensor], exact: dict[str, Tensor], factor: float = 2
) -> None:
    """Each error against float64 is at most twice that of the same-precision reference, plus one rounding.

    Errors are root mean squares over a tensor. A rounding is that of the precision in which the work is done; what is
    summed over all tokens rounds once a token, as a random walk; what cancels in the sum of ddelta, that of delta_bias,
    has been rounded, and the errors that ddelta has are in it, too. The mean over few numbers scatters, and that of the
    reference may be near zero by luck: n numbers may err by 1 + 2 / sqrt(n) roundings, a single one by three.
    """
    assert got.keys() == peer.keys() == exact.keys()
    working = torch.finfo(got["last_state"].dtype).eps
    n_tokens = got["y"].shape[0] * got["y"].shape[1]
    for name, value in got.items():
        assert value.dtype == peer[name].dtype and value.shape == peer[name].shape, name
        truth = exact[name].to(torch.complex128 if value.is_complex() else torch.float64)
        error, peer_error = (rms(t.to(truth.dtype) - truth) for t in (value, peer[name]))
        scale = rms(truth)
        if name == "ddelta_bias":
            scale = max(scale, rms(exact["ddelta"]))
            of_ddelta = rms(peer["ddelta"].to(truth.dtype) - exact["ddelta"].to(truth.dtype))
            peer_error = max(peer_error, of_ddelta * n_tokens**0.5)
        rounding = max(working, torch.finfo(value.dtype).eps) * scale
        rounding *= 1 + 2 / max(value.numel(), 1) ** 0.5
        if value.ndim <= 2:
            rounding *= n_tokens**0.5
        assert error <= factor * peer_error + rounding, (
            f"{name}: error {error:.3e}, the reference's {peer_error:.3e}, one rounding {rounding:.3e}"
        )


def rms(x: Tensor) -> float:
    """Root mean square; 0 of nothing."""
    return x.abs().square().mean().sqrt().item() if x.numel() else 0.0


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every result agrees to a tolerance relative to its largest entry."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype == want[name].dtype and value.shape == want[name].shape, name
        if value.numel():
            error = (value - want[name]).abs().max().item()
            allowed = tolerance * (1 + want[name].abs().max().item())
            assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
