"""The causal convolution: `api` is the contract, `checks` what it refuses, `registration` what torch knows of it."""

from anymamba.ops.causal_conv1d.api import ConvOutput, causal_conv1d, causal_conv1d_step

__all__ = ["ConvOutput", "causal_conv1d", "causal_conv1d_step"]
