"""What an experiment expects, written before it is run, beside what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from anymamba.experiments.charts import table

HOLDS, FAILS, TIED, UNKNOWN = "holds", "**fails**", "tie", "not judged"
"""Verdicts. A tie does not hold; what is not judged needs an arm that is not measured."""
WORST_SEED = "Set before running; the worst seed counts."


@dataclass(frozen=True)
class Check:
    """An expectation, what came out, and the verdict."""

    words: str
    wanted: str
    got: str = ""
    verdict: str = UNKNOWN

    def judged(self, got: str, holds: bool) -> Check:
        """The same with what came out."""
        return replace(self, got=got, verdict=HOLDS if holds else FAILS)


def verdict(checks: Sequence[Check], noun: str = "thresholds") -> str:
    """One line that says how many hold, and names the others."""
    named = {word: [c.words for c in checks if c.verdict == word] for word in (HOLDS, FAILS, TIED, UNKNOWN)}
    words = [f"**{len(named[HOLDS])} of {len(checks)} {noun} hold.**"]
    if named[FAILS]:
        words.append("These fail: " + "; ".join(named[FAILS]) + ".")
    if named[TIED]:
        words.append("These are ties: " + "; ".join(named[TIED]) + ".")
    if named[UNKNOWN]:
        words.append(f"{len(named[UNKNOWN])} cannot be judged: what they need is not measured.")
    return " ".join(words)


def checks_table(checks: Sequence[Check], unit: str = "") -> str:
    """Every expectation with what came out, all in one unit if it is named."""
    suffix = f", {unit}" if unit else ""
    rows = [[c.words, c.wanted, c.got, c.verdict] for c in checks]
    return table(("what", f"wanted{suffix}", f"got{suffix}", ""), rows)
