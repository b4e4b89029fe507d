"""Every name that the published `mamba_ssm` 1.0 to 2.3.2 and `causal_conv1d` 1.0 to 1.7 have: offered or refused."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from anymamba.compat.mamba_ssm import refused
from anymamba.compat.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel, MixerModel, create_block
from anymamba.compat.mamba_ssm.ops.selective_scan_interface import (
    MambaInnerFn,
    SelectiveScanFn,
    mamba_inner_fn,
    rms_norm_forward,
    selective_scan_fn,
)
from anymamba.compat.mamba_ssm.ops.triton import k_activations, layer_norm, layernorm_gated

OFFERED = {
    "causal_conv1d": "causal_conv1d_fn causal_conv1d_update",
    "causal_conv1d.causal_conv1d_interface": (
        "CausalConv1dFn causal_conv1d_bwd_function causal_conv1d_fn causal_conv1d_fwd_function causal_conv1d_ref "
        "causal_conv1d_update causal_conv1d_update_function causal_conv1d_update_ref"
    ),
    "causal_conv1d.causal_conv1d_varlen": "causal_conv1d_varlen_states causal_conv1d_varlen_states_ref",
    "causal_conv1d.cpp_functions": (
        "causal_conv1d_bwd_function causal_conv1d_fwd_function causal_conv1d_update_function"
    ),
    "mamba_ssm": "Mamba MambaLMHeadModel mamba_inner_fn selective_scan_fn",
    "mamba_ssm.models.config_mamba": "MambaConfig",
    "mamba_ssm.models.mixer_seq_simple": (
        "Block GatedMLP GenerationMixin Mamba MambaConfig MambaLMHeadModel MixerModel RMSNorm _init_weights "
        "create_block layer_norm_fn load_config_hf load_state_dict_hf rms_norm_fn"
    ),
    "mamba_ssm.modules.block": "Block RMSNorm layer_norm_fn",
    "mamba_ssm.modules.mamba_simple": (
        "Block Mamba RMSNorm causal_conv1d_fn causal_conv1d_update layer_norm_fn mamba_inner_fn rms_norm_fn "
        "selective_scan_fn selective_state_update"
    ),
    "mamba_ssm.modules.mlp": "GatedMLP",
    "mamba_ssm.ops.selective_scan_interface": (
        "MambaInnerFn SelectiveScanFn causal_conv1d_bwd_function causal_conv1d_fn causal_conv1d_fwd_function "
        "causal_conv1d_update_function mamba_inner_fn mamba_inner_ref rms_norm_forward selective_scan_fn "
        "selective_scan_ref"
    ),
    "mamba_ssm.ops.triton.k_activations": "SwiGLU swiglu",
    "mamba_ssm.ops.triton.layer_norm": (
        "LayerNormFn LayerNormLinearFn RMSNorm layer_norm_fn layer_norm_linear_fn layer_norm_ref rms_norm_fn "
        "rms_norm_ref"
    ),
    "mamba_ssm.ops.triton.layernorm": (
        "LayerNormFn LayerNormLinearFn RMSNorm layer_norm_fn layer_norm_linear_fn layer_norm_ref rms_norm_fn "
        "rms_norm_ref"
    ),
    "mamba_ssm.ops.triton.layernorm_gated": "LayerNorm LayerNormFn RMSNorm layernorm_fn rms_norm_ref rmsnorm_fn",
    "mamba_ssm.ops.triton.selective_state_update": "selective_state_update selective_state_update_ref",
    "mamba_ssm.utils.generation": (
        "DecodingCGCache GenerationMixin InferenceParams capture_graph decode modify_logit_for_repetition_penalty "
        "modify_logits_for_min_p_filtering modify_logits_for_top_k_filtering modify_logits_for_top_p_filtering "
        "sample update_graph_cache"
    ),
    "mamba_ssm.utils.hf": "load_config_hf load_state_dict_hf",
}
"""Public names by module, those that the modules import from each other included."""

REFUSED = {
    "mamba_ssm": "Mamba2 Mamba3",
    "mamba_ssm.models.mixer_seq_simple": "MHA Mamba2",
    "mamba_ssm.ops.selective_scan_interface": "causal_conv1d_cuda custom_bwd custom_fwd selective_scan_cuda",
    "mamba_ssm.ops.triton.k_activations": "autotune_configs",
    "mamba_ssm.ops.triton.layer_norm": (
        "autotune_configs config_prune configs_autotune custom_bwd custom_fwd pruned_configs_autotune"
    ),
    "mamba_ssm.ops.triton.selective_state_update": "softplus",
    "mamba_ssm.utils.generation": "allocate_inference_cache",
}
"""Names of offered modules."""

REFUSED_MODULES = (
    "mamba_ssm.distributed",
    "mamba_ssm.distributed.distributed_utils",
    "mamba_ssm.distributed.tensor_parallel",
    "mamba_ssm.modules.mamba2",
    "mamba_ssm.modules.mamba2_simple",
    "mamba_ssm.modules.mamba3",
    "mamba_ssm.modules.mha",
    "mamba_ssm.modules.ssd_minimal",
    "mamba_ssm.ops.cute.mamba3.mamba3_step_fn",
    "mamba_ssm.ops.tilelang.mamba3.mamba3_mimo",
    "mamba_ssm.ops.triton.mamba3.angle_dt",
    "mamba_ssm.ops.triton.softplus",
    "mamba_ssm.ops.triton.ssd_bmm",
    "mamba_ssm.ops.triton.ssd_chunk_scan",
    "mamba_ssm.ops.triton.ssd_chunk_state",
    "mamba_ssm.ops.triton.ssd_combined",
    "mamba_ssm.ops.triton.ssd_state_passing",
    "mamba_ssm.utils.determinism",
    "mamba_ssm.utils.torch",
)

SIGNATURES = {
    "mamba_ssm.models.mixer_seq_simple.create_block": (
        "d_model, d_intermediate, ssm_cfg=None, attn_layer_idx=None, attn_cfg=None, norm_epsilon=1e-05, "
        "rms_norm=False, residual_in_fp32=False, fused_add_norm=False, layer_idx=None, device=None, dtype=None"
    ),
    "mamba_ssm.models.mixer_seq_simple._init_weights": (
        "module, n_layer, initializer_range=0.02, rescale_prenorm_residual=True, n_residuals_per_layer=1"
    ),
    "mamba_ssm.models.mixer_seq_simple.MixerModel.__init__": (
        "d_model, n_layer, d_intermediate, vocab_size, ssm_cfg=None, attn_layer_idx=None, attn_cfg=None, "
        "norm_epsilon=1e-05, rms_norm=False, initializer_cfg=None, fused_add_norm=False, residual_in_fp32=False, "
        "device=None, dtype=None"
    ),
    "mamba_ssm.models.mixer_seq_simple.MixerModel.allocate_inference_cache": (
        "batch_size, max_seqlen, dtype=None, **kwargs"
    ),
    "mamba_ssm.models.mixer_seq_simple.MixerModel.forward": "input_ids, inference_params=None, **mixer_kwargs",
    "mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel.__init__": (
        "config, initializer_cfg=None, device=None, dtype=None"
    ),
    "mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel.tie_weights": "",
    "mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel.allocate_inference_cache": (
        "batch_size, max_seqlen, dtype=None, **kwargs"
    ),
    "mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel.forward": (
        "input_ids, position_ids=None, inference_params=None, num_last_tokens=0, **mixer_kwargs"
    ),
    "mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel.from_pretrained": (
        "pretrained_model_name, device=None, dtype=None, **kwargs"
    ),
    "mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel.save_pretrained": "save_directory",
    "mamba_ssm.modules.block.Block.__init__": (
        "dim, mixer_cls, mlp_cls, norm_cls=LayerNorm, fused_add_norm=False, residual_in_fp32=False"
    ),
    "mamba_ssm.modules.block.Block.forward": "hidden_states, residual=None, inference_params=None, **mixer_kwargs",
    "mamba_ssm.modules.block.Block.allocate_inference_cache": "batch_size, max_seqlen, dtype=None, **kwargs",
    "mamba_ssm.modules.mamba_simple.Mamba.__init__": (
        "d_model, d_state=16, d_conv=4, expand=2, dt_rank='auto', dt_min=0.001, dt_max=0.1, dt_init='random', "
        "dt_scale=1.0, dt_init_floor=0.0001, conv_bias=True, bias=False, use_fast_path=True, layer_idx=None, "
        "device=None, dtype=None"
    ),
    "mamba_ssm.modules.mamba_simple.Mamba.forward": "hidden_states, inference_params=None",
    "mamba_ssm.modules.mamba_simple.Mamba.step": "hidden_states, conv_state, ssm_state",
    "mamba_ssm.modules.mamba_simple.Mamba.allocate_inference_cache": "batch_size, max_seqlen, dtype=None, **kwargs",
    "mamba_ssm.modules.mamba_simple.Mamba._get_states_from_cache": (
        "inference_params, batch_size, initialize_states=False"
    ),
    "mamba_ssm.modules.mlp.GatedMLP.__init__": (
        "in_features, hidden_features=None, out_features=None, activation=silu, bias=False, multiple_of=128, "
        "device=None, dtype=None"
    ),
    "mamba_ssm.modules.mlp.GatedMLP.forward": "x",
    "mamba_ssm.ops.selective_scan_interface.rms_norm_forward": "x, weight, bias, eps=1e-06, is_rms_norm=True",
    "mamba_ssm.ops.selective_scan_interface.selective_scan_fn": (
        "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False"
    ),
    "mamba_ssm.ops.selective_scan_interface.selective_scan_ref": (
        "u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False"
    ),
    "mamba_ssm.ops.selective_scan_interface.mamba_inner_fn": (
        "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, "
        "B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True, "
        "checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-06"
    ),
    "mamba_ssm.ops.selective_scan_interface.mamba_inner_ref": (
        "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, "
        "B=None, C=None, D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True"
    ),
    "mamba_ssm.ops.triton.layer_norm.layer_norm_ref": (
        "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, "
        "rowscale=None, prenorm=False, dropout_mask=None, dropout_mask1=None, upcast=False"
    ),
    "mamba_ssm.ops.triton.layer_norm.rms_norm_ref": (
        "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, "
        "rowscale=None, prenorm=False, dropout_mask=None, dropout_mask1=None, upcast=False"
    ),
    "mamba_ssm.ops.triton.layer_norm.layer_norm_fn": (
        "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, "
        "rowscale=None, prenorm=False, residual_in_fp32=False, is_rms_norm=False, return_dropout_mask=False"
    ),
    "mamba_ssm.ops.triton.layer_norm.rms_norm_fn": (
        "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, "
        "rowscale=None, prenorm=False, residual_in_fp32=False, return_dropout_mask=False"
    ),
    "mamba_ssm.ops.triton.layer_norm.RMSNorm.__init__": (
        "hidden_size, eps=1e-05, dropout_p=0.0, device=None, dtype=None"
    ),
    "mamba_ssm.ops.triton.layer_norm.RMSNorm.reset_parameters": "",
    "mamba_ssm.ops.triton.layer_norm.RMSNorm.forward": "x, residual=None, prenorm=False, residual_in_fp32=False",
    "mamba_ssm.ops.triton.layer_norm.layer_norm_linear_fn": (
        "x, norm_weight, norm_bias, linear_weight, linear_bias, residual=None, eps=1e-06, prenorm=False, "
        "residual_in_fp32=False, is_rms_norm=False"
    ),
    "mamba_ssm.ops.triton.layernorm_gated.rms_norm_ref": (
        "x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True, upcast=True"
    ),
    "mamba_ssm.ops.triton.layernorm_gated.layernorm_fn": (
        "x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True, is_rms_norm=False"
    ),
    "mamba_ssm.ops.triton.layernorm_gated.rmsnorm_fn": (
        "x, weight, bias, z=None, eps=1e-06, group_size=None, norm_before_gate=True"
    ),
    "mamba_ssm.ops.triton.layernorm_gated.LayerNorm.__init__": (
        "hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, device=None, dtype=None"
    ),
    "mamba_ssm.ops.triton.layernorm_gated.LayerNorm.reset_parameters": "",
    "mamba_ssm.ops.triton.layernorm_gated.LayerNorm.forward": "x, z=None",
    "mamba_ssm.ops.triton.layernorm_gated.RMSNorm.__init__": (
        "hidden_size, eps=1e-05, group_size=None, norm_before_gate=True, device=None, dtype=None"
    ),
    "mamba_ssm.ops.triton.layernorm_gated.RMSNorm.reset_parameters": "",
    "mamba_ssm.ops.triton.layernorm_gated.RMSNorm.forward": "x, z=None",
    "mamba_ssm.ops.triton.selective_state_update.selective_state_update": (
        "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None"
    ),
    "mamba_ssm.ops.triton.selective_state_update.selective_state_update_ref": (
        "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False"
    ),
    "mamba_ssm.utils.generation.InferenceParams.reset": "max_seqlen, max_batch_size",
    "mamba_ssm.utils.generation.modify_logits_for_min_p_filtering": "logits, min_p",
    "mamba_ssm.utils.generation.modify_logits_for_top_k_filtering": "logits, top_k",
    "mamba_ssm.utils.generation.modify_logits_for_top_p_filtering": "logits, top_p",
    "mamba_ssm.utils.generation.modify_logit_for_repetition_penalty": (
        "logits, prev_output_tokens, repetition_penalty=1.0"
    ),
    "mamba_ssm.utils.generation.sample": "logits, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0",
    "mamba_ssm.utils.generation.decode": (
        "input_ids, model, max_length, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0, repetition_penalty=1.0, "
        "eos_token_id=None, teacher_outputs=None, vocab_size=None, cg=False, enable_timing=False, "
        "output_scores=False, streamer=None"
    ),
    "mamba_ssm.utils.generation.GenerationMixin.allocate_inference_cache": (
        "batch_size, max_seqlen, dtype=None, **kwargs"
    ),
    "mamba_ssm.utils.generation.GenerationMixin.generate": (
        "input_ids, max_length, top_k=1, top_p=0.0, min_p=0.0, temperature=1.0, return_dict_in_generate=False, "
        "output_scores=False, **kwargs"
    ),
    "mamba_ssm.utils.generation.update_graph_cache": (
        "model, cache, batch_size, seqlen_og, max_seqlen, decoding_seqlens=(1,), dtype=None, n_warmups=2"
    ),
    "mamba_ssm.utils.generation.capture_graph": (
        "model, inference_params, batch_size, max_seqlen, decoding_seqlen=1, mempool=None, n_warmups=2"
    ),
    "mamba_ssm.utils.hf.load_config_hf": "model_name",
    "mamba_ssm.utils.hf.load_state_dict_hf": "model_name, device=None, dtype=None",
    "causal_conv1d.causal_conv1d_interface.causal_conv1d_fn": (
        "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
        "final_states_out=None, activation=None"
    ),
    "causal_conv1d.causal_conv1d_interface.causal_conv1d_ref": (
        "x, weight, bias=None, initial_states=None, return_final_states=False, final_states_out=None, "
        "activation=None, seq_idx=None"
    ),
    "causal_conv1d.causal_conv1d_interface.causal_conv1d_update": (
        "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None"
    ),
    "causal_conv1d.causal_conv1d_interface.causal_conv1d_update_ref": (
        "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None"
    ),
    "causal_conv1d.causal_conv1d_varlen.causal_conv1d_varlen_states": "x, cu_seqlens, state_len",
    "causal_conv1d.causal_conv1d_varlen.causal_conv1d_varlen_states_ref": "x, cu_seqlens, state_len",
    "causal_conv1d.cpp_functions.causal_conv1d_fwd_function": (
        "x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation"
    ),
    "causal_conv1d.cpp_functions.causal_conv1d_bwd_function": (
        "x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation"
    ),
    "causal_conv1d.cpp_functions.causal_conv1d_update_function": (
        "x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices"
    ),
}
"""Published positional parameters of 2.3.2 and 1.7.0, with their defaults."""

OPTIONAL_HERE = {"d_intermediate": "0", "vocab_size": "None"}
"""Required in version 2, missing in version 1: they have defaults, so that both orders are taken."""

ASK = """
import importlib, importlib.util, json, sys
import anymamba.compat
anymamba.compat.activate()
names, modules = json.loads(sys.argv[1])
found = {}
for module, wanted in names.items():
    for name in wanted.split():
        has = hasattr(importlib.import_module(module), name)
        try:
            exec(f"from {module} import {name}")
            found[f"{module}.{name}"] = has, "", ""
        except Exception as error:
            found[f"{module}.{name}"] = has, type(error).__name__, str(error)
