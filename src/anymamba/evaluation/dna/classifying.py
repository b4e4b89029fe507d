"""Trains a classifier of sequences for one seed: fine-tuning of the whole model, or a linear probe of its vectors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from anymamba.data.dna import reverse_complement
from anymamba.data.tokenizer import Tokenizer
from anymamba.evaluation.dna.classifier_config import ClassifierTraining
from anymamba.evaluation.dna.embedding import embed_texts
from anymamba.evaluation.dna.sequences import device_of, encoded, in_rows
from anymamba.models.classifier import ClassifierConfig, SequenceClassifier
from anymamba.models.language_model import LanguageModel
from anymamba.training.config import OptimizerConfig
from anymamba.training.optimizer import build_optimizer, learning_rate, set_learning_rate

PENALTIES = tuple(10.0**k for k in range(-4, 3))
"""Weights of the squared norm among which a probe's valid loss chooses; the loss is a mean over sequences."""
WARMUP, LAST_RATE, CLIP = 0.1, 0.01, 1.0

Progress = Callable[[int, int], None]


def train_classifier(
    backbone: LanguageModel,
    tokenizer: Tokenizer,
    train: tuple[Sequence[str], NDArray[np.int64]],
    valid: tuple[Sequence[str], NDArray[np.int64]],
    n_classes: int,
    config: ClassifierTraining,
    seed: int,
    progress: Progress = lambda done, total: None,
) -> SequenceClassifier:
    """Train one classifier.

    Args:
        backbone: the model, which becomes part of the classifier; fine-tuning changes its weights.
        tokenizer: of the model.
        train, valid: sequences and their classes; valid chooses the epoch, or the probe's penalty.
        seed: of the head, the order and the strands; for a probe of the bootstrap sample.
        progress: called with the steps, or for a probe the sequences, that are done and their number.
    """
    torch.manual_seed(seed)
    classifier = SequenceClassifier(backbone, ClassifierConfig(n_classes, pooling=config.pooling))
    if config.method == "probe":
        _probe(classifier, tokenizer, train, valid, config, seed, progress)
    else:
        _finetune(classifier, tokenizer, train, valid, config, seed, progress)
    return classifier.eval()


@torch.inference_mode()
def predict(
    classifier: SequenceClassifier,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    config: ClassifierTraining,
    progress: Progress = lambda done, total: None,
) -> NDArray[np.float64]:
    """The probabilities of the classes, (n, n_classes); with both strands from the mean of their logits."""
    found = []
    for some in _batches(texts, config.batch_size):
        logits = _logits(classifier, tokenizer, [texts[i] for i in some], config)
        found.append(torch.softmax(logits.double(), -1).cpu())
        progress(int(some[-1]) + 1, len(texts))
    return torch.cat(found).numpy()


def _batches(texts: Sequence[str], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(texts), size):
        yield np.arange(start, min(len(texts), start + size))


def _logits(
    classifier: SequenceClassifier, tokenizer: Tokenizer, texts: Sequence[str], config: ClassifierTraining
) -> Tensor:
    both = [*texts, *map(reverse_complement, texts)] if config.strands == "both" else texts
    rows = in_rows(encoded(tokenizer, both), device_of(classifier))
    logits = classifier(rows.ids, attention_mask=rows.mask)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if config.strands == "one" else wide.view(2, len(texts), -1).mean(0)


# ------------------------------------------------------------------------------------------------- fine-tuning


def _finetune(
    classifier: SequenceClassifier,
    tokenizer: Tokenizer,
    train: tuple[Sequence[str], NDArray[np.int64]],
    valid: tuple[Sequence[str], NDArray[np.int64]],
    config: ClassifierTraining,
    seed: int,
    progress: Progress,
) -> None:
    """Train all weights and keep those of the epoch with the lowest valid loss."""
    texts, labels = train
    draw = np.random.default_rng(seed)
    steps = config.epochs * math.ceil(len(texts) / config.batch_size)
    schedule = OptimizerConfig(
        learning_rate=config.learning_rate,
        min_learning_rate=config.learning_rate * LAST_RATE,
        warmup_steps=max(1, round(steps * WARMUP)),
        weight_decay=config.weight_decay,
    )
    optimizer = build_optimizer(classifier, schedule)
    best, best_loss, step = copy.deepcopy(classifier.state_dict()), math.inf, 0
    for _ in range(config.epochs):
        classifier.train()
        order = draw.permutation(len(texts))
        for some in (order[part] for part in _batches(texts, config.batch_size)):
            step += 1
            set_learning_rate(optimizer, learning_rate(schedule, step, steps))
            _step(classifier, tokenizer, [texts[i] for i in some], labels[some], config, draw, optimizer)
            progress(step, steps)
        loss = _loss(classifier.eval(), tokenizer, valid, config)
        if loss < best_loss:
            best, best_loss = copy.deepcopy(classifier.state_dict()), loss
    if math.isinf(best_loss):
        raise RuntimeError("the valid loss was not finite after any epoch; lower the learning rate (--learning-rate)")
    classifier.load_state_dict(best)


