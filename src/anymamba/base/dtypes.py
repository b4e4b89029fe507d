"""Which dtype holds what."""

from __future__ import annotations

import torch


def complex_dtype(real: torch.dtype) -> torch.dtype:
    """The complex dtype whose parts hold a real one; as `dtype.to_complex()`, which torch.compile does not trace."""
    return torch.promote_types(real, torch.complex32)
