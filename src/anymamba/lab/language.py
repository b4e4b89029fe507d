"""Language models of bytes: settings of an arm, its training, and what its report says about speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import inf, isfinite, log
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from anymamba.data.books import SEPARATOR, read_books
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.lab.byte_windows import fixed_windows, random_windows, standard_library_bytes
from anymamba.lab.charts import spread, table
from anymamba.lab.experiment import Context, Record, Results
from anymamba.lab.learning import build_model, learn
from anymamba.lab.optimization import Optimization
from anymamba.lab.saving import SUFFIX
from anymamba.models.config import ModelConfig
from anymamba.models.costs import layer_cost
from anymamba.models.language_model import LanguageModel

VOCABULARY = 257
"""The bytes, and the end of a document: the ids of the byte tokenizer."""
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bfloat16 operations a second by the name of the GPU, from the data sheets."""


@dataclass(frozen=True)
class LanguageSettings:
    """The settings of an arm; with the seed, they determine its result."""

    model: ModelConfig
    optimization: Optimization
    window: int
    """Bytes of a row; every row starts from an empty state."""
    corpus: Literal["books", "standard-library"]
    validation_rows: int = 256
    judge_every: int = 500
    """Steps between two evaluations on the validation set."""
    rate_of: tuple[str, ...] = ()
    """Arms that tried rates; the best one's replaces that of the optimization."""
    seed_offset: int = 0
    """Added to the seed, for a seed that no other arm of the same settings has."""
    keep: bool = False
    """Save the model beside the results, in bfloat16."""


def optimization(steps: int, rows: int, rate: float, precision: Literal["float32", "bfloat16"]) -> Optimization:
    """The paper's recipe: a tenth of the steps is warm-up, then a cosine down to 1e-5."""
    return Optimization(
        steps,
        rows,
        rate,
        weight_decay=0.1,
        warmup_steps=max(1, steps // 10),
        cosine=True,
        betas=(0.9, 0.95),
        final_rate=1e-5,
        precision=precision,
    )


def measure_language(settings: LanguageSettings, context: Context) -> dict[str, Any]:
    """Train an arm. Returns the values of `learn`; the rate; the corpus, its bytes and those that were read; and the
    operations of a training step per byte."""
    seed = context.seed + settings.seed_offset
    torch.manual_seed(seed)
    context, how = replace(context, seed=seed), settings.optimization
    if settings.rate_of:
        how = replace(how, learning_rate=best_rate(settings.rate_of, context))
    training, held_out, separator, digest = corpus(settings.corpus, context)
    model = build_model(settings.model, context)
    values = learn(
        model,
        how,
        random_windows(training, settings.window, separator),
        fixed_windows(held_out, settings.window, settings.validation_rows, separator),
        context,
        every=settings.judge_every,
        resumable=True,
    )
    if settings.keep and context.saving is not None:
        name = context.saving.path.name.removesuffix(SUFFIX)
        model.to(torch.bfloat16).save_pretrained(context.saving.path.with_name(name), ByteTokenizer())
    return {
        **values,
        "learning_rate": how.learning_rate,
        "corpus": digest,
        "training_bytes": len(training),
        "held_out_bytes": len(held_out),
        "read_bytes": values["steps"] * how.batch_size * settings.window,
        "flops_per_byte": training_flops(settings.model, settings.window),
    }


def corpus(name: str, context: Context) -> tuple[Tensor, Tensor, int | None, str]:
    """Both sides on the device as uint8, the separator of documents, and a digest.

    Raises ValueError if the books are needed and the context has no folder.
    """
    if name == "standard-library":
        sides = [standard_library_bytes(held_out).to(context.device) for held_out in (False, True)]
        return *sides, None, "standard library"  # type: ignore[return-value]
    if context.data is None:
        raise ValueError("this arm reads the books; give the folder with their files with --data")
    books = read_books(context.data)
    texts = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (books.training, books.held_out))
    training, held_out = (text.to(context.device) for text in texts)
    return training, held_out, SEPARATOR, books.digest


def best_rate(arms: Sequence[str], context: Context) -> float:
    """The rate of the arm with the lowest loss.

    Raises ValueError if one of them is not finished.
    """
    results = context.finished() if context.finished else None
    missing = [arm for arm in arms if results is None or not results.of(arm)]
    if missing or results is None:
        raise ValueError(f"this arm takes its rate from {', '.join(arms)}; run {', '.join(missing)} first")
    return results.of(best_of(results, arms))[0].values["learning_rate"]