for module in modules:
    parent, _, name = module.rpartition(".")
    for line in (f"import {module}", f"from {module} import anything", f"from {parent} import {name}"):
        try:
            exec(line)
            found[line] = True, "", ""
        except Exception as error:
            found[line] = False, type(error).__name__, str(error)
    try:
        found[f"find_spec {module}"] = importlib.util.find_spec(module) is not None, "", ""
    except ModuleNotFoundError as error:  # where a parent is not there, Python's own answer
        found[f"find_spec {module}"] = False, "", ""
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[bool, str, str]]:
    """For every name whether hasattr finds it, and the kind and the text of the error that an import ends with."""
    names = {module: f"{OFFERED.get(module, '')} {REFUSED.get(module, '')}" for module in OFFERED | REFUSED}
    question = json.dumps([names, REFUSED_MODULES])
    result = subprocess.run(
        [sys.executable, "-c", ASK, question], capture_output=True, text=True, check=True, timeout=300
    )
    return json.loads(result.stdout)


def test_offered_names_are_there(answers):
    wanted = [f"{module}.{name}" for module, names in OFFERED.items() for name in names.split()]
    assert len(wanted) > 80 and [name for name in wanted if answers[name] != [True, "", ""]] == []


def test_refused_names_say_why(answers):
    """hasattr says no; the import is an ImportError that tells the reason and what to do."""
    for module, names in REFUSED.items():
        for name in names.split():
            has, kind, text = answers[f"{module}.{name}"]
            assert not has and kind == "ImportError", (name, kind)
            assert text.startswith(f"{module}.{name} is not in anymamba's mamba_ssm, which has Mamba (S6) only: it "), (
                text
            )


