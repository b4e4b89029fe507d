"""The cross-entropy of a linear map: public function in `api`, checks in `checks`, torch's op in `registration`.

`chunks` limits the logits that plain torch operations hold at once.
"""

from anymamba.ops.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
