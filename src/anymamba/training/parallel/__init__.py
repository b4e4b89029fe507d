"""Training on many devices: torchrun's processes, FSDP2, and sequences that are split over devices."""

from anymamba.training.parallel.mesh import NAMES, data_mesh, fsdp_mesh
from anymamba.training.parallel.processes import Processes
from anymamba.training.parallel.sharding import (
    clip_gradients,
    copy_from_first_rank,
    parallelize,
    reduce_gradients,
    sum_over_ranks,
    whole_tensors,
)
from anymamba.training.parallel.start import processes_of

__all__ = [
    "NAMES",
    "Processes",
    "clip_gradients",
    "copy_from_first_rank",
    "data_mesh",
    "fsdp_mesh",
    "parallelize",
    "processes_of",
    "reduce_gradients",
    "sum_over_ranks",
    "whole_tensors",
]
