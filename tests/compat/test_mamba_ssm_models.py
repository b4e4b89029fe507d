"""anymamba's `mamba_ssm` layers and models: parameters, initialisation, states, generation, files, both versions."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anymamba import LanguageModel, MambaOptions, ModelConfig
from anymamba import Mamba as OurMamba
from anymamba.compat import mamba_ssm
from anymamba.compat.mamba_ssm import Mamba, MambaLMHeadModel
from anymamba.compat.mamba_ssm.models.config_mamba import MambaConfig
from anymamba.compat.mamba_ssm.models.mixer_seq_simple import MixerModel, _init_weights, create_block
from anymamba.compat.mamba_ssm.modules import block, mamba_simple
from anymamba.compat.mamba_ssm.modules.mlp import GatedMLP
from anymamba.compat.mamba_ssm.ops.triton.layer_norm import RMSNorm
from anymamba.compat.mamba_ssm.utils.generation import (
    InferenceParams,
    capture_graph,
    decode,
    modify_logit_for_repetition_penalty,
    sample,
    update_graph_cache,
)
from anymamba.compat.mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from anymamba.models.checkpoints import CheckpointError

SMALL = {"d_model": 16, "n_layer": 2, "vocab_size": 29}


def moved(module: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


# ------------------------------------------------------------------------------------------ the layer


def test_parameters_of_the_layer():
    layer = Mamba(24, d_state=8, d_conv=3, dt_rank=5, bias=True, dtype=torch.bfloat16)
    shapes = {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()}
    narrow, wide = torch.bfloat16, torch.float32
    assert shapes == {
        "A_log": ((48, 8), wide), "D": ((48,), wide), "in_proj.weight": ((96, 24), narrow),
        "in_proj.bias": ((96,), narrow), "conv1d.weight": ((48, 1, 3), narrow), "conv1d.bias": ((48,), narrow),
        "x_proj.weight": ((21, 48), narrow), "dt_proj.weight": ((48, 5), narrow), "dt_proj.bias": ((48,), narrow),
        "out_proj.weight": ((24, 48), narrow), "out_proj.bias": ((24,), narrow),
    }  # fmt: skip
    assert layer.A_log._no_weight_decay and layer.D._no_weight_decay and layer.dt_proj.bias._no_reinit
    names = ("d_model", "d_state", "d_conv", "expand", "d_inner", "dt_rank", "use_fast_path", "layer_idx", "activation")
    assert [getattr(layer, n) for n in names] == [24, 8, 3, 2, 48, 5, True, None, "silu"]
    assert isinstance(layer.act, nn.SiLU) and Mamba(24).dt_rank == 2


def same_weights(layer: Mamba, ours: OurMamba) -> bool:
    theirs = {
        "conv.weight": layer.conv1d.weight[:, 0], "conv.bias": layer.conv1d.bias, "ssm.delta_bias": layer.dt_proj.bias,
        "ssm.A_log": layer.A_log, "ssm.D": layer.D,
    }  # fmt: skip
    theirs |= {f"{n}.weight": getattr(layer, n).weight for n in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    return all(torch.equal(p, theirs[name]) for name, p in ours.named_parameters())


@pytest.mark.parametrize("options", [{}, {"dt_init": "constant", "dt_scale": 0.5, "d_state": 4, "expand": 3}])
def test_the_same_seed_draws_the_same_layer(options):
    """Ours draws in the published module's order, which its own tests pin."""
    torch.manual_seed(7)
    layer = Mamba(16, **options)
    torch.manual_seed(7)
    assert same_weights(layer, OurMamba(16, **options))
    with pytest.raises(ValueError, match='dt_init must be "random" or "constant"'):
        Mamba(16, dt_init="zeros")


