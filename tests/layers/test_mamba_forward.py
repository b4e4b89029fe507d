"""The Mamba layer: whole == chunks == steps == packed == padded for every option."""

from __future__ import annotations

import itertools

import pytest
import torch

from anymamba import Mamba, MambaState
from anymamba.parts.state import concatenate_rows, select_rows, state_tensors

D_MODEL, LENGTH = 12, 21

OPTIONS = {
    "default": {},
    "d_state-1": {"d_state": 1},
    "d_state-5": {"d_state": 5},
    "d_conv-1": {"d_conv": 1},
    "d_conv-7": {"d_conv": 7},
    "expand-1": {"expand": 1},
    "expand-fractional": {"expand": 1.3},
    "dt_rank": {"dt_rank": 3},
    "dt_range": {"dt_min": 0.01, "dt_max": 0.5, "dt_init_floor": 0.02},
    "dt_init": {"dt_init": "constant", "dt_scale": 2.0},
    "no-conv_bias": {"conv_bias": False},
    "bias": {"bias": True},
    "zoh": {"b_discretization": "zoh"},
    "constant-delta": {"selective_delta": False},
    "constant-B": {"selective_B": False},
    "constant-C": {"selective_C": False},
    "constant-all": {"selective_delta": False, "selective_B": False, "selective_C": False},
    "A-complex": {"A_init": "s4d-lin", "b_discretization": "zoh"},
    "A-complex-constant": {"A_init": "s4d-lin", "selective_B": False, "selective_C": False},
    "A-constant": {"A_init": "constant"},
    "A-random": {"A_init": "random"},
    "rmsnorm": {"output_norm": "rmsnorm"},
    "layernorm": {"output_norm": "layernorm", "norm_eps": 1e-3},
    "inner_norms": {"inner_norms": True},
    "inner_norms-complex": {"inner_norms": True, "A_init": "s4d-lin", "selective_delta": False},
}


