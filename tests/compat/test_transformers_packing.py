"""Sequences packed along rows give what they give alone, whatever says where they begin."""

from __future__ import annotations

import pytest
import torch

from anymamba import LanguageModel
from anymamba.models.config import ModelConfig
from anymamba.parts.options import AttentionOptions, MambaOptions

transformers = pytest.importorskip("transformers", reason="the wrapper needs transformers", minversion="5")
from transformers import DataCollatorWithFlattening  # noqa: E402

from anymamba.compat.transformers import wrap  # noqa: E402

MODELS = {
    "mamba": {},
    "complex": {"mamba": MambaOptions(A_init="s4d-lin")},
    "rotary": {"attention_layers": (1,), "attention": AttentionOptions(n_heads=4)},
    "absolute": {"attention_layers": (1,), "attention": AttentionOptions(n_heads=4, positions="absolute")},
    "hyena": {"mixers": ("hyena", "mamba")},
}
LENGTHS = (5, 1, 7, 2)
OFFSETS = torch.tensor([0, 5, 6, 13, 15], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
NUMBERS = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(LENGTHS)])[None]
SAYINGS = {
    "position_ids": {"position_ids": POSITIONS},
    "position_ids of one dimension": {"position_ids": POSITIONS[0]},
    "seq_idx": {"seq_idx": NUMBERS},
    "cu_seqlens": {"cu_seqlens": OFFSETS},
    "cu_seqlens in int64 and a mask of ones": {"cu_seqlens": OFFSETS.long(), "attention_mask": torch.ones(1, 15)},
    "flash attention": {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS, "max_length_q": 7, "max_length_k": 7},
    "everything": {
        "position_ids": POSITIONS,
        "seq_idx": NUMBERS,
        "cu_seqlens": OFFSETS,
        "cu_seq_lens_q": OFFSETS,
        "cu_seq_lens_k": OFFSETS,
        "max_length_q": 7,
        "max_length_k": 7,
    },
}


def new_model(name: str = "mamba") -> LanguageModel:
    """In float64, where packed and separate rows differ by rounding only."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(d_model=32, n_layers=2, vocab_size=257, **MODELS[name])).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 257, (1, 15), generator=torch.Generator().manual_seed(1))


def sequences(ids: torch.Tensor) -> list[torch.Tensor]:
    return list(ids.split(LENGTHS, 1))


def separate(wrapped, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the sequences alone, and the mean loss of their counted labels."""
    outputs = [wrapped(row) for row in sequences(ids)]
    losses = [wrapped(row, labels=row, num_items_in_batch=1).loss for row in sequences(ids) if row.shape[1] > 1]
    return torch.cat([o.logits for o in outputs], 1), torch.stack(losses).sum() / sum(n - 1 for n in LENGTHS)


