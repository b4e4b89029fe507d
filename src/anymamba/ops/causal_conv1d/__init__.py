"""The causal convolution: public functions in `api`, argument checks in `checks`, torch's op in `registration`."""

from anymamba.ops.causal_conv1d.api import ConvOutput, causal_conv1d, causal_conv1d_step
from anymamba.ops.causal_conv1d.over_group import inputs_before, last_inputs_before

__all__ = ["ConvOutput", "causal_conv1d", "causal_conv1d_step", "inputs_before", "last_inputs_before"]