def _step(
    classifier: SequenceClassifier,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    labels: NDArray[np.int64],
    config: ClassifierTraining,
    draw: np.random.Generator,
    optimizer: torch.optim.Optimizer,
) -> None:
    if config.strands == "both":
        texts = [
            reverse_complement(t) if flip else t for t, flip in zip(texts, draw.random(len(texts)) < 0.5, strict=True)
        ]
    device = device_of(classifier)
    rows = in_rows(encoded(tokenizer, texts), device)
    classifier.loss(rows.ids, torch.from_numpy(labels).to(device), attention_mask=rows.mask).backward()
    trained = [p for p in classifier.parameters() if p.requires_grad]
    if math.isfinite(nn.utils.clip_grad_norm_(trained, CLIP).item()):
        optimizer.step()
    optimizer.zero_grad()


def _loss(
    classifier: SequenceClassifier,
    tokenizer: Tokenizer,
    data: tuple[Sequence[str], NDArray[np.int64]],
    config: ClassifierTraining,
) -> float:
    """-log p of the labels, the mean over sequences."""
    probabilities = predict(classifier, tokenizer, data[0], config)
    chosen = probabilities[np.arange(len(data[1])), data[1]]
    return float(-np.log(np.maximum(chosen, 1e-300)).mean())


# ------------------------------------------------------------------------------------------------- linear probe


def _probe(
    classifier: SequenceClassifier,
    tokenizer: Tokenizer,
    train: tuple[Sequence[str], NDArray[np.int64]],
    valid: tuple[Sequence[str], NDArray[np.int64]],
    config: ClassifierTraining,
    seed: int,
    progress: Progress,
) -> None:
    """Fit the head by logistic regression on standardised vectors; the valid loss chooses the penalty."""
    backbone, n_train = classifier.backbone, len(train[0])
    total = n_train + len(valid[0])
    x = _vectors(backbone, tokenizer, train[0], config, lambda done: progress(done, total))
    x_valid = _vectors(backbone, tokenizer, valid[0], config, lambda done: progress(n_train + done, total))
    sample = torch.from_numpy(np.random.default_rng(seed).integers(0, n_train, n_train))
    x, y = x[sample], torch.from_numpy(train[1])[sample]
    mean, scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x, x_valid, y_valid = (x - mean) / scale, (x_valid - mean) / scale, torch.from_numpy(valid[1])
    weight = x.new_zeros(classifier.config.n_outputs, x.shape[1] + 1)
    fits = []
    for penalty in reversed(PENALTIES):  # each starts from the one before
        weight = _logistic(x, y, weight, penalty)
        fits.append((F.cross_entropy(_affine(x_valid, weight), y_valid).item(), weight))
    best = min(fits, key=lambda pair: pair[0])[1]
    matrix = best[:, :-1] / scale
    with torch.no_grad():
        classifier.head.weight.copy_(matrix)
        classifier.head.bias.copy_(best[:, -1] - matrix @ mean)


def _vectors(
    backbone: LanguageModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    config: ClassifierTraining,
    progress: Callable[[int], None],
) -> Tensor:
    """(n, d_model) in float64; with both strands their mean."""
    found = []
    backbone.eval()
    for some in _batches(texts, config.batch_size):
        part = [texts[i] for i in some]
        vectors = np.stack(embed_texts(backbone, tokenizer, part, pooling=config.pooling)).astype(np.float64)
        if config.strands == "both":
            other = [reverse_complement(text) for text in part]
            vectors = (vectors + np.stack(embed_texts(backbone, tokenizer, other, pooling=config.pooling))) / 2
        found.append(torch.from_numpy(vectors))
        progress(int(some[-1]) + 1)
    return torch.cat(found)


def _affine(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight[:, :-1], weight[:, -1])


def _logistic(x: Tensor, y: Tensor, start: Tensor, penalty: float) -> Tensor:
    """Weights (n_classes, d + 1) of a logistic regression, the intercept last and without a penalty."""
    weight = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([weight], max_iter=100, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(_affine(x, weight), y) + penalty * weight[:, :-1].square().sum()
        value.backward()
        return value

    solver.step(loss)
    return weight.detach()
