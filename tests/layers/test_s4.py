"""S4 against dense matrices in float64: its kernel is that of HiPPO-LegS, its modes are one function."""

from __future__ import annotations

import math

import pytest
import torch
from contract import check_contract, check_gradients, close, states_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anymamba.layers import s4 as module
from anymamba.layers.s4 import S4, inverse_series, legs, multiply_series
from anymamba.parts.state import state_bytes


def made(width: int = 4, d_state: int = 8, moved: float = 0.3, dtype=torch.float64, **options) -> S4:
    """A layer moved away from its initialisation."""
    torch.manual_seed(0)
    layer = S4(width, d_state, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += moved * torch.randn_like(parameter)
    return layer


def hippo(N: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS, entry by entry."""
    A = torch.zeros(N, N, dtype=torch.float64)
    for n in range(N):
        for k in range(n):
            A[n, k] = -math.sqrt((2 * n + 1) * (2 * k + 1))
        A[n, n] = -(n + 1)
    return A, torch.tensor([math.sqrt(2 * n + 1) for n in range(N)], dtype=torch.float64)


def powers(A: Tensor, B: Tensor, C: Tensor, dt: float, length: int) -> Tensor:
    """C Abar^t Bbar by the dense bilinear rule."""
    one = torch.eye(len(B), dtype=A.dtype)
    Abar, h = torch.linalg.solve(one - dt / 2 * A, one + dt / 2 * A), torch.linalg.solve(one - dt / 2 * A, dt * B)
    kernel = []
    for _ in range(length):
        kernel.append(C @ h)
        h = Abar @ h
    return torch.stack(kernel)


def dense(layer: S4, channel: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """A, B, C (with the conjugates) and the step of a channel, from the parameters."""
    k = layer.kernel
    ssm = channel % layer.n_ssm
    Lambda = torch.complex(-k.A_log[ssm].exp(), k.A_imag[ssm])
    P, B, C = (torch.view_as_complex(p) for p in (k.P[ssm], k.B[ssm], k.C[channel]))
    Lambda, P, B, C = (torch.cat([v, v.conj()]) for v in (Lambda, P, B, C))
    return torch.diag(Lambda) - P[:, None] * P.conj(), B, C, math.exp(k.log_dt[channel])


def kernel_of(layer: S4, length: int) -> Tensor:
    """The layer's answer to an impulse in each channel, (width, length)."""
    x = torch.zeros(1, length, layer.width, dtype=torch.float64)
    x[0, 0] = 1
    return layer(x)[0][0].T


@pytest.mark.parametrize("N", [4, 8, 16, 32, 64])
@torch.no_grad()
def test_the_kernel_is_the_powers_of_hippo(N):
    layer = S4(2, N, dt_max=0.3, dtype=torch.float64)
    A, B = hippo(N)
    P = torch.sqrt(torch.arange(N, dtype=torch.float64) + 0.5)
    frequencies, V = torch.linalg.eigh(-1j * (A + P[:, None] * P + 0.5 * torch.eye(N)))
    frequencies, V = frequencies[N // 2 :], V[:, N // 2 :]
    V = V * torch.sgn(V.conj().T @ P.to(V.dtype))  # the phases for which V* P is positive
    close(layer.kernel.A_imag, frequencies.expand(2, -1), "frequencies", 1e-12)
    for channel in range(2):
        C = 2 * (torch.view_as_complex(layer.kernel.C[channel]) @ V.conj().T).real  # back to HiPPO's basis
        expected = powers(A, B, C, math.exp(layer.kernel.log_dt[channel]), 300)
        expected[0] += layer.kernel.D[channel]
        close(kernel_of(layer, 300)[channel], expected, f"channel {channel}", 1e-11)


@pytest.mark.parametrize("n_ssm", [None, 1, 2])
@torch.no_grad()
def test_the_kernel_is_the_powers_of_whatever_was_learned(n_ssm):
    layer = made(n_ssm=n_ssm)
    for channel in range(4):
        A, B, C, dt = dense(layer, channel)
        expected = powers(A, B, C, dt, 50)
        assert expected.imag.abs().max() < 1e-12
        expected.real[0] += layer.kernel.D[channel]
        close(kernel_of(layer, 50)[channel], expected.real, f"channel {channel}", 1e-12)


@torch.no_grad()
def test_kernels_of_two_lengths_agree_where_both_are():
    layer = made(d_state=64, moved=0.1)
    for shorter in (1, 2, 100, 999):
        close(kernel_of(layer, 1000)[:, :shorter], kernel_of(layer, shorter), f"length {shorter}", 1e-12)


@pytest.mark.parametrize("n_ssm", [None, 1, 2])
def test_contract(n_ssm):
    layer = made(n_ssm=n_ssm)
    check_contract(layer, 4, lengths=(1, 2, 7, 33, 200))
    check_gradients(made(d_state=4, n_ssm=n_ssm), 4)


@pytest.mark.parametrize("block", [1, 10])
def test_channels_in_blocks(block, monkeypatch):
    layer, x = made(), torch.randn(1, 5, 4, dtype=torch.float64)
    whole, _ = layer(x)
    monkeypatch.setattr(module, "KERNEL_BLOCK", block)
    blocks, _ = layer(x)
    close(blocks.detach(), whole.detach(), "blocks", 1e-13)


def test_float32_modes_agree_over_a_long_sequence():
    torch.manual_seed(1)
    layer, x = S4(2, 64), torch.randn(1, 1200, 2) + 0.5
    with torch.no_grad():
        whole, last = layer(x)
        first, state = layer(x[:, :500])
        second, after = layer(x[:, 500:], state)
        close(torch.cat([first, second], 1), whole, "two pieces", 1e-5)
        states_close(after, last, "two pieces", 1e-5)
        stepped, state = [], layer.init_state(1)
        for t in range(x.shape[1]):
            y, state = layer.step(x[:, t], state)
            stepped.append(y)
        close(torch.stack(stepped, 1), whole, "steps", 1e-5)
        states_close(state, last, "steps", 1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 101])
def test_inverse_of_a_power_series(length):
    a = 0.4 * torch.randn(3, length, dtype=torch.float64)
    a[:, 0] = 1
    one = torch.zeros_like(a)
    one[:, 0] = 1
    inverse = inverse_series(a)
    by_hand = torch.zeros_like(a)
    for t in range(length):  # the coefficients one after another
        by_hand[:, t] = one[:, t] - sum(a[:, j] * by_hand[:, t - j] for j in range(1, t + 1))
    close(inverse, by_hand, "by recursion", 1e-10)
    close(multiply_series(a, inverse) / inverse.abs().max(), one / inverse.abs().max(), "times a", 1e-12)


def test_the_feedback_does_not_grow():
    """The loop's response is bounded at all frequencies where A is dissipative: what makes the power series safe."""
    kernel = made(d_state=64, moved=0.1, dt_max=1.0).kernel
    loop = kernel.discretise().kernels(2000, torch.float64).loop
    dt, A = kernel.log_dt.exp()[:, None], torch.complex(-kernel.A_log.exp(), kernel.A_imag)
    weights = kernel.P.square().sum(-1)  # |P|^2, of either entry of a conjugate pair
    bound = 1 + dt * ((1 / (1 - dt / 2 * A)).real * weights).sum(-1, keepdim=True)
    response = torch.fft.rfft(loop, 8000).abs()
    assert (response <= bound * (1 + 1e-9)).all() and bound.max() < 10


def test_initialisation():
    kernel = S4(500, 16, n_ssm=1, dtype=torch.float64).kernel
    assert kernel.A_log.shape == (1, 8) and kernel.C.shape == (500, 8, 2)
    close(kernel.A_log.detach().exp(), torch.full((1, 8), 0.5, dtype=torch.float64), "-Re Λ", 1e-12)
    close(kernel.B.detach(), math.sqrt(2) * kernel.P.detach(), "B", 1e-12)
    assert abs(2 * kernel.B.square().sum().item() - 16**2) < 1e-9  # |B|^2 is the sum of 2n + 1
    frequencies, _ = legs(16)
    assert (frequencies > 0).all() and S4(6, 16).kernel.A_log.shape == (6, 8)
    assert math.log(0.001) <= kernel.log_dt.min() and kernel.log_dt.max() <= math.log(0.1)
    assert abs(kernel.C.square().sum(-1).mean().item() - 1) < 0.05 and abs(kernel.D.std().item() - 1) < 0.15


def test_the_state_is_wide_and_of_the_stated_size():
    layer = S4(5, 64, dtype=torch.bfloat16)
    assert state_bytes(layer.init_state(3, torch.bfloat16)) == 3 * 5 * 32 * 8
    assert layer(torch.randn(2, 3, 5).bfloat16())[1].h.dtype == torch.complex64
    assert layer.double()(torch.randn(2, 3, 5).double())[1].h.dtype == torch.complex128


def test_bfloat16_and_autocast():
    layer, x = made(dtype=torch.float32), torch.randn(2, 40, 4)
    with torch.no_grad():
        y, state = layer(x)
        narrow, _ = layer.bfloat16()(x.bfloat16())
        assert narrow.dtype == torch.bfloat16
        close(narrow.float(), y, "bfloat16", 2e-2)
        step, _ = layer.step(x[:, 0].bfloat16(), layer.init_state(2))
        assert step.dtype == torch.bfloat16
        close(step.float(), y[:, 0], "step in bfloat16", 2e-2)
        with torch.autocast("cpu", torch.bfloat16):
            inside, same = layer(x)
            assert torch.equal(inside, y) and torch.equal(same.h, state.h)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel() * (2 if tensor.is_complex() else 1))
        return result


def test_memory_does_not_grow_with_length_times_d_state():
    layer, x = S4(4, 64), torch.randn(2, 4096, 4)
    state = layer(x[:, :3])[1]
    with LargestTensor() as largest:
        y, after = layer(x, state)
        (y.sum() + after.h.abs().sum()).backward()
    assert largest.numel <= 8 * x.numel()  # with d_state it would be 64 times


def test_made_without_memory_first():
    layer = S4(3, 8, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(1, 4, 3))[0].isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match=r"must be even, got 7; take 8$"):
        S4(3, 7)
    with pytest.raises(ValueError, match="at least 1, got 3 and 0"):
        S4(3, 0)
    with pytest.raises(ValueError, match="n_ssm must divide width, got 2 and 3; 1 shares"):
        S4(3, 8, n_ssm=2)
    with pytest.raises(ValueError, match=r"0 < dt_min <= dt_max, got -1 and 0\.1"):
        S4(3, 8, dt_min=-1)