def test_refused_modules_say_why(answers):
    for module in REFUSED_MODULES:
        assert answers[f"find_spec {module}"][0] is False
        parent, _, name = module.rpartition(".")
        for line in (f"import {module}", f"from {module} import anything", f"from {parent} import {name}"):
            there, kind, text = answers[line]
            assert not there and kind == "ModuleNotFoundError", (line, kind)
            assert "is not in anymamba's mamba_ssm, which has Mamba (S6) only: it " in text, (line, text)


def test_reasons_are_for_refused_names_alone():
    """No reason for a name that is offered, and none for one that was never published."""
    offered = {f"{module}.{name}" for module, names in OFFERED.items() for name in names.split()}
    assert [name for name in sorted(offered) if refused.reason(name)] == []
    published = {f"{module}.{name}" for module, names in REFUSED.items() for name in names.split()}
    told = {f"mamba_ssm.{m}.{n}" if m else f"mamba_ssm.{n}" for m, names in refused.NAMES.items() for n in names}
    assert told == published
    with pytest.raises(ImportError, match="cannot import name 'never'"):
        from anymamba.compat.mamba_ssm.models.mixer_seq_simple import never  # noqa: F401
    with pytest.raises(AttributeError, match="MHA is not in anymamba's mamba_ssm"):
        _ = importlib.import_module("anymamba.compat.mamba_ssm.models.mixer_seq_simple").MHA