def best_of(results: Results, arms: Sequence[str]) -> str:
    """The arm with the lowest loss, by the first seed: others may be measured after arms that take its rate."""
    return min(arms, key=lambda arm: losses(results, [arm])[0])


# ------------------------------------------------------------------------------------------------------------- sizes


@cache
def n_parameters(config: ModelConfig) -> int:
    """The parameters of a model, counted without making it."""
    return LanguageModel(config, device="meta").n_parameters()


def with_parameters(config: ModelConfig, wanted: int) -> ModelConfig:
    """The config with MLPs so wide that it has about `wanted` parameters; the hidden width is a multiple of 8.

    Raises ValueError if the model without its MLPs has more.
    """
    one, two = (n_parameters(replace(config, mlp=replace(config.mlp, d_hidden=8 * n))) for n in (1, 2))
    eights = 1 + round((wanted - one) / (two - one))
    if eights < 1:
        raise ValueError(f"the model must have {wanted:,} parameters with its MLPs, got {one:,} with the narrowest")
    return replace(config, mlp=replace(config.mlp, d_hidden=8 * eights))


@cache
def training_flops(config: ModelConfig, length: int, labelled: float = 1.0) -> float:
    """Operations of forward and backward per token, counted in a run of each layer; backward is twice forward.

    `labelled` is the share of positions that get logits.
    """
    names = config.layer_mixers
    layers = sum(names.count(name) * layer_cost(name, config, length).flops_per_token for name in set(names))
    return 3 * (layers + 2 * labelled * config.d_model * config.padded_vocab_size)


# ------------------------------------------------------------------------------------------------------------ reports


def losses(results: Results, arms: Sequence[str]) -> list[float]:
    """The held-out losses of all seeds of arms, in nats per byte; infinite if training diverged."""
    found: dict[Any, float] = {}
    for record in (record for arm in arms for record in results.of(arm)):
        seed = record.seed + record.settings.get("seed_offset", 0)
        key = seed if len(arms) > 1 else record.key  # several arms of a list are the same training with other seeds
        value = record.values["validation_loss"]
        found.setdefault(key, inf if value is None else value)
    return list(found.values())


def loss(results: Results, arms: Sequence[str]) -> float:
    """The mean of the losses of arms; infinite if one diverged or none is measured."""
    values = losses(results, arms)
    return sum(values) / len(values) if values else inf


def gap(results: Results, above: Sequence[str], below: Sequence[str]) -> float | None:
    """The difference of two mean losses in nats a byte; None if one diverged or is missing."""
    a, b = loss(results, above), loss(results, below)
    return a - b if isfinite(a) and isfinite(b) else None


def share_of_peak(record: Record, operations: str = "flops_per_byte") -> float | None:
    """The operations of a training over the card's bfloat16 peak; None for an unknown card.

    `operations` is the name of the value that has those of a byte or token.
    """
    peak = next((peak for name, peak in PEAKS.items() if name in record.machine), None)
    rate = record.values["tokens_per_second"]
    return None if peak is None or rate is None else rate * record.values[operations] / peak


def task_speeds(results: Results) -> dict[str, str]:
    """The section of a report with the speed of arms that learn a task; none if their operations were not counted."""
    rows = []
    for arm in results.arms:
        record = results.of(arm)[0]
        if "flops_per_token" in record.values:
            rate, share = record.values["tokens_per_second"], share_of_peak(record, "flops_per_token")
            own = ["" if rate is None else f"{rate:,.0f}", "" if share is None else f"{100 * share:.1f}"]
            rows.append([arm, f"{record.values['steps']:,}", *own])
    header = ("arm", "steps", "tokens a second", "of the card's bfloat16 peak, %")
    return {"Speed": table(header, rows)} if rows else {}


def speed_table(results: Results) -> str:
    """What each arm read, how fast, and the share of the card's peak: means over the seeds."""
    header = ("arm", "parameters", "rate", "bytes read", "nats a byte", "bits a byte", "bytes a second", "of peak, %")
    rows = []
    for arm in results.arms:
        records, own = results.of(arm), losses(results, [arm])
        values = records[0].values
        speeds = [r.values["tokens_per_second"] for r in records if r.values["tokens_per_second"]]
        shares = [share for r in records if (share := share_of_peak(r)) is not None]
        rows.append(
            [
                arm,
                f"{values['parameters']:,}",
                f"{values['learning_rate']:g}",
                f"{values['read_bytes']:,}",
                spread(own, 4),
                spread(own, 4, 1 / log(2)),
                f"{fmean(speeds):,.0f}" if speeds else "",
                f"{100 * fmean(shares):.1f}" if shares else "",
            ]
        )
    return table(header, rows)
