"""Classification and regression of whole sequences: pooling, padding, losses, files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from anymamba import LanguageModel, ModelConfig
from anymamba.models.classifier import ClassifierConfig, SequenceClassifier
from anymamba.training.config import OptimizerConfig
from anymamba.training.optimizer import build_optimizer

SMALL = ModelConfig(d_model=16, n_layers=2, vocab_size=20)


def classifier(**options) -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(SMALL, ClassifierConfig(3, **options)).double().eval()


def ids(batch: int = 4, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 20, (batch, length), generator=torch.Generator().manual_seed(1))


def pooled(model: SequenceClassifier, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The head on a weighted sum of positions, row by row."""
    hidden, _ = model.backbone.hidden(tokens)
    rows = [sum(w * h for w, h in zip(row, line, strict=True)) for row, line in zip(weights, hidden, strict=True)]
    return torch.stack(rows) @ model.head.weight.T + model.head.bias


@torch.no_grad()
def test_pooling_by_its_definition():
    tokens, zero = ids(), torch.zeros(4, 9, dtype=torch.float64)
    last = zero.clone()
    last[:, -1] = 1
    torch.testing.assert_close(classifier()(tokens), pooled(classifier(), tokens, last))
    torch.testing.assert_close(classifier(pooling="mean")(tokens), pooled(classifier(), tokens, zero + 1 / 9))
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[:, 2], mask[:, 5] = True, True
    masked = classifier(pooling="masked")(tokens, pool_mask=mask)
    torch.testing.assert_close(masked, pooled(classifier(), tokens, mask / 2))


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(pooling, side):
    model, tokens = classifier(pooling=pooling), ids(1, 6)
    fill = torch.zeros(1, 4, dtype=tokens.dtype)
    padded = torch.cat([fill, tokens] if side == "left" else [tokens, fill], 1)
    mask = torch.cat([fill, tokens * 0 + 1] if side == "left" else [tokens * 0 + 1, fill], 1)
    torch.testing.assert_close(model(padded, attention_mask=mask), model(tokens))


def test_it_learns_to_tell_which_token_came_first():
    """The class depends only on the first token, at least three positions before the end."""
    torch.manual_seed(0)
    model = SequenceClassifier(SMALL, ClassifierConfig(3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        tokens = torch.randint(3, 20, (32, 5))
        classes = torch.randint(0, 3, (32,))
        tokens[:, 0] = classes
        optimizer.zero_grad()
        loss = model.loss(tokens, classes)
        loss.backward()
        optimizer.step()
    assert loss < 0.2


def test_regression_of_vectors():
    torch.manual_seed(0)
    model = SequenceClassifier(SMALL, ClassifierConfig(2, task="regression", pooling="mean", d_input=3))
    x, targets = torch.randn(4, 7, 3), torch.randn(4, 2)
    loss = model.loss(x, targets)
    torch.testing.assert_close(loss, ((model(x) - targets) ** 2).mean())
    loss.backward()
    assert model.embed is not None and model.embed.weight.grad is not None


@pytest.mark.parametrize("tied", [True, False])
def test_of_vectors_every_trainable_parameter_learns(tied):
    backbone = replace(SMALL, tie_embeddings=tied)
    model = SequenceClassifier(backbone, ClassifierConfig(2, task="regression", d_input=3))
    model.loss(torch.randn(4, 7, 3), torch.randn(4, 2)).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_the_optimizer_of_the_trainer_takes_it():
    model = SequenceClassifier(SMALL, ClassifierConfig(3))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decayed = {p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert model.head.weight in decayed
    exempt = {p for name, p in model.named_parameters() if name.endswith(("A_log", ".D", "bias", "norm.weight"))}
    assert exempt and not exempt & decayed


@torch.no_grad()
def test_a_pretrained_backbone_and_files(tmp_path):
    torch.manual_seed(0)
    language_model = LanguageModel(SMALL)
    model = SequenceClassifier(language_model, ClassifierConfig(5, pooling="mean")).eval()
    assert model.backbone is language_model
    model.save_pretrained(tmp_path)
    again = SequenceClassifier.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(again(ids()), model(ids()))
    assert torch.equal(LanguageModel.from_pretrained(tmp_path)(ids()).logits, language_model(ids()).logits)


def test_what_a_caller_can_get_wrong(tmp_path):
    model = classifier()
    with pytest.raises(ValueError, match=r"inputs must be token ids \(batch, length\)"):
        model(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="pool_mask must be given exactly if pooling is 'masked'"):
        model(ids(), pool_mask=torch.ones(4, 9))
    with pytest.raises(ValueError, match="pool_mask must be given exactly if pooling is 'masked'"):
        classifier(pooling="masked")(ids())
    with pytest.raises(ValueError, match="a position to pool"):
        model(ids(), attention_mask=torch.zeros(4, 9))
    for name, mask in (("attention_mask", torch.ones(4, 8)), ("pool_mask", torch.ones(9))):
        with pytest.raises(ValueError, match=rf"{name} must be \(batch, length\) = \(4, 9\)"):
            classifier(pooling="masked")(ids(), **{"pool_mask": torch.ones(4, 9), name: mask})
    with pytest.raises(ValueError, match=r"targets must be \(batch, n_outputs\) = \(4, 3\), got \(4,\)$"):
        classifier(task="regression").loss(ids(), torch.zeros(4))
    one = SequenceClassifier(SMALL, ClassifierConfig(1, task="regression"))
    with pytest.raises(ValueError, match=r"got \(4,\); give targets\[:, None\]"):
        one.loss(ids(), torch.zeros(4))
    with pytest.raises(ValueError, match="pooling must be one of last, mean, masked, got 'max'"):
        ClassifierConfig(3, pooling="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="task must be one of classification, regression, got 'ranking'"):
        ClassifierConfig(3, task="ranking")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_outputs must be at least 1, got 0"):
        ClassifierConfig(0)
    LanguageModel(SMALL).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="it holds no head"):
        SequenceClassifier.from_pretrained(tmp_path)
