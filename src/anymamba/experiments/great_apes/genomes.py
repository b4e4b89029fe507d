"""Homologous sequence of four apes: what belongs to each split, windows for training, and loci for tests."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anymamba.data.dna import N_ID, Genome
from anymamba.lab.genomes import A_ID, find_file, ids_of, on_either_strand
from anymamba.lab.learning import MakeBatch
from anymamba.lab.optimization import Batch

SPECIES = ("human", "chimp", "gorilla", "orangutan")
FASTA, SPLITS = "apes_chr22.fa.xz", "apes_chr22_splits.tsv"
Source = Literal["apes", "synthetic"]
Split = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class Slices:
    """The slices of one split. Slice i of each species is homologous to the same interval of the human chromosome."""

    ids: Tensor
    """(bases,) ids of `DnaTokenizer` as uint8, without N."""
    starts: Tensor
    """(slices, species) offset of each slice in the ids."""
    lengths: Tensor
    """(slices, species) its bases."""
    cut: int
    """N that were cut out."""

    def at_least(self, length: int) -> Slices:
        """The slices that have so many bases in every species. Raises ValueError if there is none."""
        kept = self.lengths.amin(1) >= length
        if not kept.any():
            raise ValueError(f"no slice has {length:,} bases in every species, the longest {int(self.lengths.max()):,}")
        return Slices(self.ids, self.starts[kept], self.lengths[kept], self.cut)

    def to(self, device: torch.device) -> Slices:
        """The slices on a device, in one byte a base."""
        return Slices(self.ids.to(device), self.starts.to(device), self.lengths.to(device), self.cut)


def slices(source: Source, folder: Path | None, split: Split, device: torch.device) -> Slices:
    """The slices of a split. Raises ValueError or FileNotFoundError if the data are not there."""
    if source == "synthetic":
        return synthetic_slices(split).to(device)
    return read_slices(find_file(folder, FASTA), find_file(folder, SPLITS))[split].to(device)


@cache
def read_slices(fasta: Path, splits: Path) -> dict[str, Slices]:
    """The slices of every split but the buffers; N are cut out.

    Windows with N cannot be dropped: at 2^16 bases every test locus has one in at least one species. The bases on both
    sides of an N are joined, as they are at the alignment's own gaps.
    """
    pieces: dict[str, list[list[NDArray[np.uint8]]]] = {}
    cut: dict[str, int] = {}
    with Genome.open(fasta) as genome, splits.open(encoding="utf-8", newline="") as file:
        ids = {name: ids_of(genome, name) for name in genome.names}
        for row in csv.DictReader(file, delimiter="\t"):
            split = row["split"]
            if split == "buffer":
                continue
            own = [ids[f"{s}.{row['run']}"][int(row[f"{s}_from"]) : int(row[f"{s}_to"])] for s in SPECIES]
            known = [piece[piece != N_ID] for piece in own]
            pieces.setdefault(split, []).append(known)
            cut[split] = cut.get(split, 0) + sum(map(len, own)) - sum(map(len, known))
    return {split: as_slices(found, cut[split]) for split, found in pieces.items()}


def as_slices(pieces: Sequence[Sequence[NDArray[np.uint8]]], cut: int = 0) -> Slices:
    """Slices from the ids of each, by species."""
    lengths = torch.tensor([[len(piece) for piece in own] for own in pieces])
    ends = lengths.flatten().cumsum(0)
    ids = torch.from_numpy(np.concatenate([piece for own in pieces for piece in own]))
    return Slices(ids, (ends - lengths.flatten()).view_as(lengths), lengths, cut)


@cache
def synthetic_slices(split: Split) -> Slices:
    """Three slices of an ancestor with mutations; each species turns its bases into a base of its own more often."""
    draw = np.random.default_rng(("train", "valid", "test").index(split))
    pieces = []
    for _ in range(3):
        ancestor = draw.integers(A_ID, A_ID + 4, 300, dtype=np.uint8)
        mutated = draw.random((len(SPECIES), len(ancestor))) < 0.3
        pieces.append([np.where(own, np.uint8(A_ID + k), ancestor) for k, own in enumerate(mutated)])
    return as_slices(pieces)


# ------------------------------------------------------------------------------------------------------------ training


def training_windows(found: Slices, length: int, asked: int | None, flips: bool = True) -> MakeBatch:
    """A function that makes batches of windows, each of a random species at a random place.

    All species have the same places: a fraction of the way through a slice, which is drawn by its length.

    Args:
        asked: the species is the label after every so many bases: (rows, length / asked). None: the labels are the next
            bases, (rows, length).
        flips: whether a row is read with probability 1/2 on the other strand.
    """
    more = 1 if asked is None else 0
    found = found.at_least(length + more)
    device = found.ids.device
    weights = (found.lengths.amin(1) - length).double() + 1
    ends = (weights / weights.sum()).cumsum(0)
    within = torch.arange(length + more, device=device)

    def make(generator: torch.Generator, rows: int) -> Batch:
        like: dict[str, Any] = {"generator": generator, "device": generator.device}
        u, place, flip = (torch.rand(rows, dtype=torch.float64, **like).to(device) for _ in range(3))
        species = torch.randint(len(SPECIES), (rows,), **like).to(device)
        which = torch.searchsorted(ends, u).clamp(max=len(ends) - 1)
        room = found.lengths[which, species] - length - more
        first = found.starts[which, species] + (place * (room + 1)).long().clamp(max=room)
        ids = found.ids[first[:, None] + within].long()
        ids = on_either_strand(ids, flip < 0.5) if flips else ids
        if asked is None:
            return ids[:, :-1], ids[:, 1:]
        return ids, species[:, None].expand(rows, length // asked)

    return make


# --------------------------------------------------------------------------------------------------------------- loci


@dataclass(frozen=True)
class Loci:
    """Homologous windows of all species, on the given strand, in the order locus, window, species."""

    ids: Tensor
    """(windows, length)."""
    species: Tensor
    """(windows,)."""
    locus: Tensor
    """(windows,) number of the locus: the homologous stretch of `longest` bases in which the window is."""


def loci(found: Slices, length: int, longest: int, most: int | None = None) -> Loci:
    """The windows of a length that tile the loci, which are the same at every length.

    A slice has as many loci as fit in every species, at equal distances from its first base to its last. Slices without
    one are left out.

    Args:
        most: take this many of the loci, at equal distances; defaults to all.
    """
    found = found.at_least(longest)
    firsts = []
    for starts, lengths in zip(found.starts.tolist(), found.lengths.tolist(), strict=True):
        n = min(lengths) // longest
        for i in range(n):
            share = i / max(1, n - 1)
            firsts.append([s + round(share * (own - longest)) for s, own in zip(starts, lengths, strict=True)])
    kept = range(len(firsts)) if most is None else range(0, len(firsts), max(1, len(firsts) // most))[:most]
    device = found.ids.device
    inside = torch.arange(0, longest, length, device=device)
    first = (
        torch.tensor([firsts[i] for i in kept], device=device)[:, None, :] + inside[None, :, None]
    )  # (loci, windows, species)
    ids = found.ids[first.flatten()[:, None] + torch.arange(length, device=device)].long()
    species = torch.arange(len(SPECIES), device=device).expand(first.shape).flatten()
    locus = torch.arange(len(kept), device=device)[:, None, None].expand(first.shape).flatten()
    return Loci(ids, species, locus)
