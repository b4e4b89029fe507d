"""Why a way to step a model does not serve it, by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anymamba.models.language_model import LanguageModel

WHOLE = -1
"""The key of reasons that are about the whole model and not about one block."""


def reasons_by_block(
    model: LanguageModel, of_model: Callable[[LanguageModel], str | None], of_block: Callable[[Any], str | None]
) -> dict[int, str]:
    """The reasons by block index, or the one of the model under WHOLE; empty if there are none."""
    whole = of_model(model)
    if whole is not None:
        return {WHOLE: whole}
    found = ((index, of_block(block)) for index, block in enumerate(model.blocks))
    return {index: why for index, why in found if why is not None}
