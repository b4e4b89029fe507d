"""The findings: thresholds set before running, tables 6 to 10 beside the paper's, and what seeds differ by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from math import isfinite, log, sqrt
from statistics import mean

from anymamba.experiments.language_ablations.arms import (
    A_INITS,
    LAYERS,
    MAMBA,
    RANK,
    RATED,
    SELECTION,
    STATE,
    STATES,
    TIMES_BYTES,
    TIMES_RATE,
    TRANSFORMER,
    arm_of,
    arm_of_a,
    arm_of_rank,
    arm_of_selection,
    arm_of_state,
    at_rate,
    longer,
)
from anymamba.lab.charts import signed, spread, table
from anymamba.lab.experiment import Results, Threshold
from anymamba.lab.language import gap, loss, losses, speed_table

BLOCKS = {"h3": "H3", "mamba": "Mamba"}
LAYER_WORDS = {"hyena": "Hyena filter", "complex": "S4, complex", "real": "S4, real", "s6": "S6"}
SELECTION_WORDS = {"none": "none", "b": "B", "c": "C", "delta": "Δ", "all": "Δ, B, C"}
A_WORDS = {"complex": "-1/2 + πni", "constant": "-1/2", "real": "-(n + 1)", "random": "-exp(N(0, 1))"}
OTHERS = {"mamba-mlp": "Mamba and MLP", "mamba-attention": "Mamba and attention", TRANSFORMER: "Transformer++"}
"""Below the layers of table 6."""
LEAST = 0.01
"""Nats a byte by which S6 must be ahead, and which a larger state must gain."""
ATTENTION = (TRANSFORMER, "mamba-attention")
"""Arms whose losses differ several times as much between seeds as those of the others."""
TIMES = 3
"""Times the gain from a larger state with constant B and C that it must be with selective ones."""
CLOSE = 0.02
"""Arms that are closer to a neighbour in their table than this need more seeds."""


def between(results: Results, above: str, below: str) -> float | None:
    """The difference of two arms' mean losses."""
    return gap(results, [above], [below])


def deviation(results: Results, with_attention: bool = False) -> float | None:
    """The standard deviation between seeds, pooled over the arms with or without attention that have several seeds;
    None if no arm has."""
    squares, degrees = 0.0, 0
    for arm in results.arms:
        own = losses(results, [arm])
        if (arm in ATTENTION) == with_attention and len(own) > 1 and all(map(isfinite, own)):
            squares += sum((value - mean(own)) ** 2 for value in own)
            degrees += len(own) - 1
    return sqrt(squares / degrees) if degrees else None


# --------------------------------------------------------------------------------------------------------- thresholds


def thresholds(results: Results) -> list[Threshold]:
    """S6 is ahead in both blocks, the order of table 7, and a larger state gains more with selective B and C."""
    seeds = deviation(results)
    tie = -1.0 if seeds is None else 2 * seeds
    found = []
    for block, words in BLOCKS.items():
        got = [between(results, arm_of(block, layer), arm_of(block, "s6")) for layer in LAYERS[block] if layer != "s6"]
        what = f"{words} block: every time-invariant layer minus S6, nats a byte"
        found.append(Threshold(what, got, at_least=LEAST, show=signed))
    for above, below in (("none", "b"), ("none", "c"), ("b", "delta"), ("c", "delta"), ("delta", "all")):
        got = [between(results, arm_of_selection(above), arm_of_selection(below))]
        what = f"selective: {SELECTION_WORDS[above]} minus {SELECTION_WORDS[below]}, nats a byte"
        found.append(Threshold(what, got, at_least=0.0, tie=tie, show=signed))
    selective, constant = gain(results, "selective"), gain(results, "constant")
    what = f"gain from N 1 to 16 with selective B and C, nats a byte (wanted: {TIMES} times that with constant ones)"
    least = max(LEAST, TIMES * (constant or 0.0))
    got = [selective if constant is not None else None]
    return [*found, Threshold(what, got, at_least=least, show=signed)]


def gain(results: Results, kind: str) -> float | None:
    """The gain of the most states over one, in nats."""
    return between(results, arm_of_state(kind, STATES[0]), arm_of_state(kind, STATES[-1]))


# ------------------------------------------------------------------------------------------------------------- tables


def sections(results: Results) -> dict[str, str]:
    """The sections of the report: the tables with something measured, the seeds and the speed."""
    selection = {SELECTION_WORDS[n]: (arm_of_selection(n), ppl) for n, ppl in SELECTION.items()}
    inits = {A_WORDS[n]: (arm_of_a(n), ppl) for n, ppl in A_INITS.items()}
    ranks = {f"{rank}": (arm_of_rank(rank), ppl) for rank, ppl in RANK.items()}
    return {
        "Table 6: block and inner layer": layer_table(results),
        "Table 7: what is selective": one_table(results, "selective", selection, SELECTION["all"]),
        "Table 8: initialisation of A": one_table(results, "A", inits, A_INITS["real"]),
        "Table 9: rank of Δ": one_table(results, "rank", ranks, RANK["full"]),
        "Table 10: states a channel": state_table(results),
        f"With {TIMES_BYTES} times the bytes": longer_table(results),
        "At other rates": rate_table(results),
        "Seeds": seed_words(results),
        "Speed": speed_table(results) if results.records else "",
    }


