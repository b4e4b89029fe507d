"""/v1/completions: the text of `generate`, whole and in pieces, and every field."""

from __future__ import annotations

import pytest

from anymamba.generation.beam import beam_search
from anymamba.generation.generate import generate
from anymamba.generation.sampling import SamplingConfig

PATH = "/v1/completions"
GREEDY = {"prompt": "def ", "max_tokens": 8, "temperature": 0}


def expected(server, prompt: str, **options) -> str:
    model, tokenizer = server.served.model, server.served.tokenizer
    return generate(model, [tokenizer.encode(prompt)], tokenizer, **({"max_new_tokens": 8} | options)).texts[0]


def test_an_answer_is_the_text_that_generate_gives(server):
    answer = server.good(PATH, {**GREEDY, "model": "nano"})
    (choice,) = answer["choices"]
    assert choice["text"] == expected(server, "def ", sampling=SamplingConfig(temperature=0))
    assert choice["finish_reason"] == "length" and choice["index"] == 0 and choice["logprobs"] is None
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (4, 8, 12)
    assert answer["object"] == "text_completion" and answer["model"] == "nano"


@pytest.mark.parametrize(
    ("field", "value"),
    [("top_k", 2), ("top_p", 0.3), ("min_p", 0.4), ("temperature", 0.3), ("repetition_penalty", 5.0)],
)
def test_filters_and_seeds_are_those_of_generate(server, field, value):
    answer = server.good(PATH, {"prompt": "ab", "max_tokens": 8, "seed": 3, field: value})
    wanted = expected(server, "ab", seed=[3], sampling=SamplingConfig(**{field: value}))
    assert answer["choices"][0]["text"] == wanted


