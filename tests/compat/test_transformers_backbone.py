"""The backbone and the head of a model of ours, where the readers of a model of `transformers` look for them."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from anymamba import LanguageModel
from anymamba.models.config import ModelConfig
from anymamba.parts.options import AttentionOptions, MambaOptions

transformers = pytest.importorskip("transformers", reason="the wrapper needs transformers", minversion="5")
from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402

from anymamba.compat.transformers import AnyMambaModel, wrap  # noqa: E402

transformers.utils.logging.disable_progress_bar()

TIED = {"tied": True, "untied": False}


def new_model(tied: bool, **options) -> LanguageModel:
    torch.manual_seed(0)
    mamba = MambaOptions(inner_norms=True, b_discretization="zoh")
    config = ModelConfig(d_model=32, n_layers=2, vocab_size=257, mamba=mamba, tie_embeddings=tied, **options)
    return LanguageModel(config).eval()


@pytest.fixture(params=TIED)
def model(request) -> LanguageModel:
    return new_model(TIED[request.param])


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 257, (3, 11), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------ the backbone


def test_all_names_of_the_backbone_are_one_module_that_gives_the_hidden_state(model, ids):
    wrapped = wrap(model).eval()
    backbone = wrapped.base_model
    assert isinstance(backbone, AnyMambaModel)
    assert backbone is wrapped.model is wrapped.get_decoder() is getattr(wrapped, wrapped.base_model_prefix)
    assert backbone.base_model is backbone.get_decoder() is backbone and wrapped.get_encoder() is wrapped
    want, state = model.hidden(ids)
    output = backbone(ids)
    assert torch.equal(output.last_hidden_state, want) and output.hidden_states is None
    for got, wanted in zip(output.cache.state.layers, state.layers, strict=True):
        assert torch.equal(got.ssm, wanted.ssm) and torch.equal(got.conv, wanted.conv)
    assert "cache" not in backbone(ids, use_cache=False)
    assert torch.equal(backbone(inputs_embeds=backbone.get_input_embeddings()(ids)).last_hidden_state, want)
    vector, cache = backbone(ids, return_dict=False)
    assert torch.equal(vector, want) and type(cache) is type(output.cache)
    with pytest.raises(TypeError, match="cannot be set, got LanguageModel; replace the layers"):
        wrapped.set_decoder(model)


def test_the_backbone_pads_steps_and_records_as_the_whole_model_does(model, ids):
    wrapped = wrap(model).eval()
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([0, 1]), 0)
    want = wrapped(ids, mask, output_hidden_states=True)
    got = wrapped.model(ids, mask, output_hidden_states=True)
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(got.hidden_states[-1], got.last_hidden_state)
    step = wrapped.model(ids[:, :1], cache=got.cache)
    assert step.last_hidden_state.shape == (3, 1, 32)
    assert torch.equal(wrapped.lm_head(step.last_hidden_state), wrapped(ids[:, :1], cache=want.cache).logits)


def test_the_whole_model_runs_through_the_backbone_and_the_head(model, ids):
    """What is hooked onto either is seen: activations are captured and offloaded like this."""
    wrapped = wrap(model).eval()
    seen = []
    for module in (wrapped.model, wrapped.lm_head):
        module.register_forward_hook(lambda module, _, output: seen.append(type(module).__name__))
    cache = wrapped(ids).cache
    wrapped(ids[:, :1], cache=cache)
    assert seen == ["AnyMambaModel", type(wrapped.lm_head).__name__] * 2


def test_hooks_of_blocks_see_the_steps_of_a_generation(model, ids):
    wrapped = wrap(model).eval()
    want = wrapped.generate(ids, max_new_tokens=4, do_sample=False)
    seen = []
    handle = model.blocks[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    assert torch.equal(wrapped.generate(ids, max_new_tokens=4, do_sample=False), want)
    assert seen == [11, 1, 1, 1]
    handle.remove()
    wrapped(ids[:, :1], cache=wrapped(ids).cache)
    assert len(seen) == 4


def test_the_backbone_has_the_layers_but_not_the_head(model):
    """The usual way to freeze all but the head."""
    wrapped = wrap(model)
    names = {name for name, _ in wrapped.model.named_parameters()}
    assert names == {name for name, _ in model.named_parameters() if not name.startswith("head.")}
    assert set(wrapped.model.state_dict()) == names
    assert wrapped.model.num_parameters() == sum(model.get_parameter(name).numel() for name in names)
    for parameter in wrapped.base_model.parameters():
        parameter.requires_grad = False
    left = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert left == (set() if model.head is None else {"head.weight"})


def test_neither_backbone_nor_tied_head_adds_a_parameter_a_child_or_a_key(model):
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    keys = list(model.state_dict())
    wrapped = wrap(model)
    assert [name for name, _ in wrapped.named_parameters(remove_duplicate=False)] == names
    assert list(wrapped.state_dict()) == keys == list(model.state_dict())
    assert [name for name, _ in wrapped.named_children()] == [name for name, _ in model.named_children()]
    assert sum(p.numel() for p in wrapped.parameters()) == model.n_parameters()


def test_a_layer_that_is_replaced_anywhere_is_replaced_everywhere(model, ids):
    wrapped = wrap(model).eval()
    for owner in (wrapped, wrapped.model, model):
        norm = torch.nn.Identity()
        owner.norm = norm
        assert wrapped.norm is wrapped.model.norm is model.norm is norm
        assert norm in list(wrapped.modules()) and norm in list(wrapped.model.modules())
    embedding = torch.nn.Embedding(264, 32)
    wrapped.base_model.set_input_embeddings(embedding)
    assert wrapped.get_input_embeddings() is model.embedding is wrapped.model.embed_tokens is embedding
    assert torch.equal(wrapped.model(ids).last_hidden_state, model.hidden(ids)[0])
    del wrapped.model.norm
    assert not hasattr(model, "norm")
    with pytest.raises(AttributeError, match="head"):
        _ = wrapped.model.head


def test_one_switch_trains_and_one_recomputes(model, ids):
    wrapped = wrap(model)
    assert wrapped.train().model.training and "cache" not in wrapped.model(ids)
    assert not wrapped.eval().model.training and "cache" in wrapped.model(ids)
    wrapped.model.activation_checkpointing_enable()
    assert model.activation_checkpointing and wrapped.is_activation_checkpointing
    wrapped.activation_checkpointing_disable()
    assert not model.activation_checkpointing and not wrapped.model.is_activation_checkpointing


def test_copies_pickles_and_replicas_have_backbones_and_heads_of_their_own(model, ids):
    wrapped = wrap(model).eval()
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert other.model.language_model is other.language_model is not model
        assert torch.equal(other.model(ids).last_hidden_state, wrapped.model(ids).last_hidden_state)
        with torch.no_grad():
            other.get_output_embeddings().weight.zero_()
            other.model.norm.weight.zero_()
        assert not other.model(ids).last_hidden_state.any() and wrapped.model(ids).last_hidden_state.any()
        assert not other.get_output_embeddings().weight.any() and wrapped.get_output_embeddings().weight.any()
    replica = wrapped._replicate_for_data_parallel()  # its children are then replaced by copies on other devices
    replica.norm, replica.embedding = torch.nn.Identity(), torch.nn.Embedding(264, 32)
    assert replica.model.norm is replica.language_model.norm is replica.norm is not wrapped.norm
    assert replica.model(ids).last_hidden_state.shape == (3, 11, 32)
    weight = replica.embedding.weight if model.head is None else model.head.weight
    assert replica.get_output_embeddings().weight is weight


def test_replicas_of_data_parallel_train_the_layers_they_are_copied_from(model, ids, monkeypatch):
    """torch's own `replicate`, whose copies to other devices become copies on this one."""
    parallel = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        parallel,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[tensor * 1 for tensor in tensors] for _ in devices],
    )
    wrapped = wrap(model)
    rows = ids.split(1)
    torch.stack([wrapped(row, labels=row).loss for row in rows]).sum().backward()
    want = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    replicas = parallel.replicate(wrapped, [0, 0, 0])
    torch.stack([replica(row, labels=row).loss for replica, row in zip(replicas, rows, strict=True)]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], msg=name)
    with torch.no_grad():
        wrapped.norm.weight.zero_()
    assert replicas[0](ids).logits.any() and replicas[0].model(ids).last_hidden_state.any()


