"""Every mixer that a config can name, in a model: the same function in any chunks, hybrids, presets, files."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from anymamba import LanguageModel, MambaOptions, ModelConfig, preset
from anymamba.generation.generate import generate
from anymamba.generation.sampling import SamplingConfig
from anymamba.models.mixers import MIXERS, growing_mixers
from anymamba.models.presets import PRESETS
from anymamba.parts.options import AttentionOptions, H3Options, HyenaOptions, MLPOptions, S4DOptions
from anymamba.parts.state import concatenate_rows, select_rows, state_tensors
from anymamba.training.config import TrainConfig
from anymamba.training.trainer import train

HYBRID = ("mamba", "attention", "h3-s4d", "mlp", "hyena")
"""One of each kind of state: fixed, growing, none."""


def model_of(*mixers: str, **options) -> LanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=16,
        n_layers=len(mixers),
        vocab_size=20,
        mixers=mixers,
        mamba=MambaOptions(d_state=4),
        hyena=HyenaOptions(max_length=64, emb_dim=5, d_filter=8),
        s4d=S4DOptions(d_state=8),
        **{"attention": AttentionOptions(n_heads=2), **options},
    )
    return LanguageModel(config).double().eval()


def ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 20, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("name", [*MIXERS, HYBRID], ids=str)
def test_whole_is_pieces_is_steps(name):
    model = model_of(*([name, name] if isinstance(name, str) else name))
    tokens = ids(3, 17)
    whole = model(tokens).logits
    first = model(tokens[:, :9])
    rest = model(tokens[:, 9:], first.state)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-9, atol=1e-9)
    state, logits = model.init_state(3), []
    for t in range(17):
        out = model.step(tokens[:, t], state)
        state = out.state
        logits.append(out.logits)
    torch.testing.assert_close(torch.stack(logits, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_learns(name):
    model = model_of(name, name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # weights that start at zero hide others
    model.loss(ids(2, 12), ids(2, 12, seed=2)).loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent, f"without a gradient: {silent}"


@pytest.mark.parametrize("name", MIXERS)
def test_reset_parameters_draws_as_construction_does(name):
    """Also for a model made on the meta device, which has no values before."""
    torch.manual_seed(0)
    built = model_of(name, name).float()
    empty = LanguageModel(built.config, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(math.nan)
    empty.reset_parameters()
    for (n, p), q in zip(built.named_parameters(), empty.parameters(), strict=True):
        assert q.isfinite().all(), n
        if p.numel() > 60:
            assert q.std().item() == pytest.approx(p.std().item(), rel=0.4, abs=1e-6), n
    empty.load_state_dict(built.state_dict())
    with torch.no_grad():
        assert torch.equal(empty.eval()(ids(2, 9)).logits, built(ids(2, 9)).logits)


@torch.no_grad()
def test_states_of_rows_of_different_lengths_are_joined():
    model = model_of(*HYBRID, attention=AttentionOptions(n_heads=2, positions="absolute", max_positions=40))
    short, long = ids(1, 5), ids(1, 11, seed=2)
    alone = [model(tokens).state for tokens in (short, long)]
    together = concatenate_rows(alone)
    token = torch.tensor([3, 4])
    stepped = model.step(token, together)
    for i, state in enumerate(alone):
        torch.testing.assert_close(stepped.logits[i : i + 1], model.step(token[i : i + 1], state).logits)
    swapped = model.step(token.flip(0), select_rows(together, torch.tensor([1, 0])))
    torch.testing.assert_close(swapped.logits.flip(0), stepped.logits)


@torch.no_grad()
def test_padded_and_packed_rows_of_a_hybrid():
    model = model_of(*HYBRID, attention=AttentionOptions(n_heads=2, positions="absolute", max_positions=40))
    parts = [ids(1, 6), ids(1, 3, seed=2)]
    alone = [model(part).logits[0] for part in parts]
    padded = torch.cat([parts[0], torch.cat([torch.zeros(1, 3, dtype=torch.int64), parts[1]], 1)])
    mask = torch.ones(2, 6)
    mask[1, :3] = 0
    logits = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(logits[0], alone[0])
    torch.testing.assert_close(logits[1, 3:], alone[1])
    packed = model(torch.cat(parts, 1), cu_seqlens=torch.tensor([0, 6, 9], dtype=torch.int32)).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone))


def test_generation_with_prompts_of_different_lengths():
    from anymamba.data.tokenizer import load_tokenizer

    torch.manual_seed(0)
    config = dataclasses.replace(preset("nano"), n_layers=4, mixers=("mamba", "attention"))
    model, tokenizer = LanguageModel(config).eval(), load_tokenizer(None)
    prompts = [tokenizer.encode(text) for text in ("def f", "import numpy as np", "x")]
    greedy = SamplingConfig(temperature=0)
    together = generate(model, prompts, tokenizer, max_new_tokens=12, sampling=greedy)
    alone = [generate(model, [p], tokenizer, max_new_tokens=12, sampling=greedy).texts[0] for p in prompts]
    assert list(together.texts) == alone


@torch.no_grad()
def test_a_hybrid_is_saved_and_loaded(tmp_path):
    model = model_of(*HYBRID, attention=AttentionOptions(n_heads=2, positions="absolute", max_positions=40)).float()
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(again(ids(2, 9)).logits, model(ids(2, 9)).logits)


def test_attention_among_mamba_by_index_or_pattern():
    assert model_of("mamba", "mamba", "mamba", attention_layers=(1,)).config.layer_mixers == (
        "mamba",
        "attention",
        "mamba",
    )
    config = ModelConfig(n_layers=4, mixers=("mamba", "mlp"))
    assert config.layer_mixers == ("mamba", "mlp") * 2
    with pytest.raises(ValueError, match="attention_layers must lie in 0 to n_layers - 1 = 3, got 4"):
        ModelConfig(n_layers=4, attention_layers=(1, 4))


def test_a_name_that_does_not_exist_lists_those_that_do():
    with pytest.raises(ValueError, match="unknown mixer 'mamba3' in mixers; the mixers are mamba, s4, "):
        model_of("mamba3")


def test_mambas_block_with_s6_is_called_mamba():
    with pytest.raises(ValueError, match="unknown mixer 'mamba-s6' in mixers; Mamba's block with S6 is \"mamba\""):
        model_of("mamba-s6")


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["linear-attention", "mlp"])
def test_absolute_positions_are_added_whatever_the_mixers(mixer):
    positions = AttentionOptions(positions="absolute", max_positions=10)
    model = model_of(mixer, attention=positions)
    same = torch.full((1, 10), 3)
    logits = model(same).logits[0]
    assert (logits[1:] - logits[0]).abs().amax(1).min() > 1e-6
    with pytest.raises(ValueError, match="a sequence of 11 tokens is longer than the table of 10 absolute positions"):
        model(torch.full((1, 11), 3))


def test_a_head_that_does_not_divide_the_width():
    with pytest.raises(ValueError, match=r"multiple of h3.d_head, got 16 and 5"):
        model_of("h3-s4d", h3=H3Options(d_head=5))


def test_a_sequence_longer_than_the_table_of_positions():
    model = model_of("attention", attention=AttentionOptions(n_heads=2, positions="absolute", max_positions=8))
    with pytest.raises(ValueError, match="max_positions"):
        model(ids(1, 9))


def test_training_with_carried_state_wants_states_that_do_not_grow(tmp_path):
    for mixers in (("mamba", "attention"), ("hyena",), ("gau",)):
        with pytest.raises(ValueError, match="set carry_state to false"):
            train(TrainConfig(model=ModelConfig(n_layers=2, mixers=mixers)), tmp_path / "run")
    window = AttentionOptions(n_heads=2, window=64)
    assert not growing_mixers(ModelConfig(n_layers=1, mixers=("attention",), attention=window))


def test_layers_say_what_they_can():
    config = ModelConfig(d_model=16, n_layers=len(MIXERS), vocab_size=9, mixers=tuple(MIXERS))
    growing = {"attention", "gau", "hyena", "hyena-filter", "h3-hyena-filter", "mamba-hyena-filter"}
    assert set(growing_mixers(config)) == growing
    blocks = dict(zip(config.layer_mixers, LanguageModel(config).blocks, strict=True))
    assert {name for name, block in blocks.items() if block.mixer.exports_step} == {"mamba", "s6", "mlp"}
    assert LanguageModel(config).grows and not model_of("mamba").grows


@pytest.mark.parametrize("name", [name for name in PRESETS if "125m" in name or "130m" in name])
def test_presets_have_the_size_in_their_name(name):
    model = LanguageModel(preset(name), device="meta")
    millions = int(name.split("-")[-1].removesuffix("m"))
    assert 0.75 * millions < model.n_parameters() / 1e6 < 1.45 * millions, model.n_parameters()


def test_the_attention_model_of_the_induction_heads_has_its_printed_size():
    """137K: two attention blocks of width 128 without MLPs, biases, LayerNorm, an untied head."""
    attention = AttentionOptions(n_heads=8, positions="rotary", bias=True)
    config = ModelConfig(
        d_model=128,
        n_layers=2,
        vocab_size=16,
        tie_embeddings=False,
        norm="layernorm",
        mixers=("attention",),
        attention=attention,
    )
    assert round(LanguageModel(config, device="meta").n_parameters(), -3) == 137_000


def test_h3_plus_plus_has_no_linear_biases():
    model = LanguageModel(preset("h3++-125m"), device="meta")
    assert [n for n, _ in model.named_parameters() if n.endswith("bias")] == []
    model = LanguageModel(preset("h3-125m"), device="meta")
    assert "blocks.0.mixer.in_proj.bias" in dict(model.named_parameters())


def test_mlp_and_attention_of_transformer_plus_plus_have_no_biases():
    model = LanguageModel(preset("transformer++-125m"), device="meta")
    assert [n for n, _ in model.named_parameters() if n.endswith("bias")] == []
    assert MLPOptions().kind == "swiglu" and model.config.attention.positions == "rotary"


# ------------------------------------------------------------------------------------------ transforms and devices


class _Loss(nn.Module):
    """A model's loss as a module, for `functional_call`."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, labels: Tensor) -> Tensor:
        return self.model.loss(token_ids, labels).loss


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, of forward mode
def test_derivatives_of_a_hybrid():
    """Per-sample gradients of its loss, and a directional derivative in all parameters."""
    model = model_of(*HYBRID, attention=AttentionOptions(n_heads=2, positions="absolute", max_positions=40))
    loss, x, y = _Loss(model), ids(3, 9), ids(3, 9, seed=2)
    parameters = {name: p.detach() for name, p in loss.named_parameters()}
    found = vmap(grad(lambda p, x, y: functional_call(loss, p, (x[None], y[None]))), (None, 0, 0))(parameters, x, y)
    for i in range(3):
        wanted = torch.autograd.grad(loss(x[i : i + 1], y[i : i + 1]), list(loss.parameters()))
        for (name, got), want in zip(found.items(), wanted, strict=True):
            torch.testing.assert_close(got[i], want, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    along = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, tangent = jvp(lambda p: functional_call(loss, p, (x, y)), (parameters,), (along,))
    above, below = (
        functional_call(loss, {name: p + step * along[name] for name, p in parameters.items()}, (x, y))
        for step in (1e-6, -1e-6)
    )
    torch.testing.assert_close(tangent, (above - below) / 2e-6, rtol=1e-6, atol=1e-6)


def test_a_traced_hybrid():
    model = model_of(*HYBRID, attention=AttentionOptions(n_heads=2, positions="absolute", max_positions=40))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes that become constants, and about the old torch.jit
        traced = torch.jit.trace(model, ids(2, 9))
    other = ids(2, 9, seed=2)
    torch.testing.assert_close(traced(other)[0], model(other).logits)


@pytest.mark.parametrize("name", [*MIXERS, HYBRID], ids=str)
def test_shapes_on_the_meta_device(name):
    model = model_of(*([name] if isinstance(name, str) else name))
    empty = copy.deepcopy(model).to("meta")
    tokens = ids(2, 9).to("meta")
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            output = empty(tokens)
            assert output.logits.shape == (2, 9, model.config.padded_vocab_size) and output.logits.is_meta
            for state in (output.state, empty.init_state(2)):
                assert empty.step(tokens[:, 0], state).logits.shape == (2, model.config.padded_vocab_size)
    empty.loss(tokens, tokens).loss.backward()
    assert all(p.grad is not None for p in empty.parameters())


# ------------------------------------------------------------------------------------------ quantised projections


class _Int8Linear(nn.Module):
    """Like bitsandbytes' linear layers: an integer parameter, and scales that are not tensors of the module."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().float().abs().amax(1, keepdim=True).clamp(min=1e-6) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias
        self.weight.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight * self.weight.scale).to(x.dtype), self.bias)


class _PackedLinear(nn.Module):
    """Like those of GPTQ: no parameter called weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner = [linear]
        self.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(2, dtype=linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](x)


def replaced(model: LanguageModel, by: Callable[[nn.Linear], nn.Module]) -> LanguageModel:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, by(child))
    return model


