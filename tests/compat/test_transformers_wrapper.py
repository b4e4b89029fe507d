"""Our models in `transformers`: the same logits, tokens and files, in `generate()`, `Trainer` and pipelines."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from anymamba import LanguageModel
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.generation.generate import generate
from anymamba.generation.sampling import SamplingConfig
from anymamba.models.config import ModelConfig
from anymamba.parts.options import MambaOptions
from anymamba.training.config import OptimizerConfig
from anymamba.training.optimizer import build_optimizer

transformers = pytest.importorskip("transformers", reason="the wrapper needs transformers", minversion="5")
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: E402

from anymamba.compat.transformers import AnyMambaConfig, AnyMambaForCausalLM, wrap  # noqa: E402

transformers.utils.logging.disable_progress_bar()

CONFIGS = {
    "plain": MambaOptions(),
    "zoh-norms": MambaOptions(b_discretization="zoh", inner_norms=True),
    "constant-B": MambaOptions(selective_B=False, output_norm="layernorm"),
    "complex": MambaOptions(A_init="s4d-lin"),
}


def config_of(mamba: MambaOptions, **options) -> ModelConfig:
    return ModelConfig(d_model=32, n_layers=2, vocab_size=257, mamba=mamba, **options)


def moved(config: ModelConfig) -> LanguageModel:
    """A model away from its initialisation, whose next tokens are not all alike."""
    torch.manual_seed(0)
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=CONFIGS, scope="module")
def model(request) -> LanguageModel:
    return moved(config_of(CONFIGS[request.param], tie_embeddings=request.param != "constant-B"))


@pytest.fixture
def plain() -> LanguageModel:
    return moved(config_of(MambaOptions(b_discretization="zoh", inner_norms=True)))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 257, (3, 11), generator=torch.Generator().manual_seed(1))


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


def greedy(model: AnyMambaForCausalLM, ids: torch.Tensor, n: int = 9, **options) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=n, do_sample=False, **options)


# ------------------------------------------------------------------------------------------ forward


def test_wrapped_logits_loss_and_states_are_those_of_the_model(model, ids):
    wrapped = wrap(model).eval()
    output, want = wrapped(ids, labels=ids), model(ids)
    assert torch.equal(output.logits, want.logits)
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(output.loss, loss.loss / loss.n_tokens)
    torch.testing.assert_close(wrapped(ids, labels=ids, num_items_in_batch=7).loss, loss.loss / 7)
    for got, wanted in zip(output.cache.state.layers, want.state.layers, strict=True):
        assert torch.equal(got.ssm, wanted.ssm) and torch.equal(got.conv, wanted.conv)


def test_a_published_mamba_computes_what_transformers_computes(ids, tmp_path):
    sizes = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    theirs = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    ours = wrap(LanguageModel.from_pretrained(tmp_path)).eval()
    want = theirs(ids, labels=ids)
    got = ours(ids, labels=ids)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.loss, want.loss)
    assert torch.equal(greedy(ours, ids), greedy(theirs, ids))


def test_a_step_and_a_longer_piece_go_on_from_the_cache(model, ids):
    wrapped = wrap(model).eval()
    want = model(ids).logits
    first = wrapped(ids[:, :6])
    step = wrapped(ids[:, 6:7], cache=first.cache)
    rest = wrapped(ids[:, 7:], cache=step.cache, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(torch.cat([first.logits, step.logits, rest.logits], 1), want, rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_and_the_right_changes_nothing(plain, ids):
    wrapped = wrap(plain).eval()
    padded = torch.nn.functional.pad(ids, (4, 3), value=256)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 3))
    torch.testing.assert_close(wrapped(padded, mask).logits[:, 4:-3], plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_inputs_as_vectors_positions_of_logits_hidden_states_and_tuples(plain, ids):
    wrapped = wrap(plain).eval()
    want = wrapped(ids, output_hidden_states=True)
    assert torch.equal(wrapped(inputs_embeds=wrapped.get_input_embeddings()(ids)).logits, want.logits)
    torch.testing.assert_close(wrapped(ids, logits_to_keep=2).logits, want.logits[:, -2:])
    torch.testing.assert_close(wrapped(ids, logits_to_keep=torch.tensor([0, 5])).logits, want.logits[:, [0, 5]])
    assert len(want.hidden_states) == plain.config.n_layers + 1
    assert torch.equal(want.hidden_states[0], plain.embedding(ids))
    assert torch.equal(want.hidden_states[-1], plain.hidden(ids)[0])
    one_more = wrapped(ids[:, :1], cache=want.cache, output_hidden_states=True)
    assert one_more.hidden_states[-1].shape == (3, 1, 32)
    logits, cache = wrapped(ids, return_dict=False)
    assert torch.equal(logits, want.logits) and type(cache) is type(want.cache)
    assert wrapped(ids, use_cache=False).cache is None and wrapped.train()(ids).cache is None


def test_what_the_model_has_not_is_refused(plain, ids):
    wrapped = wrap(plain)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        wrapped()
    with pytest.raises(TypeError, match="do not take token_type_ids, tokenizer; leave"):
        wrapped(ids, token_type_ids=ids, tokenizer="gpt2")
    wrapped(ids, output_attentions=False, token_type_ids=None)
    wrapped.hf_device_map = {"embedding": 0, "blocks": 1}
    with pytest.raises(ValueError, match=r'one place, got 0, 1; .*device_map="cuda:0"'):
        wrapped(ids)


def test_the_way_out_where_transformers_is_missing():
    code = "import sys; sys.modules['transformers'] = None; import anymamba.compat.transformers"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "transformers>=5"' in result.stderr.splitlines()[-1]


# ------------------------------------------------------------------------------------------ configs and files


def test_folders_of_ours_are_read_and_written(plain, ids, tmp_path):
    for model in (plain, moved(config_of(MambaOptions(inner_norms=True), tie_embeddings=False))):
        model.save_pretrained(tmp_path / "ours")
        config = AutoConfig.from_pretrained(tmp_path / "ours")
        assert isinstance(config, AnyMambaConfig) and config.to_model_config() == model.config
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert isinstance(loaded, AnyMambaForCausalLM) and not loaded.training
        assert_same_weights(loaded, model)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        loaded.save_pretrained(tmp_path / "theirs")
        assert set(load_file(tmp_path / "theirs" / "model.safetensors")) == set(model.state_dict())
        assert_same_weights(LanguageModel.from_pretrained(tmp_path / "theirs"), model)
        assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"), model)


def test_shards_are_read_by_both(plain, tmp_path):
    wrap(plain).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), plain)
    assert_same_weights(LanguageModel.from_pretrained(tmp_path), plain)


def test_the_config_has_what_the_ecosystem_asks_for(plain):
    config = AnyMambaConfig({"d_model": 32, "vocab_size": 257}, eos_token_id=256)
    sizes = (config.hidden_size, config.vocab_size, config.num_hidden_layers, config.intermediate_size)
    assert sizes == (32, 264, 24, 64) and config.state_size == 16
    assert config.tie_word_embeddings and config.use_cache and config.eos_token_id == 256
    assert wrap(plain, eos_token_id=256).generation_config.eos_token_id == 256
    assert json.loads(config.to_json_string())["anymamba"]["d_model"] == 32
    with pytest.raises(ValueError, match="hidden_size follows from the table"):
        AutoConfig.for_model("anymamba", hidden_size=64)
    with pytest.raises(ValueError, match="did you mean 'd_model'"):
        AnyMambaConfig({"d_modle": 32})


def test_a_folder_of_another_model_type_is_an_error(tmp_path):
    LanguageModel(config_of(MambaOptions())).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type 'mamba'.*wrap"):
        AnyMambaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_ssm_stays_in_float32(plain, ids, tmp_path, dtype):
    plain.save_pretrained(tmp_path)
    want = LanguageModel.from_pretrained(tmp_path, dtype=dtype)
    assert want.blocks[0].mixer.ssm.A_log.dtype == torch.float32 != want.embedding.weight.dtype
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    assert_same_weights(loaded, want)
    assert torch.equal(loaded(ids).logits, want(ids).logits)
    assert_same_weights(wrap(plain).to(dtype), want)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), want)
    narrow = {name: tensor.to(dtype) for name, tensor in plain.state_dict().items()}
    save_file(narrow, tmp_path / "model.safetensors", metadata={"format": "pt"})  # by another program
    narrow_too = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for n, p in narrow_too.named_parameters() if ".ssm." in n} == {torch.float32}


# ------------------------------------------------------------------------------------------ initialisation


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_a_new_model_is_drawn_as_ours_is(options):
    config = config_of(options, tie_embeddings=False)
    torch.manual_seed(5)
    want = LanguageModel(config)
    torch.manual_seed(5)
    assert_same_weights(AutoModelForCausalLM.from_config(wrap(want).config), want)


def test_loading_draws_only_what_no_file_holds(plain, tmp_path):
    plain.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = {"blocks.1.mixer.ssm.A_log", "blocks.0.mixer.ssm.D", "norm.weight"}
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == gone
    new = LanguageModel(plain.config).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, new[name] if name in gone else tensors[name]), name


# ------------------------------------------------------------------------------------------ generate


def test_greedy_tokens_are_those_of_our_generation(model, ids):
    wrapped = wrap(model, eos_token_id=256).eval()
    want = generate(model, list(ids.numpy()), max_new_tokens=9, eos_id=256, sampling=SamplingConfig(temperature=0))
    assert len({token for row in want.ids for token in row}) > 3, "the tokens are all alike and prove little"
    for options in ({}, {"use_cache": False}):
        got = greedy(wrapped, ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(got[:, 11:], want.padded(256))


def test_left_padded_prompts_give_what_they_give_alone(plain):
    wrapped = wrap(plain, eos_token_id=256).eval()
    prompts = [torch.arange(n) * 7 % 256 for n in (1, 4, 9)]
    ids = torch.stack([torch.nn.functional.pad(p, (9 - len(p), 0), value=256) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (9 - len(p), 0)) for p in prompts])
    together = greedy(wrapped, ids, attention_mask=mask)
    for row, prompt in zip(together, prompts, strict=True):
        alone = greedy(wrapped, prompt[None])[0, len(prompt) :]
        assert torch.equal(row[9 : 9 + len(alone)], alone)
    assert torch.equal(together, greedy(wrapped, ids, attention_mask=mask, use_cache=False))


def test_beam_search_reorders_the_cache(plain, ids):
    wrapped = wrap(plain).eval()
    mask = torch.nn.functional.pad(torch.ones(3, 8, dtype=torch.long), (3, 0))
    options = {"attention_mask": mask, "num_beams": 4, "num_return_sequences": 2}
    beams = greedy(wrapped, ids, **options)
    assert torch.equal(beams, greedy(wrapped, ids, **options, use_cache=False))
    assert not torch.equal(beams[::2], greedy(wrapped, ids, attention_mask=mask)), "the beams found nothing better"


def test_sampling_is_the_same_with_and_without_the_cache(plain, ids):
    wrapped = wrap(plain).eval()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        options = {"do_sample": True, "top_k": 20, "temperature": 0.7, "num_return_sequences": 2}
        drawn.append(wrapped.generate(ids, max_new_tokens=9, use_cache=use_cache, **options))
    assert drawn[0].shape == (6, 20) and torch.equal(*drawn)


def test_generation_goes_on_from_a_state_and_from_vectors(plain, ids):
    wrapped = wrap(plain).eval()
    want = greedy(wrapped, ids)
    first = wrapped(ids[:, :5])
    result = greedy(wrapped, ids[:, 5:], cache=first.cache, return_dict_in_generate=True)
    assert torch.equal(result.sequences[:, 6:], want[:, 11:])
    more = greedy(wrapped, want[:, -1:], 3, cache=result.cache)  # the state before the last token
    assert torch.equal(more[:, 1:], greedy(wrapped, want, 3)[:, 20:])
    vectors = wrapped.get_input_embeddings()(ids)
    assert torch.equal(wrapped.generate(inputs_embeds=vectors, max_new_tokens=9, do_sample=False), want[:, 11:])


def test_ids_that_only_pad_the_vocabulary_are_never_emitted(ids, tmp_path):
    model = moved(config_of(MambaOptions(b_discretization="zoh"), tie_embeddings=False))
    with torch.no_grad():
        model.head.weight[257:] = 100 * model.head.weight[:7]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert int(loaded(ids).logits.argmax(-1).max()) > 256
    assert int(greedy(loaded, ids, 20).max()) < 257
    assert int(loaded.generate(ids, GenerationConfig(max_new_tokens=20), num_beams=2).max()) < 257


def test_modes_that_would_take_tokens_back_are_refused(plain, ids):
    wrapped = wrap(plain).eval()
    with pytest.raises(ValueError, match="stateful"):
        greedy(wrapped, ids[:1], assistant_model=wrapped)
    with pytest.raises(ValueError, match="stateful"):
        greedy(wrapped, ids[:1], prompt_lookup_num_tokens=3)


def test_pipeline_with_our_tokenizer(plain, tmp_path):
    plain.save_pretrained(tmp_path, ByteTokenizer())
    pipe = transformers.pipeline("text-generation", model=str(tmp_path))
    pipe.tokenizer.pad_token = pipe.tokenizer.eos_token
    prompts = ["def ", "import os"]
    got = pipe(prompts, max_new_tokens=8, do_sample=False, batch_size=2, return_tensors=True)
    want = generate(
        plain, [list(p.encode()) for p in prompts], max_new_tokens=8, sampling=SamplingConfig(temperature=0)
    )
    for result, prompt, new in zip(got, prompts, want.ids, strict=True):
        tokens = result[0]["generated_token_ids"]
        tokens = tokens[-(len(prompt) + 8) :]
        assert list(tokens) == [*prompt.encode(), *new]


def byte_tokenizer(folder):
    ByteTokenizer().save(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def talking() -> LanguageModel:
    """A model that says "abcdefgh" over and over: each byte foretells the next."""
    model = moved(ModelConfig(d_model=32, n_layers=1, vocab_size=257, tie_embeddings=False))
    torch.manual_seed(0)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.nn.functional.normalize(torch.randn(264, 32)))
        for block in model.blocks:
            block.mixer.out_proj.weight.zero_()
        model.head.weight.zero_()
        for now, after in zip("abcdefgh", "bcdefgha", strict=True):
            model.head.weight[ord(after)] = model.embedding.weight[ord(now)]
    return model


def test_generation_stops_at_strings(talking, tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    wrapped = wrap(talking, eos_token_id=256).eval()
    inputs = tokenizer(["a", "e"], return_tensors="pt")
    options = {**inputs, "max_new_tokens": 12, "do_sample": False, "tokenizer": tokenizer}
    for extra in ({}, {"use_cache": False}, {"num_beams": 2}):
        rows = wrapped.generate(stop_strings=["cd", "fg"], **options, **extra)
        assert [tokenizer.decode(row, skip_special_tokens=True) for row in rows] == ["abcd", "efg"]
    config = GenerationConfig(max_new_tokens=12, stop_strings="h", pad_token_id=256)
    rows = wrapped.generate(**inputs, generation_config=config, tokenizer=tokenizer)
    assert tokenizer.decode(rows[0], skip_special_tokens=True) == "abcdefgh"
    assert wrapped.generate(**options).shape == (2, 13)  # a tokenizer that nothing asks for is no error either


def test_generation_streams_and_stops_at_strings(talking, tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    wrapped = wrap(talking, eos_token_id=256).eval()
    inputs = tokenizer("a", return_tensors="pt")
    said: list[str] = []

    class Streamer(transformers.TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            said.append(text)

    options = {"max_new_tokens": 12, "do_sample": False, "stop_strings": ["gh"], "tokenizer": tokenizer}
    rows = wrapped.generate(**inputs, streamer=Streamer(tokenizer, skip_prompt=True), **options)
    assert "".join(said) == "bcdefgh" == tokenizer.decode(rows[0, 1:])
    streamer = transformers.TextIteratorStreamer(tokenizer)
    thread = threading.Thread(target=wrapped.generate, kwargs={**inputs, **options, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == "abcdefgh"
    thread.join()


def test_pipelines_stop_at_strings_and_know_the_class(talking, tmp_path, caplog):
    tokenizer = byte_tokenizer(tmp_path)
    transformers.utils.logging.enable_propagation()
    pipe = transformers.pipeline("text-generation", model=wrap(talking, eos_token_id=256).eval(), tokenizer=tokenizer)
    got = pipe(["a", "c"], stop_sequence="ef", max_new_tokens=12, do_sample=False, batch_size=2)
    assert [row[0]["generated_text"] for row in got] == ["abcdef", "cdef"]
    assert "is not supported" not in caplog.text


def test_tokens_are_healed(talking, tmp_path):
    """The last token of a prompt is taken back and drawn anew among those that begin with it, which only bytes cannot
    show; that the tokenizer reaches `generate` and not the model they can."""
    tokenizer = byte_tokenizer(tmp_path)
    tokenizer.bos_token = tokenizer.eos_token
    wrapped = wrap(talking, eos_token_id=256).eval()
    inputs = tokenizer("abc", return_tensors="pt")
    rows = wrapped.generate(**inputs, max_new_tokens=4, do_sample=False, token_healing=True, tokenizer=tokenizer)
    assert tokenizer.decode(rows[0], skip_special_tokens=True).endswith("abcdefg")


# ------------------------------------------------------------------------------------------ the vocabulary


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_size_of_the_vocabulary(ids, tmp_path, tied):
    model = moved(config_of(MambaOptions(b_discretization="zoh"), tie_embeddings=tied))
    wrapped = wrap(model).eval()
    want = wrapped(ids).logits
    wrapped.resize_token_embeddings(270)
    assert wrapped.config.vocab_size == 270 == model.config.vocab_size == model.config.padded_vocab_size
    assert wrapped.get_input_embeddings() is model.embedding
    assert wrapped.get_output_embeddings().weight is (model.embedding if tied else model.head).weight
    logits = wrapped(ids).logits
    assert logits.shape[-1] == 270
    torch.testing.assert_close(logits[..., :264], want)
    assert torch.equal(model(ids).logits, logits)
    wrapped.save_pretrained(tmp_path)
    assert_same_weights(LanguageModel.from_pretrained(tmp_path), wrapped)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), wrapped)
    wrapped.resize_token_embeddings(100, mean_resizing=False)
    torch.testing.assert_close(wrapped(ids % 100).logits, model(ids % 100).logits)


# ------------------------------------------------------------------------------------------ one set of layers


def test_copies_and_replicas_run_their_own_layers(plain, ids):
    wrapped = wrap(plain)
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert torch.equal(other(ids).logits, wrapped(ids).logits)
        with torch.no_grad():
            other.norm.weight.zero_()
        assert not other(ids).logits.any() and wrapped(ids).logits.any()
    replica = wrapped._replicate_for_data_parallel()  # its children are then replaced by copies on other devices
    replica.norm = torch.nn.Identity()
    assert replica.language_model.norm is replica.norm is not wrapped.norm
    assert wrapped.language_model.norm is wrapped.norm


# ------------------------------------------------------------------------------------------ Trainer


def byte_rows(n: int = 24) -> list[dict[str, list[int]]]:
    text = (b"def f(x):\n    return x + 1\n\nclass C:\n    pass\n" * 40)[: 40 * n]
    rows = [list(text[i : i + 30 + i // 40 % 3]) for i in range(0, len(text), 40)]
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]


def trainer_of(model, folder, steps: int, optimizers=(None, None), **options):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    tokenizer_folder = folder / "tokenizer"
    tokenizer_folder.mkdir(exist_ok=True)
    ByteTokenizer().save(tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.pad_token = tokenizer.eos_token
    arguments = transformers.TrainingArguments(
        str(folder / "run"),
        max_steps=steps,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **{"per_device_train_batch_size": 4} | options,
    )
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=byte_rows(),
        eval_dataset=byte_rows(4),
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        optimizers=optimizers,
    )


def new_model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(config_of(MambaOptions(b_discretization="zoh", inner_norms=True)))


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_learns_and_a_resumed_run_is_the_straight_one(tmp_path):
    trainer = trainer_of(wrap(new_model()), tmp_path, 6)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    folder = tmp_path / "run" / "checkpoint-6"
    assert_same_weights(LanguageModel.from_pretrained(folder), trainer.model)
    straight = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    shutil.rmtree(folder)
    resumed = trainer_of(wrap(new_model()), tmp_path, 6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, straight[name]), name


def test_trainer_accumulates_as_one_batch(tmp_path):
    one = trainer_of(wrap(new_model()), tmp_path, 2)
    one.train()
    model = wrap(new_model())
    several = trainer_of(model, tmp_path, 2, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    several.train()
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)


def test_trainer_recomputes_and_takes_our_optimizer(tmp_path):
    model = new_model()
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-2, weight_decay=0.1))
    options = {"gradient_checkpointing": True, "weight_decay": 0.1, "lr_scheduler_type": "constant"}
    trainer = trainer_of(wrap(model), tmp_path, 2, (optimizer, None), **options)
    trainer.train()
    assert model.activation_checkpointing
    trainer.model.gradient_checkpointing_disable()
    assert not model.activation_checkpointing
    plain = new_model()
    optimizer = build_optimizer(plain, OptimizerConfig(learning_rate=1e-2, weight_decay=0.1))
    trainer_of(wrap(plain), tmp_path, 2, (optimizer, None), lr_scheduler_type="constant").train()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, msg=name)


def test_trainer_in_bfloat16(tmp_path):
    trainer = trainer_of(wrap(new_model()), tmp_path, 3, bf16=True)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
