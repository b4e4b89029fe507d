"""Generation: batches, ends, seeds, streams, states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hash_model import HashModel
from test_prompts import LENGTHS, prompts_of

from anymamba.data.tokenizer import ByteTokenizer
from anymamba.generation.beam import beam_search
from anymamba.generation.generate import generate, stream, stream_text
from anymamba.generation.prompts import read_prompts
from anymamba.generation.sampling import SamplingConfig
from anymamba.parts.state import select_rows, state_bytes, state_tensors

GREEDY = SamplingConfig(temperature=0)
WILD = SamplingConfig(temperature=1.5, top_k=9, top_p=0.95, min_p=0.01, repetition_penalty=1.2)


@pytest.fixture
def byte_model() -> HashModel:
    """A model of bytes whose text is mostly of a few letters."""
    model = HashModel(257, 264)
    with torch.no_grad():
        model.table[:, list(b"abc")] += 7.0
    return model


# ------------------------------------------------------------------------------------------- what is generated


def test_greedy_takes_the_likeliest_token_each_time(hash_model):
    output = generate(hash_model, [[1, 2, 3]], max_new_tokens=20, sampling=GREEDY)
    ids = [1, 2, 3]
    for token, log_probability in zip(output.ids[0], output.log_probabilities[0], strict=True):
        wanted = hash_model.next_log_probabilities(ids)
        assert token == wanted.argmax()
        assert log_probability == pytest.approx(wanted[token].item(), abs=1e-5)
        ids.append(token)
    assert output.finish_reasons == ["length"]
    assert output.texts is None


@pytest.mark.parametrize(
    "prompts",
    [torch.tensor([[1, 2, 3], [4, 5, 6]]), [torch.tensor([1, 2, 3]), range(4, 7)], np.array([[1, 2, 3], [4, 5, 6]])],
    ids=["tensor", "mixed", "array"],
)
def test_every_entry_takes_prompts_in_any_form(hash_model, prompts):
    lists = [[1, 2, 3], [4, 5, 6]]
    options = {"max_new_tokens": 5, "sampling": GREEDY}
    assert generate(hash_model, prompts, **options).ids == generate(hash_model, lists, **options).ids
    steps = stream(hash_model, prompts, **options)
    assert steps.n_prompts == 2 and steps.n_prompt_tokens == 6
    assert [step.ids for step in steps] == [step.ids for step in stream(hash_model, lists, **options)]
    found = [beam_search(hash_model, p, num_beams=3, max_new_tokens=np.int64(4)) for p in (prompts, lists)]
    assert found[0] == found[1]


def test_a_text_stream_takes_text_or_its_ids(byte_model):
    options = {"max_new_tokens": 9, "sampling": GREEDY}
    wanted = list(stream_text(byte_model, ByteTokenizer(), "abc", **options))
    for prompt in (b"abc", list(b"abc"), torch.tensor(list(b"abc")), np.frombuffer(b"abc", np.uint8)):
        steps = stream_text(byte_model, ByteTokenizer(), prompt, **options)
        assert steps.n_prompt_tokens == 3 and list(steps) == wanted
    with pytest.raises(TypeError, match=r"prompt 0 must hold integer token ids, got torch\.float32"):
        stream_text(byte_model, ByteTokenizer(), torch.tensor([1.0]))


def test_numbers_of_numpy_are_options(hash_model):
    plain = generate(hash_model, [[1], [2]], max_new_tokens=6, sampling=SamplingConfig(top_k=4), seed=7)
    numpy = generate(
        hash_model, [[1], [2]], max_new_tokens=np.int32(6), sampling=SamplingConfig(top_k=np.int64(4)), seed=np.uint8(7)
    )
    assert numpy.ids == plain.ids


def test_greedy_with_a_real_model_equals_running_over_everything_again(mamba):
    output = generate(mamba, [[1, 2, 3]], max_new_tokens=25, sampling=GREEDY)
    ids = [1, 2, 3]
    for _ in range(25):
        ids.append(int(mamba(torch.tensor([ids])).logits[0, -1, :37].argmax()))
    assert output.ids[0] == ids[3:]
    assert len(set(ids)) > 5  # the model does not merely repeat itself


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(), WILD], ids=["greedy", "plain", "wild"])
@pytest.mark.parametrize("name", ["hash_model", "mamba"])
def test_a_batch_equals_each_prompt_alone(request, name, sampling):
    model = request.getfixturevalue(name)
    prompts = prompts_of(LENGTHS, model.config.vocab_size)
    options = {"max_new_tokens": 20, "sampling": sampling, "prefill_chunk": 16}
    options["eos_id"] = generate(model, prompts[:1], seed=0, **options).ids[0][5]  # a token that does occur in the rows
    together = generate(model, prompts, seed=list(range(6)), **options)
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], seed=row, **options)
        assert together.ids[row] == alone.ids[0]
        assert together.finish_reasons[row] == alone.finish_reasons[0]
    assert len(set(map(len, together.ids))) > 1  # rows did end at different lengths


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(), WILD], ids=["greedy", "plain", "wild"])
@pytest.mark.parametrize("name", ["hash_model", "mamba"])
def test_padding_of_the_vocabulary_is_never_emitted(request, name, sampling):
    model = request.getfixturevalue(name)
    vocab_size = model.config.vocab_size
    assert model.config.padded_vocab_size > vocab_size
    output = generate(model, prompts_of((1,) * 8, vocab_size), max_new_tokens=40, sampling=sampling)
    assert max(max(row) for row in output.ids) < vocab_size


def test_ids_beyond_the_tokenizer_are_never_emitted():
    model = HashModel(300, 304)
    with torch.no_grad():
        model.table[:, 257:] += 10
    output = generate(model, [[1]], ByteTokenizer(), max_new_tokens=30)
    assert max(output.ids[0]) < 257


def test_seeds_reproduce_and_differ(hash_model):
    def ids(seed):
        return generate(hash_model, [[1]] * 3, max_new_tokens=15, seed=seed).ids

    assert ids(4) == ids(4)
    assert ids(4) != ids(5)
    assert len(set(map(tuple, ids(4)))) == 3  # one number: rows with the same prompt draw differently
    assert ids([4, 4, 5])[0] == ids([4, 4, 5])[1] == ids(4)[0]


def test_repetition_penalty_counts_prompt_and_new_tokens(hash_model):
    strong = SamplingConfig(temperature=0, repetition_penalty=1e6)
    with torch.no_grad():
        hash_model.table.abs_()  # positive logits, so that the penalty divides and makes a seen token very unlikely
    output = generate(hash_model, [[1, 2, 3], [4]], max_new_tokens=10, sampling=strong)
    assert len({1, 2, 3, *output.ids[0]}) == 13
    assert len({4, *output.ids[1]}) == 11


def test_every_option_reaches_the_tokens(hash_model):
    """With each filter at its narrowest only the likeliest token remains."""
    wanted = generate(hash_model, [[1]], max_new_tokens=15, sampling=GREEDY).ids
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        assert generate(hash_model, [[1]], max_new_tokens=15, sampling=SamplingConfig(**narrow)).ids == wanted, narrow


# ------------------------------------------------------------------------------------------- ends


def test_a_row_that_ended_stays_ended_and_leaves_the_computation():
    model = HashModel()
    plain = generate(model, prompts_of(LENGTHS, 13), max_new_tokens=30, sampling=GREEDY).ids
    eos = 5
    model.calls.clear()
    output = generate(model, prompts_of(LENGTHS, 13), max_new_tokens=30, sampling=GREEDY, eos_id=eos)
    for row, ids in enumerate(output.ids):
        wanted = plain[row][: plain[row].index(eos) + 1] if eos in plain[row] else plain[row]
        assert ids == wanted
        assert output.finish_reasons[row] == ("eos" if eos in plain[row] else "length")
    longest = max(map(len, output.ids))
    running = [sum(len(ids) > t for ids in output.ids) for t in range(1, longest)]
    assert [rows for rows, _ in model.calls[1:]] == running
    padded = output.padded(99)
    assert padded.shape == (6, longest)
    for row, ids in enumerate(output.ids):
        assert padded[row].tolist() == ids + [99] * (longest - len(ids))


def test_the_eos_token_is_no_part_of_the_text(byte_model):
    tokenizer = ByteTokenizer()
    with torch.no_grad():
        byte_model.table[:, 256] += 6.0
    output = generate(byte_model, [[n] for n in range(4)], tokenizer, max_new_tokens=200, seed=3)
    assert set(output.finish_reasons) == {"eos"}
    for ids, text in zip(output.ids, output.texts, strict=True):
        assert ids[-1] == 256 and 256 not in ids[:-1]
        assert text == tokenizer.decode(ids[:-1])


def test_max_new_tokens_0(hash_model):
    output = generate(hash_model, [[1], [2, 3]], max_new_tokens=0)
    assert output.ids == [[], []]
    assert output.finish_reasons == ["length", "length"]
    assert output.padded(0).shape == (2, 0)
    assert torch.equal(output.state.logits, read_prompts(hash_model, [[1], [2, 3]]).logits)


def test_stop_strings_cut_the_text_of_each_row(byte_model):
    tokenizer = ByteTokenizer()
    prompts = [[n] for n in range(5)]
    plain = generate(byte_model, prompts, tokenizer, max_new_tokens=60, seed=1)
    output = generate(byte_model, prompts, tokenizer, max_new_tokens=60, seed=1, stop=["ab", "cca"])
    assert "stop" in output.finish_reasons
    for row in range(5):
        whole = plain.texts[row]
        ends = [whole.find(s) for s in ("ab", "cca") if s in whole]
        assert output.texts[row] == (whole[: min(ends)] if ends else whole)
        assert output.finish_reasons[row] == ("stop" if ends else plain.finish_reasons[row])
        assert output.ids[row] == plain.ids[row][: len(output.ids[row])]


def test_streaming_gives_the_same_and_never_a_part_of_a_stop_string(byte_model):
    tokenizer = ByteTokenizer()
    for seed in range(6):
        options = {"max_new_tokens": 60, "seed": seed, "stop": ["bbc", "acb"]}
        text = stream_text(byte_model, tokenizer, "ab", **options)
        pieces = list(text)
        whole = generate(byte_model, [tokenizer.encode("ab")], tokenizer, **options)
        assert "".join(pieces) == whole.texts[0]
        assert all(pieces)
        assert text.ids == whole.ids[0] and text.finish_reason == whole.finish_reasons[0]
        assert text.log_probabilities == whole.log_probabilities[0]


def test_a_stream_reports_each_step(hash_model):
    steps = list(stream(hash_model, [[1], [2]], max_new_tokens=4, eos_id=0, seed=2))
    assert steps[0].rows == [0, 1]
    for step in steps:
        assert len(step.rows) == len(step.ids) == len(step.finish_reasons) == len(step.texts)
    assert all(reason for reason in steps[-1].finish_reasons)
    assert not torch.is_inference_mode_enabled()


def test_text_comes_as_soon_as_it_is_certain(byte_model):
    text = stream_text(byte_model, ByteTokenizer(), "a", max_new_tokens=50)
    first = next(text)
    assert len(text.ids) < 5 and first


# ------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=0, repetition_penalty=1.5)])
def test_generation_goes_on_from_its_own_state(hash_model, sampling):
    prompts = prompts_of((3, 8), 13)
    whole = generate(hash_model, prompts, max_new_tokens=20, sampling=sampling)
    half = generate(hash_model, prompts, max_new_tokens=8, sampling=sampling)
    rest = generate(hash_model, [[], []], max_new_tokens=12, sampling=sampling, state=half.state)
    assert [a + b for a, b in zip(half.ids, rest.ids, strict=True)] == whole.ids
    for a, b in zip(state_tensors(rest.state), state_tensors(whole.state), strict=True):
        assert torch.equal(a, b)


def test_the_state_of_rows_that_ended_is_that_at_their_end(hash_model):
    prompts = prompts_of(LENGTHS, 13)
    output = generate(hash_model, prompts, max_new_tokens=30, sampling=GREEDY, eos_id=5)
    again = read_prompts(hash_model, [p + ids for p, ids in zip(prompts, output.ids, strict=True)])
    for a, b in zip(state_tensors(output.state), state_tensors(again), strict=True):
        assert torch.equal(a, b)


def test_a_chat_reads_new_text_after_what_it_said(mamba):
    first = generate(mamba, [[1, 2]], max_new_tokens=6, sampling=GREEDY)
    second = generate(mamba, [[3, 4]], max_new_tokens=6, sampling=GREEDY, state=first.state)
    whole = generate(mamba, [[1, 2, *first.ids[0], 3, 4]], max_new_tokens=6, sampling=GREEDY)
    assert second.ids == whole.ids


def test_a_fork_goes_on_as_the_original_would(hash_model):
    state = read_prompts(hash_model, [[1, 2, 3]])
    fork = select_rows(state, torch.zeros(3, dtype=torch.int64))
    output = generate(hash_model, [[], [], [7]], max_new_tokens=9, seed=[1, 2, 2], state=fork)
    assert output.ids[0] == generate(hash_model, [[1, 2, 3]], max_new_tokens=9, seed=1).ids[0]
    assert output.ids[1] == generate(hash_model, [[1, 2, 3]], max_new_tokens=9, seed=2).ids[0]
    assert output.ids[2] == generate(hash_model, [[1, 2, 3, 7]], max_new_tokens=9, seed=2).ids[0]


def test_a_snapshot_in_the_middle_does_not_disturb_the_stream(hash_model):
    wanted = generate(hash_model, [[1], [2]], max_new_tokens=10, seed=3).ids
    steps, ids, snapshots = stream(hash_model, [[1], [2]], max_new_tokens=10, seed=3), [[], []], []
    for step in steps:
        for row, token in zip(step.rows, step.ids, strict=True):
            ids[row].append(token)
        snapshots.append((steps.state, [list(row) for row in ids]))
    assert ids == wanted
    for state, so_far in snapshots:  # unchanged by what came after
        for row in range(2):
            wanted_logits = hash_model.next_log_probabilities([row + 1, *so_far[row]])
            assert torch.equal(state.logits[row].log_softmax(-1), wanted_logits)


def test_the_state_and_the_calls_do_not_grow_with_the_context(mamba):
    sizes = set()
    for n in (1, 500):
        steps = stream(mamba, prompts_of((n,), 37), max_new_tokens=20)
        for _ in steps:
            sizes.add(state_bytes(steps.state))
    assert len(sizes) == 1
    model = HashModel()
    generate(model, prompts_of((300,), 13), max_new_tokens=20)
    assert set(model.calls[1:]) == {(1, 1)}


def test_a_text_goes_on_from_a_saved_state(byte_model):
    first = stream_text(byte_model, ByteTokenizer(), "ab", max_new_tokens=20, sampling=GREEDY)
    text = "".join(first)
    second = stream_text(byte_model, ByteTokenizer(), "", max_new_tokens=20, sampling=GREEDY, state=first.state)
    text += "".join(second)
    assert text == "".join(stream_text(byte_model, ByteTokenizer(), "ab", max_new_tokens=40, sampling=GREEDY))


# ------------------------------------------------------------------------------------------- misuse


def test_misuse(hash_model):
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0, got -1"):
        generate(hash_model, [[1]], max_new_tokens=-1)
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        generate(hash_model, [[1]], stop=["x"])
    with pytest.raises(ValueError, match="prompt 0 has the id 99"):
        generate(hash_model, [[99]])
    with pytest.raises(ValueError, match="prefill_chunk"):
        generate(hash_model, [[1]], prefill_chunk=0)


def test_logits_that_are_not_numbers_are_an_error(hash_model):
    with torch.no_grad():
        hash_model.table.fill_(torch.nan)
    for sampling in (GREEDY, SamplingConfig()):
        with pytest.raises(RuntimeError, match="logits are not finite at new token 1"):
            generate(hash_model, [[1]], sampling=sampling)