def test_pieces_of_a_stream_are_the_whole_answer(server):
    body = {"prompt": ["one", "two"], "max_tokens": 9, "seed": 5, "n": 2, "logprobs": 2, "echo": True}
    whole = server.good(PATH, body)
    pieces = server.events(PATH, {**body, "stream_options": {"include_usage": True}})
    assert all(piece["usage"] is None for piece in pieces[:-1])
    assert pieces[-1]["choices"] == [] and pieces[-1]["usage"]["completion_tokens"] == 36
    for choice in whole["choices"]:
        own = [c for piece in pieces for c in piece["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [x for c in own if c["logprobs"] for x in c["logprobs"][name]] == choice["logprobs"][name]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["length"]


def test_a_seed_gives_the_same_text_alone_in_company_and_after_a_cache_hit(server):
    body = {"prompt": "seeded", "max_tokens": 12, "seed": 11}
    alone = server.good(PATH, body)["choices"][0]["text"]
    company = server.good(PATH, {**body, "prompt": ["x", "seeded", "y" * 30], "n": 3})["choices"]
    assert company[3]["text"] == alone
    again = server.good(PATH, body)
    assert again["choices"][0]["text"] == alone
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 6
    assert len({choice["text"] for choice in company[3:6]}) == 3


def test_prompts_may_be_token_ids(server):
    ids = list(b"def ")
    texts = [server.good(PATH, {**GREEDY, "prompt": p})["choices"] for p in ("def ", ids, [ids])]
    assert texts[0] == texts[1] == texts[2]
    error = server.refused(400, PATH, {**GREEDY, "prompt": [1, 257]})
    assert error["param"] == "prompt" and "257" in error["message"]


def test_log_probabilities_of_a_prompt(server):
    choice = server.good(PATH, {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 1})["choices"][0]
    scores = choice["logprobs"]
    assert choice["text"] == "abc" and scores["tokens"] == ["a", "b", "c"] and scores["text_offset"] == [0, 1, 2]
    assert scores["token_logprobs"][0] is None and all(value < 0 for value in scores["token_logprobs"][1:])
    pairs = list(zip(scores["top_logprobs"], scores["token_logprobs"], strict=True))[1:]
    assert all(max(top.values()) >= value for top, value in pairs)


def test_offsets_are_those_of_the_first_character_that_a_token_completes(server):
    body = {"prompt": "aé", "max_tokens": 9, "guided_regex": "b☃é", "echo": True, "logprobs": 1}
    choice = server.good(PATH, body)["choices"][0]
    assert choice["text"] == "aéb☃é"
    wanted = [0, 1, 1, 2, 3, 3, 3, 4, 4]  # a é b ☃ é have 1, 2, 1, 3 and 2 bytes, and so many tokens
    assert choice["logprobs"]["text_offset"] == wanted
    pieces = [c["logprobs"] for piece in server.events(PATH, body) for c in piece["choices"] if c["logprobs"]]
    assert [offset for scores in pieces for offset in scores["text_offset"]] == wanted


def test_best_of_returns_the_likeliest(server):
    body = {"prompt": "q", "max_tokens": 5, "seed": 2, "logprobs": 0}
    every = server.good(PATH, {**body, "n": 6})["choices"]
    means = [sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["tokens"]) for choice in every]
    best = server.good(PATH, {**body, "n": 1, "best_of": 6})
    assert best["choices"][0]["text"] == every[means.index(max(means))]["text"]
    assert best["usage"]["completion_tokens"] == sum(len(c["logprobs"]["tokens"]) for c in every)


def test_stop_ends_a_text_before_it(server):
    text = server.good(PATH, {**GREEDY, "max_tokens": 40})["choices"][0]["text"]
    stop = text[5:7]
    for given in (stop, [stop, None], ["\0\0", stop]):
        choice = server.good(PATH, {**GREEDY, "max_tokens": 40, "stop": given})["choices"][0]
        assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"


def test_biases_and_penalties_change_what_comes(server):
    plain = server.good(PATH, GREEDY)["choices"][0]["text"]
    forced = server.good(PATH, {**GREEDY, "logit_bias": {"65": 100}})["choices"][0]["text"]
    assert forced == "A" * 8 != plain
    spread = server.good(PATH, {**GREEDY, "max_tokens": 30, "frequency_penalty": 2, "presence_penalty": 2})
    repeated = server.good(PATH, {**GREEDY, "max_tokens": 30})
    assert len(set(spread["choices"][0]["text"])) > len(set(repeated["choices"][0]["text"]))


def test_the_end_token_ends_a_text_unless_it_is_ignored(server):
    body = {"prompt": "x", "max_tokens": 6, "logit_bias": {"256": 100}, "temperature": 0, "logprobs": 0}
    answer = server.good(PATH, body)
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["choices"][0]["text"] == ""
    assert answer["choices"][0]["logprobs"]["tokens"] == [] and answer["usage"]["completion_tokens"] == 1
    ignored = server.good(PATH, {**body, "ignore_eos": True})
    assert ignored["choices"][0]["finish_reason"] == "length" and ignored["usage"]["completion_tokens"] == 6


def test_beams_find_what_beam_search_finds(server):
    model, tokenizer = server.served.model, server.served.tokenizer
    (wanted,) = beam_search(
        model, [tokenizer.encode("def ")], tokenizer, num_beams=4, n_best=2, max_new_tokens=8, length_penalty=0.5
    )
    body = {"prompt": "def ", "max_tokens": 8, "num_beams": 4, "n": 2, "length_penalty": 0.5}
    answer = server.good(PATH, body)
    assert [choice["text"] for choice in answer["choices"]] == [found.text for found in wanted]
    pieces = [c for piece in server.events(PATH, body) for c in piece["choices"]]
    assert "".join(c["text"] for c in pieces if c["index"] == 1) == wanted[1].text


def test_beams_have_log_probabilities_and_sessions(server):
    """Those of the same tokens as a prompt, and the state of the best answer goes on as a prompt does."""
    body = {"prompt": "def ", "max_tokens": 8, "num_beams": 4, "logprobs": 3, "session": "beams"}
    choice = server.good(PATH, body)["choices"][0]
    scored = {"prompt": "def " + choice["text"], "max_tokens": 0, "echo": True, "logprobs": 3}
    wanted = server.good(PATH, scored)["choices"][0]["logprobs"]
    for name in ("token_logprobs", "top_logprobs"):
        assert len(choice["logprobs"][name]) == 8
        for got, expected in zip(choice["logprobs"][name], wanted[name][4:], strict=True):
            assert got == pytest.approx(expected, abs=1e-4)
    kept = server.client.get("/v1/sessions/beams").json()
    assert kept["n_tokens"] == 4 + 7 and ("def " + choice["text"]).startswith(kept["text"])
    longer = {**GREEDY, "prompt": "def " + choice["text"] + "!"}
    server.served.worker.engine._tree._roots.clear()
    answer = server.good(PATH, {**longer, "session": "beams"})
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 4 + 7
    server.served.worker.engine._tree._roots.clear()
    assert answer["choices"] == server.good(PATH, longer)["choices"]


WRONG = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt[1]"),
    ({"prompt": ["a", 1]}, "prompt[1]"),
    ({"prompt": [[1], [-1]]}, "prompt[1][0]"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 1.5}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1 << 24}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {}}, "stream_options"),
    ({"stop": ""}, "stop[0]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 3, "stream": True}, "best_of"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"seed": 1 << 64}, "seed"),
    ({"num_beams": 2, "n": 3}, "n"),
    ({"num_beams": 2, "top_k": 3}, "top_k"),
    ({"num_beams": 2, "logit_bias": {"1": 1}}, "logit_bias"),
    ({"num_beams": 2, "guided_regex": "a"}, "guided_regex"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"stop_token_ids": [1]}, "stop_token_ids"),
    ({"session": ""}, "session"),
    ({"session": "a\0b"}, "session"),
    ({"session": "a" * 257}, "session"),
    ({"session": "s", "n": 2}, "n"),
    ({"session": "s", "prompt": ["a", "b"]}, "prompt"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"guided_regex": "(", "guided_json": {}}, "guided_regex"),
    ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[str(f)[:50] for f, _ in WRONG])
def test_a_wrong_field_is_named(server, fields, param):
    error = server.refused(400, PATH, {**GREEDY, **fields})
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert param.split("[")[0].split(".")[0] in error["message"]


def test_unknown_fields_and_nulls_are_ignored(server):
    plain = server.good(PATH, GREEDY)["choices"]
    nulls = {"suffix": None, "stop": None, "logprobs": None, "seed": None, "user": "me", "something_new": [1]}
    assert server.good(PATH, {**GREEDY, **nulls})["choices"] == plain


def test_bias_outside_the_vocabulary_is_refused(server):
    error = server.refused(400, PATH, {**GREEDY, "logit_bias": {"999": 1}})
    assert "999" in error["message"] and error["param"] == "logit_bias"
