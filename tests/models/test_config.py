"""Configs: validation of every field, and conversion from and to dictionaries."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from anymamba.base.schema import config_from_dict, config_to_dict
from anymamba.models.config import ModelConfig
from anymamba.models.presets import PRESETS
from anymamba.parts.options import (
    AttentionOptions,
    GAUOptions,
    H3Options,
    HyenaOptions,
    LinearAttentionOptions,
    MambaOptions,
    MLPOptions,
    RetentionOptions,
    S4DOptions,
    S4Options,
)

BIG = ModelConfig(
    d_model=48,
    n_layers=3,
    vocab_size=100,
    pad_vocab_multiple=16,
    tie_embeddings=False,
    norm="layernorm",
    norm_eps=1e-6,
    residual_in_fp32=False,
    mixers=("mamba", "mamba"),
    attention_layers=(1,),
    complement=(1, 0),
    weight_std=0.01,
    s4=S4Options(d_state=6, n_ssm=2, dt_min=0.01, dt_max=0.2),
    s4d=S4DOptions(d_state=6, init="s4d-inv", discretization="bilinear", dt_min=0.01, dt_max=0.2),
    hyena=HyenaOptions(order=3, max_length=100, emb_dim=5, d_filter=16, w=1.5, learn_positions=True),
    h3=H3Options(d_head=2, d_shift=4, bias=False),
    attention=AttentionOptions(
        n_heads=4, n_kv_heads=2, d_head=6, positions="xpos", max_positions=50, rotary_base=100.0, d_conv=3, window=9,
        bias=True,
    ),
    mlp=MLPOptions(kind="gelu", d_hidden=20, bias=True),
    gau=GAUOptions(expand=1.5, d_key=16, max_distance=9),
    linear_attention=LinearAttentionOptions(n_heads=2),
    retention=RetentionOptions(n_heads=2, d_value=24),
    mamba=MambaOptions(
        d_state=8, d_conv=3, expand=1.5, dt_rank=5, dt_min=0.01, dt_max=0.2, dt_init="constant", dt_scale=2.0,
        dt_init_floor=1e-3, conv_bias=False, bias=True, b_discretization="zoh", selective_delta=False,
        selective_B=False, selective_C=False, A_init="s4d-lin", output_norm="rmsnorm", inner_norms=True,
        inner_norm_weights=False, norm_eps=1e-4,
    ),
)  # fmt: skip


def test_the_case_below_changes_every_field():
    nested = [value for value in vars(BIG).values() if dataclasses.is_dataclass(value)]
    assert len(nested) == 10
    for ours, plain in ((BIG, ModelConfig()), *((value, type(value)()) for value in nested)):
        assert [f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) == getattr(plain, f.name)] == []


@pytest.mark.parametrize("config", [BIG, ModelConfig(), *PRESETS.values()])
def test_round_trip_through_json(config):
    values = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(ModelConfig, values) == config


def test_absent_keys_take_their_defaults():
    assert config_from_dict(ModelConfig, {"d_model": 64, "mamba": {"d_state": 4}}) == ModelConfig(
        d_model=64, mamba=MambaOptions(d_state=4)
    )


def test_derived_sizes():
    assert (BIG.padded_vocab_size, BIG.d_inner, BIG.dt_rank) == (112, 72, 5)
    assert ModelConfig(d_model=40).dt_rank == 3
    assert ModelConfig(n_layers=5, mixers=("a", "b")).layer_mixers == ("a", "b", "a", "b", "a")
    assert MambaOptions(A_init="s4d-lin").is_complex and not MambaOptions().is_complex


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"d_modle": 1}, ValueError, "unknown key 'd_modle' in ModelConfig; did you mean 'd_model'?"),
        ({"mamba": {"dstate": 1}}, ValueError, "unknown key 'dstate' in mamba; did you mean 'd_state'?"),
        ({"qqq": 1}, ValueError, "unknown key 'qqq' in ModelConfig; it has attention, attention_layers, complement, "),
        ({"d_model": "64"}, TypeError, "d_model must be int, got '64'"),
        ({"d_model": 64.0}, TypeError, "d_model must be int, got 64.0"),
        ({"d_model": True}, TypeError, "d_model must be int, got True"),
        ({"norm_eps": "small"}, TypeError, "norm_eps must be float, got 'small'"),
        ({"norm_eps": True}, TypeError, "norm_eps must be float, got True"),
        ({"tie_embeddings": 1}, TypeError, "tie_embeddings must be bool, got 1"),
        ({"norm": "batchnorm"}, ValueError, "norm must be one of 'rmsnorm', 'layernorm', got 'batchnorm'"),
        ({"mamba": []}, TypeError, "mamba must be a table of keys and values, got []"),
        ({"mixers": "mamba"}, TypeError, "mixers must be a list, got 'mamba'"),
        ({"mixers": [1]}, TypeError, "mixers[0] must be str, got 1"),
        ({"mamba": {"dt_rank": "auto"}}, TypeError, "mamba.dt_rank must be int, got 'auto'"),
        (
            {"mamba": {"output_norm": "x"}},
            ValueError,
            "mamba.output_norm must be one of 'rmsnorm', 'layernorm', got 'x'",
        ),
        ({"mamba": {"A_init": "x"}}, ValueError, "mamba.A_init must be one of 's4d-real'"),
        ([], TypeError, "ModelConfig must be a table of keys and values, got []"),
    ],
)
def test_messages_of_reading(values, error, message):
    with pytest.raises(error) as caught:
        config_from_dict(ModelConfig, values)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *((name, bad, f"{name} must be (an integer of )?at least 1, got {bad!r}")
          for name in ("d_model", "n_layers", "vocab_size", "pad_vocab_multiple") for bad in (0, -1, 1.5, True)),
        *(("norm_eps", bad, "norm_eps must be a positive number") for bad in (0, -1.0, float("nan"), float("inf"))),
        ("mixers", (), "mixers must name at least one mixer"),
    ],
)  # fmt: skip
def test_fields_of_the_model(field, value, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{field: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(({name: 0}, f"{name} must be at least 1, got 0") for name in ("d_state", "d_conv", "dt_rank")),
        *(({name: 0.0}, f"{name} must be a positive number, got 0.0")
          for name in ("expand", "dt_min", "dt_scale", "dt_init_floor", "norm_eps")),
        ({"dt_min": 0.2}, "dt_max must be at least dt_min, got dt_min=0.2 and dt_max=0.1"),
    ],
)  # fmt: skip
def test_fields_of_the_layer(values, message):
    with pytest.raises(ValueError, match=message):
        MambaOptions(**values)


def test_lists_become_tuples():
    config = ModelConfig(n_layers=2, mixers=["mamba", "mlp"], attention_layers=[1])  # type: ignore[arg-type]
    assert config == ModelConfig(n_layers=2, mixers=("mamba", "mlp"), attention_layers=(1,))
    assert hash(config.mixers) and config.layer_mixers == ("mamba", "attention")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixers": "mamba"}, r"""mixers must be a tuple, got 'mamba'; for example \("mamba",\)"""),
        ({"attention_layers": 3}, r"attention_layers must be a tuple, got 3; for example \(3,\)"),
    ],
)
def test_what_is_no_tuple(values, message):
    with pytest.raises(TypeError, match=message):
        ModelConfig(**values)


def test_a_layer_without_channels():
    with pytest.raises(
        ValueError, match=r"d_inner = int.* must be at least 1, got expand=0.01 and d_model=4; raise either"
    ):
        ModelConfig(d_model=4, mamba=MambaOptions(expand=0.01))


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BIG.d_model = 3


def test_configs_need_no_torch():
    code = "import sys, anymamba.models.config, anymamba.models.presets; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
