"""A FASTA file as two bits a base in the cache, with runs of other letters and of lower case aside."""

from __future__ import annotations

import json
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from anymamba.base import manifest
from anymamba.base.errors import CheckpointError
from anymamba.base.files import atomic_folder, own_file, sweep, write_json
from anymamba.data.cache import FORMAT, Sources, default_cache, mark_used, table_key

from ..documents import open_decompressed
from .fasta import FastaCounts, read_fasta
from .letters import LOWER, ODD, U, pack, translated, unpack
from .runs import RunList, find_runs, overlapping

_FORMAT = 1  # of the files below; part of the key
_BASES, _ODD, _LOWER, _RECORDS = "bases.bin", "odd.npy", "lower.npy", "records.json"
_AT_ONCE = 1 << 18  # letters packed at once; they stay in the processor's cache

Progress = Callable[[int, int | None], None]


def open_packed(file: Path, cache_dir: Path | None = None, progress: Progress | None = None) -> PackedReader:
    """The sequences of a FASTA file, which may be compressed, from the cache; the first time the file is packed.

    Args:
        cache_dir: the folder of the cache; defaults to the one of token tables.
        progress: called with (bytes read, bytes of the file) while the file is packed.
    Raises ValueError, naming line and record, for a file that is damaged or is no FASTA of DNA.
    """
    file = Path(os.path.abspath(file))  # the same file has one key, and is found again from another folder
    cache = default_cache() if cache_dir is None else Path(cache_dir)
    options = [FORMAT, "genome", _FORMAT]
    folder = cache / table_key(options, [file])
    if not _is_complete(folder):
        _pack_once(folder, file, options, progress)
    mark_used(folder)
    return PackedReader(folder)


