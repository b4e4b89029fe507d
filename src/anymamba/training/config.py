"""Configuration of a training run: frozen dataclasses for flags, config files and run folders. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from anymamba.base.errors import FORMAT_VERSION, require_format_version
from anymamba.base.schema import config_to_dict
from anymamba.base.sizes import require_at_least, require_positive
from anymamba.models.config import ModelConfig

VERSION = 1
"""The format version of run folders: the one that is written, and the newest one that can be read."""


@dataclass(frozen=True)
class GenomeConfig:
    """How DNA is read."""

    case: Literal["fold", "keep"] = "fold"
    """fold reads lower case, which marks repeats, as upper case; keep gives the lower-case bases ids of their own."""
    reverse_complement: bool = True
    """Read each window with probability 1/2 on the other strand."""
    max_unknown: float = 0.1
    """Drop windows with a larger share of N and ambiguity codes; the others have these as inputs, but not as labels."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_unknown <= 1:
            raise ValueError(f"max_unknown must be a share from 0 to 1, got {self.max_unknown}")


@dataclass(frozen=True)
class DataConfig:
    """The data to train and to evaluate on."""

    paths: tuple[str, ...] = ()
    """Files, folders and globs to train on: texts, or FASTA and .2bit files with BED files of their intervals."""
    eval_paths: tuple[str, ...] = ()
    """Files to evaluate on; defaults to a fraction of the training documents, which is held out."""
    held_out_fraction: float = 0.02
    """Fraction of the documents to hold out, chosen by a hash of their names; 0 holds out none."""
    text_field: str | None = None
    """The field that holds the text in .jsonl, .csv and .parquet files; defaults to "text"."""
    exclude: tuple[str, ...] = ()
    """Patterns of files and folders to leave out, such as '*.min.py' or tests."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row of .jsonl, .csv or .parquet that has no text or cannot be read, and with a line of a BED
    file that is no interval."""
    tokenizer: str | None = None
    """A tokenizer.json, a folder or .gguf file that holds one, or a name on the hub; defaults to that of --from, or
    to bytes, and for DNA to one token a base."""
    genome: GenomeConfig = field(default_factory=GenomeConfig)
    """How FASTA and .2bit files are read."""
    piece: int | None = None
    """Read documents in pieces of at most this many tokens, shuffled, so that a short run sees many documents; defaults
    to whole documents."""
    workers: int = 0
    """Processes that read tokens; the batches are the same for any number."""
    cache_dir: str | None = None
    """Where token tables are cached; defaults to the user's cache folder."""

    def __post_init__(self) -> None:
        require_at_least("workers", self.workers, 0)
        if self.piece is not None:
            require_at_least("piece", self.piece, 1)
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction must be at least 0 and below 1, got {self.held_out_fraction}")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = 2e-3
    """Peak learning rate."""
    kernel_learning_rate: float = 1e-3
    """Largest peak for the parameters of time-invariant kernels (S4, S4D, H3's shift, Hyena's filter)."""
    min_learning_rate: float = 1e-5
    """Learning rate at the last step."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Weight decay of matrices; A_log, D, biases and norms have none."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; a larger gradient is scaled down to it."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "kernel_learning_rate", "eps", "clip_norm"):
            require_positive(name, getattr(self, name))
        require_at_least("warmup_steps", self.warmup_steps, 0)
        for name in ("min_learning_rate", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate must not exceed learning_rate, got {self.min_learning_rate} "
                f"and {self.learning_rate}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {self.betas}")


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes that torchrun has started share a run; `training.parallel.mesh` arranges them."""

    dp_replicate: int = 1
    """Copies of the weights. Each copy reads its rows of every batch."""
    dp_shard: int = -1
    """Processes over which a copy's weights, gradients and optimizer state are split; each reads its rows of every
    batch. -1 takes all that are left."""
    cp: int = 1
    """Processes over which each sequence is split."""

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "cp"):
            require_at_least(name, getattr(self, name), 1)
        if self.dp_shard != -1:
            require_at_least("dp_shard", self.dp_shard, 1)


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    data: DataConfig = field(default_factory=DataConfig)
    """The data to train on."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(d_model=128, n_layers=4, vocab_size=257))
    """The model; the tokenizer decides its vocab_size."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its schedule."""
    objective: Literal["causal", "mlm"] = "causal"
    """What is predicted: the next token, or masked tokens (15 % of all; of them 80 % hidden, 10 % changed). With mlm
    no state is carried, and the losses are those of masked tokens."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The processes of a run that torchrun has started."""
    start_from: str | None = None
    """A model folder whose weights and sizes to start from, with a new optimizer (fine-tuning)."""
    verify: bool = True
    """Compare the files of start_from with their digests."""
    lora: int | None = None
    """Rank of LoRA adapters, which are trained in place of the weights of start_from."""
    lora_targets: tuple[str, ...] = ()
    """Names of the projections that get adapters, such as in_proj out_proj; defaults to all projections of the
    blocks."""
    lora_alpha: float | None = None
    """An adapter is scaled by lora_alpha / lora; defaults to twice the rank."""
    steps: int = 1000
    """Optimizer steps. `anymamba train --length-warmup` without --steps takes those of the warm-up, and of as many
    epochs at the context."""
    max_minutes: float | None = None
    """Stop after this time if the steps are not done by then; the learning rate decays over the steps that fit. The
    result then depends on the speed of the machine."""
    batch_size: int = 8
    """Rows per batch; each row reads its documents one after the other."""
    context: int = 256
    """Tokens per row, and the length of back-propagation."""
    length_warmup: bool = False
    """Begin with short windows of DNA, whose length doubles up to the context while the batch halves."""
    length_warmup_start: int = 1024
    """The length that the warm-up begins with; the context is this times a power of two."""
    length_warmup_epochs: float = 2.0
    """Epochs at each length below the context, and at the context where `anymamba train` has no --steps."""
    accumulation: int = 1
    """Batches whose gradients are added up for one step."""
    carry_state: bool = True
    """Documents longer than the context continue from the state of the previous batch (truncated back-propagation)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the matrix products under autocast; weights and SSM stay float32."""
    activation_checkpointing: bool = False
    """Recompute activations in backward instead of keeping them."""
    compile: bool = False
    """Run the model through torch.compile; on a CPU that needs a C++ compiler."""
    seed: int = 0
    """Seed of the initialisation and of the order of the documents."""
    log: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)
    """Where metrics are recorded besides metrics.jsonl; each but tensorboard needs the extra of its name."""
    log_every: int = 10
    """Steps between entries in metrics.jsonl."""
    eval_every: int = 500
    """Steps between evaluations on held-out documents."""
    eval_tokens: int = 50_000
    """Most tokens per evaluation; 0 turns evaluation off."""
    sample_tokens: int = 100
    """Tokens of the text that the model writes at each evaluation; 0 turns it off."""
    keep_best: bool = True
    """Keep the model with the lowest held-out loss in the folder `best` of the run."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    max_nonfinite: int = 10
    """Steps in a row with a non-finite loss or gradient after which the run fails; each is skipped."""
    device: str = "cpu"
    """Device to train on."""
    deterministic: bool = False
    """In training steps only take algorithms of torch with the same bits each time. On a GPU, models with attention
    and runs with `compile` need it to repeat and resume bit for bit. Attention's backward pass is slower then, and
    linear attention raises an error, because torch has no such form of it."""
    threads: int | None = None
    """CPU threads; defaults to torch's choice. Results are bit-identical only for the same number."""

    def __post_init__(self) -> None:
        counts = "steps batch_size context accumulation log_every eval_every checkpoint_every keep_checkpoints"
        for name in [*counts.split(), "max_nonfinite"]:
            require_at_least(name, getattr(self, name), 1)
        require_at_least("eval_tokens", self.eval_tokens, 0)
        require_at_least("sample_tokens", self.sample_tokens, 0)
        if self.max_minutes is not None:
            require_positive("max_minutes", self.max_minutes)
        if self.threads is not None:
            require_at_least("threads", self.threads, 1)
        self._require_doubling()
        if self.lora is not None:
            require_at_least("lora", self.lora, 1)
        elif self.lora_targets or self.lora_alpha is not None:
            raise ValueError("lora_targets and lora_alpha are for adapters; give their rank with lora (--lora 8)")
        if self.lora_alpha is not None:
            require_positive("lora_alpha", self.lora_alpha)

    def _require_doubling(self) -> None:
        """Raise ValueError if the length warm-up does not lead to the context."""
        require_at_least("length_warmup_start", self.length_warmup_start, 1)
        require_positive("length_warmup_epochs", self.length_warmup_epochs)
        ratio, rest = divmod(self.context, self.length_warmup_start)
        if self.length_warmup and (rest or ratio < 2 or ratio & (ratio - 1)):
            first = self.length_warmup_start
            raise ValueError(
                f"with length_warmup the context must be {2 * first:,}, {4 * first:,}, {8 * first:,} ..., which is "
                f"length_warmup_start times a power of two, got {self.context:,}; change --context"
            )

    @property
    def carries_state(self) -> bool:
        """Whether rows continue from the state of the previous batch."""
        return self.carry_state and self.objective == "causal"

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads."""
        return self.batch_size * self.context * self.accumulation


def file_values(config: TrainConfig) -> dict[str, Any]:
    """The contents of a config's file: its fields and the format version."""
    return {FORMAT_VERSION: VERSION, **config_to_dict(config)}


def config_values(values: dict[str, Any], where: Path) -> dict[str, Any]:
    """A config's fields from the contents of its file. Raises CheckpointError if the format version is newer."""
    require_format_version(values, VERSION, where)
    return {name: value for name, value in values.items() if name != FORMAT_VERSION}
