"""The cross-entropy of a linear map: `api` is the contract, `checks` what it refuses, `registration` what torch knows.

`chunks` bounds the logits that torch's own operations hold.
"""

from anymamba.ops.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
