"""Windows of genomes: each base once an epoch, seeds, strands, N, and positions to resume from."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba.data.dna import Genome, GenomeWindows, Interval, reverse_complement, whole_sequences


def genome(seed: int = 0, **lengths: int) -> Genome:
    draw = random.Random(seed)
    return Genome.open({name: "".join(draw.choices("ACGT", k=n)) for name, n in lengths.items()})


def taken(windows: GenomeWindows, n: int) -> list[tuple[int, Interval, str]]:
    some = windows.take(n)
    texts = [row.tobytes().decode() for row in some.letters]
    return list(zip(some.source, some.places, texts, strict=True))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 60)), min_size=1, max_size=5),
    st.integers(1, 20),
    st.integers(0, 9),
)
def test_an_epoch_has_each_window_of_each_interval_once(spans, length, seed):
    g = genome(a=150)
    intervals = [Interval("a", start, start + size, "+-"[i % 2], str(i)) for i, (start, size) in enumerate(spans)]
    wanted = sum(size // length for _, size in spans)
    if not wanted:
        with pytest.raises(ValueError, match=f"none of the {len(spans)} intervals has {length} bases"):
            GenomeWindows([(g, intervals)], length)
        return
    windows = GenomeWindows([(g, intervals)], length, seed=seed)
    assert windows.n_windows == wanted
    for _ in range(2):
        found = taken(windows, wanted)
        for i, interval in enumerate(intervals):
            mine = sorted(place for _, place, _ in found if place.label == str(i))
            assert len(mine) == (interval.end - interval.start) // length
            assert all(interval.start <= p.start and p.end <= interval.end and p.end - p.start == length for p in mine)
            assert all(a.end <= b.start for a, b in pairwise(mine)), "they do not overlap"
        assert all(text == g.fetch(p.name, p.start, p.end, strand=p.strand) for _, p, text in found)


def test_epochs_differ_in_order_offsets_and_strands():
    windows = GenomeWindows([(genome(a=1000), [Interval("a", 0, 1000)])], 30)
    first, second = (taken(windows, windows.n_windows) for _ in range(2))
    for part in ("start", "strand"):
        assert [getattr(p, part) for _, p, _ in first] != [getattr(p, part) for _, p, _ in second]
    assert min(p.start for _, p, _ in first) != min(p.start for _, p, _ in second)
    strands = [p.strand for _, p, _ in first + second]
    assert 15 < strands.count("-") < 51, "half of 66, by chance"


def test_without_reverse_complements_the_strand_is_that_of_the_interval():
    g = genome(a=100)
    windows = GenomeWindows([(g, [Interval("a", 0, 100, "-")])], 100, reverse_complement=False)
    (row,) = windows.take(1).letters
    assert row.tobytes().decode() == reverse_complement(g.fetch("a", 0, 100))


def test_in_order_from_the_start():
    g = genome(a=100, b=25)
    windows = GenomeWindows([(g, whole_sequences(g))], 10, shuffle=False, reverse_complement=False)
    places = [(p.name, p.start) for some in windows.once(4) for p in some.places]
    assert places == [("a", i) for i in range(0, 100, 10)] + [("b", 0), ("b", 10)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 60), st.integers(1, 7), st.integers(0, 5))
def test_a_position_continues_exactly(before, rows, seed):
    sources = [
        (genome(a=200, b=33), [Interval("a", 5, 190), Interval("b", 0, 33)]),
        (genome(1, c=70), [Interval("c", 0, 70)]),
    ]
    straight = GenomeWindows(sources, 16, seed=seed, max_unknown=0)
    for _ in range(before):
        straight.take(rows)
    position = json.loads(json.dumps(straight.position))
    resumed = GenomeWindows(sources, 16, seed=seed, max_unknown=0, position=position)
    assert taken(straight, 30) == taken(resumed, 30) and straight.position == resumed.position


@pytest.mark.parametrize("change", [{"seed": 1}, {"length": 17}, {"max_unknown": 0.5}, {"reverse_complement": False}])
def test_a_position_of_something_else(change):
    g = genome(a=200)
    options = {"length": 16, "seed": 0, "max_unknown": 0.1, "reverse_complement": True}
    position = GenomeWindows([(g, whole_sequences(g))], **options).position
    with pytest.raises(ValueError, match="the position is of other intervals, another length or another seed"):
        GenomeWindows([(g, whole_sequences(g))], **options | change, position=position)
    with pytest.raises(ValueError, match="the position is of other"):
        GenomeWindows([(g, [Interval("a", 0, 199)])], **options, position=position)


@pytest.mark.parametrize(
    ("max_unknown", "kept"), [(0.0, {0, 40}), (0.1, {0, 40, 10}), (0.5, {0, 40, 10, 20}), (1.0, {0, 10, 20, 30, 40})]
)
def test_windows_with_too_many_N_are_dropped_and_counted(max_unknown, kept):
    letters = "ACGTUacgtu" + "ACGTNACGTA" + "NNRRnACGTA" + "N" * 10 + "A" * 10
    sources = [(Genome.open({"a": letters}), [Interval("a", 0, 50)])]
    windows = GenomeWindows(sources, 10, max_unknown=max_unknown)
    found = taken(windows, 2 * len(kept))
    assert {p.start for _, p, _ in found} == kept
    assert windows.dropped == windows.position["dropped"] >= 5 - len(kept)
    in_order = GenomeWindows(sources, 10, max_unknown=max_unknown, shuffle=False)
    assert [p.start for some in in_order.once(2) for p in some.places] == sorted(kept)
    assert in_order.dropped == 5 - len(kept)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ACNRUn"), st.integers(1, 20)), min_size=5, max_size=30),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 1.0]),
    st.integers(0, 9),
)
def test_the_windows_of_an_epoch_that_are_kept_are_counted_by_runs(runs, length, max_unknown, seed):
    """The number is that of the windows that an epoch gives, whatever its offsets are."""
    n_codes = sum(n for letter, n in runs if letter == "R")  # of which a sequence has at most a half
    letters = "ACGT" * 5 + "A" * n_codes + "".join(letter * n for letter, n in runs)
    n = len(letters)
    genomes = [Genome.open({"a": letters}), Genome.open({"b": letters[::-1]})]
    sources = [(genomes[0], [Interval("a", 0, n), Interval("a", 3, n, "-")]), (genomes[1], [Interval("b", 1, n - 1)])]
    windows = GenomeWindows(sources, length, seed=seed, max_unknown=max_unknown)
    counted = windows.count_kept()
    assert counted == sum(len(some.places) for some in windows.once(4)) == windows.n_windows - windows.dropped


def test_nothing_but_N():
    windows = GenomeWindows([(Genome.open({"a": "N" * 100}), [Interval("a", 0, 100)])], 10)
    with pytest.raises(ValueError, match="each window has more than 10% of N and ambiguity codes; raise max_unknown"):
        windows.take(1)


def test_wrong_options():
    g = genome(a=10)
    with pytest.raises(ValueError, match="length"):
        GenomeWindows([(g, whole_sequences(g))], 0)
    with pytest.raises(ValueError, match="max_unknown must be a share from 0 to 1, got 2"):
        GenomeWindows([(g, whole_sequences(g))], 1, max_unknown=2)
    with pytest.raises(ValueError, match="none of the 0 intervals"):
        GenomeWindows([], 1)


def test_real_windows_have_few_N(shared_data, tmp_path):
    path = shared_data / "genomes" / "human_grch37_chr1_first10M.fa.gz"
    with Genome.open(path, cache_dir=tmp_path) as g:
        windows = GenomeWindows([(g, whole_sequences(g))], 2**14)
        some = windows.take(windows.n_windows)
        assert windows.dropped >= 20, "360,000 N are 22 windows"
        assert np.isin(some.letters & ~np.uint8(0x20), list(b"ACGTN")).all()
