"""Induction-head sequences: exactly one trigger besides the last, the answer after it, the same for any chunk size."""

from __future__ import annotations

import pytest
import torch

from anymamba.data.synthetic.induction import EARLY, Placement, induction_batch, induction_sequences

PLACEMENTS: tuple[Placement, ...] = ("uniform", "first-ten")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_answer(ids: list[int], trigger: int) -> int:
    """The token after the first trigger, found by a search."""
    return ids[ids.index(trigger) + 1]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("length", [3, 4, 13, 64])
def test_the_trigger_occurs_twice_and_the_label_is_the_token_behind_the_first(placement, length):
    ids, labels = induction_batch(seeded(), 200, length, n_tokens=5, placement=placement)
    assert ids.shape == labels.shape == (200, length)
    assert ids.dtype == labels.dtype == torch.int64
    assert (labels[:, :-1] == -100).all()
    assert (ids[:, -1] == 5).all()
    for row, label in zip(ids.tolist(), labels[:, -1].tolist(), strict=True):
        assert row.count(5) == 2
        assert 0 <= label < 5
        assert label == naive_answer(row, trigger=5)


def test_placements_cover_what_they_say_and_no_more():
    uniform = induction_sequences(seeded(), 5000, 40, placement="uniform").first
    early = induction_sequences(seeded(), 5000, 40, placement="first-ten").first
    assert set(uniform.tolist()) == set(range(38))  # 37 leaves room for the answer at 38 and the trigger at 39
    assert set(early.tolist()) == set(range(EARLY))
    assert set(induction_sequences(seeded(), 500, 5, placement="first-ten").first.tolist()) == {0, 1, 2}


def test_tokens_and_answers_are_uniform():
    sequences = induction_sequences(seeded(), 20_000, 8, n_tokens=4)
    (ids,) = sequences.chunks(8)
    for values in (sequences.answers, ids[ids < 4]):
        shares = torch.bincount(values, minlength=4) / len(values)
        assert (shares - 0.25).abs().max() < 0.02


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("size", [1, 2, 7, 36, 37, 38, 1000])
def test_pieces_of_any_size_are_the_same_sequences(placement, size):
    whole, labels = induction_batch(seeded(3), 6, 37, placement=placement)
    sequences = induction_sequences(seeded(3), 6, 37, placement=placement)
    pieces = list(sequences.chunks(size))
    assert max(piece.shape[1] for piece in pieces) == min(size, 37)
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(sequences.answers, labels[:, -1])


def test_the_generator_decides_and_moves_on():
    generator = seeded(1)
    first, second = (induction_batch(generator, 4, 20)[0] for _ in range(2))
    assert torch.equal(first, induction_batch(seeded(1), 4, 20)[0])
    assert not torch.equal(first, second)
    assert not torch.equal(first, induction_batch(seeded(2), 4, 20)[0])


def test_misuse_is_named():
    with pytest.raises(ValueError, match="length must be at least 3"):
        induction_sequences(seeded(), 1, 2)
    with pytest.raises(ValueError, match="n_tokens must be at least 1, got 0"):
        induction_sequences(seeded(), 1, 8, n_tokens=0)
    with pytest.raises(ValueError, match="uniform or first-ten, got 'last'"):
        induction_sequences(seeded(), 1, 8, placement="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size must be at least 1"):
        next(induction_sequences(seeded(), 1, 8).chunks(0))