def test_an_original_is_left_alone(tmp_path):
    """Where mamba_ssm is not ours, its own answers come."""
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").touch()
    code = "import anymamba.compat.mamba_ssm, mamba_ssm\nfrom mamba_ssm import Mamba2"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert "ImportError: cannot import name 'Mamba2' from 'mamba_ssm'" in result.stderr, result.stderr


def parameters(path: str) -> list[str]:
    """Our parameters as the table writes them, without self."""
    parts = path.split(".")
    depth = next(i for i in range(len(parts), 0, -1) if is_module(".".join(parts[:i])))
    found = importlib.import_module("anymamba.compat." + ".".join(parts[:depth]))
    owner = found
    for part in parts[depth:]:
        owner, found = found, getattr(found, part)
    values = list(inspect.signature(found).parameters.values())
    written = []
    for value in values[1 if inspect.isclass(owner) and inspect.isfunction(found) else 0 :]:
        default = getattr(value.default, "__name__", repr(value.default))
        stars = "**" if value.kind is value.VAR_KEYWORD else ""
        written.append(stars + value.name + ("" if value.default is value.empty else f"={default}"))
    return written


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(f"anymamba.compat.{name}") is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures(path):
    """The published names in the published order with the published defaults."""
    wanted = SIGNATURES[path].split(", ") if SIGNATURES[path] else []
    if path.endswith(("create_block", "MixerModel.__init__")):
        wanted = [f"{name}={OPTIONAL_HERE[name]}" if name in OPTIONAL_HERE else name for name in wanted]
    assert parameters(path) == wanted


