"""Checks that the operators share. Each error says what is wrong, what was given and what is wanted."""

from typing import Any, TypeVar

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)


def require_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...], words: str) -> None:
    """Raise ValueError unless the tensor has this shape; None matches any size."""
    got = tensor.shape
    fits = got == shape or (len(got) == len(shape) and all(map(_fits, got, shape)))
    if not fits:
        wanted = "(" + ", ".join("any" if s is None else str(s) for s in shape) + ")"
        raise ValueError(f"{name} must be {words} = {wanted}, got {tuple(tensor.shape)}")


def _fits(got: int, wanted: int | None) -> bool:
    return wanted is None or got == wanted


def require_floating(name: str, tensor: Tensor, *, allow_complex: bool = False) -> None:
    """Raise TypeError unless the tensor holds floating-point (or, if allowed, complex) numbers of at least 16 bits."""
    if not (tensor.is_floating_point() or (allow_complex and tensor.is_complex())):
        kinds = "floating point or complex" if allow_complex else "floating point"
        raise TypeError(f"{name} must be {kinds}, got {tensor.dtype}")
    if tensor.dtype.itemsize < 2:
        raise TypeError(
            f"{name} must have at least 16 bits per number, got {tensor.dtype}; convert it to torch.bfloat16"
        )


def require_same_device(op: str, tensors: dict[str, Tensor | None]) -> None:
    """Raise ValueError unless all tensors are on one device."""
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(given.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in given.items())
        raise ValueError(f"{op} needs all tensors on one device, got {places}")


def n_sequences(batch: int, cu_seqlens: Tensor | None) -> int:
    """The number of sequences, and so of states: the batch size, or the number of sequences packed into one row.

    Raises TypeError or ValueError if cu_seqlens is not an integer vector of at least two offsets or the batch is not 1.
    """
    if cu_seqlens is None:
        return batch
    if cu_seqlens.dtype not in INTEGERS:
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}; use cu_seqlens.int()")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"cu_seqlens must be a vector of n + 1 offsets for n >= 1 sequences, got shape {tuple(cu_seqlens.shape)}"
        )
    if batch != 1:
        raise ValueError(
            f"cu_seqlens packs sequences along the length of one row, got batch {batch}; "
            "flatten (batch, length) to (1, batch * length) and shift the offsets"
        )
    return cu_seqlens.numel() - 1


def require_offsets(cu_seqlens: Tensor | None, length: int) -> None:
    """Raise ValueError unless the offsets ascend from 0 to length. It reads values, so it runs inside the op."""
    if cu_seqlens is None:
        return
    offsets = cu_seqlens.long().cpu()
    if offsets[0] != 0 or offsets[-1] != length or bool((offsets[1:] < offsets[:-1]).any()):
        shown = offsets.tolist() if offsets.numel() <= 8 else [*offsets[:4].tolist(), "...", *offsets[-3:].tolist()]
        raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, got {shown}")


ArgumentsT = TypeVar("ArgumentsT")


def without_lazy(arguments: ArgumentsT) -> ArgumentsT:
    """Resolve lazy conjugation and negation of a record's tensors, because kernels read the memory directly."""
    fields: Any = arguments
    if not torch.compiler.is_compiling():
        for field in fields:
            if isinstance(field, Tensor) and (field.is_neg() or field.is_conj()):
                break
        else:
            return arguments
    return type(arguments)(*(t.resolve_conj().resolve_neg() if isinstance(t, Tensor) else t for t in fields))
