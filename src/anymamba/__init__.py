"""anymamba: selective state space models that install anywhere and run at the speed of the hardware they are on.

The public names resolve when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "selective_scan": "anymamba.ops.selective_scan",
    "selective_scan_step": "anymamba.ops.selective_scan",
    "ScanOutput": "anymamba.ops.selective_scan",
    "causal_conv1d": "anymamba.ops.causal_conv1d",
    "causal_conv1d_step": "anymamba.ops.causal_conv1d",
    "ConvOutput": "anymamba.ops.causal_conv1d",
    "Mamba": "anymamba.layers.mamba",
    "MambaState": "anymamba.layers.state",
    "MambaOptions": "anymamba.models.options",
    "ModelConfig": "anymamba.models.config",
    "LanguageModel": "anymamba.models.language_model",
    "preset": "anymamba.models.presets",
    "backend": "anymamba.ops.dispatch",
}

__all__ = [
    "ConvOutput",
    "LanguageModel",
    "Mamba",
    "MambaOptions",
    "MambaState",
    "ModelConfig",
    "ScanOutput",
    "__version__",
    "backend",
    "causal_conv1d",
    "causal_conv1d_step",
    "preset",
    "selective_scan",
    "selective_scan_step",
]

if TYPE_CHECKING:
    from anymamba.layers.mamba import Mamba
    from anymamba.layers.state import MambaState
    from anymamba.models.config import ModelConfig
    from anymamba.models.language_model import LanguageModel
    from anymamba.models.options import MambaOptions
    from anymamba.models.presets import preset
    from anymamba.ops.causal_conv1d import ConvOutput, causal_conv1d, causal_conv1d_step
    from anymamba.ops.dispatch import backend
    from anymamba.ops.selective_scan import ScanOutput, selective_scan, selective_scan_step


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'anymamba' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
