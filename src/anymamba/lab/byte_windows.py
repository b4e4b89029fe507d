"""Windows of bytes of a corpus: random ones for training, fixed ones for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from anymamba.data.stdlib_corpus import is_held_out, standard_library_files
from anymamba.lab.optimization import Batch


@cache
def standard_library_bytes(held_out: bool) -> Tensor:
    """The training or the held-out files of the standard library, joined in the order of their names, as uint8."""
    files = [path for path in standard_library_files() if is_held_out(path) is held_out]
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def random_windows(text: Tensor, length: int, separator: int | None = None) -> Callable[[torch.Generator, int], Batch]:
    """A function that makes batches of windows from random places of the text; the labels are the next bytes.

    Batches are made on the device of the text. The byte `separator` becomes the id 256, which ends a document.
    """
    require_length(text, length)

    def make(generator: torch.Generator, rows: int) -> Batch:
        starts = torch.randint(len(text) - length, (rows,), generator=generator, device=generator.device)
        return windows(text, starts.to(text.device), length, separator)

    return make


def fixed_windows(text: Tensor, length: int, rows: int, separator: int | None = None) -> Batch:
    """Windows at equal distances, from the first byte to the last."""
    require_length(text, length)
    starts = torch.linspace(0, len(text) - length - 1, rows, dtype=torch.float64).long()
    return windows(text, starts.to(text.device), length, separator)


def windows(text: Tensor, starts: Tensor, length: int, separator: int | None = None) -> Batch:
    """The window at each start, and the next byte of each position."""
    found = text[starts[:, None] + torch.arange(length + 1, device=text.device)].long()
    if separator is not None:
        found = found.masked_fill(found == separator, 256)
    return found[:, :-1], found[:, 1:]


def require_length(text: Tensor, length: int) -> None:
    """Raises ValueError if no window fits."""
    if len(text) <= length:
        raise ValueError(
            f"the text must be longer than a window of {length} bytes, got {len(text)} bytes; shorten the window"
        )
