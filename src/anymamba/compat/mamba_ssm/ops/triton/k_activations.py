"""The gated activation of `mamba_ssm`, in plain torch on any device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from anymamba.compat.mamba_ssm.refused import refusing

__getattr__ = refusing(__name__)


def swiglu(xy: Tensor) -> Tensor:
    """silu(x) y, (..., d), for xy (..., 2 d) with x before y in the last dimension.

    Source: the interface of mamba-ssm 2.3.2.
    """
    x, y = xy.chunk(2, dim=-1)
    return F.silu(x) * y


class SwiGLU:
    """Has the name of the original's autograd function; `apply` is `swiglu`."""

    apply = staticmethod(swiglu)
