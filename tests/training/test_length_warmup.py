"""Sequence-length warm-up: the table of stages, exactly, and runs that are resumed in any of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anymamba.training.config import TrainConfig
from anymamba.training.length_warmup import Stage, described, stage_of, stages, steps_of_epochs

SEGMENTS, LENGTH = 34_021, 2**17  # HG38's, of HyenaDNA and the paper


def in_segments(length: int) -> int:
    return SEGMENTS * (LENGTH // length)


def test_the_papers_schedule():
    """2^24 tokens a step, two epochs at each power of two from 2^10; the batch halves as the length doubles."""
    config = TrainConfig(context=2**17, batch_size=2**7, steps=20_000, length_warmup=True)
    found = stages(config, in_segments)
    assert [(s.context, s.batch_size) for s in found] == [
        (2**10, 2**14),
        (2**11, 2**13),
        (2**12, 2**12),
        (2**13, 2**11),
        (2**14, 2**10),
        (2**15, 2**9),
        (2**16, 2**8),
        (2**17, 2**7),
    ]
    # an epoch is 34,021 * 2^17 / 2^24 = 265.8 steps, two are 531.6: the last step of a stage is filled up
    assert [(s.start, s.stop) for s in found[:-1]] == [(532 * i, 532 * (i + 1)) for i in range(7)]
    assert (found[-1].start, found[-1].stop) == (7 * 532, 20_000)
    assert {s.context * s.batch_size for s in found} == {2**24} == {config.tokens_per_step}


def test_accumulated_batches_are_part_of_a_step():
    config = TrainConfig(context=2**17, batch_size=2**4, accumulation=2**3, steps=20_000, length_warmup=True)
    whole = TrainConfig(context=2**17, batch_size=2**7, steps=20_000, length_warmup=True)
    assert [(s.start, s.stop) for s in stages(config, in_segments)] == [
        (s.start, s.stop) for s in stages(whole, in_segments)
    ]


def test_steps_of_as_many_epochs_at_the_context():
    config = TrainConfig(context=2**17, batch_size=2**4, accumulation=2**3, length_warmup=True)
    steps = steps_of_epochs(config, in_segments)
    assert steps == 8 * 532
    last = stages(replace(config, steps=steps), in_segments)[-1]
    assert last.stop - last.start == 532
    assert steps_of_epochs(replace(config, length_warmup_epochs=4.0), in_segments) == 8 * 1064
    assert steps_of_epochs(replace(config, length_warmup_epochs=1e-9), in_segments) == 8, "a step at each length"


def test_without_a_warm_up_there_is_one_stage():
    config = TrainConfig(context=300, batch_size=5, steps=7)
    assert stages(config, in_segments) == (Stage(300, 5, 0, 7),)


def test_short_stages_take_a_step():
    config = TrainConfig(context=4096, batch_size=2, steps=3, length_warmup=True, length_warmup_epochs=1e-9)
    found = stages(config, in_segments)
    assert [(s.context, s.start, s.stop) for s in found] == [(1024, 0, 1), (2048, 1, 2), (4096, 2, 3)]
    assert [stage_of(found, step).context for step in (0, 1, 2, 3, 1000)] == [1024, 2048, 4096, 4096, 4096]
    assert described(found) == "8 x 1,024 for 1 steps, 4 x 2,048 for 1 steps, then 2 x 4,096"


def test_more_steps_lengthen_the_last_stage_only():
    config = TrainConfig(context=4096, batch_size=2**12, steps=1100, length_warmup=True)
    longer = replace(config, steps=5000)
    assert stages(config, in_segments)[:-1] == stages(longer, in_segments)[:-1]


def test_too_few_steps():
    config = TrainConfig(context=2**12, batch_size=8, steps=1000, length_warmup=True)
    with pytest.raises(
        ValueError, match=r"takes 272,168 steps before it reaches 4,096 .*2 epochs at each of 2 lengths"
    ):
        stages(config, lambda n: in_segments(n) // 2)


@pytest.mark.parametrize("context", [256, 1024, 1536, 3072, 5000])
def test_a_context_that_no_doubling_reaches(context):
    with pytest.raises(
        ValueError, match=f"the context must be 2,048, 4,096, 8,192 ..., .*got {context:,}; change --context"
    ):
        TrainConfig(context=context, length_warmup=True)


@pytest.mark.parametrize(("name", "value"), [("length_warmup_start", 0), ("length_warmup_epochs", 0.0)])
def test_wrong_values(name, value):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value})
