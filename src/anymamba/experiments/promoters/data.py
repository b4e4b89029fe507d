"""The promoters: a file of labelled sequences, split by a hash of each sequence."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anymamba.data.dna import DnaTokenizer
from anymamba.data.dna.labelled import Sequence, Split, read_labelled
from anymamba.evaluation.dna.splits import make_split
from anymamba.lab.genomes import A_ID, find_file, on_either_strand
from anymamba.lab.learning import MakeBatch
from anymamba.lab.optimization import Batch

FILE = "human_nontata_promoters_test.csv.gz"
HELD_OUT = re.compile(r"(human_nontata_promoters_.+\.csv)(\.gz|\.bz2|\.xz|\.zst)?")
"""The names of other files beside FILE: every arm is judged on them after its training."""
Source = Literal["promoters", "synthetic"]
SPLIT_SEED, VALID, TEST = 0, 0.1, 0.2
"""The rule of the split. A hash of a sequence, or of its reverse complement, decides; 20 % are test, 10 % valid."""


class Labelled(NamedTuple):
    """The sequences of one split."""

    ids: Tensor
    """(sequences, length) ids of `DnaTokenizer`."""
    labels: Tensor
    """(sequences,) 1 for a promoter, else 0."""

    def to(self, device: torch.device) -> Labelled:
        """The sequences on a device."""
        return Labelled(self.ids.to(device), self.labels.to(device))


def labelled(source: Source, folder: Path | None, device: torch.device) -> tuple[dict[Split, Labelled], str]:
    """The sequences of each split on the device, and the digest of the split.

    Raises ValueError or FileNotFoundError if the file is not there.
    """
    sequences = synthetic() if source == "synthetic" else tuple(read(find_file(folder, FILE)))
    parts, digest = split(sequences)
    return {name: own.to(device) for name, own in parts.items()}, digest


@cache
def read(file: Path) -> tuple[Sequence, ...]:
    """The sequences of the file. Raises ValueError if they are not of one length, or have other labels than 0 and 1."""
    found = read_labelled(file).sequences
    if others := sorted({str(one.label) for one in found} - {"0", "1"}):
        raise ValueError(f"{file} has the label {others[0]!r}; 1 is a promoter, and 0 is none")
    lengths = {len(one.text) for one in found}
    if len(lengths) > 1:
        raise ValueError(f"{file} has sequences of {min(lengths)} to {max(lengths)} bases; they must have one length")
    return tuple(found)


def held_out_files(source: Source, folder: Path | None) -> list[Path]:
    """The files beside FILE that arms are judged on, by name; a copy of FILE with another compression is none."""
    if source == "synthetic":
        return []
    found = []
    for path in sorted(find_file(folder, FILE).parent.iterdir()):
        match = HELD_OUT.fullmatch(path.name)
        if match and path.is_file() and not FILE.startswith(match[1]):
            found.append(path)
    return found


def held_out(file: Path, folder: Path | None, device: torch.device) -> tuple[Labelled, int]:
    """The sequences of a held-out file, and how many are left out: those that FILE has, too, on either strand.

    Raises ValueError if none is left, or if they are not as long as those of FILE.
    """
    known, found = read(find_file(folder, FILE)), read(file)
    seen = {one.canonical for one in known}
    new = [one for one in found if one.canonical not in seen]
    if not new:
        raise ValueError(f"{file} has no sequence that {FILE} does not have")
    if len(new[0].text) != len(known[0].text):
        raise ValueError(f"{file} has sequences of {len(new[0].text)} bases, those of {FILE} have {len(known[0].text)}")
    return tensors(new).to(device), len(found) - len(new)


def tensors(some: list[Sequence]) -> Labelled:
    """Sequences of one length as ids and labels."""
    ids = np.stack([DnaTokenizer().encode_array(one.text) for one in some])
    return Labelled(torch.from_numpy(ids).long(), torch.tensor([int(one.label == "1") for one in some]))


@cache
def split(sequences: tuple[Sequence, ...]) -> tuple[dict[Split, Labelled], str]:
    """The sequences of each split, and the digest of the split."""
    frozen = make_split(list(sequences), seed=SPLIT_SEED, valid=VALID, test=TEST)
    return {name: tensors(some) for name, some in frozen.parts(list(sequences)).items()}, frozen.digest


@cache
def synthetic() -> tuple[Sequence, ...]:
    """Random sequences; those of class 1 have TATAAA somewhere."""
    draw, found = np.random.default_rng(0), []
    for i in range(80):
        ids = draw.integers(A_ID, A_ID + 4, 32, dtype=np.uint8)
        text = DnaTokenizer().decode(ids)
        at = int(draw.integers(0, 26))
        found.append(Sequence(f"{i}", f"{text[:at]}TATAAA{text[at + 6 :]}" if i % 2 else text, str(i % 2), None))
    return tuple(found)


def training_batches(train: Labelled) -> MakeBatch:
    """A function that makes batches of random sequences, half of them on the other strand."""
    device = train.ids.device

    def make(generator: torch.Generator, rows: int) -> Batch:
        chosen = torch.randint(len(train.ids), (rows,), generator=generator, device=generator.device).to(device)
        flip = torch.rand(rows, generator=generator, device=generator.device).to(device) < 0.5
        return on_either_strand(train.ids[chosen], flip), train.labels[chosen, None]

    return make
