"""The tokens of all documents as one stream, memory-mapped from Arrow and read without Arrow's cost per row."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOKENS_FILE = "tokens.arrow"


class TokenStore:
    """A stream of tokens stored in chunks (Arrow's record batches) of one array.

    Args:
        flat: the array that holds the chunks; for a file, the whole file viewed as tokens.
        offsets: (n_chunks + 1,) where each chunk begins in the stream, then the stream's length.
        places: (n_chunks,) where each chunk begins in `flat`.
        folder: the folder that the tokens were mapped from. Unpickling in another process maps it again, so pickles do
            not contain tokens.
    """

    def __init__(
        self, flat: NDArray, offsets: NDArray[np.int64], places: NDArray[np.int64], folder: Path | None = None
    ) -> None:
        self._flat, self._offsets, self._folder = flat, offsets, folder
        self._shifts = places - offsets[:-1]  # index in flat = index in the stream + shift of the chunk
        self._offset_list, self._shift_list = (
            offsets.tolist(),
            self._shifts.tolist(),
        )  # looking up single values is faster in lists

    def __reduce__(self) -> tuple[Any, ...]:
        if self._folder is not None:
            return open_store, (self._folder,)
        return TokenStore, (self._flat, self._offsets, self._shifts + self._offsets[:-1])

    def slice(self, start: int, stop: int) -> NDArray:
        """The tokens [start, stop) of the stream: a view, or a copy if they are in several chunks."""
        chunk = bisect_right(self._offset_list, start) - 1
        if stop <= self._offset_list[min(chunk + 1, len(self._offset_list) - 1)]:
            shift = self._shift_list[chunk] if stop > start else 0
            return self._flat[start + shift : stop + shift]
        return self.gather(np.array([start]), np.array([stop - start]))

    def gather(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray:
        """The tokens of several spans of the stream, concatenated. Short spans are read without a loop over them."""
        filled = lengths > 0
        places, lengths = self._parts(starts[filled], lengths[filled])
        total = int(lengths.sum())
        if total >= 256 * len(lengths):  # long spans: copying slices is faster than indexing each token
            views = [self._flat[place : place + n] for place, n in zip(places.tolist(), lengths.tolist(), strict=True)]
            return np.concatenate(views) if views else self._flat[:0]
        before = np.cumsum(lengths) - lengths
        return self._flat[np.repeat(places - before, lengths) + np.arange(total)]

    def _parts(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices in `flat` and lengths of the spans, which are cut where their chunks end."""
        first = np.searchsorted(self._offsets, starts, side="right") - 1
        last = np.searchsorted(self._offsets, starts + lengths - 1, side="right") - 1
        counts = last - first + 1
        if (counts == 1).all():
            return starts + self._shifts[first], lengths
        span = np.repeat(np.arange(len(starts)), counts)
        chunk = first[span] + np.arange(len(span)) - np.repeat(np.cumsum(counts) - counts, counts)
        begin = np.maximum(starts[span], self._offsets[chunk])
        end = np.minimum((starts + lengths)[span], self._offsets[chunk + 1])
        return begin + self._shifts[chunk], end - begin


def open_store(folder: Path) -> TokenStore:
    """Map the tokens of a cached table; only the headers of the record batches are read."""
    import pyarrow

    file = pyarrow.memory_map(str(folder / TOKENS_FILE))
    buffer = file.read_buffer(file.size())
    chunks = pyarrow.ipc.open_stream(pyarrow.BufferReader(buffer)).read_all().column("tokens").chunks
    values = [chunk.flatten() for chunk in chunks]
    dtype = np.dtype(values[0].type.to_pandas_dtype())
    width = dtype.itemsize
    places = [v.buffers()[1].address - buffer.address + v.offset * width for v in values]
    assert not any(place % width for place in places), "Arrow aligns its buffers to 8 bytes"
    flat = np.frombuffer(buffer, np.uint8, buffer.size // width * width).view(dtype)
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int64)
    return TokenStore(flat, offsets, np.array(places, np.int64) // width, folder)
