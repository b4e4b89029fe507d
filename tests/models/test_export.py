"""Models under torch.compile, torch.export and ONNX: the same numbers as without them."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch

from anymamba import LanguageModel
from anymamba.models import export
from anymamba.models.config import ModelConfig
from anymamba.models.mixers import MIXERS
from anymamba.parts.options import AttentionOptions, HyenaOptions, MambaOptions
from anymamba.parts.state import state_tensors

OPTIONS = {
    "plain": MambaOptions(),
    "zoh-norms": MambaOptions(b_discretization="zoh", inner_norms=True, output_norm="layernorm"),
    "constant": MambaOptions(selective_delta=False, selective_B=False, selective_C=False),
    "complex": MambaOptions(A_init="s4d-lin"),
}
REAL = [name for name in OPTIONS if name != "complex"]


def build(name: str, n_layers: int = 2) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(
        ModelConfig(d_model=32, n_layers=n_layers, vocab_size=257, tie_embeddings=False, mamba=OPTIONS[name])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 257, shape, generator=torch.Generator().manual_seed(1))


def values_and_gradients(model: LanguageModel, function, *inputs, **options) -> list[torch.Tensor]:
    model.zero_grad()
    output = function(*inputs, **options)
    found = [output.logits, *state_tensors(output.state)]
    sum(t.abs().square().mean() for t in found).backward()
    return [t.detach() for t in found] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_all_close(got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float) -> None:
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"value {i}: {m}")


# ------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("name", OPTIONS)
def test_one_graph_serves_all_lengths_forwards_and_backwards(name):
    torch._dynamo.reset()
    model = build(name, n_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (17, 9, 67):
            ids = tokens(2, length)
            got = values_and_gradients(model, compiled, ids)
            assert_all_close(got, values_and_gradients(model, model, ids), 1e-6)


def test_one_graph_with_a_state_a_mask_and_recomputed_blocks():
    torch._dynamo.reset()
    model = build("plain")
    ids = tokens(2, 17)
    state = model(tokens(2, 5)).state
    state = type(state)(tuple(type(s)(*(t.detach() for t in s)) for s in state.layers))
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[0, :5] = mask[1, 14:] = False
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = values_and_gradients(model, compiled, ids, state, attention_mask=mask)
        assert_all_close(got, values_and_gradients(model, model, ids, state, attention_mask=mask), 1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_one_graph_serves_all_steps(name):
    """From a prompt's state or none, whatever was run in between."""
    torch._dynamo.reset()
    model = build(name, n_layers=1)
    compiled = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for state in (model.init_state(2), model(tokens(2, 5)).state):
            ours = theirs = state
            for ids in tokens(4, 2):
                got, want = compiled(ids, theirs), model.step(ids, ours)
                assert_all_close(
                    [got.logits, *state_tensors(got.state)], [want.logits, *state_tensors(want.state)], 1e-5
                )
                theirs, ours = got.state, want.state


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_is_one_graph(mixer):
    """From a state, a sequence and a step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(d_model=32, n_layers=1, vocab_size=257, mixers=(mixer,))).eval()
    with torch.no_grad():
        state = model(tokens(2, 5)).state
        for function, ids in ((model, tokens(2, 7)), (model.step, tokens(2))):
            got = torch.compile(function, fullgraph=True, backend="aot_eager")(ids, state)
            want = function(ids, state)
            assert_all_close([got.logits, *state_tensors(got.state)], [want.logits, *state_tensors(want.state)], 1e-5)


def test_inductor():
    torch._dynamo.reset()
    model = build("plain", n_layers=1)
    ids = tokens(2, 19)
    got = values_and_gradients(model, torch.compile(model, fullgraph=True), ids)
    assert_all_close(got, values_and_gradients(model, model, ids), 1e-5)


# ------------------------------------------------------------------------------------------ torch.export


def exported(model: LanguageModel, **more) -> torch.export.ExportedProgram:
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=1, max=4096)
    shapes = {"input_ids": {0: batch, 1: length}}
    if "attention_mask" in more:
        shapes["attention_mask"] = {0: batch, 1: length}
    if "state" in more:
        shapes["state"] = torch.utils._pytree.tree_map(lambda t: {0: batch}, more["state"])
    with torch.no_grad():
        return torch.export.export(model, (tokens(3, 19),), more, dynamic_shapes=shapes)


def assert_same_output(got, want) -> None:
    """Equal but for rounding: the norms of a program are torch's operations."""
    assert type(got) is type(want)
    for a, b in zip(state_tensors((got.logits, got.state)), state_tensors((want.logits, want.state)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_program_serves_all_batches_and_lengths(name):
    model = build(name).eval()
    program = exported(model).module()
    with torch.no_grad():
        for shape in ((3, 19), (1, 1), (5, 67), (2, 7)):
            assert_same_output(program(tokens(*shape)), model(tokens(*shape)))


def test_a_program_with_a_mask_and_with_a_state():
    model = build("zoh-norms").eval()
    masked = exported(model, attention_mask=torch.ones(3, 19, dtype=torch.bool)).module()
    with torch.no_grad():
        continued = exported(model, state=model(tokens(3, 4)).state).module()
        ids, mask = tokens(2, 33), torch.ones(2, 33, dtype=torch.bool)
        mask[0, :7] = mask[1, 30:] = False
        assert_same_output(masked(ids, attention_mask=mask), model(ids, attention_mask=mask))
        state = model(tokens(2, 5)).state
        assert_same_output(continued(ids, state=state), model(ids, state))


DYNAMIC = dict.fromkeys(("mamba", "s6", "h3-s6", "attention", "mlp", "rwkv-channel"), 2)
DYNAMIC |= dict.fromkeys(("gau", "linear-attention", "retention", "rwkv"), 1)
"""How many sizes may change: batch and length, or the batch alone; those of other mixers are fixed."""


@pytest.mark.parametrize("mixer", MIXERS)
def test_programs_of_all_mixers_are_saved(mixer):
    torch.manual_seed(0)
    config = ModelConfig(d_model=16, n_layers=1, vocab_size=257, mixers=(mixer,), hyena=HyenaOptions(max_length=32))
    model, n_dynamic = LanguageModel(config).eval(), DYNAMIC.get(mixer, 0)
    sizes = (torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=1, max=30))[:n_dynamic]
    with torch.no_grad():
        program = torch.export.export(model, (tokens(3, 19),), dynamic_shapes={"input_ids": dict(enumerate(sizes))})
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for shape in ((3, 19), (1, 19), (2, 7))[: n_dynamic + 1]:
            assert_same_output(loaded(tokens(*shape)), model(tokens(*shape)))


RUN_PROGRAM = """
import sys, torch
import anymamba.models.export
program = torch.export.load(sys.argv[1]).module()
torch.save(program(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_a_saved_program_runs_in_another_process(tmp_path):
    model = build("plain").eval()
    program, ids, logits = (str(tmp_path / name) for name in ("model.pt2", "ids.pt", "logits.pt"))
    torch.export.save(exported(model), program)
    torch.save(tokens(2, 23), ids)
    subprocess.run([sys.executable, "-c", RUN_PROGRAM, program, ids, logits], check=True)
    torch.testing.assert_close(torch.load(logits), model(tokens(2, 23)).logits)


# ------------------------------------------------------------------------------------------ ONNX


def onnx_session(model: LanguageModel, path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="ONNX files are written with onnx and onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX files are run with onnxruntime")
    export.export_step_onnx(model, path)
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def decode_both(model: LanguageModel, session, prompts: torch.Tensor, n: int = 32) -> None:
    """The prompt and n greedy tokens through both; each takes its own tokens and states."""
    zeros = (t.numpy() for t in state_tensors(model.init_state(len(prompts))))
    names = [entry.name for entry in session.get_inputs()]
    theirs, ours = dict(zip(names[1:], zeros, strict=True)), model.init_state(len(prompts))
    ids, their_ids, seen = prompts[:, 0], prompts[:, 0].numpy(), []
    for i in range(prompts.shape[1] + n):
        their_logits, *states = session.run(None, {"token_ids": their_ids, **theirs})
        logits, ours = model.step(ids, ours)
        logits = logits[:, : model.config.vocab_size]
        torch.testing.assert_close(torch.from_numpy(their_logits), logits, rtol=1e-4, atol=1e-5)
        theirs = dict(zip(names[1:], states, strict=True))
        if i + 1 < prompts.shape[1]:
            ids, their_ids = prompts[:, i + 1], prompts[:, i + 1].numpy()
        else:
            ids, their_ids = logits.argmax(-1), their_logits.argmax(-1)
            assert ids.tolist() == their_ids.tolist()
            seen.append(ids)
    assert len(torch.stack(seen).unique()) > 3, "the tokens are all alike and prove little"
    for a, b in zip(states, state_tensors(ours), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REAL)
def test_onnxruntime_decodes_the_same_tokens_in_any_batch(name, tmp_path):
    model = build(name)
    session = onnx_session(model, tmp_path / "step.onnx")
    assert model.training, "exporting left its mark on the model"
    assert [file.name for file in tmp_path.iterdir()] == ["step.onnx"]
    inputs, outputs = ([entry.name for entry in e] for e in (session.get_inputs(), session.get_outputs()))
    state = ["state.layers.0.conv", "state.layers.0.ssm", "state.layers.1.conv", "state.layers.1.ssm"]
    assert inputs == ["token_ids", *state] and outputs == ["logits", *(f"new_{name}" for name in state)]
    with torch.no_grad():
        for batch in (1, 5):
            decode_both(model, session, tokens(batch, 6))


def test_large_weights_go_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ONE_FILE", 0)
    model = build("plain")
    session = onnx_session(model, tmp_path / "step.onnx")
    assert {file.name for file in tmp_path.iterdir()} == {"step.onnx", "step.onnx.data"}
    with torch.no_grad():
        decode_both(model, session, tokens(2, 3), 8)


def test_what_onnx_cannot_express_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'complex arithmetic, which A_init="s4d-lin" needs'):
        export.export_step_onnx(build("complex"), tmp_path / "step.onnx")
    config = ModelConfig(d_model=32, n_layers=1, vocab_size=9, attention=AttentionOptions(positions="absolute"))
    with pytest.raises(ValueError, match=r"the end of a table of absolute positions; torch.export takes every model"):
        export.export_step_onnx(LanguageModel(config), tmp_path / "step.onnx")
    with pytest.raises(ValueError, match=r"float32, got a model in torch.bfloat16; use model.float"):
        export.export_step_onnx(build("plain").bfloat16(), tmp_path / "step.onnx")


def test_the_way_out_where_onnx_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        export.export_step_onnx(build("plain"), tmp_path / "step.onnx")