def dynamic(dtype: torch.dtype) -> Callable[[LanguageModel], LanguageModel]:
    def quantize(model: LanguageModel) -> LanguageModel:
        if torch.backends.quantized.engine == "none":
            pytest.skip("this build of torch has no engine for quantised layers")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch.ao, which moves to torchao
            return torch.ao.quantization.quantize_dynamic(model.float(), {nn.Linear}, dtype=dtype)

    return quantize


QUANTIZED: dict[str, Callable[[LanguageModel], LanguageModel]] = {
    "dynamic int8": dynamic(torch.qint8),
    "dynamic float16": dynamic(torch.float16),
    "int8 weights": lambda model: replaced(model.bfloat16(), _Int8Linear),
    "packed weights": lambda model: replaced(model.bfloat16(), _PackedLinear),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("name", MIXERS)
def test_quantised_projections(name, kind):
    """It makes a state, and a step from it equals `forward` at length one, to the precision of the activations."""
    model = QUANTIZED[kind](model_of(name, name, tie_embeddings=False))
    state = model.init_state(2)
    assert all(t.is_floating_point() or t.is_complex() or t.dtype == torch.int64 for t in state_tensors(state))
    for tokens in ids(4, 2):
        wanted = model(tokens[:, None], state).logits[:, 0].float()
        output = model.step(tokens, state)
        state = output.state
        error = (output.logits.float() - wanted).abs().max() / wanted.abs().max()
        allowed = 0.02 if kind.startswith("dynamic") else 0.05  # rounding to 8 bits, and bfloat16
        assert error <= allowed, f"differs by {error:.1e}, allowed {allowed:.0e}"


@torch.no_grad()
def test_the_dtype_of_a_state_is_the_activations_where_a_tensor_tells_it():
    for name in ("mamba", "hyena", "gau", "rwkv", "rwkv-channel", "h3-s4d"):
        model = QUANTIZED["int8 weights"](model_of(name, tie_embeddings=False))
        assert next(state_tensors(model.init_state(1))).dtype == torch.bfloat16, name


def test_generation_with_quantised_projections():
    from anymamba.data.tokenizer import load_tokenizer

    torch.manual_seed(0)
    config = dataclasses.replace(preset("nano"), n_layers=4, mixers=("mamba", "attention"))
    tokenizer = load_tokenizer(None)
    model = QUANTIZED["dynamic int8"](LanguageModel(config).eval())
    greedy = SamplingConfig(temperature=0)
    prompts = [tokenizer.encode("def f"), tokenizer.encode("x")]
    assert len(generate(model, prompts, tokenizer, max_new_tokens=6, sampling=greedy).texts) == 2
