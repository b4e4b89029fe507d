"""Classifiers of sequences for `learn`: a body, a linear head, and positions at which the class is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel, LossOutput
from anymamba.parts.embedding import embed


@dataclass(frozen=True)
class ConvOptions:
    """Options of `ConvNet`."""

    channels: int = 128
    n_layers: int = 3
    width: int = 9
    """Bases that a convolution of the first layer reads."""
    vocab_size: int = 12


class ConvNet(nn.Module):
    """Convolutions with ReLU, each followed by a maximum over pairs: after n layers a vector for each 2^n bases."""

    def __init__(self, config: ConvOptions) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.channels)
        like = {"kernel_size": config.width, "padding": "same"}
        self.convolutions = nn.ModuleList(
            nn.Conv1d(config.channels, config.channels, **like)  # type: ignore[arg-type]
            for _ in range(config.n_layers)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(1, config.channels) for _ in range(config.n_layers))

    def hidden(self, ids: Int[Tensor, "rows length"]) -> tuple[Float[Tensor, "rows shorter channels"], None]:
        """The output of the last layer; there is no state."""
        x = embed(self.embedding, ids).transpose(1, 2)
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            x = F.max_pool1d(F.relu(convolution(norm(x))), 2)
        return x.transpose(1, 2), None


@dataclass(frozen=True)
class Classes:
    """The classes, and where they are asked."""

    n: int
    asked: int | Literal["mean"]
    """After every this many positions, of the vector there; or once, of the mean over all positions."""

    @property
    def vocab_size(self) -> int:
        """The number of classes, under the name that evaluation reads."""
        return self.n


class Classifier(nn.Module):
    """A body with a linear head. Labels are (rows, asked): a class for each position at which one is asked, or -100.

    Args:
        body: a language model or a `ConvNet`, or the config of one.
        classes: their number, and where they are asked.
    """

    def __init__(self, body: ModelConfig | LanguageModel | ConvOptions, classes: Classes) -> None:
        super().__init__()
        self.config = classes
        if isinstance(body, ConvOptions):
            self.body: LanguageModel | ConvNet = ConvNet(body)
            width = body.channels
        else:
            self.body = body if isinstance(body, LanguageModel) else LanguageModel(body)
            width = self.body.config.d_model
        self.head = nn.Linear(width, classes.n)

    @property
    def embedding(self) -> nn.Embedding:
        """The embedding of the body."""
        return self.body.embedding

    def hidden(self, ids: Int[Tensor, "rows length"]) -> tuple[Float[Tensor, "rows asked width"], Any]:
        """The vectors of the positions at which a class is asked; there is no state."""
        x = self.body.hidden(ids)[0]
        if self.config.asked == "mean":
            return x.float().mean(1, keepdim=True), None
        return x[:, self.config.asked - 1 :: self.config.asked], None

    def logits(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... classes"]:
        """The head on vectors of `hidden`."""
        return self.head(x)

    def loss(self, ids: Int[Tensor, "rows length"], labels: Int[Tensor, "rows asked"]) -> LossOutput:
        """The sum of -log p over the labels, and their number."""
        logits = self.logits(self.hidden(ids)[0]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return LossOutput(loss, (labels != -100).sum(), None)  # type: ignore[arg-type]

    def n_parameters(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def probabilities(self, ids: Int[Tensor, "rows length"]) -> Float[Tensor, "rows asked classes"]:
        """The probability of each class, in float64."""
        return self.logits(self.hidden(ids)[0]).double().softmax(-1)
