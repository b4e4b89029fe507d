"""The norm of a sum: `api` is the contract, `checks` what it refuses, `registration` what torch knows of it."""

from anymamba.ops.add_norm.api import AddNormOutput, add_norm

__all__ = ["AddNormOutput", "add_norm"]
