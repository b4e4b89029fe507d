"""FSDP2 for our models: which parameters are gathered together, and in which dtype.

A unit of `fully_shard` has the weights of the projections of one block, or of several small ones. All other parameters
(A_log, D, the bias of the step, convolutions, norms, embedding and head) are the unit of the model itself, which is
gathered once a step in the dtype of its storage. So a narrow `param_dtype` reaches only weights that go into a matrix
product.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from anymamba.base.sizes import require_sizes
from anymamba.ops.groups import context_parallel, is_spread
from anymamba.parts.parameters import WideParameters
from anymamba.training.parallel.mesh import context_group, fsdp_mesh

UNIT_BYTES = 128 << 20
"""Of the gathered weights of a unit, at most, if it has several blocks. A unit costs about 2 ms of Python in each step,
in which an H200 sends 0.4 GB to another: 48 units of mamba-370m took 392 ms a step on one GPU, 8 units 306."""
METHODS = ("loss", "step")
"""The methods of a model, besides `forward`, before which its parameters are gathered."""


def parallelize(
    model: Any,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    compile: bool = False,
    reshard_after_forward: bool = True,
    blocks_per_unit: int | None = None,
) -> Any:
    """Shard a model over the devices of a mesh and return it. Make the optimizer after this.

        mesh = init_device_mesh("cuda", (4, 2), mesh_dim_names=("dp_shard", "cp"))
        model = parallelize(LanguageModel(config), mesh, param_dtype=torch.bfloat16)

    Gradients are sums over all ranks, not means. So divide the loss, which is a sum as well, by the number of labels of
    all ranks (`sum_over_ranks`). With a degree `cp` above 1 each rank gives the model its part of the sequence.

    Args:
        model: a `LanguageModel` or another module with `blocks`. One on the meta device gets memory here; fill it with
            `copy_from_first_rank`, or load a checkpoint.
        mesh: with dimensions of these names: "dp_replicate" (copies of the weights), "dp_shard" (over which weights,
            gradients and the optimizer's state are split), "cp" (over which sequences are split). The weights are split
            over "cp", too, whose ranks would hold copies of them.
        param_dtype: the dtype in which the projections' weights are gathered, such as torch.bfloat16. The model must
            then run under autocast with that dtype. The result is the same as that of gathering in float32, with half
            of the bytes. Gradients are added up in the dtype of the weights.
        compile: run each block through torch.compile.
        reshard_after_forward: free the gathered weights of a block after its forward pass and gather them again in the
            backward pass. False keeps them: faster, and takes more memory.
        blocks_per_unit: how many blocks are gathered together. By default as many as have 128 MiB of gathered weights,
            at least one: 10 at 370m, 2 at 1.4b, 1 at 2.8b.
    Raises ValueError for a mesh without names or with other ones and for blocks_per_unit below 1, TypeError for a model
    without blocks.
    """
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise TypeError(f"parallelize needs a model with blocks, got {type(model).__name__}; give a LanguageModel")
    together, group = list(_together(blocks, param_dtype, blocks_per_unit)), context_group(mesh)
    if group is not None:
        _split_sequences(model, group)
    over = fsdp_mesh(mesh)
    _shard_blocks(together, over, param_dtype, reshard_after_forward)
    _shard_rest(model, blocks, over)
    for method in METHODS:
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)  # sums instead of means
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    if any(p.is_meta for p in model.parameters()):
        model.to_empty(device=_device(mesh))
    if compile:
        for block in blocks:
            block.forward = torch.compile(block.forward)
    return model


def units(model: nn.Module) -> Iterator[FSDPModule]:
    """The FSDP units of a model."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def narrow_parameters(block: nn.Module) -> set[nn.Parameter]:
    """The parameters of a block that may be gathered in a narrow dtype: those of its projections."""
    own = {m for wide in block.modules() if isinstance(wide, WideParameters) for m in wide.modules()}
    projections = [m for m in block.modules() if isinstance(m, nn.Linear) and m not in own]
    return {p for projection in projections for p in projection.parameters()}


def _together(
    blocks: nn.ModuleList, param_dtype: torch.dtype | None, blocks_per_unit: int | None
) -> Iterator[list[nn.Module]]:
    """The blocks of each unit."""
    if blocks_per_unit is not None:
        require_sizes(blocks_per_unit=blocks_per_unit)
    some: list[nn.Module] = []
    n_bytes = 0
    for block in blocks:
        own = sum(p.numel() * (param_dtype or p.dtype).itemsize for p in narrow_parameters(block))
        full = n_bytes + own > UNIT_BYTES if blocks_per_unit is None else len(some) == blocks_per_unit
        if some and full:
            yield some
            some, n_bytes = [], 0
        some.append(block)
        n_bytes += own
    yield some


def _shard_blocks(
    together: list[list[nn.Module]], mesh: DeviceMesh, param_dtype: torch.dtype | None, reshard_after_forward: bool
) -> None:
    # the inputs of a block are not cast: the residual stays in float32
    narrow = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=None, cast_forward_inputs=False)
    if param_dtype is not None:
        narrow = MixedPrecisionPolicy(param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # a block returns views, such as its state, which nothing changes in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    for blocks in together:
        if param_dtype is not None:
            for block in blocks:
                block.register_forward_pre_hook(_autocast_check(param_dtype, mesh.device_type))
        fully_shard(
            blocks,
            mesh=mesh,
            mp_policy=narrow,
            ignored_params={p for block in blocks for p in set(block.parameters()) - narrow_parameters(block)},
            reshard_after_forward=reshard_after_forward,
        )
        for block in blocks:
            register_fsdp_forward_method(block, "step")


def _shard_rest(model: nn.Module, blocks: nn.ModuleList, mesh: DeviceMesh) -> None:
    """Make the unit of all parameters that the blocks' units left out.

    `fully_shard` does not look into a unit inside another one. So the modules that hold those parameters are children
    of the model for the moment of the call.
    """
    done: set[nn.Parameter] = {p for p in model.parameters() if isinstance(p, DTensor)}
    model._modules["_rest"] = nn.ModuleList(
        m for m in blocks.modules() if any(p not in done for p in m.parameters(recurse=False))
    )
    try:
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=done, reshard_after_forward=False)
    finally:
        del model._modules["_rest"]


