"""The flags that say how tokens are guessed, which `generate` and `chat` share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from anymamba.base.sizes import require_at_least
from anymamba.console.runtime import Runtime, load_model, open_model

if TYPE_CHECKING:
    from anymamba.data.tokenizer import Tokenizer
    from anymamba.generation.speculation import Speculation
    from anymamba.models.language_model import LanguageModel


@dataclass(frozen=True)
class SpeculationFlags:
    """How tokens are guessed."""

    speculate: int | None = None
    """Guess up to so many tokens and read them at once; the text does not change. Guesses are what followed the same
    tokens earlier in the text."""
    draft: Path | None = None
    """A smaller model with the same tokenizer that guesses instead, named as in --model; 4 tokens by default."""


def check_speculation(flags: SpeculationFlags) -> None:
    """Raise ValueError if a flag is out of range."""
    if flags.speculate is not None:
        require_at_least("--speculate", flags.speculate, 1)


def open_speculation(
    flags: SpeculationFlags, runtime: Runtime, model: LanguageModel, tokenizer: Tokenizer
) -> Speculation | None:
    """How tokens are guessed; None if they are not. Raises ValueError for a draft model with another tokenizer."""
    from anymamba.generation.speculation import Speculation

    if flags.draft is None:
        return None if flags.speculate is None else Speculation(flags.speculate)
    runtime = replace(runtime, adapter=None)
    checkpoint, theirs = open_model(flags.draft, None, runtime)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"the draft model must have the tokenizer of --model; that of {flags.draft} is different; take another "
            "--draft, or --speculate without it"
        )
    speculation = Speculation(flags.speculate or 4, load_model(checkpoint, runtime))
    speculation.check(model)
    return speculation
