"""The language model: whole == chunks == steps == packed == padded, the loss in pieces, its options, its parameters."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anymamba import LanguageModel, MambaOptions, ModelConfig
from anymamba.ops import dispatch
from anymamba.ops.linear_cross_entropy import chunks
from anymamba.parts.state import concatenate_rows, select_rows, state_bytes, state_tensors

LENGTH = 18

CONFIGS = {
    "default": {},
    "untied": {"tie_embeddings": False},
    "layernorm": {"norm": "layernorm", "norm_eps": 1e-3},
    "complex": {"mamba": MambaOptions(A_init="s4d-lin", b_discretization="zoh", d_state=4)},
    "not selective": {"mamba": MambaOptions(selective_delta=False, selective_B=False, selective_C=False)},
    "norms": {"mamba": MambaOptions(output_norm="rmsnorm", inner_norms=True, bias=True)},
    "residual": {"residual_in_fp32": False},
}


def build(dtype: torch.dtype = torch.float64, **options) -> LanguageModel:
    """A small model, moved away from its initialisation so that nothing is zero by accident."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**{"d_model": 12, "n_layers": 2, "vocab_size": 29} | options)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def ids(batch: int = 3, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randint(29, (batch, length), generator=torch.Generator().manual_seed(seed))


def some_state(model: LanguageModel, batch: int):
    """The state after some tokens."""
    return model(ids(batch, 5, seed=7)).state