# ------------------------------------------------------------------------------------------ names of functions


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(got, want, leaves) -> None:
    """Equal values, and equal gradients of all leaves."""
    torch.testing.assert_close(got, want)
    weights = random(*want.shape, seed=9)
    a, b = (torch.autograd.grad((y * weights).sum(), leaves) for y in (got, want))
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right)
        assert right.abs().max() > 0


def test_autograd_functions_by_name():
    u, delta, A, B = random(2, 3, 5), random(2, 3, 5, seed=1), -random(3, 4).abs(), random(2, 4, 5, seed=2)
    leaves = [t.requires_grad_() for t in (u, delta, A, B)]
    arguments = (*leaves, random(2, 4, 5, seed=3), random(3), random(2, 3, 5, seed=4), random(3, seed=5), True)
    same(SelectiveScanFn.apply(*arguments), selective_scan_fn(*arguments), leaves)
    out, state = SelectiveScanFn.apply(*arguments, True)
    assert out.shape == (2, 3, 5) and state.shape == (2, 3, 4)
    weights = (random(3, 1, 4), random(3), random(2 + 2 * 4, 3), random(3, 2), random(6, 3), random(6))
    leaves = [t.requires_grad_() for t in (random(2, 6, 5), *weights)]
    inner = (*leaves, A.detach(), None, None, random(3), random(3, seed=1))
    same(MambaInnerFn.apply(*inner), mamba_inner_fn(*inner), leaves)


