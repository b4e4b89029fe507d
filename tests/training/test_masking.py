"""Masked language modelling: which tokens are hidden, and a run of it that is resumed bit for bit."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anymamba.data.batches import Batch
from anymamba.data.dna import DnaTokenizer
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.parts.options import MambaOptions
from anymamba.training.config import DataConfig, OptimizerConfig, TrainConfig
from anymamba.training.masking import Masking
from anymamba.training.metrics import read_metrics
from anymamba.training.trainer import Silent, resume, train

MASK, N = 3, 11


def batch_of(ids: torch.Tensor) -> Batch:
    return Batch(ids, ids, torch.tensor([0]), torch.tensor([False]), {})


def test_shares_of_hidden_changed_and_kept_tokens():
    ids = torch.randint(7, 12, (64, 4096), generator=torch.Generator().manual_seed(0))
    hidden = Masking.of(DnaTokenizer(), 0).apply(batch_of(ids), 5)
    chosen = hidden.labels != -100
    bases = ids != N
    assert not chosen[~bases].any() and torch.equal(hidden.input_ids[~chosen], ids[~chosen])
    assert torch.equal(hidden.labels[chosen], ids[chosen])
    share = chosen[bases].double().mean().item()
    masked = (hidden.input_ids[chosen] == MASK).double().mean().item()
    changed = ((hidden.input_ids != ids) & (hidden.input_ids != MASK))[chosen].double().mean().item()
    # four standard deviations of 200,000 and of 30,000 draws; a random base is the same one in a quarter of the cases
    assert abs(share - 0.15) < 0.0035 and abs(masked - 0.8) < 0.01 and abs(changed - 0.075) < 0.007
    counts = torch.bincount(hidden.input_ids[chosen & (hidden.input_ids != ids)], minlength=16)
    assert counts[[0, 1, 2, 4, 5, 6, 11, 12, 13, 14, 15]].sum() == 0
    assert counts[7:11].min() > 0.8 * counts[7:11].max()


def test_the_same_number_hides_the_same_tokens():
    ids = torch.randint(7, 11, (4, 64))
    masking = Masking.of(DnaTokenizer(), 1)
    first = masking.apply(batch_of(ids), 2, 3)
    assert torch.equal(first.input_ids, masking.apply(batch_of(ids), 2, 3).input_ids)
    others = (masking.apply(batch_of(ids), 3, 2), Masking.of(DnaTokenizer(), 2).apply(batch_of(ids), 2, 3))
    assert all(not torch.equal(first.labels, other.labels) for other in others)


def test_lower_case_with_ids_of_its_own_may_be_hidden():
    assert Masking.of(DnaTokenizer("keep"), 0).ordinary.tolist() == [7, 8, 9, 10, 12, 13, 14, 15]
    assert Masking.of(DnaTokenizer(), 0).ordinary.tolist() == [7, 8, 9, 10]


def test_a_tokenizer_without_a_mask_token():
    with pytest.raises(ValueError, match=r"the tokenizer bytes has no mask token.*\[MASK\], <mask>"):
        Masking.of(ByteTokenizer(), 0)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A few steps on text of pairs, a base and its complement, with an N between pairs."""
    draw, folder, held_out = random.Random(0), tmp_path / "texts", tmp_path / "held-out"
    folder.mkdir()
    held_out.mkdir()
    for i in range(20):
        text = "N".join(draw.choices(("AT", "CG", "GC", "TA"), k=60))
        ((held_out if i < 4 else folder) / f"{i}.txt").write_text(text)
    DnaTokenizer().save(tmp_path / "tokenizer")
    return TrainConfig(
        data=DataConfig(
            paths=(str(folder),),
            eval_paths=(str(held_out),),
            cache_dir=str(tmp_path / "cache"),
            tokenizer=str(tmp_path / "tokenizer"),
        ),
        model=ModelConfig(
            d_model=16,
            n_layers=2,
            vocab_size=12,
            pad_vocab_multiple=16,
            mixers=("bimamba",),
            mamba=MambaOptions(d_state=4),
        ),
        optimizer=OptimizerConfig(warmup_steps=3, learning_rate=1e-2),
        objective="mlm",
        steps=8,
        batch_size=4,
        context=40,
        accumulation=2,
        log_every=1,
        eval_every=4,
        eval_tokens=500,
        checkpoint_every=3,
        threads=1,
    )


class StopAt(Silent):
    def on_step(self, metrics) -> None:
        if metrics["step"] == 5:
            raise RuntimeError("crash")


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize("complement", [(), (0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7)])
def test_a_run_is_resumed_bit_for_bit(config: TrainConfig, tmp_path: Path, complement: tuple[int, ...]):
    config = replace(config, model=replace(config.model, complement=complement))
    straight = train(config, tmp_path / "straight")
    with pytest.raises(RuntimeError, match="crash"):
        train(config, tmp_path / "run", StopAt())
    resumed = resume(tmp_path / "run")
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "run"))
    assert a == b and resumed.held_out_bits_per_byte == straight.held_out_bits_per_byte
    model = LanguageModel.from_pretrained(tmp_path / "run")
    assert model.config.complement == (complement and (*complement, 11))
    assert not model.config.is_causal


@pytest.mark.usefixtures("without_plots")
def test_it_learns_from_both_sides(config: TrainConfig, tmp_path: Path):
    """Half of the bases follow from the base before, the others from the base after."""
    config = replace(config, steps=160, eval_every=160, checkpoint_every=160, accumulation=1)
    train(config, tmp_path / "run")
    losses = [line["nats_per_token"] for line in read_metrics(tmp_path / "run") if line["kind"] == "eval"]
    assert losses[-1] < 0.5  # 1.386 without context, 0.8 from one side, 0.2 at best: a neighbour may be masked, too


def test_a_model_that_is_not_causal_needs_masks(config: TrainConfig, tmp_path: Path):
    with pytest.raises(ValueError, match=r"the model is not causal.*--objective mlm"):
        train(replace(config, objective="causal"), tmp_path / "run")


def test_rows_carry_no_state(config: TrainConfig):
    assert not config.carries_state and replace(config, objective="causal").carries_state
