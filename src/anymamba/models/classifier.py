"""Classification and regression of whole sequences: a language model's backbone, pooling, and a head."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anymamba.base import manifest
from anymamba.base.files import atomic_file, own_folder, write_json
from anymamba.base.schema import config_from_dict, config_to_dict
from anymamba.base.sizes import require_at_least
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.ops.groups import is_spread
from anymamba.parts.strands import both_masks

Task = Literal["classification", "regression"]
Pooling = Literal["last", "mean", "masked"]
HEAD_FILE, CONFIG_FILE = "classifier.safetensors", "classifier.json"


@dataclass(frozen=True)
class ClassifierConfig:
    """Outputs, task, pooling and inputs of a `SequenceClassifier`."""

    n_outputs: int
    """Number of classes, or of numbers to predict."""
    task: Task = "classification"
    """The loss: cross-entropy over classes, or the squared error of numbers."""
    pooling: Pooling = "last"
    """The last position that is not padding; the mean of all such positions; the mean of those in a pool_mask."""
    d_input: int | None = None
    """Size of input vectors, which a linear layer embeds; None: inputs are token ids."""

    def __post_init__(self) -> None:
        require_at_least("n_outputs", self.n_outputs, 1)
        if self.d_input is not None:
            require_at_least("d_input", self.d_input, 1)
        for name, known in (("task", get_args(Task)), ("pooling", get_args(Pooling))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


class SequenceClassifier(nn.Module):
    """Maps a whole sequence to class logits or to numbers.

    Args:
        model: the backbone: its config, or a language model (pretrained or not) that becomes part of this one.
        config: outputs, task, pooling, inputs.
        device, dtype: of new weights.
    """

    def __init__(self, model: ModelConfig | LanguageModel, config: ClassifierConfig, device=None, dtype=None) -> None:
        super().__init__()
        self.config = config
        if isinstance(model, LanguageModel):
            weight = model.embedding.weight
            device, dtype = device or weight.device, dtype or weight.dtype
        else:
            model = LanguageModel(model, device=device, dtype=dtype)
        self.backbone = model
        d_model, like = self.backbone.config.d_model, {"device": device, "dtype": dtype}
        self.embed = None if config.d_input is None else nn.Linear(config.d_input, d_model, **like)
        if self.embed is not None:
            self.backbone.embedding.requires_grad_(False)  # unused: inputs are vectors
        if self.backbone.head is not None:
            self.backbone.head.requires_grad_(False)  # unused: no token is predicted
        self.head = nn.Linear(d_model, config.n_outputs, **like)

    def forward(
        self,
        inputs: Int[Tensor, "batch length"] | Float[Tensor, "batch length d_input"],
        *,
        attention_mask: Bool[Tensor, "batch length"] | None = None,
        pool_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch n_outputs"]:
        """Logits of the classes, or the numbers. Those of a model of both strands are the same for either strand.

        Args:
            inputs: token ids, or vectors if the config has d_input.
            attention_mask: true at real positions; padding on either side changes nothing.
            pool_mask: for pooling "masked", true at the positions to average.
        Raises ValueError if inputs are of the other kind, or if a row has no position to pool.
        """
        if is_spread():
            raise ValueError(
                "a classifier pools whole sequences, but context_parallel gives it parts; keep each sequence on one "
                "process"
            )
        wanted = 2 if self.embed is None else 3
        if inputs.ndim != wanted:
            words = "token ids (batch, length)" if wanted == 2 else "vectors (batch, length, d_input)"
            raise ValueError(f"inputs must be {words}, got shape {tuple(inputs.shape)}; d_input decides which")
        embedded = self.backbone.embed_strands(inputs) if self.embed is None else self.embed(inputs)
        n_strands = 2 if self.embed is None and self.backbone.config.complement else 1
        if n_strands == 2:
            attention_mask, pool_mask = both_masks(attention_mask), both_masks(pool_mask)
        hidden, _ = self.backbone.hidden_of_embedded(embedded, attention_mask=attention_mask)
        pooled = self._pooled(hidden, self._counted(hidden, attention_mask, pool_mask))
        return self.head(pooled if n_strands == 1 else pooled.view(2, -1, pooled.shape[-1]).mean(0))

    def _counted(self, hidden: Tensor, attention_mask: Tensor | None, pool_mask: Tensor | None) -> Tensor:
        """True at the positions that are pooled."""
        if (pool_mask is None) == (self.config.pooling == "masked"):
            raise ValueError(
                f"pool_mask must be given exactly if pooling is 'masked', got pooling {self.config.pooling!r}"
            )
        real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        for name, mask in (("attention_mask", attention_mask), ("pool_mask", pool_mask)):
            if mask is not None and mask.shape != real.shape:
                raise ValueError(
                    f"{name} must be (batch, length) = {tuple(real.shape)} like the inputs, got {tuple(mask.shape)}"
                )
            if mask is not None:
                real = real & mask.bool()
        if not real.any(1).all():
            raise ValueError("every row needs a position to pool, got one without; drop the row or correct its mask")
        return real

    def _pooled(self, hidden: Float[Tensor, "batch length d_model"], counted: Bool[Tensor, "batch length"]) -> Tensor:
        if self.config.pooling == "last":
            place = torch.arange(hidden.shape[1], device=hidden.device)
            last = torch.where(counted, place, -1).argmax(1)
            return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        summed = hidden.to(wide).masked_fill(~counted[..., None], 0).sum(1)
        return (summed / counted.sum(1, keepdim=True)).to(hidden.dtype)

    def loss(self, inputs: Tensor, targets: Tensor, **masks: Tensor | None) -> Float[Tensor, ""]:
        """The mean loss of a batch: nats per row, or squared error per number.

        Args:
            targets: (batch,) classes, or (batch, n_outputs) numbers.
            masks: attention_mask and pool_mask, as in `forward`.
        """
        outputs = self(inputs, **masks)
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        if self.config.task == "classification":
            return F.cross_entropy(outputs, targets)
        if targets.shape != outputs.shape:
            way_out = "; give targets[:, None]" if targets.shape == outputs.shape[:1] and outputs.shape[1] == 1 else ""
            raise ValueError(
                f"targets must be (batch, n_outputs) = {tuple(outputs.shape)}, got {tuple(targets.shape)}{way_out}"
            )
        return F.mse_loss(outputs, targets.to(outputs.dtype))

    def save_pretrained(self, path: str | Path) -> None:
        """Write the backbone as `LanguageModel` does, and the head beside it, each file atomically."""
        path = Path(path)
        own = {k: v.contiguous() for k, v in self.state_dict().items() if not k.startswith("backbone.")}
        with own_folder(path):
            self.backbone.save_pretrained(path)
            with manifest.rewritten(path) as files:
                with atomic_file(path / HEAD_FILE) as temporary:
                    save_file(own, temporary)
                write_json(path / CONFIG_FILE, config_to_dict(self.config))
                files += [HEAD_FILE, CONFIG_FILE]

    @classmethod
    def from_pretrained(cls, path: str | Path, device=None, dtype=None, *, verify: bool = True) -> SequenceClassifier:
        """Load what `save_pretrained` wrote.

        Args:
            verify: as in `LanguageModel.from_pretrained`.
        Raises FileNotFoundError if the folder has no head; a new classifier can take `LanguageModel.from_pretrained`.
            CheckpointError as `LanguageModel.from_pretrained` does.
        """
        path = Path(path)
        if not (path / CONFIG_FILE).is_file():
            raise FileNotFoundError(
                f"{path} has no {CONFIG_FILE}: it holds no head; SequenceClassifier(LanguageModel.from_pretrained("
                "...), ClassifierConfig(...)) puts a new head on a language model"
            )
        backbone = LanguageModel.from_pretrained(path, device=device, dtype=dtype, verify=verify)  # and all the files
        values: dict[str, Any] = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        model = cls(backbone, config_from_dict(ClassifierConfig, values))
        missing, unexpected = model.load_state_dict(load_file(path / HEAD_FILE), strict=False)
        wrong = [name for name in missing if not name.startswith("backbone.")] + unexpected
        if wrong:
            raise ValueError(f"{path / HEAD_FILE} does not fit {CONFIG_FILE}: {wrong[0]} is missing or not part of it")
        return model