def test_norm_of_the_scan_interface():
    x, weight, bias = (t.requires_grad_() for t in (random(3, 8), random(8, seed=1), random(8, seed=2)))
    same(rms_norm_forward(x, weight, None, 1e-3), F.rms_norm(x, (8,), weight, 1e-3), [x, weight])
    same(
        rms_norm_forward(x, weight, bias, 1e-3, is_rms_norm=False),
        F.layer_norm(x, (8,), weight, bias, 1e-3),
        [x, weight, bias],
    )


def test_swiglu():
    xy = random(2, 3, 8).requires_grad_()
    want = F.silu(xy[..., :4]) * xy[..., 4:]
    same(k_activations.swiglu(xy), want, [xy])
    assert torch.equal(k_activations.SwiGLU.apply(xy), want)


@pytest.mark.parametrize("rms", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_gated_norms(rms, group_size, before, gated):
    x, z, weight, bias = (random(*shape, seed=i) for i, shape in enumerate([(2, 3, 8), (2, 3, 8), (8,), (8,)]))
    leaves = [t.requires_grad_() for t in (x, weight, bias, *([z] if gated else []))]
    y = x * F.silu(z) if gated and not before else x
    groups = y.unflatten(-1, (-1, group_size or 8))
    if not rms:
        groups = groups - groups.mean(-1, keepdim=True)
    want = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + 1e-3)).flatten(-2) * weight + bias
    want = want * F.silu(z) if gated and before else want
    gate = z if gated else None
    got = layernorm_gated.layernorm_fn(x, weight, bias, gate, 1e-3, group_size, before, rms)
    same(got, want, leaves)
    assert torch.equal(layernorm_gated.LayerNormFn.apply(x, weight, bias, gate, 1e-3, group_size, before, rms), got)
    if rms:
        assert torch.equal(layernorm_gated.rmsnorm_fn(x, weight, bias, gate, 1e-3, group_size, before), got)
        assert torch.equal(layernorm_gated.rms_norm_ref(x, weight, bias, gate, 1e-3, group_size, before), got)
    module = (layernorm_gated.RMSNorm if rms else layernorm_gated.LayerNorm)(8, 1e-3, group_size, before)
    assert set(dict(module.named_parameters())) == ({"weight"} if rms else {"weight", "bias"})
    ones, zeros = torch.ones(8), torch.zeros(8)
    plain = layernorm_gated.layernorm_fn(
        x.float(), ones, zeros, None if gate is None else gate.float(), 1e-3, group_size, before, rms
    )
    torch.testing.assert_close(module(x.float(), None if gate is None else gate.float()), plain)


