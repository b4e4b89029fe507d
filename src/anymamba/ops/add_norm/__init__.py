"""The norm of a sum: public function in `api`, argument checks in `checks`, torch's op in `registration`."""

from anymamba.ops.add_norm.api import AddNormOutput, add_norm

__all__ = ["AddNormOutput", "add_norm"]
