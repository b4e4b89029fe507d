"""The config of a run: completed at its start, read again, and changed by a run that goes on for longer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from anymamba.base.errors import CheckpointError
from anymamba.base.files import write_json
from anymamba.base.schema import config_from_dict
from anymamba.data.dna import COMPLEMENT_IDS, DnaTokenizer
from anymamba.data.tokenizer import ByteTokenizer, Tokenizer
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.models.mixers import growing_mixers
from anymamba.training.checkpoint import refuse_pickles
from anymamba.training.config import TrainConfig, config_values, file_values
from anymamba.training.loggers import require_loggers
from anymamba.training.lora import chosen_targets, require_peft

TRAIN_CONFIG = "train_config.json"


def require_possible(config: TrainConfig) -> None:
    """The errors that can be found before the data is read.

    Raises ValueError for a carried state that would grow and for adapters of no model, ModuleNotFoundError for a
    package that is missing.
    """
    growing = growing_mixers(config.model) if config.carries_state else ()
    if growing:
        raise ValueError(
            f"carry_state would let the caches of {', '.join(growing)} grow from batch to batch; set carry_state to "
            "false (--no-carry-state), or give attention a window (--model.attention.window)"
        )
    _require_causal(config, config.model)
    require_loggers(config.log)
    if config.lora is None:
        return
    if config.start_from is None:
        raise ValueError("lora adapts a model that is trained already; name it with start_from (--from)")
    require_peft()


def _require_causal(config: TrainConfig, model: ModelConfig) -> None:
    if config.objective == "causal" and not model.is_causal:
        raise ValueError(
            "the model is not causal: it reads the token that it would predict; train it with masks, objective mlm "
            "(--objective mlm)"
        )


def complete(config: TrainConfig, tokenizer: Tokenizer, *, dna: bool) -> TrainConfig:
    """The config with the values that the tokenizer, the given weights and the kind of data decide.

    Args:
        dna: whether the data is genomes.
    """
    if dna:
        config = dataclasses.replace(config, carry_state=False)  # windows do not continue each other
    if config.start_from is None:
        model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
        if model.complement and isinstance(tokenizer, DnaTokenizer):
            own = tuple(COMPLEMENT_IDS[: tokenizer.vocab_size].tolist())  # lower case may have ids of its own
            model = dataclasses.replace(model, complement=own)
        return dataclasses.replace(config, model=model)
    given = LanguageModel.from_pretrained(config.start_from, device="meta", verify=config.verify)
    model = given.config
    _require_causal(config, model)
    if tokenizer.vocab_size > model.padded_vocab_size:
        raise ValueError(
            f"{config.start_from} has a vocabulary of {model.vocab_size}, the tokenizer of {tokenizer.vocab_size}; "
            "give the model's own tokenizer (--tokenizer)"
        )
    if config.lora is not None:
        config = dataclasses.replace(config, lora_targets=tuple(chosen_targets(given, config.lora_targets)))
    data = config.data
    if data.tokenizer is None and not isinstance(tokenizer, ByteTokenizer):
        data = dataclasses.replace(data, tokenizer=config.start_from)
    return dataclasses.replace(config, model=model, data=data)


def config_path(run: Path) -> Path:
    """The file of a run's config. Raises FileNotFoundError for a folder that is not a run."""
    path = run / TRAIN_CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{run} is not a run folder: it has no {TRAIN_CONFIG}; start one with --out {run}")
    return path


def read_config(run: Path) -> TrainConfig:
    """The resolved config of a run folder."""
    path = config_path(run)
    refuse_pickles(run)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return config_from_dict(TrainConfig, config_values(values, path) if isinstance(values, dict) else values)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def write_config(run: Path, config: TrainConfig) -> None:
    """Write the config into the run's folder."""
    write_json(run / TRAIN_CONFIG, file_values(config))
