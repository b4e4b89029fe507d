"""Language models for inference: packed weights, and one compiled call per token where the model allows it."""

from typing import TYPE_CHECKING

from anymamba.base import lazy_names

__all__ = ["BlockReport", "InferenceModel"]

_HOMES = dict.fromkeys(__all__, "anymamba.models.inference.model")

__getattr__, __dir__ = lazy_names(__name__, _HOMES)

if TYPE_CHECKING:
    from anymamba.models.inference.model import BlockReport, InferenceModel
