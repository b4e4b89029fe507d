"""`anymamba dna VERB`: scores variants, embeds regions and classifies sequences with a model of DNA."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from contextlib import suppress

VERBS = {
    "score": "score the variants of a VCF file: log-likelihood of ALT minus REF, on both strands",
    "embed": "write the vectors of regions: their mean, the last one, or one a base",
    "classify": "train, evaluate and use a classifier of sequences: dna classify train|eval|predict",
}
FULL_HELP = "--help-all"


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba dna`."""
    arguments = list(arguments)
    if arguments and arguments[0] in ("-h", "--help"):
        print(overview())
        return
    if arguments == [FULL_HELP]:
        for verb in VERBS:
            with suppress(SystemExit):  # each help ends with it
                _run(verb, [FULL_HELP if verb == "classify" else "--help"])
        return
    if not arguments:
        raise ValueError(f"name what to do: anymamba dna {'|'.join(VERBS)}; --help explains them")
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the verbs are {', '.join(VERBS)}"
        raise ValueError(f"unknown verb {verb!r} of anymamba dna; {hint}")
    _run(verb, rest)


def _run(verb: str, arguments: Sequence[str]) -> None:
    importlib.import_module(f"anymamba.cli.dna.{verb}").command(arguments)


def overview() -> str:
    """What `anymamba dna --help` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items()]
    return "\n".join(
        [
            "usage: anymamba dna VERB [OPTIONS]",
            "",
            "Models of DNA: variants, regions, classes. `anymamba train --data genome.fa` makes one.",
            "",
            "verbs:",
            *lines,
            "",
            f"anymamba dna VERB --help lists the options of a verb, anymamba dna {FULL_HELP} those of all.",
        ]
    )