def gradients(wrapped, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    wrapped.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------ packed == separate


@pytest.mark.parametrize(
    ("name", "saying"),
    [*(("mamba", saying) for saying in SAYINGS), *((name, "position_ids") for name in [*MODELS][1:])],
)
def test_packed_sequences_give_what_they_give_alone(name, saying, ids):
    wrapped = wrap(new_model(name)).eval()
    logits, loss = separate(wrapped, ids)
    packed = wrapped(ids, labels=ids, **SAYINGS[saying])
    torch.testing.assert_close(packed.logits, logits)
    torch.testing.assert_close(packed.loss, loss)
    assert not torch.allclose(wrapped(ids).logits, logits), "the sequences do not see each other anyway"
    want, got = gradients(wrapped, loss), gradients(wrapped, packed.loss)
    assert list(got) == list(want)
    for parameter, gradient in got.items():
        torch.testing.assert_close(gradient, want[parameter], msg=parameter)


@pytest.mark.parametrize("name", MODELS)
def test_several_packed_rows_and_padding_anywhere(name, ids):
    """Row 0 holds two sequences and padding, row 1 one, row 2 three, one of them with padding inside."""
    wrapped = wrap(new_model(name)).eval()
    rows = ids.view(3, 5)
    positions = torch.tensor([[0, 1, 0, 1, 99], [0, 1, 2, 3, 4], [0, 0, 99, 1, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 1, 1]])
    labels = rows.masked_fill(mask == 0, -100)
    labels[2, 3] = -100  # what stands before it is padding
    output = wrapped(rows, mask, position_ids=positions, labels=labels)
    losses = []
    for row, columns in ((0, [0, 1]), (0, [2, 3]), (1, [0, 1, 2, 3, 4]), (2, [0]), (2, [1, 3]), (2, [4])):
        alone = wrapped(rows[row : row + 1, columns], labels=labels[row : row + 1, columns], num_items_in_batch=1)
        torch.testing.assert_close(output.logits[row : row + 1, columns], alone.logits)
        losses.append(alone.loss)
    torch.testing.assert_close(output.loss, torch.stack(losses).sum() / 6)
    hidden = wrapped.model(rows, mask, position_ids=positions, output_hidden_states=True)
    assert not hidden.last_hidden_state[mask == 0].any(), "padding has no hidden state"
    assert [h.shape for h in hidden.hidden_states] == [(3, 5, 32)] * 3
    starts = torch.tensor([[1, 0, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(hidden.sequence_starts, starts)
    numbers = torch.tensor([[4, 4, 7, 7, 0], [0, 0, 0, 0, 0], [1, 2, 0, 2, 3]])
    torch.testing.assert_close(wrapped(rows, mask, seq_idx=numbers).logits, output.logits)


def test_vectors_hidden_states_and_single_positions_of_packed_sequences(ids):
    wrapped = wrap(new_model()).eval()
    want = wrapped(ids, cu_seqlens=OFFSETS, output_hidden_states=True)
    vectors = wrapped.get_input_embeddings()(ids)
    assert torch.equal(wrapped(inputs_embeds=vectors, position_ids=POSITIONS).logits, want.logits)
    assert torch.equal(want.hidden_states[0], vectors)
    for saying in (SAYINGS["position_ids"], SAYINGS["cu_seqlens"]):
        torch.testing.assert_close(wrapped(ids, logits_to_keep=3, **saying).logits, want.logits[:, -3:])
    last = OFFSETS[1:].long() - 1
    torch.testing.assert_close(
        wrapped(ids, logits_to_keep=last, cu_seqlens=OFFSETS).logits[0],
        torch.cat([wrapped(row).logits[:, -1] for row in sequences(ids)]),
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_of_a_packed_batch_has_a_row_for_each_sequence(name, ids):
    wrapped = wrap(new_model(name)).eval()
    cache = wrapped(ids, position_ids=POSITIONS).cache
    more = torch.arange(8).view(4, 2)
    want = [
        wrapped(torch.cat([row, new[None]], 1)).logits[0, -2:] for row, new in zip(sequences(ids), more, strict=True)
    ]
    first = wrapped(more[:, :1], cache=cache)  # as rows, a step
    second = wrapped(more[:, 1:], cache=first.cache, attention_mask=torch.ones(4, 9))
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), torch.stack(want))
    again = torch.tensor([0, 2, 4, 6, 8])
    positions = torch.cat([torch.arange(n, n + 2) for n in LENGTHS])[None]
    packed = wrapped(more.view(1, 8), cache=cache, cu_seqlens=again, position_ids=positions)
    torch.testing.assert_close(packed.logits[0], torch.cat(want))


def test_the_flattening_collator_is_understood(ids):
    wrapped = wrap(new_model()).eval()
    features = [{"input_ids": row[0].tolist()} for row in sequences(ids)]
    _, loss = separate(wrapped, ids)
    for options in (
        {},
        {"return_position_ids": False, "return_seq_idx": True},
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
        {"return_seq_idx": True, "return_flash_attn_kwargs": True},
        {"position_ids_start": 2},
    ):
        batch = DataCollatorWithFlattening(return_tensors="pt", **options)(features)
        torch.testing.assert_close(wrapped(**batch).loss, loss)


def collate(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right."""
    length = max(len(feature["input_ids"]) for feature in features)
    batch = {}
    for name, fill in {"input_ids": 0, "labels": -100, "position_ids": 0, "attention_mask": 0}.items():
        if name in features[0]:
            batch[name] = torch.tensor([f[name] + [fill] * (length - len(f[name])) for f in features])
    return batch


def test_trainer_learns_the_same_from_packed_and_from_separate_rows(tmp_path):
    """`position_ids` is an argument by name, so that `Trainer` keeps this column of a data set."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    datasets = pytest.importorskip("datasets", reason="only columns of its data sets are dropped")
    rows = [list(range(i, i + 4 + i % 3)) for i in range(12)]
    separate = [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in rows]
    packed = [
        {
            "input_ids": a + b,
            "labels": [-100, *a[1:], -100, *b[1:]],  # `Trainer` counts the labels that it divides by
            "attention_mask": [1] * len(a + b),
            "position_ids": [*range(len(a)), *range(len(b))],
        }
        for a, b in zip(rows[::2], rows[1::2], strict=True)
    ]

    def losses(data: list[dict[str, list[int]]], size: int) -> list[float]:
        options = {"per_device_train_batch_size": size, "train_sampling_strategy": "sequential", "report_to": []}
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, learning_rate=1e-2, logging_steps=1, use_cpu=True, disable_tqdm=True, **options
        )
        model = wrap(LanguageModel(ModelConfig(d_model=32, n_layers=2, vocab_size=257)))
        model.load_state_dict(weights)
        data = datasets.Dataset.from_list(data)
        trainer = transformers.Trainer(model, arguments, train_dataset=data, data_collator=collate)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    weights = LanguageModel(ModelConfig(d_model=32, n_layers=2, vocab_size=257)).state_dict()
    got, want = losses(packed, 3), losses(separate, 6)
    assert len(got) == 2 and got == pytest.approx(want, rel=1e-4)


# ------------------------------------------------------------------------------------------ not packed


@pytest.mark.parametrize("name", MODELS)
def test_ordinary_positions_change_nothing(name, ids):
    wrapped = wrap(new_model(name)).eval()
    rows = ids.view(3, 5)
    want = wrapped(rows)
    for positions in (torch.arange(5)[None], torch.arange(5).expand(3, 5), torch.arange(5, dtype=torch.int32)):
        got = wrapped(rows, position_ids=positions)
        assert torch.equal(got.logits, want.logits)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    padded = wrapped(rows, mask).logits
    for fill in (0, 1):  # as generate() fills them now, and did before
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
        assert torch.equal(wrapped(rows, mask, position_ids=positions).logits, padded)
    more = torch.arange(6).view(3, 2)
    continued = wrapped(more, cache=want.cache)
    assert torch.equal(wrapped(more, cache=want.cache, position_ids=torch.tensor([[5, 6]])).logits, continued.logits)
    step = wrapped(more[:, :1], cache=want.cache, position_ids=torch.tensor([[5], [5], [5]]))
    torch.testing.assert_close(step.logits, continued.logits[:, :1])


def test_one_sequence_that_is_said_to_be_packed_is_a_row(ids):
    wrapped = wrap(new_model()).eval()
    want = wrapped(ids)
    assert wrapped.model(ids, seq_idx=torch.zeros(1, 15)).sequence_starts is None
    for saying in ({"seq_idx": torch.zeros(1, 15)}, {"cu_seqlens": torch.tensor([0, 15])}):
        torch.testing.assert_close(wrapped(ids, **saying).logits, want.logits)
    empty = wrapped(ids[:, :0], position_ids=POSITIONS[:, :0])
    assert empty.logits.shape == (1, 0, 264)


def test_generation_takes_positions_and_needs_none(ids):
    wrapped = wrap(new_model("absolute")).eval()
    rows = ids.view(3, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    want = wrapped.generate(rows, **options)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(wrapped.generate(rows, position_ids=positions, **options), want)
    assert torch.equal(wrapped.generate(rows, position_ids=positions, use_cache=False, **options), want)


def test_positions_need_no_look_at_their_values_under_torch_compile(ids):
    wrapped = wrap(new_model()).eval()
    want = wrapped(ids, cu_seqlens=OFFSETS).logits
    compiled = torch.compile(wrapped, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, **SAYINGS["everything"]).logits, want)


# ------------------------------------------------------------------------------------------ contradictions


@pytest.mark.parametrize(
    ("saying", "words"),
    [
        (
            {"position_ids": torch.arange(14)[None]},
            r"position_ids must be \(batch, length\) = \(1, 15\).*got \(1, 14\)",
        ),
        ({"position_ids": torch.arange(30).view(2, 15)}, r"or \(1, 15\), got \(2, 15\)"),
        ({"seq_idx": torch.zeros(1, 1, 15)}, r"seq_idx must be .*got \(1, 1, 15\)"),
        ({"position_ids": torch.tensor([[*range(5), *range(7, 17)]])}, r"start again at 0 .*got 7 after 4 in row 0"),
        ({"position_ids": torch.arange(15).flip(0)[None]}, r"start again at 0 in the next, got 13 after 14"),
        ({"position_ids": POSITIONS, "cu_seqlens": torch.tensor([0, 4, 15])}, "same tokens.* differ at token 4;"),
        ({"position_ids": torch.arange(15)[None], "seq_idx": NUMBERS}, "seq_idx and position_ids must begin"),
        ({"seq_idx": NUMBERS, "cu_seqlens": torch.tensor([0, 15])}, "cu_seqlens and seq_idx must begin"),
        ({"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": torch.tensor([0, 15])}, "cu_seq_lens_q and cu_seq_lens_k must"),
        ({"cu_seqlens": OFFSETS, "cu_seq_lens_k": torch.tensor([0, 16])}, "rise from 0 to the length 15"),
        ({"cu_seqlens": torch.tensor([0, 16])}, "rise from 0 to the length 15"),
        (
            {"position_ids": POSITIONS, "attention_mask": torch.arange(16)[None]},
            r"attention_mask must be .*got \(1, 16\)",
        ),
        ({"cu_seqlens": OFFSETS, "attention_mask": torch.arange(15)[None]}, "attention_mask or cu_seqlens, not both"),
    ],
)
def test_what_contradicts_itself_is_refused(saying, words, ids):
    wrapped = wrap(new_model()).eval()
    for model in (wrapped, wrapped.model):
        with pytest.raises(ValueError, match=words):
            model(ids, **saying)


def test_offsets_pack_one_row_only(ids):
    wrapped = wrap(new_model())
    with pytest.raises(ValueError, match=r"got batch 3; flatten"):
        wrapped(ids.view(3, 5), cu_seqlens=OFFSETS)


def test_a_new_sequence_inside_a_row_that_goes_on_is_refused(ids):
    wrapped = wrap(new_model()).eval()
    cache = wrapped(ids).cache
    for saying in (SAYINGS["position_ids"], SAYINGS["seq_idx"]):
        with pytest.raises(ValueError, match=r"continues from a cache; .*cu_seqlens and a cache with a row for each"):
            wrapped(ids, cache=cache, **saying)
    with pytest.raises(ValueError, match="a row per sequence, got 1 rows for 4"):
        wrapped(ids, cache=cache, cu_seqlens=OFFSETS)


def test_a_table_of_positions_refuses_others_than_it_counts(ids):
    wrapped = wrap(new_model("absolute")).eval()
    later = torch.arange(3, 18)[None]
    with pytest.raises(ValueError, match=r"row 0 must start at 0, the number of tokens that it has seen, got 3; leave"):
        wrapped(ids, position_ids=later)
    cache = wrapped(ids).cache
    with pytest.raises(ValueError, match="must start at 15, the number of tokens that it has seen, got 0"):
        wrapped(ids, cache=cache, position_ids=torch.arange(15)[None])
    wrapped(ids, cache=cache, position_ids=torch.arange(15, 30)[None])
    rotary = wrap(new_model("rotary")).eval()  # where only distances count
    assert torch.equal(rotary(ids, position_ids=later).logits, rotary(ids).logits)
