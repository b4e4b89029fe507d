"""Groups, schedule, and the validation of every field."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.models.options import MambaOptions
from anymamba.models.schema import config_from_dict, config_to_dict
from anymamba.training.config import DataConfig, OptimizerConfig, TrainConfig
from anymamba.training.optimizer import build_optimizer, learning_rate


def test_decay_groups_by_name() -> None:
    options = MambaOptions(bias=True, inner_norms=True, output_norm="layernorm", selective_B=False)
    model = LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=11, tie_embeddings=False, mamba=options))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    name_of = {id(p): name for name, p in model.named_parameters()}
    decays = {name_of[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays.keys() == set(name_of.values())
    decayed = {name for name, decay in decays.items() if decay == 0.3}
    assert decayed == {
        "embedding.weight",
        "head.weight",
        "blocks.0.mixer.in_proj.weight",
        "blocks.0.mixer.conv.weight",
        "blocks.0.mixer.x_proj.weight",
        "blocks.0.mixer.dt_proj.weight",
        "blocks.0.mixer.out_proj.weight",
    }
    assert {decays[name] for name in decays if name not in decayed} == {0.0}


def test_linear_warm_up_and_cosine() -> None:
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10)
    rates = [learning_rate(config, step, 110) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[59] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[34] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_clipping_bounds_the_whole_gradient() -> None:
    model = LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=11))
    model.loss(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).loss.mul(1e3).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    total = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    assert total == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    "field, value",
    [
        ("steps", 0),
        ("batch_size", 0),
        ("context", 0),
        ("accumulation", 0),
        ("log_every", 0),
        ("eval_every", 0),
        ("eval_tokens", -1),
        ("checkpoint_every", 0),
        ("keep_checkpoints", 0),
        ("max_nonfinite", 0),
        ("threads", 0),
    ],
)
def test_bad_values_name_the_field(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(
    "field, value",
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("min_learning_rate", -1.0),
        ("min_learning_rate", 1.0),
        ("warmup_steps", -1),
        ("betas", (0.9, 1.0)),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("clip_norm", 0.0),
    ],
)
def test_bad_optimizer_values_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        OptimizerConfig(**{field: value})  # type: ignore[arg-type]


def test_bad_data_values_name_the_field() -> None:
    with pytest.raises(ValueError, match="workers"):
        DataConfig(workers=-1)
    with pytest.raises(ValueError, match="held_out_fraction"):
        DataConfig(held_out_fraction=1.0)


def test_round_trip_and_nearest_key() -> None:
    config = replace(TrainConfig(steps=7), data=DataConfig(paths=("a", "b")))
    assert config_from_dict(TrainConfig, config_to_dict(config)) == config
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        config_from_dict(TrainConfig, {"optimizer": {"learnin_rate": 1}})
    with pytest.raises(ValueError, match="did you mean 'batch_size'"):
        config_from_dict(TrainConfig, {"batchsize": 1})
