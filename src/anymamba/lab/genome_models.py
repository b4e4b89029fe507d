"""Models of genomes: sizes, settings of an arm, its training, the loss on each held-out block, and speeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F

from anymamba.lab.charts import spread, table
from anymamba.lab.experiment import Context, Results
from anymamba.lab.genomes import CorpusName, corpus, held_out_windows, training_windows
from anymamba.lab.language import best_rate, losses, n_parameters, training_flops, with_parameters
from anymamba.lab.learning import EVALUATED_AT_ONCE, build_model, finite, learn
from anymamba.lab.optimization import Batch, Optimization, autocast
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.models.presets import dna, transformer_plus_plus
from anymamba.parts.options import HyenaOptions, MLPOptions
from anymamba.parts.state import without_last_states

WORDS = {"mamba": "Mamba", "transformer": "Transformer++", "hyena": "Hyena"}


@dataclass(frozen=True)
class GenomeSettings:
    """The settings of an arm; with the seed, they determine its result."""

    model: ModelConfig
    optimization: Optimization
    window: int
    """Bases of a row; every row starts from an empty state."""
    corpus: CorpusName
    judge_every: int
    """Steps between two evaluations on the held-out bases."""
    block: int
    """Held-out bases of which a loss is stored."""
    held_out: int | None = None
    """Bases of each held-out stretch that are read; None means all."""
    rate_of: tuple[str, ...] = ()
    """Arms that tried rates; the best one's replaces that of the optimization."""
    seed_offset: int = 0
    """Added to the seed, for a seed that no other arm of the same settings has."""
    checkpointing: bool = False
    """Compute the activations of blocks again in the backward pass instead of keeping them."""


