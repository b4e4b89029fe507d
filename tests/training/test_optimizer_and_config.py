"""Groups, schedule, and the validation of every field."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from anymamba.base.schema import config_from_dict, config_to_dict
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.models.mixers import MIXERS
from anymamba.parts.options import MambaOptions
from anymamba.parts.parameters import KernelParameters, WideParameters
from anymamba.training.config import DataConfig, OptimizerConfig, TrainConfig
from anymamba.training.optimizer import build_optimizer, learning_rate, set_learning_rate


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


@pytest.mark.parametrize("mixer", MIXERS)
def test_wide_parameters_never_decay_and_kernels_have_their_own_rate(mixer: str) -> None:
    config = OptimizerConfig(learning_rate=4e-3, kernel_learning_rate=1e-3, weight_decay=0.3)
    model = LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=11, mixers=(mixer,)))
    optimizer = build_optimizer(model, config)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == set(model.parameters())
    inside = {p for m in model.modules() if isinstance(m, WideParameters) for p in m.parameters()}
    kernels = {p for m in model.modules() if isinstance(m, KernelParameters) for p in m.parameters()}
    assert all(groups[p]["weight_decay"] == 0 for p in inside)
    for rate in (None, 2e-3, 1e-4):
        if rate is not None:
            set_learning_rate(optimizer, rate)
        for p, group in groups.items():
            assert group["lr"] == pytest.approx((rate or 4e-3) * (0.25 if p in kernels else 1))


def test_a_kernels_rate_is_never_above_that_of_the_others() -> None:
    model = LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=11, mixers=("s4d",)))
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=5e-4))
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4}


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
        ("kernel_learning_rate", 0.0),
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