class PackedReader:
    """Random access to packed sequences. The bases are mapped; runs are read from mapped arrays."""

    def __init__(self, folder: Path) -> None:
        notes = json.loads((folder / _RECORDS).read_text(encoding="utf-8"))
        self.lengths: dict[str, int] = dict(zip(notes["names"], notes["lengths"], strict=True))
        self.counts: dict[str, Any] = notes["counts"]
        """Letters other than the bases, lower-case letters, empty records and comments of the file."""
        self._first = {name: i for i, name in enumerate(notes["names"])}
        self._offsets, self._odd_at, self._lower_at = notes["offsets"], notes["odd"], notes["lower"]
        self._odd = np.load(folder / _ODD, mmap_mode="r")
        self._lower = np.load(folder / _LOWER, mmap_mode="r")
        with (folder / _BASES).open("rb") as bases:
            self._bases = mmap.mmap(bases.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, name: str, start: int, end: int) -> NDArray[np.uint8]:
        """The letters [start, end) of a sequence as ASCII codes."""
        record = self._first[name]
        at = self._offsets[record]
        packed = self._bases[at + start // 4 : at + (end + 3) // 4]
        letters = unpack(packed, start % 4, end - start)
        for first, last, letter in self._runs(self._odd, self._odd_at, record, start, end):
            letters[max(first - start, 0) : last - start] = letter
        for first, last, _ in self._runs(self._lower, self._lower_at, record, start, end):
            letters[max(first - start, 0) : last - start] |= LOWER
        return letters

    def unknown_runs(self, name: str) -> NDArray[np.int64]:
        """Where a sequence has N or an ambiguity code, (n_runs, 2)."""
        at = self._first[name]
        mine = self._odd[self._odd_at[at] : self._odd_at[at + 1]]
        return np.asarray(mine[mine[:, 2] != U][:, :2])

    @staticmethod
    def _runs(runs: NDArray[np.int64], at: list[int], record: int, start: int, end: int) -> list[list[int]]:
        """The runs of a record in a range, as [start, end, letter]."""
        mine = runs[at[record] : at[record + 1]]
        return mine[overlapping(mine[:, 0], mine[:, 1], start, end)].tolist()

    def close(self) -> None:
        """Close the mapped file."""
        self._bases.close()


def _is_complete(folder: Path) -> bool:
    try:
        return {_BASES, _ODD, _LOWER, _RECORDS} <= manifest.check(folder)
    except (CheckpointError, FileNotFoundError):
        return False


def _pack_once(folder: Path, file: Path, options: list[Any], progress: Progress | None) -> None:
    """Pack a file unless another process does so first."""
    with ExitStack() as owned:
        with _writing(folder.parent):
            owned.enter_context(own_file(folder, wait=None))
        if _is_complete(folder):
            return
        sweep(folder.parent)
        with atomic_folder(folder, replace=True) as building:
            building.mkdir()
            _pack(building, folder.parent, file, options, progress)


def _pack(folder: Path, cache: Path, file: Path, options: list[Any], progress: Progress | None) -> None:
    total, done = file.stat().st_size, 0

    def on_read(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    counts = FastaCounts()
    with open_decompressed(file, on_read) as stream, (folder / _BASES).open("wb") as bases:
        writer = _Writer(bases, cache)
        for name, pieces in read_fasta(file, stream, counts):
            writer.add(name, pieces)
        if not writer.names:
            raise ValueError(f"{file} has no sequence: all of its {len(counts.empty)} records are empty")
    with _writing(cache):
        writer.finish(folder, counts)
        Sources(options, "DNA", len(writer.names), sum(writer.lengths), [str(file)]).write(folder)
        manifest.write(folder)


class _Writer:
    """Packs records one after another; each begins in a byte of its own."""

    def __init__(self, bases: BinaryIO, cache: Path) -> None:
        self._bases, self._cache = bases, cache
        self.names: list[str] = []
        self.lengths: list[int] = []
        self._offsets: list[int] = []
        self._runs: dict[str, list[NDArray[np.int64]]] = {_ODD: [], _LOWER: []}
        self._letters: Counter[str] = Counter()

    def add(self, name: str, pieces: Iterator[NDArray[np.uint8]]) -> None:
        """Write one record."""
        self.names.append(name)
        self._offsets.append(self._bases.tell())
        odd, lower, length = RunList(), RunList(), 0
        for letters in _in_fours(pieces):
            with _writing(self._cache):
                self._bases.write(pack(letters))
            odd.add(find_runs(translated(letters, ODD)), length)
            lower.add(find_runs(letters & np.uint8(LOWER)), length)
            length += len(letters)
        self.lengths.append(length)
        for file, runs in ((_ODD, odd.take()), (_LOWER, lower.take())):
            self._runs[file].append(runs)
            self._count(file, runs)

    def _count(self, file: str, runs: NDArray[np.int64]) -> None:
        for letter in np.unique(runs[:, 2]).tolist():
            mine = runs[runs[:, 2] == letter]
            self._letters["lower" if file == _LOWER else chr(letter)] += int((mine[:, 1] - mine[:, 0]).sum())

    def finish(self, folder: Path, counts: FastaCounts) -> None:
        """Write the runs and the list of records."""
        at = {}
        for file, runs in self._runs.items():
            np.save(folder / file, np.concatenate(runs))
            at[file] = [0, *np.cumsum([len(r) for r in runs]).tolist()]
        write_json(
            folder / _RECORDS,
            {
                "names": self.names,
                "lengths": self.lengths,
                "offsets": self._offsets,
                "odd": at[_ODD],
                "lower": at[_LOWER],
                "counts": {"letters": self._letters, "empty": counts.empty, "comments": counts.comments},
            },
            indent=None,
        )


def _in_fours(pieces: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """The same letters in pieces whose lengths are multiples of four, but for the last one."""
    waiting: list[NDArray[np.uint8]] = []
    n = 0
    for piece in pieces:
        waiting.append(piece)
        n += len(piece)
        if n >= _AT_ONCE:
            letters = np.concatenate(waiting)
            whole = n // 4 * 4
            yield letters[:whole]
            waiting, n = [letters[whole:]], n - whole
    if n:
        yield np.concatenate(waiting)


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Turn an OSError in the body into one that says that the cache cannot be written, and the way out."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write the packed genome in {cache} ({error.strerror or error}); free space there, or choose "
            "another folder with cache_dir or XDG_CACHE_HOME",
        ) from error