def config_of(architecture: str, n_layers: int, d_model: int, window: int) -> ModelConfig:
    """The model of an architecture with the parameters of Mamba with these blocks and this width."""
    mamba = dna(n_layers, d_model)
    if architecture == "mamba":
        return mamba
    layers = max(1, n_layers // 2)
    if architecture == "transformer":
        model = transformer_plus_plus(layers, d_model, max(1, d_model // 64))
    else:
        model = hyena(layers, d_model, window)
    model = replace(model, vocab_size=mamba.vocab_size, pad_vocab_multiple=mamba.pad_vocab_multiple)
    return with_parameters(model, n_parameters(mamba))


def hyena(n_layers: int, d_model: int, window: int) -> ModelConfig:
    """HyenaDNA's layers (arXiv:2306.15794): five features of a position, frequency 10, an MLP with GELU, LayerNorm."""
    return ModelConfig(
        d_model=d_model,
        n_layers=2 * n_layers,
        norm="layernorm",
        mixers=("hyena", "mlp"),
        weight_std=0.02,
        hyena=HyenaOptions(max_length=window, emb_dim=5, w=10.0),
        mlp=MLPOptions(kind="gelu"),
    )


def measure_genomes(settings: GenomeSettings, context: Context) -> dict[str, Any]:
    """Train an arm. Returns the values of `learn`; `block_losses`; the rate; the corpus, its bases and those read; and
    the operations of a training step per base."""
    seed = context.seed + settings.seed_offset
    torch.manual_seed(seed)
    context, how = replace(context, seed=seed), settings.optimization
    if settings.rate_of:
        how = replace(how, learning_rate=best_rate(settings.rate_of, context))
    found = corpus(settings.corpus, context.data, context.device)
    model = build_model(settings.model, context)
    held_out = held_out_windows(found.held_out, settings.window, settings.held_out)
    model.activation_checkpointing = settings.checkpointing
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(context.device)
    values = learn(
        model,
        how,
        training_windows(found.training, settings.window),
        held_out,
        context,
        every=settings.judge_every,
        resumable=True,
    )
    return {
        **values,
        "block_losses": block_losses(model, held_out, settings.block, how),
        "learning_rate": how.learning_rate,
        "corpus": found.digest,
        "training_bases": len(found.training.ids),
        "held_out_bases": int((held_out[1] != -100).sum()),
        "read_bases": values["steps"] * how.batch_size * settings.window,
        "flops_per_base": training_flops(settings.model, settings.window),
    }


@torch.no_grad()
def block_losses(model: LanguageModel, batch: Batch, block: int, how: Optimization) -> list[float | None]:
    """The mean loss of each block of held-out bases, in nats a base; None if it has no label or is not finite.

    Blocks are counted along the windows, one after another, so that windows of any length give the same blocks.
    """
    ids, labels = batch
    model.eval()
    found = []
    for part in torch.arange(len(ids), device=ids.device).split(max(1, EVALUATED_AT_ONCE // ids.shape[1])):
        with autocast(how, ids.device), without_last_states():
            logits = model.logits(model.hidden(ids[part])[0])[..., : model.config.vocab_size].float()
        found.append(F.cross_entropy(logits.flatten(0, 1), labels[part].flatten(), reduction="none"))
    losses, counted = torch.cat(found).double().view(-1, block), (labels != -100).reshape(-1, block)
    return [finite(value) for value in (losses.sum(1) / counted.sum(1)).tolist()]


# ------------------------------------------------------------------------------------------------------------ reports


def paired(results: Results, above: Sequence[str], below: Sequence[str]) -> tuple[float, float] | None:
    """The mean difference of two models over the held-out blocks, and its standard error; None if one is missing.

    The error says how far other held-out bases would move the difference, not other seeds.

    Args:
        above, below: arms of the same settings, with different seeds; their losses are averaged.
    """
    one, other = blocks(results, above), blocks(results, below)
    if one is None or other is None:
        return None
    differences = [a - b for a, b in zip(one, other, strict=True)]
    n, mean = len(differences), sum(differences) / len(differences)
    return mean, sqrt(sum((d - mean) ** 2 for d in differences) / max(1, n - 1) / n)


def blocks(results: Results, arms: Sequence[str]) -> list[float] | None:
    """The losses of the held-out blocks, means over arms; None if none is measured or one is not finite."""
    seeds = [own for arm in arms for own in results.values(arm, "block_losses")]
    if not seeds or any(value is None for own in seeds for value in own):
        return None
    return [sum(values) / len(values) for values in zip(*seeds, strict=True)]


def rate_table(results: Results, sweeps: Mapping[str, Mapping[str, float]], words: str) -> str:
    """The loss at each rate that was tried; `sweeps` has the rates by arm of each architecture."""
    rows = [
        [WORDS[name], f"{rate:g}", spread(losses(results, [arm]), 4)]
        for name, rates in sweeps.items()
        for arm, rate in rates.items()
        if results.of(arm)
    ]
    return f"{table(('', 'peak rate', 'nats a base'), rows)}\n\n{words}" if rows else ""


def measured_rates(results: Results, arms: Sequence[str]) -> dict[str, float]:
    """The rates of those arms that are measured."""
    return {arm: results.of(arm)[0].values["learning_rate"] for arm in arms if results.of(arm)}


def speed_table(results: Results, arms: Sequence[str] | None = None) -> str:
    """Parameters, rate, bases read, bases a second, memory and time of each arm."""
    header = ("arm", "parameters", "rate", "bases read", "bases a second", "GPU memory, GiB", "minutes", "recorded")
    rows = []
    for arm in results.arms if arms is None else arms:
        for record in results.of(arm)[:1]:
            values = record.values
            speed, memory = values["tokens_per_second"], values["peak_gib"]
            rows.append(
                [
                    arm,
                    f"{values['parameters']:,}",
                    f"{values['learning_rate']:g}",
                    f"{values['read_bases']:,}",
                    "" if speed is None else f"{speed:,.0f}",
                    "" if memory is None else f"{memory:.1f}",
                    f"{values['training_seconds'] / 60:.2f}",
                    "yes" if values["recorded"] else "no",
                ]
            )
    words = "Of the first seed. The time has evaluations in it, the speed has not. Recorded: steps ran as a CUDA graph."
    return f"{table(header, rows)}\n\n{words}" if rows else ""