def test_whole_pieces_and_steps_agree():
    """Also where a prompt is shorter than the filter, and where several tokens go on from a state."""
    layer = moved(Mamba(16, layer_idx=3))
    x = torch.randn(2, 11, 16)
    with torch.no_grad():
        want = layer(x)
        for first in (1, 2, 5):
            params = InferenceParams(max_seqlen=20, max_batch_size=2)
            pieces = [layer(x[:, :first], inference_params=params)]
            params.seqlen_offset = first
            pieces.append(layer(x[:, first : first + 3], inference_params=params))
            params.seqlen_offset = first + 3
            for t in range(first + 3, 11):
                pieces.append(layer(x[:, t : t + 1], inference_params=params))
                params.seqlen_offset += 1
            torch.testing.assert_close(torch.cat(pieces, dim=1), want, atol=1e-5, rtol=1e-5)
        conv_state, ssm_state = layer.allocate_inference_cache(2, 20)
        assert conv_state.shape == (2, 32, 4) and ssm_state.shape == (2, 32, 16)
        pieces = []
        for t in range(11):
            out, same_conv, same_ssm = layer.step(x[:, t : t + 1], conv_state, ssm_state)
            assert same_conv is conv_state and same_ssm is ssm_state
            pieces.append(out)
        torch.testing.assert_close(torch.cat(pieces, dim=1), want, atol=1e-5, rtol=1e-5)
        inputs = layer.in_proj(x)[..., :32].transpose(1, 2)
        torch.testing.assert_close(conv_state, inputs[..., -4:])


def gradients(layer: Mamba, outputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(outputs.square().sum(), list(layer.parameters())))


def test_gradients_through_the_states_are_those_of_the_whole():
    """Several calls with a cache, again after a reset, and steps; nothing that backward needs is overwritten."""
    layer = moved(Mamba(8, d_state=4, layer_idx=3)).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    want = gradients(layer, layer(x))

    def pieces(params: InferenceParams) -> torch.Tensor:
        outputs = []
        for start, end in ((0, 2), (2, 3), (3, 9)):
            outputs.append(layer(x[:, start:end], inference_params=params))
            params.seqlen_offset = end
        return torch.cat(outputs, dim=1)

    params = InferenceParams(max_seqlen=20, max_batch_size=2)
    for _ in range(2):
        for got, wanted in zip(gradients(layer, pieces(params)), want, strict=True):
            torch.testing.assert_close(got, wanted)
        params.reset(20, 2)
    states = layer.allocate_inference_cache(2, 20)
    steps = torch.cat([layer.step(x[:, t : t + 1], *states)[0] for t in range(9)], dim=1)
    for got, wanted in zip(gradients(layer, steps), want, strict=True):
        torch.testing.assert_close(got, wanted)


def test_states_stay_where_they_are_without_gradients():
    """Programs hold on to the tensors of a cache; while gradients are recorded they are new ones."""
    layer = moved(Mamba(16, layer_idx=0))
    states = layer.allocate_inference_cache(2, 20)
    params = InferenceParams(20, 2, key_value_memory_dict={0: states})
    with torch.no_grad():
        layer(torch.randn(2, 4, 16), inference_params=params)
    assert all(a is b for a, b in zip(params.key_value_memory_dict[0], states, strict=True)) and states[1].any()
    layer(torch.randn(2, 4, 16), inference_params=params)
    assert all(state.requires_grad for state in params.key_value_memory_dict[0]) and not states[1].requires_grad


def test_states_of_inference_mode_go_on_outside_it():
    layer = moved(Mamba(16, layer_idx=0))
    x = torch.randn(2, 9, 16)
    params = InferenceParams(20, 2)
    with torch.inference_mode():
        pieces = [layer(x[:, :4], inference_params=params)]
        states = layer.allocate_inference_cache(2, 20)
    params.seqlen_offset = 4
    with torch.no_grad():
        pieces.append(layer(x[:, 4:6], inference_params=params))
    params.seqlen_offset = 6
    pieces.append(layer(x[:, 6:], inference_params=params))
    torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x), atol=1e-5, rtol=1e-5)
    pieces[-1].sum().backward()
    steps = [layer.step(x[:, t : t + 1], *states)[0] for t in range(9)]
    torch.testing.assert_close(torch.cat(steps, dim=1), layer(x), atol=1e-5, rtol=1e-5)
    assert states[0].is_inference() and layer.A_log.grad.any()


