"""LoRA of PEFT on the four projections: each adapter acts, learns, is saved, loaded and merged."""

from __future__ import annotations

import copy

import pytest
import torch

from anymamba import LanguageModel
from anymamba.models.config import ModelConfig
from anymamba.parts.options import MambaOptions

pytest.importorskip("transformers", reason="the wrapper needs transformers", minversion="5")
peft = pytest.importorskip("peft", reason="adapters need peft")

from anymamba.compat.transformers import wrap  # noqa: E402

PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
OPTIONS = {"plain": MambaOptions(), "zoh-norms": MambaOptions(b_discretization="zoh", inner_norms=True)}


@pytest.fixture(params=OPTIONS)
def model(request) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(d_model=32, n_layers=2, vocab_size=257, mamba=OPTIONS[request.param]))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 257, (2, 13), generator=torch.Generator().manual_seed(1))


def adapted(model: LanguageModel, targets: tuple[str, ...] = PROJECTIONS, seed: int | None = None):
    """A model with adapters; a seed draws those halves that begin at zero."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=list(targets), r=4)
    result = peft.get_peft_model(wrap(model), config).eval()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in result.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=generator)
    return result


@pytest.mark.parametrize("target", [*PROJECTIONS, "embedding"])
def test_each_adapter_acts_and_gets_gradients(model, ids, target):
    before = wrap(model).eval()(ids).logits.detach()
    unmoved = adapted(model, (target,))
    assert torch.equal(unmoved(ids).logits, before)
    moved = unmoved
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=1.0)
    output = moved(ids, labels=ids)
    assert not torch.allclose(output.logits, before, atol=1e-4)
    output.loss.backward()
    gradients = {name: p.grad for name, p in moved.named_parameters() if p.requires_grad}
    assert len(gradients) == (2 if target == "embedding" else 4)
    for name, gradient in gradients.items():
        assert "lora" in name and gradient is not None and gradient.abs().max() > 0, name
    assert all(p.grad is None for name, p in moved.named_parameters() if "lora" not in name)


def test_the_gradients_are_those_of_the_merged_weights(model, ids):
    """W = W0 + s B A: dB = s dW Aᵀ and dA = s Bᵀ dW, with dW of a model whose weights are W."""
    lora = adapted(model, seed=2)
    lora(ids, labels=ids).loss.backward()
    layers = {name: m for name, m in lora.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == 8
    merged = LanguageModel(model.config)
    weights = {name.replace(".base_layer", ""): p for name, p in model.state_dict().items() if "lora" not in name}
    for name, layer in layers.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.get_delta_weight("default")
    merged.load_state_dict(weights)
    wrap(merged)(ids, labels=ids).loss.backward()
    for name, layer in layers.items():
        gradient = merged.get_parameter(f"{name}.weight").grad
        A, B, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        torch.testing.assert_close(B.grad, scale * gradient @ A.T, rtol=1e-3, atol=1e-6, msg=name)
        torch.testing.assert_close(A.grad, scale * B.T @ gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_steps_use_the_adapters(model, ids):
    lora = adapted(model, seed=2)
    options = {"max_new_tokens": 8, "do_sample": False}
    want = lora.generate(input_ids=ids, use_cache=False, **options)
    assert torch.equal(lora.generate(input_ids=ids, **options), want)
    first = lora(ids[:, :7])
    step = lora(ids[:, 7:8], cache=first.cache)
    torch.testing.assert_close(step.logits[:, 0], lora(ids).logits[:, 7], rtol=1e-4, atol=1e-5)


def test_adapters_are_saved_loaded_and_merged(model, ids, tmp_path):
    lora = adapted(model, seed=2)
    want = lora(ids).logits
    lora.save_pretrained(tmp_path / "adapter")
    fresh = LanguageModel(model.config)
    fresh.load_state_dict({n.replace(".base_layer", ""): p for n, p in model.state_dict().items() if "lora" not in n})
    loaded = peft.PeftModel.from_pretrained(wrap(fresh), tmp_path / "adapter").eval()
    assert torch.equal(loaded(ids).logits, want)
    with loaded.disable_adapter():
        assert not torch.allclose(loaded(ids).logits, want, atol=1e-4)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(fresh(ids).logits, merged(ids).logits)  # it is the same model, and ours again
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(LanguageModel.from_pretrained(tmp_path / "merged")(ids).logits, merged(ids).logits)


def test_trainer_moves_the_adapters_only(model, ids, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    lora = adapted(model)
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    options = {"max_steps": 12, "learning_rate": 5e-2, "logging_steps": 1, "save_steps": 12, "report_to": []}
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, **options)
    trainer = transformers.Trainer(lora, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
    for name, parameter in model.state_dict().items():
        if "lora" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name
    fresh = LanguageModel(model.config)
    fresh.load_state_dict(before)
    loaded = peft.PeftModel.from_pretrained(wrap(fresh), tmp_path / "checkpoint-12").eval()
    assert torch.equal(loaded(ids).logits, lora.eval()(ids).logits)


def test_a_soft_prompt(model, ids):
    """Vectors before the tokens' embeddings: what `inputs_embeds` is for."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    config.num_layers, config.token_dim, config.num_attention_heads = 2, 32, 1
    soft = peft.get_peft_model(wrap(model), config).eval()
    logits = soft(ids, attention_mask=torch.ones_like(ids)).logits
    vectors = torch.cat([soft.get_prompt(batch_size=2), model.embedding(ids)], 1)
    assert torch.equal(logits, model.logits(model.hidden_of_embedded(vectors)[0]))


