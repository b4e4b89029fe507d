"""The report: recall against the number of pairs and the bytes of state, the thresholds, and what came out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from anymamba.experiments.associative_recall.arms import (
    ATTENTION_AT_LEAST,
    CHOSEN,
    FAILS_BELOW,
    FIXED_BELOW,
    HYBRID_WITHIN,
    LTI_BELOW,
    MAMBA_BY_STATE,
    STATE_GAIN,
    STATE_TIE,
    SYSTEMS,
    TIME_INVARIANT,
    WITHOUT_ATTENTION,
)
from anymamba.experiments.charts import spread, table
from anymamba.experiments.checks import WORST_SEED, Check, checks_table, verdict
from anymamba.experiments.experiment import Results


@dataclass(frozen=True)
class Point:
    """A system of a width asked with a number of pairs."""

    system: str
    width: int
    n_pairs: int
    length: int
    vocab_size: int
    recall: tuple[float, ...]
    """Of each seed."""
    state_bytes: int
    parameters: int
    steps: tuple[int, ...]
    """Of each seed, at its best rate."""
    rates: tuple[float, ...]
    """The best of each seed."""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return sum(self.recall) / len(self.recall)


def report(results: Results) -> str:
    """The Markdown between title and provenance."""
    if not results.records:
        return "Nothing has been measured yet."
    parts = [part for part in (verdict(checks(results)), protocol(results), CHOSEN.get(results.scale, "")) if part]
    for width in widths(results):
        parts += [f"## Recall, %, width {width}", recall_table(results, width)]
    parts += [baseline_words(results), PUBLISHED, "## Thresholds", WORST_SEED, checks_table(checks(results), "%")]
    return "\n\n".join([*parts, "## What came out", remarks(results)])


PUBLISHED = (
    "Published for this task (vocabulary 8192; read off figures): attention near 100 % at all four sizes; at 512 "
    "tokens with 64 pairs H3 and Hyena below 40 % even at width 512; Mamba from about 52 % with 8,000 numbers of state "
    "to 85 % with 100,000 in Zoology's tables, mostly below 50 % at N = 16 in the paper of Mamba-2. The two disagree "
    "on how much of this is the size of the state."
)


# ------------------------------------------------------------------------------------------------ reading the results


def points(results: Results) -> list[Point]:
    """Every system, width and number of pairs that was asked, in the order of the arms."""
    found: list[Point] = []
    for arm in results.arms:
        records = results.of(arm)
        settings, values = records[0].settings, records[0].values
        for i, test in enumerate(values["tests"]):
            found.append(
                Point(
                    system=settings["system"],
                    width=settings["model"]["d_model"],
                    n_pairs=test["n_pairs"],
                    length=test["length"],
                    vocab_size=test["vocab_size"],
                    recall=tuple(record.values["tests"][i]["tokens"] for record in records),
                    state_bytes=values["state_bytes"],
                    parameters=values["parameters"],
                    steps=tuple(record.values["steps"] for record in records),
                    rates=tuple(record.values["learning_rate"] for record in records),
                )
            )
    return found


def widths(results: Results) -> list[int]:
    """Widths that were measured, in order."""
    return sorted({point.width for point in points(results)})


def pairs(results: Results) -> list[int]:
    """Numbers of pairs that were asked, in order."""
    return sorted({point.n_pairs for point in points(results)})


def by_pairs(results: Results, system: str, width: int) -> dict[int, Point]:
    """A system's points by the number of pairs."""
    return {p.n_pairs: p for p in points(results) if (p.system, p.width) == (system, width)}


def label(system: str) -> str:
    """A system in words."""
    return SYSTEMS[system].label


def join(lines: Iterable[str], otherwise: str) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {line}" for line in lines) or otherwise


# --------------------------------------------------------------------------------------------------------- thresholds


def checks(results: Results) -> list[Check]:
    """Every threshold at every width, the worst seed counting."""
    found = []
    for width in widths(results):
        of = {system: by_pairs(results, system, width) for system in SYSTEMS}
        found += [attention_check(of), fixed_check(of)]
        found += [hybrid_check(of, hybrid) for hybrid in WITHOUT_ATTENTION]
        found += [below_check(of, system, LTI_BELOW) for system in TIME_INVARIANT]
        found += state_checks(of)
        if len(widths(results)) > 1:
            found = [named(c, width) if not c.words.startswith("width") else c for c in found]
    return found


Points = dict[str, dict[int, Point]]


def named(check: Check, width: int) -> Check:
    """The check with its width."""
    return replace(check, words=f"width {width}: {check.words}")


