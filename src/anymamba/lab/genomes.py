"""Genomes as a corpus on the device: stretches for training and held-out ones, and windows of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anymamba.data.dna import N_ID, DnaTokenizer, Genome
from anymamba.lab.optimization import Batch

CorpusName = Literal["arabidopsis", "synthetic"]
A_ID = 7
"""The id of A; C, G and T follow. An id and that of its complement add up to 2 A_ID + 3."""
LONG_RUN = 1000
"""Runs of this many N are cut out of a stretch; shorter ones are read, but no N is a label."""
HELD_OUT_UNIT = 1 << 20
"""Every held-out stretch has a multiple of this many bases, so that windows of every length tile the same bases."""


@dataclass(frozen=True)
class Part:
    """A sequence of a genome and how it is split by position: held out, then a buffer, then training."""

    file: str
    sequence: str
    held_out: int = 0
    """Bases at the beginning that are held out."""
    training_from: int = 0


ARABIDOPSIS = (
    Part("arabidopsis_thaliana_chr1.2bit", "NC_003070.9", 3 * HELD_OUT_UNIT, 4_000_000),
    Part("arabidopsis_lyrata_chr1_chr2.2bit", "CM047395.1", 4 * HELD_OUT_UNIT, 5_100_000),
    Part("arabidopsis_lyrata_chr1_chr2.2bit", "CM047396.1"),
    Part("arabidopsis_arenosa_chr1_chr2.2bit", "CM047417.1", 3 * HELD_OUT_UNIT, 4_500_000),
    Part("arabidopsis_arenosa_chr1_chr2.2bit", "CM047418.1"),
)
"""The first chromosomes of the three species are colinear: position 4,000,000 of A. thaliana is about 5,050,000 in A.
lyrata and 4,400,000 in A. arenosa. So what is held out in one is neither in training in another, nor near it."""


class Stretches(NamedTuple):
    """Contiguous stretches of bases, one after another."""

    ids: Tensor
    """(bases,) ids of `DnaTokenizer` as uint8."""
    starts: tuple[int, ...]
    lengths: tuple[int, ...]


class Corpus(NamedTuple):
    """Both sides of a split. A held-out stretch has one base more than is counted, the last label."""

    training: Stretches
    held_out: Stretches
    digest: str
    """Identifies the bases of both sides."""
    cut: int
    """Bases of long runs of N, which are in neither side."""

    def to(self, device: torch.device) -> Corpus:
        """The corpus on a device, in one byte a base."""
        sides = [side._replace(ids=side.ids.to(device)) for side in (self.training, self.held_out)]
        return self._replace(training=sides[0], held_out=sides[1])


def corpus(name: CorpusName, folder: Path | None, device: torch.device) -> Corpus:
    """The corpus with that name.

    Args:
        folder: has the files, or a folder `genomes` with them; the synthetic corpus needs none.
    Raises ValueError if a folder is needed and None, FileNotFoundError if it lacks a file.
    """
    if name == "synthetic":
        return synthetic_corpus().to(device)
    files = tuple(find_file(folder, file) for file in dict.fromkeys(part.file for part in ARABIDOPSIS))
    return read_corpus(files, ARABIDOPSIS).to(device)


def find_file(folder: Path | None, name: str) -> Path:
    """A file in the folder of the data, or in a folder of it.

    Raises ValueError if there is no folder, FileNotFoundError if it does not have the file.
    """
    if folder is None:
        raise ValueError(f"this arm reads {name}; give the folder with the genomes with --data")
    found = next((path for path in (folder / name, *sorted(folder.glob(f"*/{name}"))) if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"neither {folder} nor a folder in it has {name}; give the folder that has with --data")
    return found


@cache
def read_corpus(files: tuple[Path, ...], parts: tuple[Part, ...]) -> Corpus:
    """Read the files and split their sequences by position."""
    training: list[NDArray[np.uint8]] = []
    held_out: list[NDArray[np.uint8]] = []
    cut = 0
    for file in files:
        with Genome.open(file) as genome:
            for part in parts:
                if part.file == file.name:
                    ids = ids_of(genome, part.sequence)
                    kept = without_long_runs(ids[part.training_from :])
                    cut += len(ids) - part.training_from - sum(map(len, kept))
                    training += kept
                    held_out += [ids[: part.held_out + 1]] if part.held_out else []
    return Corpus(joined(training), joined(held_out), digest_of([*training, *held_out]), cut)


def ids_of(genome: Genome, name: str) -> NDArray[np.uint8]:
    """A whole sequence as ids of `DnaTokenizer`; lower case is folded."""
    return DnaTokenizer().encode_letters(genome.letters(name, 0, genome.lengths[name]))


def without_long_runs(ids: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The pieces between runs of at least LONG_RUN N."""
    unknown = np.concatenate([[0], (ids == N_ID).view(np.int8), [0]])
    begins, ends = (np.flatnonzero(np.diff(unknown) == sign) for sign in (1, -1))
    long = ends - begins >= LONG_RUN
    edges = np.concatenate([[0], np.stack([begins[long], ends[long]], 1).ravel(), [len(ids)]])
    return [ids[a:b] for a, b in edges.reshape(-1, 2) if b > a]


