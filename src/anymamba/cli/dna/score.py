"""`anymamba dna score`: scores the variants of a VCF file, and writes a TSV or the VCF with the scores added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import tyro

from anymamba.cli.dna.inputs import exact, has_suffix, lines_to, open_genome, tell_skipped, write_results
from anymamba.console.flags import read_flags
from anymamba.console.output import progress_bar, say
from anymamba.console.runtime import Runtime, load_model, open_model

if TYPE_CHECKING:
    from anymamba.data.dna.vcf import Record, Vcf
    from anymamba.evaluation.dna import AlleleScore
    from anymamba.models.checkpoints import Checkpoint

LENGTH = "insertions and deletions, which a model trained with masks does not score"
COLUMNS = ("chrom", "pos", "id", "ref", "alt", "score", "plus", "minus", "skipped")
FIELDS = {
    "AM_SCORE": "log-likelihood of the allele minus that of REF in nats, mean of both strands",
    "AM_PLUS": "that of the plus strand",
    "AM_MINUS": "that of the minus strand",
}
"""The INFO fields of a VCF with scores, one number for each allele of ALT."""


@dataclass(frozen=True)
class ScoreOptions:
    """Score the variants of a VCF file with a model of DNA: log-likelihood of ALT minus REF in context, in nats.

    Both strands are read, and their scores averaged. REF is compared with the genome. What cannot be scored stays in
    the output without a score, and is counted on stderr.
    """

    model: Path
    """Folder of a model of DNA (a run folder is one), or a name on the Hugging Face hub."""
    fasta: Path
    """The reference genome: FASTA, plain or compressed, or .2bit."""
    vcf: Path
    """The variants, plain or compressed (.gz)."""
    out: Path | None = None
    """A new .vcf file, which adds AM_SCORE, AM_PLUS and AM_MINUS to INFO, or a .tsv file; defaults to TSV on stdout."""
    context: int = 512
    """Bases that are read on each side of a variant."""
    batch_size: int = 16
    """Variants that are read at once."""
    objective: Literal["causal", "mlm"] | None = None
    """How the model was trained; defaults to what its run says, else to causal for a causal model, mlm for others."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a line of the VCF that is no record."""
    tokenizer: Path | None = None
    """A tokenizer.json or a folder that holds one; defaults to the model's own."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print counts as one JSON object; needs --out."""
    runtime: tyro.conf.OmitArgPrefixes[Runtime] = field(default_factory=Runtime)


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba dna score`."""
    options = read_flags(ScoreOptions, "dna score", arguments)
    write_results(options, run, ("context", "batch_size"), (".vcf", ".tsv"), "scores")


def run(options: ScoreOptions) -> dict[str, object]:
    """Score the file and write the result; return what was counted. The file is checked before the model is loaded."""
    from anymamba.data.dna.vcf import Vcf

    with open_genome(options.fasta) as genome:
        vcf = Vcf(options.vcf, genome, on_bad_line=options.on_bad_row)
        vcf.require_same_assembly()
        total = vcf.n_alleles
        runtime = exact(options.runtime)
        checkpoint, tokenizer = open_model(options.model, options.tokenizer, runtime)
        from anymamba.evaluation.dna import score

        objective = chosen_objective(options, checkpoint)
        model = load_model(checkpoint, runtime)
        records = _Following(vcf)
        scores = score(
            model,
            tokenizer,
            genome,
            (record.variant for record in records.with_variants() if record.variant is not None),
            context=options.context,
            batch_size=options.batch_size,
            masked=objective == "mlm",
        )
        n_scored, n_of_length = 0, 0
        with progress_bar("scoring") as show, lines_to(options.out) as stream:
            writer = _VcfWriter(stream, vcf) if has_suffix(options.out, ".vcf") else _Tsv(stream)
            for record, found in records.joined(scores):
                writer.write(record, found)
                known = sum(one is not None and one.score is not None for one in found)
                n_of_length += sum(one is not None and one.score is None for one in found)
                n_scored += known
                show(n_scored + n_of_length, total, f"{n_scored:,} alleles")
            writer.end()
    skipped = dict(vcf.skipped) | ({LENGTH: n_of_length} if n_of_length else {})
    tell_skipped(options.vcf, skipped)
    say(f"scored {n_scored:,} alleles")
    return {"objective": objective, "scored": n_scored, "skipped": skipped, "out": str(options.out)}


def chosen_objective(options: ScoreOptions, checkpoint: Checkpoint) -> Literal["causal", "mlm"]:
    """The objective of the flag, else that of the model's training; one line says which and why."""
    from anymamba.evaluation.dna import trained_with_masks

    names: dict[bool, Literal["causal", "mlm"]] = {False: "causal", True: "mlm"}
    adapter = options.runtime.adapter
    trained = None if adapter is None else trained_with_masks(adapter)
    trained = trained_with_masks(checkpoint) if trained is None else trained
    if options.objective is not None:
        objective, why = options.objective, "chosen with --objective"
        if trained is not None and names[trained] != objective:
            why += f"; the model was trained with {names[trained]}"
    elif trained is not None:
        objective, why = names[trained], "the model was trained with it"
    else:
        causal = checkpoint.config.is_causal
        objective = names[not causal]
        why = f"the model is {'' if causal else 'not '}causal, and its folder does not say how it was trained"
    say(f"objective {objective}: {why}")
    return objective


class _Following:
    """Gives the records with alleles to score to the model, and keeps all of them until their scores come."""

    def __init__(self, vcf: Vcf) -> None:
        self._records = vcf.records()
        self._waiting: list[Record] = []

    def with_variants(self) -> Iterator[Record]:
        """The records that have alleles to score."""
        for record in self._records:
            self._waiting.append(record)
            if record.variant is not None:
                yield record

    def joined(self, scores: Iterator[list[AlleleScore]]) -> Iterator[tuple[Record, list[AlleleScore | None]]]:
        """All records in order, with a score for each allele that can be scored."""
        for found in scores:
            while (record := self._waiting.pop(0)).variant is None:
                yield record, [None] * len(record.reasons)
            each = iter(found)
            yield record, [None if reason is not None else next(each) for reason in record.reasons]
        for record in self._waiting:
            yield record, [None] * len(record.reasons)


def _number(value: float | None) -> str:
    return "." if value is None else f"{value:.6g}"


class _Tsv:
    """Writes a line for each allele."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        print(*COLUMNS, sep="\t", file=stream)

    def write(self, record: Record, scores: list[AlleleScore | None]) -> None:
        """The alleles of a record."""
        for alt, score, reason in zip(record.alts, scores, record.reasons, strict=True):
            numbers = [_number(value) for value in (score or (None, None, None))]
            why = reason or (LENGTH if score is not None and score.score is None else "")
            print(*record.columns[:4], alt, *numbers, why, sep="\t", file=self._stream)

    def end(self) -> None:
        """After the last record."""


class _VcfWriter:
    """Writes the file's lines with the scores in INFO."""

    def __init__(self, stream: TextIO, vcf: Vcf) -> None:
        self._stream, self._vcf, self._has_header = stream, vcf, False

    def write(self, record: Record, scores: list[AlleleScore | None]) -> None:
        """A record. Those of its INFO fields that have our names are replaced."""
        self._write_header()
        columns = [*record.columns, *["."] * (8 - len(record.columns))]
        kept = [one for one in columns[7].split(";") if one not in (".", "") and one.partition("=")[0] not in FIELDS]
        for name, place in zip(FIELDS, range(3), strict=True):
            values = [_number(None if score is None else score[place]) for score in scores]
            if any(value != "." for value in values):
                kept.append(f"{name}={','.join(values)}")
        columns[7] = ";".join(kept) or "."
        print(*columns, sep="\t", file=self._stream)

    def end(self) -> None:
        """After the last record."""
        self._write_header()

    def _write_header(self) -> None:
        if self._has_header:
            return
        self._has_header = True
        lines = self._vcf.header
        names = [line for line in lines if line.startswith("#CHROM")]
        own = [f'##INFO=<ID={n},Number=A,Type=Float,Description="{text}">' for n, text in FIELDS.items()]
        first = [line for line in lines if line.startswith("##") and not _is_own(line)]
        first = first if first and first[0].startswith("##fileformat") else ["##fileformat=VCFv4.2", *first]
        print(*first, *own, *(names or ["#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]), sep="\n", file=self._stream)


def _is_own(line: str) -> bool:
    return any(line.startswith(f"##INFO=<ID={name},") for name in FIELDS)
