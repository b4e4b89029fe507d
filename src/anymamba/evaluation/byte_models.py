"""Simple byte models to compare a language model with: an order-k byte model, zlib and xz.

All measure bits per byte on the same held-out documents. The order-k model is trained on the training documents; the
compressors read only the held-out bytes and adapt to them.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 22
"""Bytes counted at once. This bounds the memory apart from the tables, which grow with the distinct contexts only."""


class OrderKByteModel:
    """Predicts each byte from the k bytes before it in its document (fewer at its beginning).

    Counts of all orders up to k are interpolated by Witten-Bell's rule, which is the escape of PPM method C:

        p_j(b | c) = (n(c b) + t(c) p_{j-1}(b | c')) / (n(c) + t(c)),   p_{-1} = 1 / 256,

    where n counts in the training bytes, t(c) is the number of different bytes seen after the context c and c' is c
    without its oldest byte. For a context that was never seen p_j is p_{j-1}. Every probability is above 0.
    Source: Witten and Bell, The zero-frequency problem, IEEE Trans. Inf. Theory 37(4), 1991; Moffat, 1990 (PPMC).

    Args:
        documents: the training bytes; each document starts a new context.
        order: k, 0 to 7.
    """

    def __init__(self, documents: Iterable[bytes], order: int = 3) -> None:
        if isinstance(order, bool) or not isinstance(order, int) or not 0 <= order <= 7:
            raise ValueError(f"order must be an integer from 0 to 7 (a context is kept in 64 bits), got {order!r}")
        self.order = order
        self._dtype: Any = np.uint32 if order <= 3 else np.uint64  # holds k + 1 bytes as one number
        tables = [_Counts.of(np.zeros(0, self._dtype))] * (order + 1)
        for block in _blocks(documents, order):
            for known in range(order + 1):
                tables[known] = tables[known].add(_Counts.of(block.grams(known, self._dtype)))
        # so far each byte is counted once, with its longest context; now also count it at every lower order
        for known in range(order, 0, -1):
            tables[known - 1] = tables[known - 1].add(tables[known].without_oldest(known))
        self.n_training_bytes = int(tables[0].counts.sum())
        """Number of bytes that the model was trained on."""
        self._tables = [_Followers(table) for table in tables]
        _require_bytes(self.n_training_bytes)

    def bits_per_byte(self, documents: Iterable[bytes]) -> float:
        """Mean of -log2 p over the bytes of all documents; each document starts a new context.

        Raises ValueError if there are no bytes.
        """
        bits, n_bytes = 0.0, 0
        for block in _blocks(documents, self.order):
            for known in range(self.order + 1):
                grams, counts = _Counts.of(block.grams(known, self._dtype))
                bits -= float(np.sum(counts * np.log2(self._probabilities(grams, known))))
                n_bytes += int(counts.sum())
        return bits / _require_bytes(n_bytes)

    def probabilities(self, context: bytes) -> NDArray[np.float64]:
        """(256,) the probability of each byte after a context; only its last k bytes count."""
        known = min(len(context), self.order)
        number = int.from_bytes(context[len(context) - known :], "big")
        return self._probabilities(self._dtype(number << 8) + np.arange(256, dtype=self._dtype), known)

    def _probabilities(self, grams: NDArray[Any], known: int) -> NDArray[np.float64]:
        """The probability of the last byte of each gram, given the `known` bytes before it."""
        p = np.full(len(grams), 1 / 256)
        for order in range(known + 1):
            suffix = grams & self._dtype(256 ** (order + 1) - 1)
            n_gram, n_context, n_different = self._tables[order].look_up(suffix)
            p = np.where(n_context > 0, (n_gram + n_different * p) / np.maximum(n_context + n_different, 1), p)
        return p


def zlib_bits_per_byte(documents: Iterable[bytes]) -> float:
    """Bits per byte of the documents one after another as a single zlib stream, level 9, header included."""
    return _compressed_bits_per_byte(zlib.compressobj(9), documents)


def xz_bits_per_byte(documents: Iterable[bytes]) -> float:
    """Bits per byte of the documents one after another as a single .xz file, preset 9 extreme, header included."""
    return _compressed_bits_per_byte(lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME), documents)


def _compressed_bits_per_byte(compressor: Any, documents: Iterable[bytes]) -> float:
    n_bytes = n_compressed = 0
    for document in documents:
        n_bytes += len(document)
        n_compressed += len(compressor.compress(document))
    return 8 * (n_compressed + len(compressor.flush())) / _require_bytes(n_bytes)


def _require_bytes(n_bytes: int) -> int:
    if n_bytes == 0:
        raise ValueError("no bytes; give at least one document that is not empty")
    return n_bytes


# ------------------------------------------------------------------------------------------------- counting
#
# A gram is a byte with the bytes before it, as one number whose lowest 8 bits are the last byte.


class _Block(NamedTuple):
    """A block of the concatenated documents."""

    data: NDArray[np.uint8]
    known: NDArray[np.uint8]
    """For each byte, the number of bytes before it in its document, at most k; CONTEXT_ONLY for bytes that belong to
    the previous block."""

    def grams(self, known: int, dtype: Any) -> NDArray[Any]:
        """The grams of all bytes that have `known` bytes before them."""
        places = np.flatnonzero(self.known == known)
        grams = np.zeros(len(places), dtype)
        for back in range(known, -1, -1):
            grams = (grams << dtype(8)) | self.data[places - back]
        return grams


CONTEXT_ONLY = 255


def _blocks(documents: Iterable[bytes], order: int, size: int = BLOCK) -> Iterator[_Block]:
    """The documents in blocks of less than 2 * size bytes; short documents share a block and long ones are cut."""
    pieces: list[NDArray[np.uint8]] = []
    goes_on, length = False, 0  # goes_on: whether the block's first piece continues a document
    for document in documents:
        data = np.frombuffer(document, np.uint8)
        for begin in range(0, len(data), size):
            goes_on = goes_on or begin > 0
            pieces.append(data[max(0, begin - order) : begin + size])
            length += len(pieces[-1])
            if length >= size:
                yield _join(pieces, goes_on, order)
                pieces, goes_on, length = [], False, 0
    if pieces:
        yield _join(pieces, goes_on, order)


def _join(pieces: list[NDArray[np.uint8]], goes_on: bool, order: int) -> _Block:
    data = np.concatenate(pieces)
    starts = np.cumsum([0, *map(len, pieces[:-1])])
    known = np.full(len(data), order, np.uint8)
    for j in range(order - 1, -1, -1):  # in this order, the nearest beginning is written last
        known[(starts + j)[starts + j < len(data)]] = j
    if goes_on:
        known[:order] = CONTEXT_ONLY
    return _Block(data, known)


class _Counts(NamedTuple):
    """The number of occurrences of each gram. Grams are sorted and distinct."""

    grams: NDArray[Any]
    counts: NDArray[np.int64]

    @staticmethod
    def of(grams: NDArray[Any]) -> _Counts:
        return _Counts(*np.unique(grams, return_counts=True))

    def add(self, other: _Counts) -> _Counts:
        """The sum of both counts."""
        grams = np.concatenate([self.grams, other.grams])
        return _sum_equal(grams, np.concatenate([self.counts, other.counts]))

    def without_oldest(self, known: int) -> _Counts:
        """The counts of the grams without their oldest byte."""
        return _sum_equal(self.grams & self.grams.dtype.type(256**known - 1), self.counts)


def _sum_equal(grams: NDArray[Any], counts: NDArray[np.int64]) -> _Counts:
    order = np.argsort(grams, kind="stable")
    grams, counts = grams[order], counts[order]
    first = _first_of_runs(grams)
    return _Counts(grams[first], np.add.reduceat(counts, first) if len(first) else counts)


def _first_of_runs(values: NDArray[Any]) -> NDArray[np.int64]:
    """Where each run of equal values begins."""
    return np.flatnonzero(np.concatenate([np.ones(min(1, len(values)), bool), values[1:] != values[:-1]]))


class _Followers:
    """The counts of one order, by context."""

    def __init__(self, table: _Counts) -> None:
        self._grams, self._counts = table
        contexts = self._grams >> self._grams.dtype.type(8)
        first = _first_of_runs(contexts)
        self._contexts = contexts[first]
        self._totals = np.add.reduceat(self._counts, first) if len(first) else first
        self._different = np.diff(first, append=len(contexts))

    def look_up(self, grams: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """For each gram: its count, the count of its context, and the number of different bytes after that context."""
        contexts = grams >> grams.dtype.type(8)
        n_gram = _values_at(self._grams, grams, self._counts)
        n_context = _values_at(self._contexts, contexts, self._totals)
        return n_gram, n_context, _values_at(self._contexts, contexts, self._different)


def _values_at(keys: NDArray[Any], wanted: NDArray[Any], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The value of each wanted key; 0 for a key that is missing from the sorted `keys`."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
