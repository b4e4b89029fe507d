"""The gated activation that `mamba_ssm` fuses; plain torch here, on any device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from anymamba.compat.mamba_ssm.refused import refusing

__getattr__ = refusing(__name__)


def swiglu(xy: Tensor) -> Tensor:
    """silu(x) y of xy (..., 2 d), x before y in the last dimension; (..., d).

    Source: the interface of mamba-ssm 2.3.2.
    """
    x, y = xy.chunk(2, dim=-1)
    return F.silu(x) * y


class SwiGLU:
    """The name of the original's autograd function; `apply` is `swiglu`."""

    apply = staticmethod(swiglu)