def attention_check(of: Points) -> Check:
    """It recalls everything."""
    words, wanted = "attention: recall at its worst", f"at least {100 * ATTENTION_AT_LEAST:.0f}"
    least = min((min(p.recall) for p in of["attention"].values()), default=None)
    return judged(words, wanted, least, lambda got: got >= ATTENTION_AT_LEAST)


def fixed_check(of: Points) -> Check:
    """The smallest state is too small for the most pairs."""
    return below_check(of, MAMBA_BY_STATE[0], FIXED_BELOW)


def below_check(of: Points, system: str, gap: float) -> Check:
    """How far a system lies below attention at the most pairs."""
    words, wanted = f"{label(system)}: points below attention at the most pairs", f"at least {100 * gap:.0f}"
    top, own = of["attention"], of[system]
    got = min(top[max(top)].recall) - max(own[max(top)].recall) if top and max(top) in own else None
    return judged(words, wanted, got, lambda got: got >= gap)


def hybrid_check(of: Points, hybrid: str) -> Check:
    """It recalls what attention recalls."""
    words, wanted = f"{label(hybrid)}: points below attention at its worst", f"at most {100 * HYBRID_WITHIN:.0f}"
    top, own = of["attention"], of[hybrid]
    got = max((max(top[n].recall) - min(own[n].recall) for n in top if n in own), default=None)
    return judged(words, wanted, got, lambda got: got <= HYBRID_WITHIN)


def state_checks(of: Points) -> list[Check]:
    """Mamba's recall grows with its state: means over the seeds, at the most pairs."""
    most = max((n for points in of.values() for n in points), default=0)
    means = [of[system][most].mean for system in MAMBA_BY_STATE if most in of[system]]
    whole = len(means) == len(MAMBA_BY_STATE)
    step = min(b - a for a, b in itertools.pairwise(means)) if whole else None
    gain = means[-1] - means[0] if whole else None
    return [
        judged(
            "Mamba, means of the seeds: least change of recall from one state to the next larger, at the most pairs",
            f"at least {-100 * STATE_TIE:.0f}",
            step,
            lambda got: got >= -STATE_TIE,
        ),
        judged(
            "Mamba, means of the seeds: what the largest state gains over the smallest, at the most pairs",
            f"at least {100 * STATE_GAIN:.0f}",
            gain,
            lambda got: got >= STATE_GAIN,
        ),
    ]


def judged(words: str, wanted: str, got: float | None, holds: Callable[[float], bool]) -> Check:
    """A check of a share, shown in percent."""
    check = Check(words, wanted)
    return check if got is None else check.judged(f"{100 * got:.1f}", holds(got))


# -------------------------------------------------------------------------------------------------------------- words


def protocol(results: Results) -> str:
    """The settings in words."""
    settings = results.records[0].settings
    how, tasks = settings["optimization"], settings["tasks"]
    first, std = points(results)[0], settings["model"]["weight_std"]
    sizes = sorted({(p.length, p.n_pairs) for p in points(results)})
    filler = "drawn from the whole vocabulary" if tasks[0]["random_filler"] else "0"
    rates = ", ".join(f"{rate:g}" for rate in (how["learning_rate"], *settings["more_learning_rates"]))
    mixed = "learned together, about as many queries of each in a batch" if len(tasks) > 1 else "an arm for each"
    tried = " (tried in turn until training ends early; the best on the validation set counts)"
    tried = tried if settings["more_learning_rates"] else ""
    warmup = f" after {how['warmup_steps']} steps of warm-up" if how["warmup_steps"] else ""
    drawn = f", projections N(0, {std:g}) in all" if std is not None else ""
    return (
        f"Pairs of tokens: {', '.join(f'{n} in {length}' for length, n in sizes)} ({mixed}); vocabulary "
        f"{first.vocab_size}, keys and values different within a row, queries at gaps with the power law of "
        f"a = {tasks[0]['power']:g}, labels at queries alone, filler {filler}. Blocks without MLPs{drawn}; attention "
        "with 2 heads, rotary positions and a short convolution of width 4. Every arm: AdamW, at most "
        f"{how['steps']:,} steps of {how['batch_size']} fresh rows, learning rate {rates}"
        f"{tried}{warmup}, "
        f"{'down to none in half a cosine' if how['cosine'] else 'constant'}, weight decay {how['weight_decay']:g} "
        f"(kernels at most at {how['kernel_learning_rate']:g}); training ends at {100 * settings['enough']:g} % on "
        f"the validation set. {settings['test_rows']} test rows for each number of pairs, the same for all arms."
    )


