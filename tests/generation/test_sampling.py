"""Sampling against a plain numpy implementation; every option, every error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anymamba.generation.sampling import RowDraws, SamplingConfig, filter_logits, sample


def naive(logits, config: SamplingConfig, seen=None) -> set[int]:
    """Ids that one row keeps, in float64, token by token."""
    x = penalized(logits, config, seen)
    x = [v / config.temperature for v in x]
    kept = set(range(len(x)))
    if config.top_k is not None:
        limit = sorted(x, reverse=True)[min(config.top_k, len(x)) - 1]
        kept = {i for i in kept if x[i] >= limit}
    if config.top_p is not None and config.top_p < 1:
        total = sum(math.exp(x[i] - max(x)) for i in kept)
        mass, limit = 0.0, None
        for i in sorted(kept, key=lambda i: -x[i]):
            assume(abs(mass - config.top_p) > 1e-5)  # a tie of the float32 sum
            if mass >= config.top_p:
                break
            mass, limit = mass + math.exp(x[i] - max(x)) / total, x[i]
        kept = {i for i in kept if x[i] >= limit}
    if config.min_p:
        top = max(x)
        assume(all(abs(x[i] - top - math.log(config.min_p)) > 1e-4 for i in kept))
        kept = {i for i in kept if math.exp(x[i] - top) >= config.min_p}
    return kept


def penalized(logits, config, seen):
    penalty, seen = config.repetition_penalty, seen if seen is not None else [False] * len(logits)
    return [(v / penalty if v > 0 else v * penalty) if s else v for v, s in zip(map(float, logits), seen, strict=True)]


configs = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.7]),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.05, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7, 4.0]),
)
# On a grid: equal logits are exactly equal, different ones clearly different.
rows = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=10)


@settings(max_examples=300, deadline=None)
@given(rows, configs, st.integers(0, 2**10 - 1))
def test_filters_equal_the_naive_ones(row, config, bits):
    seen = [bool(bits >> i & 1) for i in range(len(row))]
    x = filter_logits(torch.tensor([row]), config, torch.tensor([seen]))[0]
    assert x.dtype == torch.float32
    kept = naive(row, config, seen)
    assert {i for i, v in enumerate(x.tolist()) if v > -math.inf} == kept
    wanted = np.array(penalized(row, config, seen)) / config.temperature
    wanted = np.where([i in kept for i in range(len(row))], np.exp(wanted - wanted.max()), 0)
    np.testing.assert_allclose(x.softmax(-1).numpy(), wanted / wanted.sum(), atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(rows, configs, st.floats(0, 1, exclude_max=True))
def test_draws_never_pick_a_removed_token(row, config, draw):
    chosen = sample(torch.tensor([row]), config, torch.tensor([draw], dtype=torch.float64))
    assert torch.isfinite(filter_logits(torch.tensor([row]), config))[0, chosen[0]]


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_pick_tokens_that_exist(draw):
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]])
    assert sample(logits, SamplingConfig(), torch.tensor([draw], dtype=torch.float64)).item() in (1, 2)


def test_min_p_is_relative_to_the_likeliest_token_not_to_token_0():
    logits = torch.tensor([[0.01, 0.5, 0.4, 0.09]]).log()
    kept = filter_logits(logits, SamplingConfig(min_p=0.5))
    assert torch.isfinite(kept).tolist() == [[False, True, True, False]]


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    for p, kept in ((0.3, {1}), (0.5001, {1, 3}), (0.74, {1, 3}), (0.76, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        x = filter_logits(logits, SamplingConfig(top_p=p))[0]
        assert {i for i in range(4) if torch.isfinite(x[i])} == kept, p


def test_top_p_of_a_wide_vocabulary_keeps_its_tail_at_1():
    logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0)) * 8
    assert torch.isfinite(filter_logits(logits, SamplingConfig(top_p=1.0))).all()


def test_equal_tokens_are_kept_together():
    logits = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    for config in (SamplingConfig(top_k=2), SamplingConfig(top_p=0.4)):
        assert torch.isfinite(filter_logits(logits, config)).tolist() == [[True, True, False, True]]


def test_draws_follow_the_distribution():
    logits, n = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), 20_000
    draws = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = sample(logits.expand(n, -1), SamplingConfig(), draws).bincount(minlength=4) / n
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=2 / n, rtol=0)
    hot = sample(logits.expand(n, -1), SamplingConfig(temperature=2.0), draws).bincount(minlength=4) / n
    torch.testing.assert_close(hot, (logits / 2).softmax(-1), atol=2 / n, rtol=0)


def test_tokens_of_tiny_probability_can_be_drawn():
    logits = torch.full((1, 50_000), -18.0)
    logits[0, 0] = 0.0  # the others have 1.5e-8 each, 7.6e-4 together
    draws = torch.linspace(0.9993, 0.99999, 101, dtype=torch.float64)
    chosen = sample(logits.expand(101, -1), SamplingConfig(), draws)
    assert len(set(chosen.tolist())) == 101


def test_greedy_takes_the_likeliest_after_the_penalty():
    logits = torch.tensor([[3.0, 2.0, -1.0], [-3.0, -1.0, -2.0]])
    greedy = SamplingConfig(temperature=0)
    assert sample(logits, greedy).tolist() == [0, 1]
    penalty = SamplingConfig(temperature=0, repetition_penalty=2.5)
    seen = torch.tensor([[True, False, False], [False, True, False]])
    assert sample(logits, penalty, seen=seen).tolist() == [1, 2]
    assert sample(logits, penalty).tolist() == [0, 1]


def test_a_tiny_temperature_is_greedy_without_overflow():
    logits = torch.tensor([[90.0, 89.0, -90.0]])
    x = filter_logits(logits, SamplingConfig(temperature=1e-38))
    assert x.softmax(-1).tolist() == [[1.0, 0.0, 0.0]]


def test_low_precision_logits_are_filtered_in_float32():
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    config = SamplingConfig(temperature=0.7, top_p=0.9)
    low = logits.bfloat16()
    assert torch.equal(filter_logits(low, config), filter_logits(low.float(), config))


def test_a_row_draws_by_its_own_seed():
    one = RowDraws(7, 3)
    first = [one.next([0, 1, 2]) for _ in range(4)]
    other = RowDraws(7, 3)
    assert torch.equal(torch.stack([other.next([2]) for _ in range(4)])[:, 0], torch.stack(first)[:, 2])
    assert len({x.item() for step in first for x in step}) == 12
    listed = RowDraws([5, 7], 2)
    assert torch.equal(listed.next([1]), RowDraws(7, 1).next([0]))
    assert not torch.equal(RowDraws(8, 1).next([0]), RowDraws(7, 1).next([0]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature must be a number of at least 0, got -0.1"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"top_k": 1.5}, "top_k must be"),
        ({"top_k": True}, "top_k must be"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1, got 1.01"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"min_p": -0.1}, "min_p must lie between 0 and 1, got -0.1"),
        ({"min_p": 1.1}, "min_p must"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a positive number, got 0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty must"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        SamplingConfig(**options)


def test_misuse_of_sample():
    with pytest.raises(ValueError, match="needs draws"):
        sample(torch.zeros(1, 3), SamplingConfig())
    with pytest.raises(ValueError, match="temperature 0"):
        filter_logits(torch.zeros(1, 3), SamplingConfig(temperature=0))
    with pytest.raises(ValueError, match="one number or one per prompt, got 3 for 2 prompts"):
        RowDraws([1, 2, 3], 2)
    with pytest.raises(ValueError, match="a seed must lie between 0 and"):
        RowDraws(-1, 1)


# --------------------------------------------------------------------------------------------- one row

FILTERS = [
    SamplingConfig(),
    SamplingConfig(temperature=0.7, top_p=0.9),
    SamplingConfig(temperature=1.3, top_k=40, top_p=0.95, min_p=0.02, repetition_penalty=1.2),
    SamplingConfig(top_p=1e-6),
]


@pytest.mark.parametrize("config", FILTERS, ids=["plain", "top-p", "all", "one token"])
@pytest.mark.parametrize("vocab_size", [1, 13, 257, 5003])
def test_one_row_has_the_tokens_that_it_has_in_a_batch(config, vocab_size):
    """One row is drawn by numpy, several by torch; the bits before the draw are equal, too."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (4 * torch.randn(40, vocab_size, generator=generator)).mul(8).round().div(8)  # with ties
    draws = torch.rand(40, dtype=torch.float64, generator=generator)
    draws[:2] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    seen = torch.rand(40, vocab_size, generator=generator) < 0.2
    together, filtered = sample(logits, config, draws, seen), filter_logits(logits, config, seen)
    for row in range(40):
        part = slice(row, row + 1)
        assert sample(logits[part], config, draws[part], seen[part]).tolist() == [together[row]]
        assert torch.equal(filter_logits(logits[part], config, seen[part]), filtered[part])


def test_one_row_that_is_not_a_number_draws_the_last_id():
    """The stream then raises for its log-probability."""
    logits = torch.full((1, 5), float("nan"))
    for config in FILTERS:
        assert sample(logits, config, torch.tensor([0.5], dtype=torch.float64)).item() == 4
