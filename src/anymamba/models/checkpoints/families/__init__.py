"""The families of models that checkpoints hold, one file each.

A new family is a file with its spellings, and an entry in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from anymamba.base.errors import CheckpointError
from anymamba.models.checkpoints.families.anymamba import ANYMAMBA
from anymamba.models.checkpoints.families.falcon_mamba import FALCON_MAMBA
from anymamba.models.checkpoints.families.family import Family, Format, Spelling
from anymamba.models.checkpoints.families.mamba import MAMBA
from anymamba.models.config import ModelConfig

FAMILIES: tuple[Family, ...] = (MAMBA, FALCON_MAMBA, ANYMAMBA)
"""General families come before special ones."""


def nearest_spelling(config: ModelConfig, to: Format) -> tuple[Spelling, list[str]]:
    """The spelling of a format that lacks the fewest options of a config, and these options.

    On a tie the more special family wins: its names for the options are closer to the config.
    """
    candidates = [family.spellings[to] for family in reversed(FAMILIES) if to in family.spellings]
    found = [(spelling, spelling.foreign_options(config)) for spelling in candidates]
    return min(found, key=lambda pair: len(pair[1]))


def spelling_for(config: ModelConfig, to: Format) -> Spelling:
    """The spelling that holds a config in a format. Raises CheckpointError, which names the options, if none does."""
    spelling, options = nearest_spelling(config, to)
    if options:
        raise CheckpointError(f"the format {to} cannot hold this model: {', '.join(options)}; keep it as anymamba")
    return spelling


def recognise(values: Mapping[str, Any], formats: Container[Format]) -> tuple[Format, Spelling] | None:
    """The format, among `formats`, and the family of a file with these values; None if no family matches."""
    for family in FAMILIES:
        for format, spelling in family.spellings.items():
            if format in formats and spelling.matches(values):
                return format, spelling
    return None


def kinds(formats: Container[Format]) -> list[str]:
    """The names that these formats have for the families."""
    found = [s.kind for family in FAMILIES for format, s in family.spellings.items() if format in formats]
    return list(dict.fromkeys(found))