def row_of(results: Results, words: Iterable[str], arm: str, paper: float | None) -> list[str] | None:
    """Parameters, loss and gap to Mamba of an arm beside the paper's gap; None if the arm is not measured."""
    own = losses(results, [arm])
    if not own:
        return None
    parameters = f"{results.of(arm)[0].values['parameters']:,}"
    theirs = "" if paper is None else signed(paper)
    return [*words, parameters, spread(own, 4), signed(between(results, arm, MAMBA), 4), theirs]


HEADER = ("parameters", "nats a byte", "above Mamba", "paper, nats a token")


def shown(header: tuple[str, ...], rows: Iterable[list[str] | None]) -> str:
    """A table of the rows that are measured; "" if none is."""
    found = [row for row in rows if row is not None]
    return table((*header, *HEADER), found) if found else ""


def layer_table(results: Results) -> str:
    """Table 6, then Mamba with other blocks in between, and Transformer++."""
    best = LAYERS["mamba"]["s6"]
    cells = [(block, layer) for block in LAYERS for layer in LAYERS[block]]
    rows = [
        row_of(results, (BLOCKS[b], LAYER_WORDS[layer]), arm_of(b, layer), log(LAYERS[b][layer] / best))
        for b, layer in cells
    ]
    return shown(
        ("block", "layer"), [*rows, *(row_of(results, (words, ""), arm, None) for arm, words in OTHERS.items())]
    )


def one_table(results: Results, name: str, cells: dict[str, tuple[str, float]], best: float) -> str:
    """A table with one column of words."""
    return shown((name,), [row_of(results, (words,), arm, log(ppl / best)) for words, (arm, ppl) in cells.items()])


def state_table(results: Results) -> str:
    """Table 10."""
    best = STATE["selective"][STATES[-1]]
    cells = [(kind, n) for kind in STATE for n in STATES]
    rows = [row_of(results, (kind, f"{n}"), arm_of_state(kind, n), log(STATE[kind][n] / best)) for kind, n in cells]
    return shown(("B and C", "N"), rows)


def longer_table(results: Results) -> str:
    """What selection and states gain, and what they gain with more bytes."""
    gaps = {
        "Mamba block: S4, real, minus S6": ("mamba-real", MAMBA),
        "H3 block: S4, real, minus S6": ("h3-real", "h3-s6"),
        f"one state a channel minus {STATES[-1]}": ("selective-n1", MAMBA),
    }
    rows = []
    for words, (above, below) in gaps.items():
        more = between(results, longer(above), longer(below))
        if more is not None:
            rows.append([words, signed(between(results, above, below), 4), signed(more, 4)])
    return table(("nats a byte", "bytes as above", f"{TIMES_BYTES} times as many"), rows) if rows else ""


def rate_table(results: Results) -> str:
    """Losses of some layers at several rates; the lowest of each is its best rate."""
    words = {arm_of(b, layer): f"{BLOCKS[b]} block: {LAYER_WORDS[layer]}" for b in LAYERS for layer in LAYERS[b]}
    words |= {arm_of_selection(n): f"selective: {SELECTION_WORDS[n]}" for n in SELECTION if n != "all"}
    words |= {arm_of_state(kind, STATES[0]): f"{kind} B and C, one state" for kind in STATE}
    times = sorted((1, *TIMES_RATE))
    rows = []
    for arm in RATED:
        own = [losses(results, [arm if t == 1 else at_rate(arm, t)]) for t in times]
        if any(values for t, values in zip(times, own, strict=True) if t != 1):
            best = min((mean(values) for values in own if values and all(map(isfinite, values))), default=None)
            rows.append([words[arm], *(spread(v, 4) if v else "" for v in own), "" if best is None else f"{best:.4f}"])
    header = ("nats a byte", *("as above" if t == 1 else f"{t:g} times the rate" for t in times), "best")
    return table(header, rows) if rows else ""


def seed_words(results: Results) -> str:
    """What seeds differ by, and which arms with one seed are too close to a neighbour."""
    seeds = deviation(results)
    words = (
        "No arm has several seeds yet: how far chance moves a loss is not known, and no gap is called a tie."
        if seeds is None
        else f"The pooled standard deviation between seeds is {seeds:.4f} nats a byte; gaps of at most {2 * seeds:.4f} "
        "are ties."
    )
    attention = deviation(results, with_attention=True)
    if attention is not None:
        words += f" Of the arms with attention it is {attention:.4f}: a gap to one of them of at most "
        words += f"{2 * attention:.4f} is a tie."
    close = close_arms(results)
    if close:
        words += f" Less than {CLOSE} from a neighbour in their table, with fewer than three seeds: {', '.join(close)}."
    return words


def close_arms(results: Results) -> list[str]:
    """Arms with fewer than three seeds that are closer than CLOSE to another arm of their table."""
    tables: list[list[str]] = [
        [*(arm_of(b, layer) for b in LAYERS for layer in LAYERS[b]), *OTHERS],
        *([f(name) for name in names] for f, names in ROWS),
        *([arm_of_state(kind, n) for n in STATES] for kind in STATE),
    ]
    found = set()
    for arms in tables:
        known = sorted((loss(results, [arm]), arm) for arm in arms if isfinite(loss(results, [arm])))
        for (a, one), (b, other) in pairwise(known):
            if b - a < CLOSE:
                found |= {one, other}
    return sorted(arm for arm in found if len(results.of(arm)) < 3)


ROWS: tuple[tuple[Callable[..., str], Iterable[str | int]], ...] = (
    (arm_of_selection, tuple(SELECTION)),
    (arm_of_a, tuple(A_INITS)),
    (arm_of_rank, tuple(RANK)),
)
"""The function that names the arm of a row, and the rows, of tables 7 to 9."""