def recall_table(results: Results, width: int) -> str:
    """Recall by system and number of pairs, with parameters and bytes of state after a row."""
    asked = pairs(results)
    header = ("system", "parameters", "state, bytes", "best rate", "steps", *(f"{n} pairs" for n in asked))
    rows = []
    for system in SYSTEMS:
        found = by_pairs(results, system, width)
        if found:
            sizes = [span(p.parameters for p in found.values()), span(p.state_bytes for p in found.values())]
            sizes.append(", ".join(f"{rate:g}" for rate in sorted({r for p in found.values() for r in p.rates})))
            sizes.append(span(step for p in found.values() for step in p.steps))
            shown = [spread(found[n].recall, scale=100) if n in found else "" for n in asked]
            rows.append([label(system), *sizes, *shown])
    note = (
        "State: all tensors that one sequence carries after a row; those of attention and Hyena grow with it. The rate "
        "and the steps are those of the rate that did best, by seeds; the seconds below are those of all rates. Fewer "
        "steps than allowed mean that the validation set was answered before. What falls short had too small a state "
        "or too few steps: arms that differ in the state alone tell the two apart, others do not."
    )
    return f"{table(header, rows)}\n\n{note}"


def span(sizes: Iterable[int]) -> str:
    """A number, or the least and the largest."""
    least, *more = sorted(set(sizes))
    return f"{least:,} to {more[-1]:,}" if more else f"{least:,}"


def baseline_words(results: Results) -> str:
    """What a guess gets."""
    n_values = points(results)[0].vocab_size // 2
    known = ", ".join(f"{100 / n:.1f} % of {n}" for n in pairs(results))
    return (
        f"A guess among all values gets {100 / n_values:.2f} %. Knowing which values a row has, but not whose they "
        f"are: {known} pairs."
    )


def remarks(results: Results) -> str:
    """What the numbers say, each sentence computed from them."""
    lines: list[str] = []
    for width in widths(results):
        where = f" (width {width})" if len(widths(results)) > 1 else ""
        lines += [line + where for line in failure_remarks(results, width)]
        lines += [line + where for line in size_remarks(results, width)]
        lines += [line + where for line in repair_remarks(results, width)]
    return join(lines, "Too few arms are measured to compare any.")


def failure_remarks(results: Results, width: int) -> list[str]:
    """From how many pairs on each system recalls less than FAILS_BELOW."""
    lines, limit = [], f"{100 * FAILS_BELOW:.0f} %"
    for system in SYSTEMS:
        found = by_pairs(results, system, width)
        failed = [n for n in sorted(found) if found[n].mean < FAILS_BELOW]
        if not found:
            continue
        if not failed:
            lines.append(f"{label(system)} recalls at least {limit} at every number of pairs asked.")
            continue
        again = [n for n in found if n > failed[0] and n not in failed]
        worst = found[max(failed)]
        lines.append(
            f"{label(system)} recalls less than {limit} from {failed[0]} pairs on"
            f"{' (but not at ' + ', '.join(map(str, again)) + ')' if again else ''}: {100 * worst.mean:.1f} % of "
            f"{worst.n_pairs}"
            + (", no better than one that knows only which values there are" if worst.mean <= 1 / worst.n_pairs else "")
            + "."
        )
    return lines


def size_remarks(results: Results, width: int) -> list[str]:
    """Mamba's recall beside its state, at the most pairs."""
    found = [by_pairs(results, system, width) for system in MAMBA_BY_STATE]
    if not all(found):
        return []
    most = max(found[0])
    small, large = found[0][most], found[-1][most]
    return [
        f"Mamba with {most} pairs: {large.state_bytes / small.state_bytes:.1f} times the bytes of state change recall "
        f"by {100 * (large.mean - small.mean):+.1f} points, from {100 * small.mean:.1f} % to {100 * large.mean:.1f} %."
    ]


def repair_remarks(results: Results, width: int) -> list[str]:
    """What attention in the place of Mamba changes, and what state it costs."""
    lines = []
    for hybrid, pure in WITHOUT_ATTENTION.items():
        ours, before = by_pairs(results, hybrid, width), by_pairs(results, pure, width)
        for n in sorted(set(ours) & set(before))[-1:]:
            lines.append(
                f"{label(hybrid)}, against {label(pure)}, with {n} pairs: {100 * (ours[n].mean - before[n].mean):+.1f} "
                f"points of recall, {ours[n].state_bytes:,} bytes of state for {before[n].state_bytes:,}."
            )
    return lines
