"""The compiled step of a whole model equals the step block by block, in every option and format."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import anymamba
from anymamba.models.config import ModelConfig
from anymamba.models.inference.native_step import NativeStep
from anymamba.models.inference.obstacles import WHOLE
from anymamba.models.language_model import LanguageModel, LanguageModelState
from anymamba.ops.packed_linear import FORMATS, pack
from anymamba.parts.options import AttentionOptions, MambaOptions
from anymamba.parts.packed import pack_modules
from anymamba.parts.state import map_state, select_rows, state_tensors
from anymamba.runtimes import native

if native.load() is None:
    pytest.skip(f"no compiled kernels here: {native.reason()}", allow_module_level=True)

SMALL = ModelConfig(d_model=40, n_layers=3, vocab_size=101)
OPTIONS = {
    "plain": SMALL,
    "odd": replace(SMALL, d_model=37, mamba=MambaOptions(d_state=5, d_conv=3, expand=1.5, dt_rank=3)),
    "wide state": replace(SMALL, mamba=MambaOptions(d_state=37, d_conv=7)),
    "no memory in the convolution": replace(SMALL, mamba=MambaOptions(d_conv=1, conv_bias=False)),
    "biases": replace(SMALL, mamba=MambaOptions(bias=True)),
    "zero-order hold": replace(SMALL, mamba=MambaOptions(b_discretization="zoh")),
    "constant step": replace(SMALL, mamba=MambaOptions(selective_delta=False)),
    "constant B": replace(SMALL, mamba=MambaOptions(selective_B=False)),
    "constant C": replace(SMALL, mamba=MambaOptions(selective_C=False)),
    "nothing selective": replace(
        SMALL, mamba=MambaOptions(selective_delta=False, selective_B=False, selective_C=False)
    ),
    "Jamba's norms": replace(SMALL, mamba=MambaOptions(inner_norms=True)),
    "FalconMamba's norms": replace(SMALL, mamba=MambaOptions(inner_norms=True, inner_norm_weights=False)),
    "output norm": replace(SMALL, mamba=MambaOptions(output_norm="rmsnorm")),
    "output LayerNorm": replace(SMALL, mamba=MambaOptions(output_norm="layernorm"), norm="layernorm"),
    "own head": replace(SMALL, tie_embeddings=False, residual_in_fp32=False),
    "several chunks": ModelConfig(d_model=160, n_layers=2, vocab_size=2000),
}


def build(moved, config: ModelConfig) -> LanguageModel:
    """A model with steps so long that some decays vanish, and with some that are almost nothing."""
    model = moved(config)
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.ssm.delta_bias[::7] += 20
            block.mixer.ssm.delta_bias[1::7] -= 20
    return model


def compiled(model: LanguageModel) -> NativeStep:
    found = NativeStep.of(model)
    assert isinstance(found, NativeStep), found
    return found


def state_after_some(model: LanguageModel, rows: int) -> LanguageModelState:
    """Of rows that have read different tokens."""
    ids = torch.randint(0, model.config.vocab_size, (rows, 5), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids).state


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def assert_same_steps(step, model: LanguageModel, rows: int, tolerance: float, n_steps: int = 3) -> None:
    """Both ways go on from their own states; the tokens are given."""
    ours = theirs = state_after_some(model, rows)
    generator = torch.Generator().manual_seed(4)
    for _ in range(n_steps):
        ids = torch.randint(0, model.config.vocab_size, (rows,), generator=generator)
        with torch.no_grad():
            assert step.serves(ids, ours)
            got, wanted = step.step(ids, ours), LanguageModel.step(model, ids, theirs)
        ours, theirs = got.state, wanted.state
        assert difference(got.logits, wanted.logits) <= tolerance
        for mine, other in zip(state_tensors(ours), state_tensors(theirs), strict=True):
            assert mine.shape == other.shape and (not other.numel() or difference(mine, other) <= tolerance)


SETS = native.module().instruction_sets()
CASES = [(SETS[0], name) for name in OPTIONS] + [(other, name) for other in SETS[1:] for name in ("odd", "wide state")]


@pytest.mark.parametrize(("instruction_set", "name"), CASES)
def test_every_option_equals_block_by_block(moved, instruction_set, name):
    before = native.module().instruction_set()
    native.module().choose_instruction_set(instruction_set)
    try:
        model = build(moved, OPTIONS[name])
        assert_same_steps(compiled(model), model, 3, 2e-5)
    finally:
        native.module().choose_instruction_set(before)


def packed(model: LanguageModel, format: str) -> LanguageModel:
    """A copy with packed matrices; those whose columns are no whole number of blocks are bfloat16."""
    matrices = {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}
    weights = {
        name: pack(matrix, format if matrix.shape[1] % FORMATS[format].columns == 0 else "bfloat16")
        for name, matrix in matrices.items()
        if "conv" not in name and "ssm" not in name
    }
    result = copy.deepcopy(model)
    pack_modules(result, weights)
    return result


ONE_BLOCK = ModelConfig(d_model=256, n_layers=1, vocab_size=70, tie_embeddings=False)
EXACT = ("float32", "float16")
"""Formats of numbers that float32 holds."""


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("q5_k", *EXACT)])
def test_every_format_and_batch_equals_block_by_block(moved, format):
    """Rounding to bfloat16 or int8 turns differences in the last digit into differences of one unit of those."""
    model = packed(build(moved, ONE_BLOCK), format)
    for rows in (1, 3, 64):
        assert_same_steps(compiled(model), model, rows, 2e-2, n_steps=2)


@pytest.mark.parametrize("format", EXACT)
def test_errors_are_those_of_block_by_block(moved, format):
    """Steps and decays of this model are so far apart that the last digit of a product shows in the fifth of a logit,
    by the order of sums of a processor. So each way is held against float64."""
    whole = build(moved, ONE_BLOCK)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(parameter.to(getattr(torch, format)))
    model, exact = packed(whole, format), copy.deepcopy(whole).double()
    step = compiled(model)
    for rows in (1, 3, 64):
        ours, theirs = errors_of_steps(step.step, exact, model, rows), errors_of_steps(model.step, exact, model, rows)
        assert ours <= 2 * theirs + 1e-6, f"{rows} rows: {ours:.1e} of the largest, block by block {theirs:.1e}"


def errors_of_steps(step, exact: LanguageModel, model: LanguageModel, rows: int) -> float:
    """The largest difference from steps in float64, relative to the largest value of each tensor."""
    ours = state_after_some(model, rows)
    wanted = map_state(torch.Tensor.double, ours)
    generator, errors = torch.Generator().manual_seed(4), []
    for _ in range(2):
        ids = torch.randint(0, model.config.vocab_size, (rows,), generator=generator)
        with torch.no_grad():
            got, true = step(ids, ours), exact.step(ids, wanted)
        ours, wanted = got.state, true.state
        pairs = zip([got.logits, *state_tensors(ours)], [true.logits, *state_tensors(wanted)], strict=True)
        errors += [difference(one.double(), other) for one, other in pairs]
    return max(errors)


def test_rows_do_not_depend_on_their_batch(moved):
    model = build(moved, SMALL)
    state, ids = state_after_some(model, 260), torch.arange(260) % 70
    together = compiled(model).step(ids, state)
    for row in (0, 1, 255, 256, 259):
        alone = compiled(model).step(ids[row : row + 1], select_rows(state, torch.tensor([row])))
        assert torch.equal(alone.logits[0], together.logits[row])
        for one, all_rows in zip(state_tensors(alone.state), state_tensors(together.state), strict=True):
            assert torch.equal(one[0], all_rows[row])


@pytest.mark.parametrize("rows", [1, 5])
def test_bits_do_not_depend_on_the_threads(moved, rows):
    model = build(moved, ModelConfig(d_model=640, n_layers=2, vocab_size=600))  # two threads share 24 MB
    step, state, ids = compiled(model), state_after_some(model, rows), torch.arange(rows)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += [step.step(ids, state) for _ in range(8)]
    torch.set_num_threads(2)
    for result in results[1:]:
        assert torch.equal(result.logits, results[0].logits)
        assert all(map(torch.equal, state_tensors(result.state), state_tensors(results[0].state)))


def test_a_state_is_a_value_unless_it_may_be_reused(moved):
    model = build(moved, SMALL)
    step, state, ids = compiled(model), state_after_some(model, 2), torch.tensor([4, 5])
    before = map_state(torch.Tensor.clone, state)
    fresh = step.step(ids, state)
    assert all(map(torch.equal, state_tensors(state), state_tensors(before)))
    reused = step.step(ids, state, reuse=True)
    assert torch.equal(reused.logits, fresh.logits)
    assert all(map(torch.equal, state_tensors(reused.state), state_tensors(fresh.state)))
    places = [[t.data_ptr() for t in state_tensors(s)] for s in (state, reused.state)]
    assert places[0] == places[1]


def test_strided_states_and_narrow_ids_are_served(moved):
    model = build(moved, SMALL)
    step, state, ids = compiled(model), state_after_some(model, 2), torch.tensor([4, 5])
    strided = map_state(lambda t: t.mT.contiguous().mT, state)
    wanted = step.step(ids, state)
    for reuse in (False, True):
        got = step.step(ids.int(), strided, reuse=reuse)
        assert torch.equal(got.logits, wanted.logits)


def test_an_id_outside_the_vocabulary_is_an_index_error(moved):
    model = build(moved, SMALL)
    for token in (-1, 104):
        with pytest.raises(IndexError, match=rf"token id {token} is outside the embedding's rows, 0 to 103"):
            compiled(model).step(torch.tensor([token]), model.init_state(1))


def test_a_changed_weight_is_seen(moved):
    model = build(moved, SMALL)
    step, state, ids = compiled(model), state_after_some(model, 1), torch.tensor([7])
    for name in ("A_log", "D"):
        with torch.no_grad():
            getattr(model.blocks[1].mixer.ssm, name).mul_(1.5)
            model.blocks[0].mixer.conv.weight.add_(0.1)
            model.blocks[0].mixer.out_proj.weight = nn.Parameter(2 * model.blocks[0].mixer.out_proj.weight)
            wanted = LanguageModel.step(model, ids, state)
        assert difference(step.step(ids, state).logits, wanted.logits) < 2e-5


def test_not_finite_numbers_stay_so(moved):
    model = build(moved, SMALL)
    with torch.no_grad():
        model.embedding.weight[3] = float("nan")
        model.embedding.weight[4] = float("inf")
    for token in (3, 4):
        assert not torch.isfinite(compiled(model).step(torch.tensor([token]), model.init_state(1)).logits).any()


# ---------------------------------------------------------------------------------------- what does not fit


class OwnLinear(nn.Linear):
    """A subclass may compute anything."""


def test_each_block_says_why_it_does_not_fit(moved):
    hybrid = replace(SMALL, n_layers=4, mixers=("mamba", "mlp", "mamba", "mamba"))
    model = moved(hybrid)
    mixer = model.blocks[2].mixer
    mixer.out_proj = OwnLinear(*mixer.out_proj.weight.T.shape, bias=False)
    model.blocks[3].mixer.D_hook = model.blocks[3].mixer.register_forward_hook(lambda *_: None)
    reasons = NativeStep.of(model)
    assert list(reasons) == [1, 2, 3]
    assert "its mixer is MLP" in reasons[1] and reasons[2] == "out_proj is a OwnLinear"


@pytest.mark.parametrize(
    ("config", "dtype", "where", "why"),
    [
        (replace(SMALL, mamba=MambaOptions(A_init="s4d-lin")), torch.float32, 0, "A is complex"),
        (replace(SMALL, attention=AttentionOptions(positions="absolute")), torch.float32, WHOLE, "table of positions"),
        (SMALL, torch.bfloat16, WHOLE, "embedding is torch.bfloat16"),
        (SMALL, torch.float64, WHOLE, "embedding is torch.float64"),
    ],
    ids=["complex", "positions", "bfloat16", "float64"],
)
def test_a_model_that_does_not_fit_says_why(moved, config, dtype, where, why):
    reasons = NativeStep.of(moved(config, dtype))
    assert why in reasons[where]


def test_arguments_that_it_cannot_take_are_refused(moved):
    model = build(moved, SMALL)
    step, state, ids = compiled(model), model.init_state(2), torch.tensor([1, 2])
    with torch.no_grad():
        assert step.serves(ids, state)
        assert not step.serves(ids[:1], state)
        assert not step.serves(ids.double(), state)
        assert not step.serves(ids[None], state)
        assert not step.serves(ids, map_state(torch.Tensor.double, state))
        assert not step.serves(ids, LanguageModelState(state.layers[:2], state.positions))
        with anymamba.backend("reference"):
            assert not step.serves(ids, state)
    assert not step.serves(ids, state)  # gradients may be wanted