def test_auto_model_loads_the_backbone_of_a_folder(model, ids, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    backbone, info = AutoModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert isinstance(backbone, AnyMambaModel) and not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(backbone(ids).last_hidden_state, model.hidden(ids)[0])
    backbone.save_pretrained(tmp_path / "part")
    assert set(load_file(tmp_path / "part" / "model.safetensors")) == set(backbone.state_dict())
    whole, info = AutoModelForCausalLM.from_pretrained(tmp_path / "part", output_loading_info=True)
    assert info["missing_keys"] == (set() if model.head is None else {"head.weight"})
    assert torch.equal(whole.model(ids).last_hidden_state, model.hidden(ids)[0])
    backbone.resize_token_embeddings(300, mean_resizing=False)
    assert backbone.language_model.config.vocab_size == 300 and backbone(ids + 40).last_hidden_state.shape[1] == 11


# ------------------------------------------------------------------------------------------ the head


def test_the_head_is_found_and_gives_the_logits(model, ids):
    wrapped = wrap(model).eval()
    head = wrapped.get_output_embeddings()
    assert head is wrapped.lm_head and head.bias is None
    assert (head.in_features, head.out_features) == (32, 264)
    assert head.weight is (model.embedding.weight if model.head is None else model.head.weight)
    hidden = wrapped.model(ids).last_hidden_state
    assert torch.equal(head(hidden), wrapped(ids).logits)
    torch.testing.assert_close(F.linear(hidden, head.weight), model(ids).logits)
    found = [name for name, module in wrapped.named_modules() if module is head]  # as PEFT looks for it
    assert found == ["lm_head" if model.head is None else "head"]
    assert [name for name, module in torch.nn.Sequential(wrapped, wrapped).named_modules() if module is head] == [
        f"0.{found[0]}"
    ]


def test_gradients_through_backbone_and_head_are_those_of_the_whole_model(model, ids):
    """A fused loss calls the backbone and multiplies by the head's weight itself."""
    wrapped = wrap(model)
    wrapped(ids, labels=ids).loss.backward()
    want = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    head = wrapped.get_output_embeddings()
    logits = F.linear(wrapped.base_model(ids, use_cache=False).last_hidden_state[:, :-1], head.weight, head.bias)
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], msg=name)


