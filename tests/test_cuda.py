"""A GPU gives the same results as the CPU: operators, layer, model, autocast, single steps."""

from __future__ import annotations

import copy

import pytest
import torch

from anymamba.layers.mamba import Mamba
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.models.mixers import MIXERS
from anymamba.ops.causal_conv1d import causal_conv1d
from anymamba.ops.selective_scan import selective_scan
from anymamba.parts.options import AttentionOptions, MambaOptions
from anymamba.parts.state import map_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def assert_close(gpu: torch.Tensor, cpu: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("b_discretization", ["euler", "zoh"])
def test_operators(packed: bool, b_discretization: str) -> None:
    torch.manual_seed(0)
    batch, length, d_inner, d_state = (1, 301, 40, 16) if packed else (3, 77, 40, 16)
    offsets = torch.tensor([0, 5, 5, 120, length], dtype=torch.int32) if packed else None
    rows = 4 if packed else batch
    u, delta, z = torch.randn(3, batch, length, d_inner)
    B, C = torch.randn(2, batch, length, d_state)
    A, h, weight = -torch.rand(d_inner, d_state), torch.randn(rows, d_inner, d_state), torch.randn(d_inner, 4)
    inputs = (u, delta, A, B, C, z, h, weight)
    outputs = []
    for device in ("cuda", "cpu"):
        leaves = [t.to(device).requires_grad_() for t in inputs]
        u_, delta_, A_, B_, C_, z_, h_, weight_ = leaves
        cu_seqlens = None if offsets is None else offsets.to(device)
        x = causal_conv1d(u_, weight_, activation="silu", cu_seqlens=cu_seqlens).y
        out = selective_scan(
            x,
            delta_,
            A_,
            B_,
            C_,
            None,
            z_,
            delta_softplus=True,
            b_discretization=b_discretization,
            initial_state=h_,
            cu_seqlens=cu_seqlens,
        )
        loss = out.y.square().sum() + out.last_state.square().sum()
        outputs.append((out.y, out.last_state, *torch.autograd.grad(loss, leaves)))
    for gpu, cpu in zip(*outputs, strict=True):
        scale = cpu.abs().max()
        assert_close(gpu / scale.cuda(), cpu / scale)


def test_layer_on_the_gpu_keeps_its_ssm_parameters_wide() -> None:
    layer = Mamba(32).to("cuda", torch.bfloat16)
    assert layer.in_proj.weight.dtype == torch.bfloat16
    assert {p.dtype for p in layer.ssm.parameters()} == {torch.float32}
    y, state = layer(torch.randn(2, 9, 32, device="cuda", dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and state.ssm.dtype == torch.float32


@pytest.mark.parametrize("options", [MambaOptions(), MambaOptions(A_init="s4d-lin", b_discretization="zoh")])
def test_model_whole_chunks_steps_and_cpu(options: MambaOptions) -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(d_model=32, n_layers=2, vocab_size=50, mamba=options))
    ids = torch.randint(0, 50, (2, 40))
    with torch.no_grad():
        expected = model(ids).logits
        model.cuda()
        whole = model(ids.cuda())
        assert_close(whole.logits, expected)
        state = model.init_state(2)
        logits = []
        for t in range(40):
            out = model.step(ids[:, t].cuda(), state)
            state = out.state
            logits.append(out.logits)
        assert_close(torch.stack(logits, 1), expected)
        first = model(ids[:, :13].cuda())
        second = model(ids[:, 13:].cuda(), first.state)
        assert_close(torch.cat([first.logits, second.logits], 1), expected)
        map_state(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4) or a, second.state, whole.state)


def test_training_under_bfloat16_autocast_learns() -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(d_model=64, n_layers=2, vocab_size=16)).cuda()
    model.activation_checkpointing = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    ids = torch.randint(0, 16, (4, 65), device="cuda")
    losses = []
    for _ in range(60):
        with torch.autocast("cuda", torch.bfloat16):
            out = model.loss(ids[:, :-1], ids[:, 1:])
        (out.loss / out.n_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((out.loss / out.n_tokens).item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_in_a_model(name: str) -> None:
    """Losses and gradients of padded rows, and steps, are the same as on the CPU."""
    torch.manual_seed(0)
    attention = AttentionOptions(n_heads=4, positions="absolute", max_positions=100)
    model = LanguageModel(ModelConfig(d_model=32, n_layers=2, vocab_size=20, mixers=(name,), attention=attention))
    there = copy.deepcopy(model).cuda()
    ids, mask = torch.randint(0, 20, (3, 50)), torch.ones(3, 50)
    mask[1, :7] = 0
    losses = [m.loss(i, i, attention_mask=k) for m, i, k in ((model, ids, mask), (there, ids.cuda(), mask.cuda()))]
    for loss in losses:
        loss.loss.backward()
    assert_close(losses[1].loss, losses[0].loss)
    for p, q in zip(model.parameters(), there.parameters(), strict=True):
        scale = p.grad.abs().max().clamp(min=1e-6)
        assert_close(q.grad / scale.cuda(), p.grad / scale, 1e-3)
    with torch.no_grad():
        whole, out = there(ids.cuda()).logits, there(ids[:, :45].cuda())
        for t in range(45, 50):
            out = there.step(ids[:, t].cuda(), out.state)
            assert_close(out.logits, whole[:, t].cpu())