def test_misuse_of_gated_norms():
    x, weight = torch.randn(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="hidden_size must be a multiple of group_size, got 8 and 3"):
        layernorm_gated.rmsnorm_fn(x, weight, None, group_size=3)
    with pytest.raises(ValueError, match=r"z must have the shape of x, got \(1, 8\) and \(2, 8\)"):
        layernorm_gated.rmsnorm_fn(x, weight, None, x[:1])


# ------------------------------------------------------------------------------------------ version 1's orders


def test_norms_in_the_order_of_version_1():
    x, weight, bias, residual = random(3, 8), random(8, seed=1), random(8, seed=2), random(3, 8, seed=3)
    named = {"residual": residual, "eps": 1e-2, "prenorm": True, "residual_in_fp32": True}
    for function, old in (
        (layer_norm.layer_norm_fn, (1e-2, True, True)),
        (layer_norm.rms_norm_fn, (True, True, 1e-2)),
        (layer_norm.LayerNormFn.apply, (1e-2, True, True)),
    ):
        for a, b in zip(function(x, weight, bias, residual, *old), function(x, weight, bias, **named), strict=True):
            assert torch.equal(a, b)
    for function in (layer_norm.layer_norm_ref, layer_norm.rms_norm_ref):
        narrow = [t.bfloat16() for t in (x, weight, bias, residual)]
        out, total = function(*narrow, 1e-2, True, True)
        assert total.dtype == torch.float32 and out.dtype == torch.bfloat16
        assert torch.equal(function(*narrow, 1e-2), out) and function(*narrow, 1e-2, True)[1].dtype == torch.bfloat16
    assert torch.equal(
        layer_norm.layer_norm_fn(x, weight, bias, None, 1e-2, False, False, True),
        layer_norm.rms_norm_fn(x, weight, bias, eps=1e-2),
    )
    norm = layer_norm.RMSNorm(8, 1e-2, "meta", torch.bfloat16)
    assert norm.weight.is_meta and norm.weight.dtype == torch.bfloat16 and norm.drop is None and norm.eps == 1e-2
    assert layer_norm.RMSNorm(8, 1e-2, None, torch.bfloat16).weight.dtype == torch.bfloat16
    assert layer_norm.RMSNorm(8, 1e-2, 0.5).drop.p == 0.5
    with pytest.raises(TypeError, match=r"rms_norm_fn takes at most 7 positional .* \(x, weight, .* eps\), got 8"):
        layer_norm.rms_norm_fn(x, weight, bias, residual, True, True, 1e-2, None)


def test_masks_of_the_references():
    x, x1, weight = random(3, 8), random(3, 8, seed=1), random(8, seed=2)
    masks = [random(3, 8, seed=seed) > 0 for seed in (3, 4)]
    got = layer_norm.rms_norm_ref(x, weight, None, None, x1, None, None, 1e-5, 0.25, None, False, *masks)
    total = x * masks[0] / 0.75 + x1 * masks[1] / 0.75
    torch.testing.assert_close(got, F.rms_norm(total, (8,), weight, 1e-5))


def test_blocks_in_the_order_of_version_1():
    """dtype is version 1's ninth argument, after the device."""
    block = create_block(16, {"d_state": 8}, 1e-3, True, True, True, 4, "meta", torch.bfloat16)
    weight = block.mixer.in_proj.weight
    assert weight.is_meta and weight.dtype == torch.bfloat16 and block.layer_idx == 4
    model = MixerModel(16, 1, 29, {"d_state": 8}, 1e-3, True, None, True, True, "meta", torch.bfloat16)
    assert model.embedding.weight.is_meta and model.embedding.weight.dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"create_block takes at most 9 positional arguments in the order of version 1"):
        create_block(16, None, 1e-3, True, True, True, 4, "meta", torch.bfloat16, 0)
    with pytest.raises(TypeError, match=r"write MambaLMHeadModel\(MambaConfig\(d_model=16, n_layer"):
        MambaLMHeadModel(16, 2, 29)