def _autocast_check(dtype: torch.dtype, device_type: str) -> Callable[..., None]:
    def check(block: nn.Module, args: Any) -> None:
        if not torch.is_autocast_enabled(device_type) or torch.get_autocast_dtype(device_type) != dtype:
            raise RuntimeError(
                f"the projections are gathered in {dtype}: run the model under torch.autocast({device_type!r}, "
                f"{dtype}), or leave param_dtype out"
            )

    return check


def _split_sequences(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Run `forward` and `loss` in the context of a group, unless the caller has entered one."""

    def within(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(*args: Any, **options: Any) -> Any:
            with nullcontext() if is_spread() else context_parallel(group):
                return method(*args, **options)

        return run

    for name in ("forward", "loss"):
        if hasattr(model, name):
            setattr(model, name, within(getattr(model, name)))


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, getattr(torch, mesh.device_type).current_device())


# ------------------------------------------------------------------------------------------------------------- weights


@torch.no_grad()
def copy_from_first_rank(model: nn.Module, source: nn.Module | None) -> None:
    """Fill a sharded model with the weights of a whole one that only rank 0 has.

    Args:
        model: what `parallelize` returned.
        source: on rank 0 a model with the same parameters and buffers, on any device; None on other ranks.
    Raises RuntimeError on rank 0 if the parameters are not the same.
    """
    for kind in ("named_parameters", "named_buffers"):
        targets: dict[str, Tensor] = dict(getattr(model, kind)())
        given: dict[str, Tensor] = {} if source is None else dict(getattr(source, kind)())
        if source is not None and targets.keys() != given.keys():
            raise RuntimeError(f"the models differ in {min(targets.keys() ^ given.keys())}; make them from one config")
        for name, target in targets.items():
            local = target.to_local() if isinstance(target, DTensor) else target
            whole = torch.empty(target.shape, dtype=target.dtype, device=local.device)
            if source is not None:
                whole.copy_(given[name])
            dist.broadcast(whole, 0)
            if isinstance(target, DTensor):
                whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None).to_local()
            local.copy_(whole)


@torch.no_grad()
def whole_tensors(model: nn.Module) -> dict[str, Tensor] | None:
    """The whole parameters and buffers of a sharded model on the CPU, by name: on rank 0. Other ranks get None.

    All ranks must call it. One parameter at a time is gathered.
    """
    if isinstance(model, FSDPModule):
        model.reshard()
    first = dist.get_rank() == 0
    tensors = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        if first:
            tensors[name] = whole.to("cpu", copy=True)
    return tensors if first else None


# ------------------------------------------------------------------------------------------------------------ gradients


def reduce_gradients(model: nn.Module, wanted: bool) -> None:
    """Say whether the next backward passes add up gradients over ranks: False for all but the last batch of a step."""
    for unit in units(model):
        unit.set_requires_gradient_sync(wanted, recurse=False)
        unit.set_is_last_backward(wanted)


def clip_gradients(model: nn.Module, largest: float) -> float:
    """Scale the gradient down to a norm of at most `largest`; return the norm that it had, over all ranks."""
    parameters = list(model.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm.item()


def sum_over_ranks(*values: float, group: dist.ProcessGroup | None = None) -> list[float]:
    """The sums of numbers over all ranks of a group, which defaults to all ranks."""
    numbers = torch.tensor(values, dtype=torch.float64, device=_reduction_device(group))
    dist.all_reduce(numbers, group=group)
    return numbers.tolist()


def _reduction_device(group: dist.ProcessGroup | None) -> torch.device:
    """The CPU where the group's backend can reduce there, else the current GPU."""
    backend = dist.get_backend_config(group)
    return torch.device("cpu") if "cpu" in str(backend) else torch.device("cuda", torch.cuda.current_device())
