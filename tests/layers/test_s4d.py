"""S4D against loops over time and state, in float64; its initialisations, modes and sizes."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from contract import check_contract, check_gradients, close, states_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anymamba.layers.s4d import S4D
from anymamba.parts.diagonal import exact_dtype
from anymamba.parts.state import state_bytes

OPTIONS = [(init, rule) for init in ("s4d-lin", "s4d-inv", "s4d-real") for rule in ("zoh", "bilinear")]


def made(
    init: str = "s4d-lin", rule: str = "zoh", width: int = 3, d_state: int = 8, dtype=torch.float64, **options
) -> S4D:
    """A layer moved away from its initialisation."""
    torch.manual_seed(0)
    layer = S4D(width, d_state, init=init, discretization=rule, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def naive(layer: S4D, x: Tensor) -> Tensor:
    """The recurrence with Python's numbers."""
    k, y = layer.kernel, torch.zeros_like(x)
    for b in range(x.shape[0]):
        for d in range(x.shape[2]):
            dt = math.exp(k.log_dt[d].item())
            y[b, :, d] = k.D[d] * x[b, :, d]
            for n in range(k.A_log.shape[1]):
                A, C, pair = complex(-math.exp(k.A_log[d, n]), 0), complex(1), 1
                if k.A_imag is None:
                    C = complex(k.C[d, n])
                else:
                    A, C, pair = A + 1j * float(k.A_imag[d, n]), complex(*k.C[d, n].tolist()), 2
                if k.discretization == "zoh":
                    Abar, Bbar = cmath.exp(dt * A), (cmath.exp(dt * A) - 1) / A
                else:
                    Abar, Bbar = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
                h = 0
                for t in range(x.shape[1]):
                    h = Abar * h + Bbar * float(x[b, t, d])
                    y[b, t, d] += pair * (C * h).real
    return y


@pytest.mark.parametrize(("init", "rule"), OPTIONS)
def test_contract(init, rule):
    layer = made(init, rule)
    check_contract(layer, 3, lengths=(1, 2, 7, 33, 200))
    check_gradients(made(init, rule, d_state=4), 3)


@pytest.mark.parametrize(("init", "rule"), OPTIONS)
@pytest.mark.parametrize("length", [1, 37])
def test_it_is_the_recurrence(init, rule, length):
    layer, x = made(init, rule), torch.randn(2, length, 3, dtype=torch.float64)
    with torch.no_grad():
        close(layer(x)[0], naive(layer, x), f"{init}, {rule}", 1e-12)


def test_a_real_state_that_vanishes_at_once():
    """Bilinear with ΔA = -2 has Abar = 0, beyond it a negative Abar: powers, but no logarithms."""
    layer = S4D(2, 4, init="s4d-real", discretization="bilinear", dt_min=1.0, dt_max=1.0, dtype=torch.float64)
    x = torch.randn(1, 20, 2, dtype=torch.float64)
    y, _ = layer(x)
    close(y.detach(), naive(layer, x), "ΔA = -1, -2, -3, -4", 1e-12)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(("init", "rule"), OPTIONS)
def test_float32_modes_agree_over_a_long_sequence(init, rule):
    torch.manual_seed(1)
    layer, x = S4D(2, 64, init=init, discretization=rule), torch.randn(1, 1200, 2) + 0.5
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


def test_initialisation():
    n = torch.arange(16, dtype=torch.float64)
    for init, imaginary in (("s4d-lin", math.pi * n), ("s4d-inv", 32 / math.pi * (32 / (2 * n + 1) - 1))):
        kernel = S4D(500, 32, init=init, dtype=torch.float64).kernel
        close(kernel.A_log.detach().exp(), torch.full((500, 16), 0.5, dtype=torch.float64), "-Re A", 1e-12)
        close(kernel.A_imag.detach(), imaginary.expand(500, 16), "Im A", 1e-12)
        assert abs(kernel.C.square().sum(-1).mean().item() - 1) < 0.05
    real = S4D(500, 32, init="s4d-real", dtype=torch.float64).kernel
    close(real.A_log.detach().exp(), torch.arange(1.0, 33, dtype=torch.float64).expand(500, 32), "-A", 1e-12)
    assert real.A_imag is None and real.C.shape == (500, 32) and abs(real.C.std().item() - 1) < 0.05
    assert math.log(0.001) <= real.log_dt.min() < math.log(0.0012) and math.log(0.08) < real.log_dt.max() <= math.log(
        0.1
    )
    assert abs(real.log_dt.mean().item() - math.log(0.01)) < 0.25 and abs(real.D.std().item() - 1) < 0.15


def test_the_state_is_wide_and_of_the_stated_size():
    assert state_bytes(S4D(5, 64).init_state(3)) == 3 * 5 * 32 * 8
    assert state_bytes(S4D(5, 64, init="s4d-real").init_state(3)) == 3 * 5 * 64 * 4
    layer = S4D(5, 64, dtype=torch.bfloat16)
    for state in (layer.init_state(2, torch.bfloat16), layer(torch.randn(2, 3, 5).bfloat16())[1]):
        assert state.h.dtype == torch.complex64
    assert layer.double()(torch.randn(2, 3, 5).double())[1].h.dtype == torch.complex128
    assert exact_dtype(torch.device("cpu")) == torch.float64 and exact_dtype(torch.device("mps")) == torch.float32


@pytest.mark.parametrize("init", ["s4d-lin", "s4d-real"])
def test_bfloat16_and_autocast(init):
    layer, x = made(init, dtype=torch.float32), torch.randn(2, 40, 3)
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
    layer, x = S4D(4, 64), torch.randn(2, 4096, 4)
    state = layer(x[:, :3])[1]
    with LargestTensor() as largest:
        y, after = layer(x, state)
        (y.sum() + after.h.abs().sum()).backward()
    assert largest.numel <= 8 * x.numel()  # with d_state it would be 64 times


def test_training_keeps_little_more_than_the_input():
    layer, x, kept = S4D(8, 64), torch.randn(8, 1024, 8, requires_grad=True), {}  # far larger than the parameters

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y, _ = layer(x)
    assert sum(kept.values()) < 2 * x.numel() * 4
    y.sum().backward()


def test_made_without_memory_first():
    layer = S4D(3, 8, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(1, 4, 3))[0].isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match=r'must be even, got 7; take 8, or init="s4d-real", whose states are real$'):
        S4D(3, 7)
    assert S4D(3, 7, init="s4d-real").init_state(1).h.shape == (1, 3, 7)
    with pytest.raises(ValueError, match="at least 1, got 0 and 8"):
        S4D(0, 8)
    with pytest.raises(ValueError, match=r"s4d-lin, s4d-inv, s4d-real, got 's4d-log'"):
        S4D(3, 8, init="s4d-log")
    with pytest.raises(ValueError, match="zoh, bilinear, got 'euler'"):
        S4D(3, 8, discretization="euler")
    with pytest.raises(ValueError, match=r"0 < dt_min <= dt_max, got 0\.1 and 0\.001"):
        S4D(3, 8, dt_min=0.1, dt_max=0.001)
    with pytest.raises(ValueError, match="not both"):
        S4D(3, 8)(torch.zeros(1, 2, 3), attention_mask=torch.ones(1, 2), cu_seqlens=torch.tensor([0, 2]))