# ------------------------------------------------------------------------------------------ backbone and head


def untied_model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(d_model=32, n_layers=2, vocab_size=257, tie_embeddings=False))


def test_all_linear_is_every_projection_but_the_head(model):
    """PEFT finds the head among the modules and leaves it out, a tied one, too."""
    for language_model in (model, untied_model()):
        lora = peft.get_peft_model(
            wrap(language_model), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
        )
        adapted = {name.rpartition(".")[2] for name, module in lora.named_modules() if hasattr(module, "lora_A")}
        assert adapted == set(PROJECTIONS)


def saved_and_loaded(lora, fresh: LanguageModel, folder):
    lora.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(wrap(fresh), folder).eval()


def test_an_embedding_that_is_trained_whole_is_the_tied_head_as_well(model, ids, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["in_proj"], modules_to_save=["embedding"])
    fresh = copy.deepcopy(model)
    lora = peft.get_peft_model(wrap(model), config).eval()
    before = lora(ids).logits
    lora(ids, labels=ids).loss.backward()
    copied = model.embedding.modules_to_save["default"].weight
    assert model.embedding.original_module.weight.grad is None and copied.grad.abs().max() > 0
    with torch.no_grad():
        copied.add_(0.1 * torch.randn_like(copied))
    after = lora(ids).logits
    assert not torch.allclose(after, before, atol=1e-3)
    wrapped = lora.get_base_model()
    assert wrapped.get_output_embeddings().weight is copied
    hidden = wrapped.base_model(ids).last_hidden_state
    torch.testing.assert_close(hidden @ copied.T, after)
    assert torch.equal(saved_and_loaded(lora, fresh, tmp_path)(ids).logits, after)


def test_a_head_is_trained_whole_where_it_is_one(model, ids, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["in_proj"], modules_to_save=["head"])
    untied = untied_model()
    fresh = copy.deepcopy(untied)
    lora = peft.get_peft_model(wrap(untied), config).eval()
    with torch.no_grad():
        untied.head.modules_to_save["default"].weight.mul_(2)
    wrapped = lora.get_base_model()
    assert wrapped.lm_head is untied.head
    torch.testing.assert_close(lora(ids).logits, 2 * fresh(ids).logits)
    assert torch.equal(saved_and_loaded(lora, fresh, tmp_path)(ids).logits, lora(ids).logits)
    with pytest.raises(ValueError, match="embedding's weight and cannot be set or trained separately"):
        peft.get_peft_model(wrap(model), config)


def test_packed_sequences_go_through_the_adapters(model, ids):
    lora = adapted(model, seed=2)
    positions = torch.cat([torch.arange(4), torch.arange(9)])[None]
    got = lora(input_ids=ids[:1], position_ids=positions).logits
    want = torch.cat([lora(input_ids=ids[:1, :4]).logits, lora(input_ids=ids[:1, 4:]).logits], 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_soft_prompt_is_trained_and_generates(model, ids):
    """PEFT looks for the backbone among the children, and takes the whole model where none is a model itself."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    config.num_layers, config.token_dim, config.num_attention_heads = 2, 32, 1
    soft = peft.get_peft_model(wrap(model), config).eval()
    soft(ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    moved = {name for name, parameter in soft.named_parameters() if parameter.grad is not None}
    assert moved == {"prompt_encoder.default.embedding.weight"}
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    first = soft(ids, attention_mask=torch.ones_like(ids)).logits[:, -1].argmax(-1)
    new = soft.generate(input_ids=ids, **options)
    assert torch.equal(new[:, ids.shape[1]], first) and new.shape == (2, 17)
