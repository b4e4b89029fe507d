"""Rows of token ids in whatever form a caller has them: lists, ranges, arrays, tensors."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike


def row_of_ids(ids: ArrayLike | Iterable[int], what: str = "ids") -> Int[np.ndarray, " length"]:
    """Turn one row of token ids, in any form, into an array of integers.

    Args:
        ids: a list, range, array or tensor of any integer type, on any device, or any other iterable of integers. Items
            of a list may be integers of Python or numpy, or 0-dimensional tensors.
        what: the name of the row in messages.
    Raises ValueError if ids do not have one dimension, TypeError if values are not integers (booleans are not).
    """
    if isinstance(ids, str):
        raise TypeError(f"{what} must hold integer token ids, got text; encode it with the tokenizer first")
    if isinstance(ids, Mapping):
        raise TypeError(f"{what} must hold integer token ids, got a {type(ids).__name__}; give its 'input_ids'")
    array = _as_array(ids, what)
    if array.ndim != 1:
        raise ValueError(f"{what} must be a list of token ids, got shape {array.shape}; give one row")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{what} must hold integer token ids, got {array.dtype}")
    return array if array.size else array.astype(np.int64)


def _as_array(ids: Any, what: str) -> np.ndarray:
    """Ids as an array of their own dtype."""
    if hasattr(ids, "detach"):  # a tensor: numpy reads only those on the CPU and has no bfloat16
        if ids.dim() and ids.numel() and not _holds_integers(ids):
            raise TypeError(f"{what} must hold integer token ids, got {ids.dtype}")
        return ids.detach().cpu().numpy() if _holds_integers(ids) else np.empty(tuple(ids.shape))
    if hasattr(ids, "__array__") and np.asarray(ids).dtype != object:
        return np.asarray(ids)
    return _list_as_array(list(ids), what) if isinstance(ids, Iterable) else np.asarray(ids)


def _list_as_array(values: list[Any], what: str) -> np.ndarray:
    """A list of integers as an array; numpy itself would accept booleans and round large ids."""
    kinds = set(map(type, values))
    for value in values if kinds - {int} else ():
        if getattr(value, "ndim", 0) or isinstance(value, list | tuple | range):
            raise ValueError(f"{what} must be a list of token ids, got a {type(value).__name__} in it; give one row")
        if isinstance(value, bool | np.bool_) or not (isinstance(value, int | np.integer) or _holds_integers(value)):
            raise TypeError(f"{what} must hold integer token ids, got {value!r}")
    numbers = values if kinds <= {int} else list(map(operator.index, values))
    try:
        return np.array(numbers, np.int64)
    except OverflowError:
        raise ValueError(f"{what} has the id {max(numbers, key=abs)}, which is too large for any vocabulary") from None


def _holds_integers(values: Any) -> bool:
    """Whether an array or a tensor is of an integer type."""
    return str(getattr(values, "dtype", "")).removeprefix("torch.").startswith(("int", "uint"))
