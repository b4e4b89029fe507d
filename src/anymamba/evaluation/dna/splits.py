"""Frozen splits of labelled sequences into train, valid and test: a file with the digest of every sequence.

A hash of a sequence decides, so equal sequences and reverse complements of each other are in the same split, and adding
others changes nothing. Splits that the data has are kept; of training data without a split named valid, a part is held
out for it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymamba.base.errors import FORMAT_VERSION, require_format_version
from anymamba.base.files import write_json
from anymamba.data.dna import reverse_complement
from anymamba.data.dna.labelled import Sequence, Split
from anymamba.data.dna.letters import as_dna

VERSION = 1
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@dataclass(frozen=True)
class FrozenSplit:
    """Which sequences are in which split, by their digests."""

    seed: int
    valid: float
    """Share of the sequences that are in valid; of those in train where the data has a split test."""
    test: float
    """Share of the sequences that are in test; not used where the data has one."""
    digests: dict[Split, tuple[str, ...]]
    """The sorted digests of each split; one that several rows have is listed as often."""

    @property
    def digest(self) -> str:
        """Identifies the split."""
        text = json.dumps([self.digests[name] for name in SPLITS])
        return hashlib.sha256(text.encode()).hexdigest()

    def parts(self, sequences: list[Sequence]) -> dict[Split, list[Sequence]]:
        """The sequences of each split.

        Raises ValueError if sequences or labels are not those that were split.
        """
        where: dict[str, Split] = {digest: name for name in SPLITS for digest in self.digests[name]}
        wanted = Counter(digest for name in SPLITS for digest in self.digests[name])
        present = Counter(one.digest for one in sequences)
        if present != wanted:
            raise ValueError(
                f"the data is not what was split: {(present - wanted).total():,} sequences are new or have another "
                f"label, {(wanted - present).total():,} are missing; use the data of the split, or make a new one"
            )
        found: dict[Split, list[Sequence]] = {name: [] for name in SPLITS}
        for one in sequences:
            found[where[one.digest]].append(one)
        return found

    def n_trained(self, sequences: list[Sequence], labels: list[str]) -> int:
        """How many sequences are in train, whatever their own label and split, as they are or as reverse complements.

        Args:
            labels: all labels of the data that was split.
        """
        trained = set(self.digests["train"])
        return sum(any(one.digest in trained for one in _rows_of_train(sequence, labels)) for sequence in sequences)

    def save(self, path: Path) -> None:
        """Write the file."""
        values: dict[str, Any] = {FORMAT_VERSION: VERSION, "seed": self.seed, "valid": self.valid, "test": self.test}
        counts = {name: len(self.digests[name]) for name in SPLITS}
        lists = {name: list(self.digests[name]) for name in SPLITS}
        write_json(path, values | {"counts": counts, "digest": self.digest, "sequences": lists})

    @classmethod
    def load(cls, path: Path) -> FrozenSplit:
        """Read the file. Raises ValueError if it is none, or has been changed."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            require_format_version(values, VERSION, path)
            digests: dict[Split, tuple[str, ...]] = {name: tuple(values["sequences"][name]) for name in SPLITS}
            split = cls(int(values["seed"]), float(values["valid"]), float(values["test"]), digests)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not the file of a split: {error!r}; make one with --split-file") from None
        if values.get("digest") != split.digest:
            raise ValueError(f"{path} has been changed: its digest does not fit its sequences; restore it")
        return split


def make_split(sequences: list[Sequence], *, seed: int = 0, valid: float = 0.1, test: float = 0.2) -> FrozenSplit:
    """Split sequences.

    Args:
        seed: another one gives another split.
        valid: share of the sequences, or of the data's split train.
        test: share of the sequences; not used if the data has a split test.
    Raises ValueError for shares that leave nothing, a sequence without a split among others with one, and an empty
    split.
    """
    if not (0 < valid < 1 and 0 < test < 1 and valid + test < 1):
        raise ValueError(f"valid and test must be shares above 0 with a sum below 1, got {valid} and {test}")
    given = {one.split for one in sequences}
    if None in given and len(given) > 1:
        raise ValueError("some sequences have a split and others have none; name a split for all, or for none")
    if given != {None} and not {"train", "test"} <= given:
        raise ValueError(
            f"data with splits needs train and test, got {', '.join(sorted(str(name) for name in given))}; add the "
            "other, or leave splits out"
        )
    found: dict[Split, list[str]] = {name: [] for name in SPLITS}
    for one in sequences:
        found[_split_of(one, given, seed, valid, test)].append(one.digest)
    empty = [name for name in SPLITS if not found[name]]
    if empty:
        raise ValueError(f"the split {empty[0]} of {len(sequences):,} sequences is empty; give more, or larger shares")
    return FrozenSplit(seed, valid, test, {name: tuple(sorted(found[name])) for name in SPLITS})


def _split_of(one: Sequence, given: set[Split | None], seed: int, valid: float, test: float) -> Split:
    draw = int.from_bytes(hashlib.sha256(f"{seed} {one.canonical}".encode()).digest()[:8], "big") / 2**64
    if one.split is not None:
        return "valid" if one.split == "train" and "valid" not in given and draw < valid else one.split
    if draw < test:
        return "test"
    return "valid" if draw < test + valid else "train"


def _rows_of_train(one: Sequence, labels: list[str]) -> Iterator[Sequence]:
    """The rows of train that have the bases of a sequence, on either strand, as DNA or RNA."""
    plus = as_dna(one.text.upper())
    strands = {plus, reverse_complement(plus)}
    for text in strands | {strand.replace("T", "U") for strand in strands}:
        for label in labels:
            for split in (None, "train"):
                yield Sequence(one.name, text, label, split)


def n_shared(parts: dict[Split, list[Sequence]]) -> int:
    """Sequences of test that are also in train, as they are or as reverse complements."""
    trained = {one.canonical for one in parts["train"]}
    return sum(one.canonical in trained for one in parts["test"])