def test_a_head_that_is_set_is_the_models(ids):
    model = new_model(tied=False)
    wrapped = wrap(model).eval()
    for number, set_head in enumerate((wrapped.set_output_embeddings, lambda m: setattr(wrapped, "lm_head", m))):
        head = torch.nn.Linear(32, 264, bias=number == 1)
        set_head(head)
        assert wrapped.lm_head is model.head is wrapped.get_output_embeddings() is head
        assert torch.equal(wrapped(ids).logits, model(ids).logits)
        assert "lm_head" not in dict(wrapped.named_children()) and "lm_head.weight" not in wrapped.state_dict()


def test_a_tied_head_follows_the_embedding_and_cannot_be_replaced(ids):
    model = new_model(tied=True)
    wrapped = wrap(model).eval()
    for set_head in (wrapped.set_output_embeddings, lambda m: setattr(wrapped, "lm_head", m)):
        with pytest.raises(ValueError, match=r"embedding's weight .* train the embedding, or .*tie_embeddings=False"):
            set_head(torch.nn.Linear(32, 264))
    head = wrapped.lm_head
    wrapped.lm_head = head.float()  # GRPO's cast_lm_head_to_fp32 sets what is there
    wrapped.tie_weights()
    assert wrapped.get_output_embeddings() is head
    wrapped.set_input_embeddings(torch.nn.Embedding(264, 32))
    assert head.weight is model.embedding.weight
    wrapped.resize_token_embeddings(300, mean_resizing=False)
    assert head is wrapped.lm_head and head.weight is model.embedding.weight and head.out_features == 300
    assert wrapped(ids).logits.shape[-1] == 300
    wrapped.to(torch.bfloat16)
    assert wrapped.lm_head.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------ sharding

FSDP = """
import sys
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from anymamba import LanguageModel
from anymamba.models.config import ModelConfig
from anymamba.compat.transformers import wrap

def new(tied):
    torch.manual_seed(0)
    return wrap(LanguageModel(ModelConfig(d_model=32, n_layers=2, vocab_size=257, tie_embeddings=tied)))

def shard(model):
    # As accelerate does: the last norm and the head, with a tied embedding, are gathered together.
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    if not tied:
        fully_shard(embedding, mesh=mesh)
    norm = [m for m in model.base_model.children() if "Norm" in type(m).__name__][-1]
    fully_shard([norm, embedding, head] if tied else [norm, head], mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)

def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)

torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
mesh = torch.distributed.init_device_mesh("cpu", (1,))
ids = torch.randint(0, 257, (2, 12), generator=torch.Generator().manual_seed(1))
for tied in (True, False):
    sharded, whole = shard(new(tied)), new(tied)
    assert {type(p).__name__ for p in sharded.parameters()} == {"DTensor"}
    assert abs(train(sharded) - train(whole)) < 1e-5
    weights = sharded.state_dict()
    assert list(weights) == list(whole.state_dict())
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(weights[name].full_tensor(), tensor)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(sharded.eval().generate(ids, **options), whole.eval().generate(ids, **options))
torch.distributed.destroy_process_group()
print("ok")
"""


def test_a_sharded_model_trains_and_generates_as_the_whole_one(tmp_path):
    """FSDP2 gathers a layer's shards when the layer is called, the head and the blocks of a step among them."""
    (tmp_path / "fsdp.py").write_text(FSDP)
    command = [sys.executable, str(tmp_path / "fsdp.py"), str(tmp_path / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert result.returncode == 0 and result.stdout.endswith("ok\n"), result.stderr[-3000:]


# ------------------------------------------------------------------------------------------ other readers


def test_trainer_smooths_labels_that_it_shifts(ids, tmp_path):
    """`Trainer` shifts them for the classes that it knows as causal language models, and no others."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    wrapped = wrap(new_model(tied=True))
    arguments = transformers.TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    trainer = transformers.Trainer(wrapped, arguments)
    got = trainer.compute_loss(wrapped, {"input_ids": ids, "labels": ids.clone()})
    logits = wrapped(ids).logits[:, :-1].flatten(0, 1)
    want = F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(got, want)


def test_a_model_with_attention_and_a_table_of_positions_has_them_in_its_backbone(ids):
    options = {"attention_layers": (1,), "attention": AttentionOptions(n_heads=4, positions="absolute")}
    model = new_model(tied=True, **options)
    wrapped = wrap(model).eval()
    assert [name for name, _ in wrapped.model.named_children()] == ["embedding", "positions", "blocks", "norm"]
    assert torch.equal(wrapped.model(ids).last_hidden_state, model.hidden(ids)[0])