def layer_and_input(batch: int = 3, **options) -> tuple[Mamba, torch.Tensor]:
    """A layer in float64, moved away from its initialisation, and an input."""
    torch.manual_seed(0)
    layer = Mamba(D_MODEL, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer, torch.randn(batch, LENGTH, D_MODEL, dtype=torch.float64)


def assert_same(got, want, tolerance: float = 1e-12) -> None:
    pairs = list(zip(state_tensors(got), state_tensors(want), strict=True))
    for a, b in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype
        error = (a - b).abs().max().item() if a.numel() else 0.0
        assert error <= tolerance, f"error {error:.3e}, allowed {tolerance:.3e}"


def some_state(layer: Mamba, batch: int) -> MambaState:
    """A state that is not zero."""
    zeros = layer.init_state(batch)
    return MambaState(*(torch.randn_like(t) for t in zeros))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_whole_equals_chunks_equals_steps(options):
    layer, x = layer_and_input(**options)
    y, last = layer(x)
    assert y.shape == x.shape
    for cuts in ([7, 8, LENGTH], [0, LENGTH]):
        pieces, state = [], layer.init_state(3)
        for start, stop in itertools.pairwise([0, *cuts]):
            piece, state = layer(x[:, start:stop], state)
            pieces.append(piece)
        assert_same((torch.cat(pieces, 1), state), (y, last))
    tokens, state = [], layer.init_state(3)
    for t in range(LENGTH):
        token, state = layer.step(x[:, t], state)
        tokens.append(token)
    assert_same((torch.stack(tokens, 1), state), (y, last))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_packed_equals_one_by_one(options):
    layer, x = layer_and_input(1, **options)
    lengths = [4, 0, 16, 1]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    state = some_state(layer, 4)
    y, last = layer(x, state, cu_seqlens=offsets)
    alone = [
        layer(x[:, start:stop], select_rows(state, torch.tensor([i])))
        for i, (start, stop) in enumerate(itertools.pairwise(offsets.tolist()))
    ]
    assert_same((y, last), (torch.cat([y for y, _ in alone], 1), concatenate_rows([s for _, s in alone])))


def masks() -> torch.Tensor:
    """Rows padded left, right, with holes, not at all, and altogether."""
    mask = torch.ones(5, LENGTH, dtype=torch.bool)
    mask[0, :6] = False
    mask[1, -6:] = False
    mask[2, [0, 3, 4, 9, 20]] = False
    mask[4] = False
    return mask


@pytest.mark.parametrize("carried", [False, True], ids=["from zeros", "carried"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_padded_equals_unpadded(options, carried):
    layer, x = layer_and_input(5, **options)
    mask = masks()
    state = some_state(layer, 5) if carried else None
    y, last = layer(x, state, attention_mask=mask)
    for row in range(5):
        before = None if state is None else select_rows(state, torch.tensor([row]))
        alone, after = layer(x[row : row + 1, mask[row]], before)
        assert_same((y[row : row + 1, mask[row]], select_rows(last, torch.tensor([row]))), (alone, after))


def test_short_prompts_padded_left_keep_the_conv_state_of_before():
    """Fewer real tokens than the convolution is wide: its state reaches into what came before the row."""
    layer, x = layer_and_input(2, d_conv=7)
    mask = torch.zeros(2, LENGTH)
    mask[0, -2:] = 1
    state = some_state(layer, 2)
    _, last = layer(x, state, attention_mask=mask)
    assert torch.equal(last.conv[0, :4], state.conv[0, 2:])
    assert torch.equal(last.conv[1], state.conv[1]) and torch.equal(last.ssm[1], state.ssm[1])


def test_gradients_of_padded_inputs_are_zero_and_the_others_those_without_padding():
    layer, x = layer_and_input(5)
    mask = masks()
    x.requires_grad_()
    y, last = layer(x, attention_mask=mask)
    loss = y[mask].square().sum() + sum(t.square().sum() for t in last)
    padded = torch.autograd.grad(loss, [x, *layer.parameters()])
    assert padded[0][~mask].eq(0).all()
    total = torch.zeros((), dtype=torch.float64)
    for row in range(5):
        y, last = layer(x[row : row + 1, mask[row]])
        total = total + y.square().sum() + sum(t.square().sum() for t in last)
    assert_same(tuple(padded), torch.autograd.grad(total, [x, *layer.parameters()]), 1e-9)


def test_padding_may_hold_anything():
    layer, x = layer_and_input(5)
    mask = masks()
    want = layer(x, attention_mask=mask)
    dirty = torch.where(mask[..., None], x, torch.full_like(x, 1e4))
    got = layer(dirty, attention_mask=mask)
    assert_same((got[0][mask], got[1]), (want[0][mask], want[1]), 0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool], ids=str)
def test_masks_of_any_dtype(dtype):
    layer, x = layer_and_input(5)
    assert_same(layer(x, attention_mask=masks().to(dtype)), layer(x, attention_mask=masks()), 0)


@pytest.mark.parametrize("options", [{}, {"A_init": "s4d-lin"}, {"selective_delta": False}], ids=str)
def test_causality(options):
    layer, x = layer_and_input(2, **options)
    before, _ = layer(x)
    x[:, 9] += 1
    after, _ = layer(x)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().amax((0, 2)).gt(0).all()


def test_a_row_does_not_depend_on_the_others():
    layer, x = layer_and_input(3)
    y, last = layer(x)
    for row in range(3):
        assert_same(layer(x[row : row + 1]), (y[row : row + 1], select_rows(last, torch.tensor([row]))))


def test_empty_inputs():
    layer, x = layer_and_input(3)
    y, last = layer(x[:0])
    assert y.shape == (0, LENGTH, D_MODEL) and last.ssm.shape == (0, 24, 16)
    state = some_state(layer, 3)
    y, last = layer(x[:, :0], state)
    assert y.shape == (3, 0, D_MODEL)
    assert_same(last, state, 0)


def test_nothing_is_remembered_on_the_module():
    layer, x = layer_and_input()
    names = set(vars(layer))
    first = layer(x)
    layer.step(x[:, 0], layer.init_state(3))
    assert set(vars(layer)) == names and not list(layer.buffers())
    assert_same(layer(x), first, 0)


def test_the_state_that_goes_in_is_left_as_it_was():
    layer, x = layer_and_input()
    state = some_state(layer, 3)
    before = MambaState(*(t.clone() for t in state))
    layer(x, state)
    layer.step(x[:, 0], state)
    assert_same(state, before, 0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_gets_a_gradient(options):
    layer, x = layer_and_input(**options)
    layer(x)[0].square().sum().backward()
    assert [n for n, p in layer.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, p in layer.named_parameters() if p.grad.abs().max() == 0] == []


def test_a_constant_step_has_no_projection():
    layer, _ = layer_and_input(selective_delta=False, selective_B=False, selective_C=False)
    assert layer.x_proj is None and layer.dt_proj is None
    layer, _ = layer_and_input(selective_B=False, dt_rank=3)
    assert layer.x_proj.weight.shape == (3 + 16, 24)
    layer, _ = layer_and_input(A_init="s4d-lin", dt_rank=3)
    assert layer.x_proj.weight.shape == (3 + 4 * 16, 24)


def test_mask_and_packing_exclude_each_other():
    layer, x = layer_and_input(1)
    with pytest.raises(ValueError, match="give attention_mask or cu_seqlens, not both"):
        layer(x, attention_mask=torch.ones(1, LENGTH), cu_seqlens=torch.tensor([0, LENGTH]))


def test_a_mask_of_another_shape():
    layer, x = layer_and_input(2)
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, length\) = \(2, 21\), got \(2, 20\)"):
        layer(x, attention_mask=torch.ones(2, 20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
        ({"d_conv": 0}, "d_conv must be at least 1, got 0"),
        ({"expand": 0.01}, "d_inner must be at least 1, got 0"),
        ({"dt_rank": 0}, "dt_rank must be at least 1, got 0"),
        ({"dt_init": "zeros"}, 'dt_init must be "random" or "constant", got \'zeros\''),
        ({"A_init": "hippo"}, "A_init must be .* got 'hippo'"),
        ({"output_norm": "batchnorm"}, "norm must be one of rmsnorm, layernorm, got 'batchnorm'"),
        ({"b_discretization": "bilinear"}, 'b_discretization must be "euler" or "zoh", got \'bilinear\''),
    ],
)
def test_options_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba(D_MODEL, **options)


# ------------------------------------------------------------------------------------------ precision and torch


@pytest.mark.parametrize("options", [{}, {"A_init": "s4d-lin"}, {"selective_C": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_the_ssm_in_float32(dtype, options):
    layer, x = layer_and_input(**options)
    want, _ = layer(x)
    layer = layer.to(dtype)
    y, state = layer(x.to(dtype))
    assert y.dtype == dtype == state.conv.dtype
    assert state.ssm.dtype == (torch.complex64 if layer.ssm.is_complex else torch.float32)
    assert {p.dtype for p in layer.ssm.parameters()} == {torch.float32}
    assert (y.double() - want).abs().max() < 0.1 * want.abs().max()
    token, state = layer.step(x[:, 0].to(dtype), state)
    assert token.dtype == dtype and state.ssm.dtype.is_complex == layer.ssm.is_complex
    zeros = layer.init_state(3)
    assert zeros.conv.dtype == dtype and zeros.ssm.dtype == state.ssm.dtype


def test_autocast_keeps_the_state_in_float32_and_the_result_close():
    layer, x = layer_and_input()
    layer, x = layer.float(), x.float()
    want, exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
        token, _ = layer.step(x[:, 0], layer.init_state(3))
    assert y.dtype == torch.bfloat16 and state.ssm.dtype == torch.float32
    assert (y - want).abs().max() < 0.05 * want.abs().max()
    assert (state.ssm - exact.ssm).abs().max() < 0.05 * exact.ssm.abs().max()
    assert (token - y[:, 0]).abs().max() < 0.02 * want.abs().max()
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


def test_compile_fullgraph_with_dynamic_length():
    torch._dynamo.reset()
    layer, x = layer_and_input()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (LENGTH, 13, 8):
        assert_same(compiled(x[:, :length]), layer(x[:, :length]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(compiled(x[:, :17]), layer(x[:, :17]))


@pytest.mark.parametrize("kind", ["state", "mask", "packed"])
def test_compile_with_a_state_a_mask_and_packing(kind):
    torch._dynamo.reset()
    layer, x = layer_and_input(1 if kind == "packed" else 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    options = {
        "state": {"state": some_state(layer, 5)},
        "mask": {"attention_mask": masks()},
        "packed": {"cu_seqlens": torch.tensor([0, 4, 4, LENGTH], dtype=torch.int32)},
    }[kind]
    assert_same(compiled(x, **options), layer(x, **options))


def test_compile_of_the_step():
    torch._dynamo.reset()
    layer, x = layer_and_input()
    state = some_state(layer, 3)
    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    assert_same(step(x[:, 0], state), layer.step(x[:, 0], state))


class Stepper(torch.nn.Module):
    def __init__(self, layer: Mamba) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x, state):
        return self.layer.step(x, state)


def exported_names(program) -> set[str]:
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    return {str(node.target) for graph in graphs for node in graph.nodes}


@pytest.mark.parametrize("options", [{}, {"b_discretization": "zoh"}, {"inner_norms": True, "bias": True}], ids=str)
def test_export_of_the_step_is_plain_torch(options):
    layer, x = layer_and_input(**options)
    state = some_state(layer, 3)
    program = torch.export.export(Stepper(layer), (x[:, 0], state))
    assert not [name for name in exported_names(program) if "anymamba" in name]
    assert_same(program.module()(x[:, 0], state), layer.step(x[:, 0], state))


def test_export_of_the_layer_with_dynamic_length():
    layer, x = layer_and_input()
    length = torch.export.Dim("length", min=1, max=4096)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {1: length}})
    assert any("anymamba" in name for name in exported_names(program))
    for n in (LENGTH, 2, 50):
        x = torch.randn(3, n, D_MODEL, dtype=torch.float64)
        assert_same(program.module()(x), layer(x))


def test_deepcopy_and_state_dict():
    import copy

    layer, x = layer_and_input(A_init="s4d-lin", selective_B=False)
    twin = copy.deepcopy(layer)
    assert_same(twin(x), layer(x), 0)
    fresh = Mamba(D_MODEL, A_init="s4d-lin", selective_B=False).double()
    fresh.load_state_dict(layer.state_dict())
    assert_same(fresh(x), layer(x), 0)
