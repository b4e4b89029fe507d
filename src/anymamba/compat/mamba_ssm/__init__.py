"""The package `mamba_ssm`, interface 2.3.2, for Mamba (S6) with anymamba's operators, on any device."""

from __future__ import annotations

import sys
from typing import Any

from anymamba.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from anymamba.compat.mamba_ssm.modules.mamba_simple import Mamba
from anymamba.compat.mamba_ssm.ops import selective_scan_interface
from anymamba.compat.mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from anymamba.compat.mamba_ssm.refused import refusing

__version__ = "2.3.2"

__all__ = ["Mamba", "MambaLMHeadModel", "mamba_inner_fn", "selective_scan_fn"]

_refuse = refusing(__name__)


def _declined(*args: Any, **kwargs: Any) -> None:
    """What transformers gets for `mamba_inner_fn`: it returns None, so transformers calls its own modules instead.

    transformers would pass the weights to the fused function, which would ignore adapters and the mask after the
    convolution.
    """


def __getattr__(name: str) -> Any:
    if name == "mamba_inner_fn":
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _declined if caller.startswith("transformers.") else selective_scan_interface.mamba_inner_fn
    return _refuse(name)