def joined(pieces: Sequence[NDArray[np.uint8]]) -> Stretches:
    """Stretches of these pieces."""
    lengths = tuple(map(len, pieces))
    starts = tuple(np.cumsum([0, *lengths])[:-1].tolist())
    return Stretches(torch.from_numpy(np.concatenate(pieces)), starts, lengths)


def digest_of(pieces: Sequence[NDArray[np.uint8]]) -> str:
    """The first 16 digits of the SHA-256 of ids."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece.tobytes())
    return found.hexdigest()[:16]


@cache
def synthetic_corpus(n_bases: int = 20_000, held_out: int = 512) -> Corpus:
    """Bases that mostly repeat what stood 16 before, with a few N: for tests and the scale toy."""
    draw = np.random.default_rng(0)
    ids = draw.integers(A_ID, A_ID + 4, n_bases, dtype=np.uint8)
    for i in range(16, n_bases):
        if draw.random() < 0.7:
            ids[i] = ids[i - 16]
    ids[draw.integers(0, n_bases, 20)] = N_ID
    training, held = ids[2 * held_out :], ids[: held_out + 1]
    return Corpus(joined([training]), joined([held]), digest_of([training, held]), 0)


# ------------------------------------------------------------------------------------------------------------ windows


def training_windows(stretches: Stretches, length: int) -> Callable[[torch.Generator, int], Batch]:
    """A function that makes batches of windows from random places; the labels are the next bases.

    A row is read with probability 1/2 on the other strand. Every start at which a window fits in a stretch is equally
    likely. Batches are made on the device of the stretches. Raises ValueError if no stretch is longer than a window.
    """
    device = stretches.ids.device
    rooms = torch.tensor([max(0, n - length) for n in stretches.lengths], device=device)
    if not int(rooms.sum()):
        longest = max(stretches.lengths, default=0)
        raise ValueError(f"no stretch is longer than a window of {length:,} bases, the longest has {longest:,}")
    ends, starts, total = rooms.cumsum(0), torch.tensor(stretches.starts, device=device), int(rooms.sum())

    def make(generator: torch.Generator, rows: int) -> Batch:
        draw = torch.randint(total, (rows,), generator=generator, device=generator.device).to(device)
        flip = torch.rand(rows, generator=generator, device=generator.device).to(device) < 0.5
        which = torch.searchsorted(ends, draw, right=True)
        first = starts[which] + draw - (ends[which] - rooms[which])
        ids = stretches.ids[first[:, None] + torch.arange(length + 1, device=device)].long()
        return as_batch(on_either_strand(ids, flip))

    return make


def held_out_windows(stretches: Stretches, length: int, most: int | None = None) -> Batch:
    """The windows that tile all held-out stretches, or the first `most` bases of each: at every length the same labels.

    Raises ValueError if windows of that length do not tile a stretch.
    """
    rows = []
    for start, n in zip(stretches.starts, stretches.lengths, strict=True):
        tiled = n - 1 if most is None else min(most, n - 1)
        if tiled % length:
            raise ValueError(f"windows of {length:,} bases do not tile a held-out stretch of {tiled:,}")
        own = stretches.ids[start : start + tiled + 1]
        rows.append(torch.cat([own[:-1].view(-1, length), own[length::length, None]], 1))
    return as_batch(torch.cat(rows).long())


def as_batch(ids: Tensor) -> Batch:
    """Inputs and labels (rows, length) of windows with one base more; an N is never a label."""
    labels = ids[:, 1:]
    return ids[:, :-1], labels.masked_fill(labels == N_ID, -100)


def on_either_strand(ids: Tensor, flip: Tensor) -> Tensor:
    """Rows of ids, where `flip` says so as their reverse complements."""
    is_base = (ids >= A_ID) & (ids < A_ID + 4)
    other = torch.where(is_base, 2 * A_ID + 3 - ids, ids).flip(1)
    return torch.where(flip[:, None], other, ids)
