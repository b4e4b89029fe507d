"""TRL's trainers on our models: they call the backbone and multiply by the head's weight, and pack without padding."""

from __future__ import annotations

import math

import pytest
import torch

from anymamba import LanguageModel
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.models.config import ModelConfig
from anymamba.parts.options import MambaOptions

transformers = pytest.importorskip("transformers", reason="the wrapper needs transformers", minversion="5")
datasets = pytest.importorskip("datasets", reason="TRL's trainers take its data sets")
trl = pytest.importorskip("trl", reason="it is the library under test", minversion="1.16")

from anymamba.compat.transformers import wrap  # noqa: E402

transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()

TIED = {"tied": True, "untied": False}
TEXTS = ["def f(x):\n    return x + 1\n"[: 9 + i % 11] for i in range(16)]


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL counts its trainers elsewhere
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def new_model(tied: bool = True) -> LanguageModel:
    torch.manual_seed(0)
    mamba = MambaOptions(inner_norms=True, b_discretization="zoh")
    return LanguageModel(ModelConfig(d_model=32, n_layers=2, vocab_size=257, mamba=mamba, tie_embeddings=tied))


@pytest.fixture
def folder(tmp_path):
    """A folder of a tied model with its tokenizer."""
    wrap(new_model(), eos_token_id=256).save_pretrained(tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    return tmp_path / "model"


def trained(name: str, folder, model, data: dict[str, list], options: dict, **arguments):
    """A trainer by its name after its run, which the options may lengthen."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    common = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    config = getattr(trl, f"{name}Config")(str(folder / "run"), **{**common, **quiet, **options})
    trainer = getattr(trl, f"{name}Trainer")(
        model, args=config, train_dataset=datasets.Dataset.from_dict(data), processing_class=tokenizer, **arguments
    )
    before = {
        name: parameter.clone() for name, parameter in trainer.model.named_parameters() if parameter.requires_grad
    }
    trainer.train()
    moved = {
        name for name, p in trainer.model.named_parameters() if name in before and not torch.equal(p, before[name])
    }
    assert before and moved == set(before), f"{set(before) - moved} did not move"
    return trainer


def logged(trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ------------------------------------------------------------------------------------------ SFT


@pytest.mark.parametrize("tied", TIED)
def test_sft_learns_and_saves_a_folder_of_ours(tied, folder, tmp_path):
    model = new_model(TIED[tied])
    trainer = trained("SFT", folder, wrap(model, eos_token_id=256), {"text": TEXTS}, {"max_steps": 6})
    losses = logged(trainer)
    assert losses[-1] < losses[0] - 0.5
    trainer.save_model(tmp_path / "saved")
    loaded = LanguageModel.from_pretrained(tmp_path / "saved")
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("tied", TIED)
def test_sft_without_padding_learns_what_it_learns_with_padding(tied, folder):
    losses = {}
    for padding_free in (False, True):
        options = {"padding_free": padding_free, "max_length": None, "seed": 3}
        trainer = trained("SFT", folder, wrap(new_model(TIED[tied]), 256), {"text": TEXTS}, options)
        losses[padding_free] = logged(trainer)
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"pad_to_multiple_of": 16, "gradient_checkpointing": True}, {"packing_strategy": "wrapped"}, {"loss_type": "dft"}],
    ids=str,
)
def test_sft_packs(options, folder):
    packed = {"packing": True, "max_length": 32, **options}
    trainer = trained("SFT", folder, wrap(new_model(), 256), {"text": TEXTS}, packed)
    assert len(logged(trainer)) == 2 and all(math.isfinite(loss) for loss in logged(trainer))


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trains_adapters(packing, folder):
    peft = pytest.importorskip("peft", reason="adapters need peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    options = {"packing": packing, "max_length": 32, "gradient_checkpointing": packing}
    trainer = trained("SFT", folder, wrap(new_model(), 256), {"text": TEXTS}, options, peft_config=config)
    assert logged(trainer)[-1] < logged(trainer)[0]


# ------------------------------------------------------------------------------------------ preferences and rewards

PAIRS = {"prompt": ["def ", "class "] * 8, "chosen": ["f(x): pass", "C: pass"] * 8, "rejected": ["zzzz", "qq"] * 8}
PROMPTS = {"prompt": PAIRS["prompt"]}


def from_folder(folder):
    """TRL loads the reference model from where the model came from."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("options", [{}, {"padding_free": True}], ids=str)
def test_dpo_learns_preferences(options, folder):
    trainer = trained("DPO", folder, from_folder(folder), PAIRS, {"max_steps": 4, **options})
    losses = logged(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3) and losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("options", [{}, {"beta": 0.1, "cast_lm_head_to_fp32": True}], ids=str)
def test_grpo_learns_from_rewards(options, folder):
    def reward(completions: list[str], **_) -> list[float]:
        return [float(len(set(text))) for text in completions]

    sizes = {"num_generations": 4, "max_completion_length": 8, "per_device_train_batch_size": 8}
    trainer = trained("GRPO", folder, from_folder(folder), PROMPTS, {**sizes, **options}, reward_funcs=reward)
    assert len(logged(trainer, "reward")) == 2 and min(logged(trainer, "reward")) > 0


def test_kto_and_distillation_run(folder):
    labelled = {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": [True, False] * 8}
    trained("KTO", folder, from_folder(folder), labelled, {})
    student = wrap(new_model(), 256)
    with torch.no_grad():
        student.embedding.weight.mul_(2)
    options = {"max_completion_length": 8}
    trainer = trained("Distillation", folder, student, PROMPTS, options, teacher_model=from_folder(folder))
    assert logged(trainer)[0] > 0
