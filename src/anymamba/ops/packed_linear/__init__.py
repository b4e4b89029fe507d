"""The product of packed weights: public functions in `api`, argument checks in `checks`."""

from anymamba.kernels.packed_linear.formats import FORMATS, PackedWeight
from anymamba.ops.packed_linear.api import no_kernels, pack, packed_linear, unpack, unpack_rows

__all__ = ["FORMATS", "PackedWeight", "no_kernels", "pack", "packed_linear", "unpack", "unpack_rows"]
