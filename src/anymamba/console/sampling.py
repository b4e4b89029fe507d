"""The flags that say how text is generated, which `generate` and `chat` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from anymamba.base.sizes import require_at_least

if TYPE_CHECKING:
    from anymamba.generation.sampling import SamplingConfig

FILTERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""The flags that are fields of `SamplingConfig`."""


@dataclass(frozen=True)
class SamplingFlags:
    """How tokens are chosen, and where a text ends."""

    max_new_tokens: int = 256
    """Most tokens to generate for each prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token (greedy)."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens whose probabilities add up to this."""
    min_p: float | None = None
    """Sample among tokens with at least this fraction of the likeliest token's probability."""
    repetition_penalty: float = 1.0
    """A value above 1 makes tokens that have occurred less likely."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End before this text; may be repeated."""
    seed: int = 0
    """The same seed gives the same text."""


def checked_sampling(flags: SamplingFlags) -> SamplingConfig:
    """The filters of the flags. Raises ValueError if a flag is out of range."""
    from anymamba.generation.sampling import RowDraws, SamplingConfig
    from anymamba.generation.stops import StopMatcher

    require_at_least("--max-new-tokens", flags.max_new_tokens, 0)
    RowDraws(flags.seed, 1)
    StopMatcher(flags.stop)
    return SamplingConfig(**{name: getattr(flags, name) for name in FILTERS})