@pytest.mark.parametrize("grad", [True, False])
def test_a_step_compiles_into_one_graph(grad):
    layer = moved(Mamba(16))
    step = torch.compile(lambda x, *states: layer.step(x, *states), fullgraph=True, backend="eager")
    x = torch.randn(2, 1, 16)
    got, want = layer.allocate_inference_cache(2, 20), layer.allocate_inference_cache(2, 20)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(step(x, *got)[0], layer.step(x, *want)[0])
    torch.testing.assert_close(got, want)


def test_a_double_layer_is_double_throughout():
    layer = moved(Mamba(8, d_state=4)).double()
    leaves = [layer.A_log, layer.D, layer.dt_proj.bias, torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)]
    assert torch.autograd.gradcheck(lambda *_: layer(leaves[3]), leaves, fast_mode=True)


def test_a_short_prompt_is_padded_on_the_left():
    layer = moved(Mamba(16, layer_idx=0))
    params = InferenceParams(max_seqlen=20, max_batch_size=1)
    with torch.no_grad():
        layer(torch.randn(1, 2, 16), inference_params=params)
    conv_state, _ = params.key_value_memory_dict[0]
    assert not conv_state[..., :2].any() and conv_state[..., 2:].all()


def test_misuse_of_the_layer():
    params = InferenceParams(max_seqlen=4, max_batch_size=1)
    with pytest.raises(ValueError, match="caching needs the layer's number; pass layer_idx"):
        Mamba(16)(torch.randn(1, 2, 16), inference_params=params)
    layer = Mamba(16)
    with pytest.raises(ValueError, match="step takes one token, got 2"):
        layer.step(torch.randn(1, 2, 16), *layer.allocate_inference_cache(1, 4))
    assert not hasattr(mamba_ssm, "Mamba2")
    with pytest.raises(ImportError, match=r"Mamba2 is not in anymamba's mamba_ssm, which has Mamba \(S6\) only"):
        from anymamba.compat.mamba_ssm import Mamba2  # noqa: F401
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mamba_ssm.nothing


def test_all_gradients():
    layer = moved(Mamba(8, d_state=4, bias=True)).train()
    layer(torch.randn(2, 9, 8)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_the_top_names():
    from anymamba.compat.mamba_ssm import mamba_inner_fn, selective_scan_fn
    from anymamba.compat.mamba_ssm.ops import selective_scan_interface as interface

    assert mamba_inner_fn is interface.mamba_inner_fn and selective_scan_fn is interface.selective_scan_fn
    assert mamba_ssm.__version__ == "2.3.2"


# ------------------------------------------------------------------------------------------ blocks and models


@pytest.mark.parametrize("rms_norm", [True, False])
def test_fused_and_plain_blocks_agree(rms_norm):
    norm = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=1e-5)
    torch.manual_seed(0)
    plain = moved(block.Block(16, Mamba, partial(GatedMLP, hidden_features=20, out_features=16), norm, False, True))
    fused = block.Block(16, Mamba, partial(GatedMLP, hidden_features=20, out_features=16), norm, True, True)
    fused.load_state_dict(plain.state_dict())
    x, residual = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    for before in (None, residual):
        for a, b in zip(plain(x, before), fused(x, before), strict=True):
            torch.testing.assert_close(a, b)
    assert plain.mlp.fc1.weight.shape == (256, 16)  # 20 rounded up to 128, twice
    total = x + residual
    hidden = plain.mixer(plain.norm(total))
    total = total + hidden
    torch.testing.assert_close(plain(x, residual)[0], plain.mlp(plain.norm2(total)))
    torch.testing.assert_close(plain(x, residual)[1], total)


@pytest.mark.parametrize("activation", [F.silu, F.gelu])
def test_the_gated_mlp_is_its_equation(activation):
    mlp, x = GatedMLP(8, 12, multiple_of=4, activation=activation), torch.randn(2, 3, 8)
    y, gate = mlp.fc1(x)[..., :12], mlp.fc1(x)[..., 12:]
    torch.testing.assert_close(mlp(x), mlp.fc2(y * activation(gate)))


