"""DNA: genomes in files, intervals, windows of them, and the tokenizer. Needs neither torch nor a GPU."""

from __future__ import annotations

from .bed import Interval, read_bed, whole_sequences
from .files import GenomeFile, are_genomes, find_genomes
from .genome import Genome, Strand
from .letters import reverse_complement
from .runs import is_unknown
from .tokenizer import (
    COMPLEMENT_IDS,
    MASK_ID,
    N_ID,
    PAD_ID,
    DnaTokenizer,
    case_of_specification,
    reverse_complement_ids,
)
from .windows import GenomeWindows, Source, Windows, unknown_share

__all__ = [
    "COMPLEMENT_IDS",
    "MASK_ID",
    "N_ID",
    "PAD_ID",
    "DnaTokenizer",
    "Genome",
    "GenomeFile",
    "GenomeWindows",
    "Interval",
    "Source",
    "Strand",
    "Windows",
    "are_genomes",
    "case_of_specification",
    "find_genomes",
    "is_unknown",
    "read_bed",
    "reverse_complement",
    "reverse_complement_ids",
    "unknown_share",
    "whole_sequences",
]