def assert_same(got, want, tolerance: float = 1e-11) -> None:
    for a, b in zip(state_tensors(got), state_tensors(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        error = (a - b).abs().max().item() if a.numel() else 0.0
        assert error <= tolerance, f"error {error:.3e}, allowed {tolerance:.3e}"


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_whole_equals_chunks_equals_steps(options):
    model = build(**options)
    whole = model(ids())
    assert whole.logits.shape == (3, LENGTH, 32)
    logits, state = [], model.init_state(3)
    for start, stop in itertools.pairwise([0, 7, 8, LENGTH]):
        out = model(ids()[:, start:stop], state)
        logits.append(out.logits)
        state = out.state
    assert_same((torch.cat(logits, 1), state), tuple(whole))
    logits, state = [], model.init_state(3)
    for t in range(LENGTH):
        out = model.step(ids()[:, t], state)
        logits.append(out.logits)
        state = out.state
    assert_same((torch.stack(logits, 1), state), tuple(whole))


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_packed_equals_one_by_one(options):
    model, tokens, lengths = build(**options), ids(1), [5, 0, 1, 12]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    state = some_state(model, 4)
    packed = model(tokens, state, cu_seqlens=offsets)
    alone = [
        model(tokens[:, start:stop], select_rows(state, torch.tensor([i])))
        for i, (start, stop) in enumerate(itertools.pairwise(offsets.tolist()))
    ]
    want = torch.cat([o.logits for o in alone], 1), concatenate_rows([o.state for o in alone])
    assert_same(tuple(packed), want)


@pytest.mark.parametrize("carried", [False, True], ids=["from zeros", "carried"])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_padded_equals_unpadded(options, carried):
    model, tokens = build(**options), ids(4)
    mask = torch.ones(4, LENGTH, dtype=torch.bool)
    mask[0, :5] = mask[1, -5:] = False
    mask[2, [0, 3, 9, 10]] = False
    state = some_state(model, 4) if carried else None
    out = model(tokens, state, attention_mask=mask)
    for row in range(4):
        before = None if state is None else select_rows(state, torch.tensor([row]))
        alone = model(tokens[row : row + 1, mask[row]], before)
        got = out.logits[row : row + 1, mask[row]], select_rows(out.state, torch.tensor([row]))
        assert_same(got, tuple(alone))


def test_a_thousand_short_documents_in_one_row_are_a_thousand_runs():
    torch.manual_seed(2)
    model = build(torch.float32, d_model=8, n_layers=1)
    lengths = torch.randint(0, 7, (1000,)).tolist()
    tokens = ids(1, sum(lengths))
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    with torch.no_grad():
        packed = model(tokens, cu_seqlens=offsets)
        for i in range(0, 1000, 37):
            alone = model(tokens[:, offsets[i] : offsets[i + 1]])
            got = packed.logits[:, offsets[i] : offsets[i + 1]], select_rows(packed.state, torch.tensor([i]))
            assert_same(got, tuple(alone), 1e-5)


def test_causality_and_rows():
    model, tokens = build(), ids()
    before = model(tokens)
    changed = tokens.clone()
    changed[1, 9] = (changed[1, 9] + 1) % 29
    after = model(changed)
    assert torch.equal(before.logits[1, :9], after.logits[1, :9])
    assert not torch.equal(before.logits[1, 9:], after.logits[1, 9:])
    assert torch.equal(before.logits[[0, 2]], after.logits[[0, 2]])
    assert_same(tuple(model(tokens[1:2])), (before.logits[1:2], select_rows(before.state, torch.tensor([1]))))


@pytest.mark.parametrize("n", [0, 1, 5, LENGTH, 100])
def test_num_last_logits(n):
    model = build()
    whole, last = model(ids()), model(ids(), num_last_logits=n)
    assert_same((last.logits, last.state), (whole.logits[:, max(0, LENGTH - n) :], whole.state), 1e-14)


def test_num_last_logits_is_not_negative():
    with pytest.raises(ValueError, match="num_last_logits must be at least 0, got -1"):
        build()(ids(), num_last_logits=-1)


def test_empty_sequences_and_batches():
    model = build()
    state = some_state(model, 3)
    out = model(ids()[:, :0], state)
    assert out.logits.shape == (3, 0, 32)
    assert_same(out.state, state, 0)
    assert model(ids()[:0]).logits.shape == (0, LENGTH, 32)
    loss = model.loss(ids()[:, :0], ids()[:, :0])
    assert loss.loss.item() == 0 and loss.n_tokens.item() == 0


# ------------------------------------------------------------------------------------------ loss


def labels(batch: int = 3) -> torch.Tensor:
    values = ids(batch, seed=3)
    values[0, :4] = -100
    values[-1, -1] = -100
    return values


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_loss_is_the_sum_of_minus_log_p(options):
    model = build(**options)
    out = model.loss(ids(), labels())
    log_p = model(ids()).logits.log_softmax(-1)
    counted = labels() != -100
    want = -log_p.gather(-1, labels().clamp(min=0)[..., None])[..., 0][counted].sum()
    assert math.isclose(out.loss.item(), want.item(), rel_tol=1e-12)
    assert out.n_tokens.item() == counted.sum() and out.loss.shape == ()


@pytest.mark.parametrize("rows", [1, 7, 54, 1000], ids="{} rows a chunk".format)
def test_loss_in_chunks_equals_the_whole(monkeypatch, rows):
    results = []
    for elements in (1 << 23, rows * 32):
        monkeypatch.setattr(chunks, "MOST_LOGITS", elements)
        model = build()
        out = model.loss(ids(), labels(), some_state(model, 3))
        out.loss.backward()
        results.append((out.loss.detach(), out.state, *(p.grad for p in model.parameters())))
    assert_same(results[1], results[0], 1e-10)


def test_loss_never_holds_all_logits(monkeypatch):
    """The largest tensor that forward and backward create, for a long sequence and a large vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.untyped_storage().nbytes() // out.element_size())
            return out

    model = build(torch.float32, vocab_size=3000, d_model=4, n_layers=1)
    tokens = ids(2, 500)
    monkeypatch.setattr(chunks, "MOST_LOGITS", 50 * 3000)
    with Largest() as largest:
        model.loss(tokens, tokens).loss.backward()
    assert 50 * 3000 <= largest.elements < 2 * 50 * 3000


def test_loss_is_float32_under_autocast_and_in_half_precision():
    model = build(torch.float32)
    want = model.loss(ids(), labels()).loss
    with torch.autocast("cpu", torch.bfloat16):
        got = model.loss(ids(), labels()).loss
    assert got.dtype == torch.float32 and abs(got - want) < 0.02 * want
    got = model.to(torch.bfloat16).loss(ids(), labels()).loss
    assert got.dtype == torch.float32 and abs(got - want) < 0.02 * want


def test_loss_with_padding_packing_and_int32_ids():
    model = build()
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[0, :4] = mask[2, -1:] = False
    padded = model.loss(ids(), labels(), attention_mask=mask)
    rows = [model.loss(ids()[r : r + 1, mask[r]], labels()[r : r + 1, mask[r]]).loss for r in range(3)]
    assert math.isclose(padded.loss.item(), sum(rows).item(), rel_tol=1e-12)
    offsets = torch.arange(0, 3 * LENGTH + 1, LENGTH, dtype=torch.int32)
    packed = model.loss(ids().view(1, -1), labels().view(1, -1), cu_seqlens=offsets)
    assert math.isclose(packed.loss.item(), model.loss(ids(), labels()).loss.item(), rel_tol=1e-12)
    assert model.loss(ids().int(), labels().int()).loss == model.loss(ids(), labels()).loss


def test_loss_with_nothing_to_count():
    out = build().loss(ids(), torch.full_like(ids(), -100))
    assert out.loss.item() == 0 and out.n_tokens.item() == 0
    out.loss.backward()


def test_truncated_back_propagation_carries_the_value_of_the_state():
    model = build()
    whole = model.loss(ids(), labels())
    first = model.loss(ids()[:, :7], labels()[:, :7])
    second = model.loss(ids()[:, 7:], labels()[:, 7:], first.state)
    assert math.isclose((first.loss + second.loss).item(), whole.loss.item(), rel_tol=1e-12)
    assert_same(second.state, whole.state)


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(ids()[0]), ValueError, r"token ids must be \(batch, length\), got shape \(18,\)"),
        (lambda m: m(ids().float()), TypeError, "token ids must be integers, got torch.float32"),
        (lambda m: m.step(ids(), m.init_state(3)), ValueError, r"token ids must be \(batch,\), got shape \(3, 18\)"),
        (lambda m: m.loss(ids(), ids()[:, 1:]), ValueError, r"labels must be like input_ids \(3, 18\), got \(3, 17\)"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(build())


def test_an_unknown_mixer():
    with pytest.raises(ValueError, match="unknown mixer 'atention' in mixers; the mixers are mamba"):
        build(mixers=("mamba", "atention"))


# ------------------------------------------------------------------------------------------ parameters


def test_initialisation():
    torch.manual_seed(0)
    n_layers = 9
    model = LanguageModel(
        ModelConfig(
            d_model=256, n_layers=n_layers, vocab_size=1000, mamba=MambaOptions(bias=True), tie_embeddings=False
        )
    )
    weight = model.embedding.weight
    assert abs(weight.std().item() - 0.02) < 2e-4 and abs(weight.mean().item()) < 2e-4
    for block in model.blocks:
        mixer = block.mixer
        bound = 512**-0.5 / math.sqrt(n_layers)
        assert 0.98 * bound < mixer.out_proj.weight.abs().max() <= bound * (1 + 1e-6)
        assert abs(mixer.out_proj.weight.std().item() - bound / math.sqrt(3)) < 0.02 * bound
        assert mixer.in_proj.weight.abs().max() > 0.98 * 256**-0.5
        assert mixer.in_proj.bias.eq(0).all() and mixer.out_proj.bias.eq(0).all()
        assert mixer.conv.bias.abs().max() > 0.4
        step = F.softplus(mixer.ssm.delta_bias)
        assert 0.001 * 0.999 < step.min() < 0.0015 and 0.08 < step.max() < 0.1 * 1.001
        assert torch.equal(mixer.ssm.A_log[5], torch.log(torch.arange(1, 17.0))) and mixer.ssm.D.eq(1).all()
        assert block.norm.weight.eq(1).all()
    assert model.head.weight.abs().max() < 1 / 16 and model.norm.weight.eq(1).all()


def test_apply_that_zeroes_biases_leaves_the_step():
    model = build(mamba=MambaOptions(bias=True))
    before = [b.mixer.ssm.delta_bias.clone() for b in model.blocks]

    def careless(module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    model.apply(careless)
    assert all(torch.equal(b.mixer.ssm.delta_bias, want) for b, want in zip(model.blocks, before, strict=True))


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_meta_device_then_reset_has_the_values_of_construction(options):
    config = ModelConfig(**{"d_model": 12, "n_layers": 2, "vocab_size": 29} | options)
    torch.manual_seed(4)
    want = LanguageModel(config)
    model = LanguageModel(config, device="meta").to_empty(device="cpu")
    torch.manual_seed(4)
    model.reset_parameters()
    for (name, a), (_, b) in zip(model.named_parameters(), want.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_padded_vocabulary():
    model = build(vocab_size=29, pad_vocab_multiple=16)
    assert model.embedding.weight.shape[0] == 32 and model(ids()).logits.shape[-1] == 32
    assert build(vocab_size=29, pad_vocab_multiple=1).embedding.weight.shape[0] == 29


def test_tied_and_separate_heads():
    tied, separate = build(), build(tie_embeddings=False)
    assert tied.head is None and separate.head.weight.shape == (32, 12)
    assert separate.n_parameters() == tied.n_parameters() + 32 * 12
    hidden, _ = tied.hidden(ids())
    assert torch.allclose(tied(ids()).logits, hidden @ tied.embedding.weight.T)
    hidden, _ = separate.hidden(ids())
    assert torch.allclose(separate(ids()).logits, hidden @ separate.head.weight.T)


@pytest.mark.parametrize(("wide", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_residual_stream_keeps_its_precision(wide, dtype):
    model = build(torch.bfloat16, residual_in_fp32=wide)
    seen = []
    model.norm.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].dtype))
    out = model(ids())
    model.step(ids()[:, 0], out.state)
    assert seen == [dtype, dtype] and out.logits.dtype == torch.bfloat16


def test_the_state_has_a_size_that_does_not_grow():
    model = build(torch.float32)
    assert state_bytes(model(ids()).state) == state_bytes(model(ids(3, 200)).state) == state_bytes(model.init_state(3))


def test_no_decay_names():
    options = MambaOptions(bias=True, selective_B=False, selective_C=False, output_norm="layernorm", inner_norms=True)
    model = build(norm="layernorm", tie_embeddings=False, mamba=options)
    inside = {"norm.weight", "norm.bias", "mixer.in_proj.bias", "mixer.conv.bias", "mixer.out_proj.bias"}
    inside |= {f"mixer.ssm.{name}" for name in ("A_log", "D", "delta_bias", "B", "C")}
    inside |= {"mixer.output_norm.weight", "mixer.output_norm.bias", "mixer.dt_norm.weight"}
    want = {f"blocks.{i}.{name}" for i in range(2) for name in inside} | {"norm.weight", "norm.bias"}
    assert model.no_decay_parameter_names() == want
    rest = {name for name, _ in model.named_parameters()} - want
    kinds = {"mixer.in_proj", "mixer.conv", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"}
    decayed = {f"blocks.{i}.{kind}.weight" for i in range(2) for kind in kinds}
    assert rest == decayed | {"embedding.weight", "head.weight"}


def test_no_decay_names_of_the_published_model_and_of_a_complex_one():
    names = build().no_decay_parameter_names()
    inside = ("norm.weight", "mixer.conv.bias", "mixer.ssm.A_log", "mixer.ssm.D", "mixer.ssm.delta_bias")
    assert names == {"norm.weight"} | {f"blocks.{i}.{name}" for i in range(2) for name in inside}
    names = build(mamba=MambaOptions(A_init="s4d-lin")).no_decay_parameter_names()
    assert {f"blocks.{i}.mixer.ssm.A_imag" for i in range(2)} <= names


# ------------------------------------------------------------------------------------------ torch


def test_activation_checkpointing_gives_the_same_gradients_and_recomputes():
    results = []
    best = dispatch.resolve("selective_scan", "cpu", None)
    for recompute in (False, True):
        model = build()
        model.activation_checkpointing = recompute
        dispatch.calls.clear()
        model.loss(ids(), labels()).loss.backward()
        assert dispatch.calls["selective_scan", best, "forward"] == (4 if recompute else 2)
        assert dispatch.calls["selective_scan", best, "backward"] == 2
        results.append(tuple(p.grad for p in model.parameters()))
    assert_same(results[1], results[0], 0)


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_compile_fullgraph(kind):
    torch._dynamo.reset()
    model, tokens = build(), ids(1 if kind == "packed" else 3)
    options = {"cu_seqlens": torch.tensor([0, 4, 4, LENGTH], dtype=torch.int32)} if kind == "packed" else {}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_same(tuple(compiled(tokens, **options)), tuple(model(tokens, **options)))
    if kind == "plain":
        with torch._dynamo.config.patch(error_on_recompile=True):
            shorter = tokens[:, :11].contiguous()
            assert_same(tuple(compiled(shorter)), tuple(model(shorter)))


def test_compile_of_loss_and_step():
    torch._dynamo.reset()
    model = build()
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    loss(ids(), labels()).loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.loss(ids(), labels()).loss.backward()
    assert_same(tuple(got), tuple(p.grad for p in model.parameters()))
    step = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    state = some_state(model, 3)
    assert_same(tuple(step(ids()[:, 0], state)), tuple(model.step(ids()[:, 0], state)))


class Stepper(nn.Module):
    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids, state):
        return self.model.step(token_ids, state)


def test_export_of_the_step_is_plain_torch():
    model = build()
    state = some_state(model, 3)
    program = torch.export.export(Stepper(model), (ids()[:, 0], state))
    names = {str(n.target) for m in program.graph_module.modules() if hasattr(m, "graph") for n in m.graph.nodes}
    assert names and not [name for name in names if "anymamba" in name]
    assert_same(tuple(program.module()(ids()[:, 0], state)), tuple(model.step(ids()[:, 0], state)))


def test_it_learns():
    """A few steps of any optimizer on one sequence bring its loss down: the gradients point the right way."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=29))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    losses = []
    for _ in range(12):
        out = model.loss(ids()[:, :-1], ids()[:, 1:])
        optimizer.zero_grad()
        (out.loss / out.n_tokens).backward()
        optimizer.step()
        losses.append((out.loss / out.n_tokens).item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradients_per_sample_of_a_loss_in_chunks(recompute, monkeypatch):
    """torch.func cannot differentiate through activation checkpoints and raises."""
    monkeypatch.setattr(chunks, "MOST_LOGITS", 40)
    model = LanguageModel(ModelConfig(d_model=8, n_layers=1, vocab_size=9)).double()
    model.activation_checkpointing = recompute
    tokens = torch.randint(0, 9, (3, 1, 12))
    weights = dict(model.named_parameters())

    def loss(weights, sample):
        return torch.func.functional_call(_Loss(model), {f"model.{k}": v for k, v in weights.items()}, (sample,))

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, tokens)
    for i, sample in enumerate(tokens):
        want = torch.autograd.grad(_Loss(model)(sample), list(weights.values()))
        for (name, _), g in zip(weights.items(), want, strict=True):
            torch.testing.assert_close(found[name][i], g)


class _Loss(torch.nn.Module):
    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample):
        return self.model.loss(sample[:, :-1], sample[:, 1:]).loss