def test_the_block_of_version_1():
    made = mamba_simple.Block(16, Mamba, partial(RMSNorm, eps=1e-5), fused_add_norm=True, residual_in_fp32=True)
    assert made.mlp is None and "norm2" not in dict(made.named_children())
    hidden, residual = made(torch.randn(1, 3, 16))
    assert hidden.shape == residual.shape == (1, 3, 16)
    assert len(made.allocate_inference_cache(1, 5)) == 2
    with pytest.raises(ValueError, match="fused_add_norm is for LayerNorm and RMSNorm, got Identity"):
        mamba_simple.Block(16, Mamba, nn.Identity, fused_add_norm=True)


def test_create_block_of_both_versions():
    first = create_block(16, {"d_state": 8}, 1e-3, True, True, True, 4)  # ssm_cfg, norm_epsilon, rms_norm, ...
    second = create_block(16, 0, {"d_state": 8}, None, None, 1e-3, True, True, True, 4)
    named = create_block(
        16,
        ssm_cfg={"d_state": 8},
        norm_epsilon=1e-3,
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
        layer_idx=4,
    )
    for made in (first, second, named):
        assert isinstance(made.norm, RMSNorm) and made.norm.eps == 1e-3 and made.mlp is None
        assert made.mixer.d_state == 8 and made.mixer.layer_idx == made.layer_idx == 4
        assert made.residual_in_fp32 and made.fused_add_norm
    assert create_block(16, None, 1e-3).norm.eps == 1e-3
    assert create_block(16, 32).mlp.fc2.weight.shape == (16, 128)
    with pytest.raises(ValueError, match=r"ssm_cfg\['layer'\] must be 'Mamba1', got 'Mamba2'"):
        create_block(16, 0, {"layer": "Mamba2"})
    with pytest.raises(ValueError, match=r"asks for attention .* in block 1, but only Mamba"):
        create_block(16, attn_layer_idx=[1], layer_idx=1)


def test_mixer_model_of_both_versions():
    first = MixerModel(
        16, 2, 29, {"d_state": 8}, 1e-3, True
    )  # d_model, n_layer, vocab_size, ssm_cfg, epsilon, rms_norm
    second = MixerModel(16, 2, 0, 29, {"d_state": 8}, None, None, 1e-3, True)
    for made in (first, second, MixerModel(16, 2, 29, rms_norm=True, norm_epsilon=1e-3, ssm_cfg={"d_state": 8})):
        assert made.embedding.weight.shape == (29, 16) and len(made.layers) == 2
        assert made.norm_f.eps == 1e-3 and isinstance(made.norm_f, RMSNorm) and made.layers[1].mixer.d_state == 8
    assert MixerModel(d_model=16, n_layer=1, vocab_size=29).layers[0].mlp is None
    assert MixerModel(16, 1, d_intermediate=32, vocab_size=29).layers[0].mlp is not None
    with pytest.raises(TypeError, match="MixerModel needs vocab_size"):
        MixerModel(d_model=16, n_layer=1)


def test_initialisation():
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(d_model=64, n_layer=4, vocab_size=1000, ssm_cfg={"bias": True}))
    assert abs(model.backbone.embedding.weight.std().item() - 0.02) < 1e-3
    mixer = model.backbone.layers[1].mixer
    assert not mixer.in_proj.bias.any() and mixer.dt_proj.bias.any()
    bound = (1 / 128) ** 0.5 / 2
    assert 0.9 * bound < mixer.out_proj.weight.abs().max() <= bound
    torch.testing.assert_close(mixer.A_log, torch.log(torch.arange(1.0, 17.0)).expand(128, 16))
    linear = nn.Linear(4, 4)
    _init_weights(linear, n_layer=1)
    assert not linear.bias.any()


