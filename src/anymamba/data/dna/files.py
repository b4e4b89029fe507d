"""Finds the genomes and BED files that paths name, and which BED file belongs to which genome."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..documents import GENOME_SUFFIXES, file_format, find_files

BED = ".bed"
_SOUGHT = (*GENOME_SUFFIXES, BED)


class GenomeFile(NamedTuple):
    """A genome and the BED files with its intervals; without one it is read as a whole."""

    genome: Path
    beds: tuple[Path, ...]


def are_genomes(paths: Sequence[str]) -> bool:
    """Whether paths name genomes and BED files, and no text.

    Names decide: a folder or a pattern is one of genomes if it has a genome and nothing else that can be read.
    Raises ValueError where there are both.
    """
    kinds = {path: _is_genomic(path) for path in paths}
    if len(set(kinds.values())) < 2:
        return any(kinds.values())
    genome = next(path for path, genomic in kinds.items() if genomic)
    text = next(path for path, genomic in kinds.items() if not genomic)
    raise ValueError(f"{genome} is DNA and {text} is text; train on one of them, since a model has one tokenizer")


def _is_genomic(path: str) -> bool:
    root = Path(path).expanduser()
    if root.is_dir():
        return _has_genome(root) and not _has_text(root)
    if root.exists() or not glob.has_magic(path):
        return file_format(root) in _SOUGHT
    matches = [Path(match) for match in glob.glob(str(root), recursive=True)]
    files = [match for match in matches if match.is_file()]
    return bool(files) and all(file_format(file) in _SOUGHT for file in files)


def _has_genome(folder: Path) -> bool:
    try:
        return any(file_format(file) in GENOME_SUFFIXES for file in find_files(folder, formats=_SOUGHT))
    except FileNotFoundError:
        return False


def _has_text(folder: Path) -> bool:
    try:
        return bool(find_files(folder))
    except FileNotFoundError:
        return False


def find_genomes(paths: Sequence[str], exclude: Sequence[str] = (), only: Path | None = None) -> list[GenomeFile]:
    """The genomes that paths name, in order, each once, with their BED files.

    A BED file belongs to the genome that is named last before it, or to the only genome that there is.

    Args:
        paths, exclude: as for `find_files`.
        only: the genome of BED files where the paths name none.
    Raises FileNotFoundError if a path names no file, ValueError for a BED file whose genome is not clear.
    """
    genomes: dict[str, Path] = {}
    owners: list[tuple[Path, list[Path]]] = []
    last: list[Path] = []
    for path in paths:
        files = find_files(path, exclude, _SOUGHT)
        here = [file for file in files if file_format(file) != BED]
        last = here or last
        genomes |= {os.path.realpath(file): file for file in here if os.path.realpath(file) not in genomes}
        owners += [(file, last) for file in files if file_format(file) == BED]
    found = list(genomes.values()) or ([only] if only else [])
    beds: dict[Path, list[Path]] = {genome: [] for genome in found}
    for bed, before in owners:
        candidates = found if len(found) == 1 else before
        if len(candidates) != 1:
            count = f"{len(candidates)} genomes are" if candidates else "no genome is"
            raise ValueError(f"{count} named before {bed}; name the one that it belongs to just before it")
        beds[genomes.get(os.path.realpath(candidates[0]), candidates[0])].append(bed)
    return [GenomeFile(genome, tuple(beds[genome])) for genome in found]