def ours_and_theirs(**options) -> tuple[LanguageModel, MambaLMHeadModel]:
    theirs = moved(MambaLMHeadModel(MambaConfig(**(SMALL | options))))
    values = theirs.state_dict()
    config = ModelConfig(
        d_model=16, n_layers=2, vocab_size=29, norm="rmsnorm" if theirs.config.rms_norm else "layernorm",
        tie_embeddings=theirs.config.tie_embeddings, mamba=MambaOptions(**theirs.config.ssm_cfg),
    )  # fmt: skip
    from anymamba.models.checkpoints.families.mamba import ORIGINAL

    ours = LanguageModel(config)
    tensors = {name: values[ORIGINAL.name(name)] for name, _ in ours.named_parameters()}
    ours.load_state_dict({n: t[:, 0] if n.endswith("conv.weight") else t for n, t in tensors.items()})
    return ours.eval(), theirs


MODELS = {
    "plain": {},
    "not fused": {"fused_add_norm": False},
    "layernorm": {"rms_norm": False},
    "odd": {"tie_embeddings": False, "ssm_cfg": {"d_state": 8, "d_conv": 3, "dt_rank": 5, "bias": True}},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_the_same_function_as_our_model(options):
    ours, theirs = ours_and_theirs(**options)
    ids = torch.randint(29, (2, 13))
    with torch.no_grad():
        want = ours(ids).logits
        torch.testing.assert_close(theirs(ids).logits, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs(ids, num_last_tokens=3).logits, want[:, -3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_files(tmp_path, options):
    """Ours read theirs, theirs read ours in every format, and the helpers read what lies in the folder."""
    ours, theirs = ours_and_theirs(**options)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.randint(29, (1, 9))
    loaded = LanguageModel.from_pretrained(tmp_path / "theirs")
    assert loaded.config.vocab_size == 29
    with torch.no_grad():
        want = theirs(ids).logits
        torch.testing.assert_close(loaded(ids).logits, want, atol=1e-5, rtol=1e-5)
        for kind in ("state-spaces", *(() if "rms_norm" in options else ("hf",))):
            ours.save_pretrained(tmp_path / kind, format=kind)
            again = MambaLMHeadModel.from_pretrained(str(tmp_path / kind))
            torch.testing.assert_close(again(ids).logits, want, atol=1e-5, rtol=1e-5)
            assert again.backbone.layers[0].mixer.A_log._no_weight_decay
            assert (again.lm_head.weight is again.backbone.embedding.weight) == again.config.tie_embeddings
    assert load_config_hf(str(tmp_path / "theirs"))["n_layer"] == 2
    tensors = load_state_dict_hf(str(tmp_path / "theirs"), dtype=torch.bfloat16)
    assert tensors.keys() == theirs.state_dict().keys() and {t.dtype for t in tensors.values()} == {torch.bfloat16}


OPTIONS = {
    "mlp": {"d_intermediate": 64},
    "not fused": {"fused_add_norm": False},
    "narrow residual": {"residual_in_fp32": False},
    "layernorm": {"rms_norm": False},
    "untied": {"tie_embeddings": False},
    "vocabulary": {"pad_vocab_size_multiple": 1},
    "no such attention": {"attn_layer_idx": [7], "attn_cfg": {"num_heads": 2}},
    "sizes": {"ssm_cfg": {"d_state": 4, "d_conv": 3, "expand": 3, "dt_rank": 5, "bias": True, "conv_bias": False}},
    "names": {"ssm_cfg": {"layer": "Mamba1", "dt_rank": "auto", "use_fast_path": False, "dt_init": "constant"}},
    "steps": {"ssm_cfg": {"dt_min": 0.01, "dt_max": 0.2, "dt_scale": 0.5, "dt_init_floor": 1e-3}},
}
REFUSED_BY_OUR_READER = {
    "d_intermediate": "d_intermediate=64 asks for",
    "attn_layer_idx": r"attn_layer_idx=\[7\] asks for",
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_is_saved_and_read_back(tmp_path, options):
    """The config is the same, and so is the function; our own reader reads it or names the option."""
    model = moved(MambaLMHeadModel(MambaConfig(**(SMALL | options))))
    model.save_pretrained(tmp_path)
    again = MambaLMHeadModel.from_pretrained(str(tmp_path))
    ids = torch.randint(29, (2, 7))
    assert again.config == model.config
    with torch.no_grad():
        want = model(ids).logits
        assert torch.equal(again.eval()(ids).logits, want)
        refused = [message for name, message in REFUSED_BY_OUR_READER.items() if name in options]
        if refused:
            with pytest.raises(CheckpointError, match=refused[0]):
                LanguageModel.from_pretrained(tmp_path)
        else:
            torch.testing.assert_close(LanguageModel.from_pretrained(tmp_path)(ids).logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, r"config.json: ssm_cfg\['layer'\] must be 'Mamba1', got 'Mamba2'"),
        ({"ssm_cfg": {"nothing": 1}}, "config.json: .*unexpected keyword argument 'nothing'"),
        ({"attn_layer_idx": [1]}, "config.json: attn_layer_idx asks for attention"),
        (
            {"n_layer": 1},
            r"backbone.layers.1.mixer.A_log must have shape none, there is no such tensor, got \(32, 16\)",
        ),
        ({"n_layer": 3}, "backbone.layers.2.mixer.A_log must have shape .* got none"),
        ({"n_layer": 10**9}, "holds 23 tensors, too few for the 1000000000 layers"),
        ({"d_model": 8}, r"embedding.weight must have shape \(32, 8\), got \(32, 16\)"),
    ],
)
def test_configs_that_do_not_fit_the_file(tmp_path, change, message):
    MambaLMHeadModel(MambaConfig(**SMALL)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(CheckpointError, match=message):
        MambaLMHeadModel.from_pretrained(str(tmp_path))


def test_what_cannot_be_read_back_is_not_saved(tmp_path):
    model = MambaLMHeadModel(MambaConfig(**SMALL))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds model\.safetensors, which readers prefer to"):
        model.save_pretrained(tmp_path)
    model.config.ssm_cfg["dt_min"] = torch.tensor(0.1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        model.save_pretrained(tmp_path / "config")
    model.backbone.layers[0].mixer.in_proj.weight = nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"in_proj.weight must be floating point to be saved, got torch.int8; save before"
    ):
        model.save_pretrained(tmp_path / "weights")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_dtype_of_a_loaded_model(tmp_path):
    _, theirs = ours_and_theirs()
    theirs.save_pretrained(tmp_path)
    loaded = MambaLMHeadModel.from_pretrained(str(tmp_path), dtype=torch.bfloat16, device="cpu")
    wide = {name for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert wide == {f"backbone.layers.{i}.mixer.{n}" for i in range(2) for n in ("A_log", "D")}
    assert loaded(torch.zeros(1, 3, dtype=torch.long)).logits.dtype == torch.bfloat16


def test_a_falcon_is_refused_by_name(tmp_path):
    mamba = MambaOptions(inner_norms=True, inner_norm_weights=False)
    LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=8, mamba=mamba)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot hold this model: inner_norms=True"):
        MambaLMHeadModel.from_pretrained(str(tmp_path))


# ------------------------------------------------------------------------------------------ generation


@pytest.fixture(scope="module")
def model() -> MambaLMHeadModel:
    return moved(MambaLMHeadModel(MambaConfig(**SMALL)))


def greedy(model, ids: torch.Tensor, length: int) -> torch.Tensor:
    with torch.no_grad():
        while ids.shape[1] < length:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("cg", [False, True])
def test_greedy_is_that_without_a_cache(model, cg):
    for batch in (2, 3):
        ids = torch.randint(29, (batch, 5))
        assert torch.equal(model.generate(ids, max_length=20, cg=cg), greedy(model, ids, 20))
    assert torch.equal(model.generate(ids, max_length=5), ids)


def test_scores_and_dict(model):
    ids = torch.randint(29, (2, 4))
    output = model.generate(ids, max_length=9, return_dict_in_generate=True, output_scores=True, vocab_size=29)
    assert output.sequences.shape == (2, 9) and len(output.scores) == 5
    with torch.no_grad():
        want = model(output.sequences).logits[:, 3:8, :29]
    torch.testing.assert_close(torch.stack(output.scores, dim=1), want, atol=1e-5, rtol=1e-5)


def test_each_row_ends_by_itself(model):
    """The rows emit the end at different steps; generation stops when all have."""
    ids = torch.randint(29, (4, 5), generator=torch.Generator().manual_seed(3))
    free = greedy(model, ids, 40)
    end = free[0, 8].item()
    got = model.generate(ids, max_length=40, eos_token_id=end)
    for row in range(4):
        new = free[row, 5:]
        where = (new == end).nonzero()
        stop = where[0].item() + 1 if len(where) else len(new)
        stop = min(stop, got.shape[1] - 5)
        assert torch.equal(got[row, 5 : 5 + stop], new[:stop])
        assert (got[row, 5 + stop :] == end).all()
    other = free[1, 5].item()
    several = model.generate(ids, max_length=40, eos_token_id=[end, other])
    assert several[1, 5] == other and (several[1, 6:] == end).all()  # it is filled with the first of the ends


def test_teacher_and_streamer(model):
    ids = torch.randint(29, (1, 3))
    teacher = torch.randint(29, (1, 8))
    teacher[:, :3] = ids

    class Streamer:
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, ids):
            self.pieces += ids.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    got = decode(ids, model, 8, teacher_outputs=teacher, streamer=streamer).sequences
    assert torch.equal(got, teacher)
    assert streamer.pieces == teacher[0].tolist() and streamer.ended


def test_timing_is_printed(model, capsys):
    model.generate(torch.zeros(1, 2, dtype=torch.long), max_length=4, enable_timing=True)
    assert "ms" in capsys.readouterr().out


def drawn(logits: torch.Tensor, **options) -> set[int]:
    torch.manual_seed(0)
    return set(sample(logits.repeat(2000, 1), **options).tolist())


def test_sampling_filters():
    logits = torch.log(torch.tensor([[0.05, 0.5, 0.3, 0.15]]))
    assert drawn(logits) == {1}
    assert drawn(logits, top_k=0) == {0, 1, 2, 3}
    assert drawn(logits, top_k=2) == {1, 2}
    assert drawn(logits, top_k=0, top_p=0.6) == {1, 2}
    assert drawn(logits, top_k=0, min_p=0.25) == {1, 2, 3}  # against the likeliest token, not against token 0
    assert drawn(logits, top_k=0, min_p=0.5) == {1, 2}
    assert drawn(logits, top_k=0, temperature=0.01) == {1}
    with pytest.raises(ValueError, match="top_p must be between 0 and 1, got 2"):
        sample(logits, top_k=0, top_p=2.0)


def test_repetition_penalty(model):
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    got = modify_logit_for_repetition_penalty(logits, torch.tensor([[0, 1]]), 2.0)
    assert got.tolist() == [[1.0, -4.0, 1.0]]
    ids = torch.randint(29, (1, 4))
    free = model.generate(ids, max_length=40)
    assert not torch.equal(model.generate(ids, max_length=40, repetition_penalty=5.0), free)


def test_graph_cache(model):
    cache = update_graph_cache(model, None, 2, 4, 20)
    ids = torch.randint(29, (2, 4))
    with torch.no_grad():
        model(ids, inference_params=cache.inference_params)
        got = cache.run(ids[:, :1], torch.full((2, 1), 4), 4)
        want = model(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert callable(capture_graph(model, cache.inference_params, 2, 20))


def test_inference_params_reset():
    params = InferenceParams(4, 2, seqlen_offset=3, lengths_per_sample=torch.ones(2))
    params.reset(9, 5)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (9, 5, 0)
    assert not params.lengths_per_sample.any()


def test_config_fields():
    assert json.loads(json.dumps(MambaConfig().__dict__)) == {
        "d_model": 2560, "d_intermediate": 0, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "attn_layer_idx": [],
        "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "tie_embeddings": True,
        "pad_vocab_size_multiple": 8,
    }  # fmt: skip
