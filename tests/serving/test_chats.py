"""/v1/chat/completions: templates, contents, tools and structured output."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from live_server import live

from anymamba.serving.limits import Limits
from anymamba.serving.protocol.errors import ApiError
from anymamba.serving.templates import unfinished

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
SILENT = {"role": "assistant", "content": " "}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["here", "there"]}, "days": {"$ref": "#/$defs/days"}},
            "required": ["place", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
BROKEN = {
    "type": "function",
    "function": {"name": "broken", "parameters": {"type": "object", "properties": {"a": {"pattern": "((("}}}},
}
TIME = {"type": "function", "function": {"name": "time"}}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "name": {"enum": ["a", "b"]}},
    "required": ["x", "name"],
    "additionalProperties": False,
}


def ask(server, **fields):
    return server.good(PATH, {"messages": [USER], "max_tokens": 8, "temperature": 0, **fields})["choices"][0]


def prompt_of(server, messages, **fields) -> str:
    ids = server.good("/tokenize", {"messages": messages, **fields})["tokens"]
    return server.good("/detokenize", {"tokens": ids})["prompt"]


def test_an_answer_continues_the_rendered_messages(server):
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(server, [USER]) == prompt
    text = server.good("/v1/completions", {"prompt": prompt, "max_tokens": 8, "temperature": 0})["choices"][0]["text"]
    choice = ask(server)
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == "length"


def test_parts_are_joined_and_a_developer_speaks_as_the_system(server):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert ask(server, messages=[{"role": "user", "content": parts}]) == ask(server)
    system, developer = ([{"role": role, "content": "be brief"}, USER] for role in ("system", "developer"))
    assert prompt_of(server, system) == prompt_of(server, developer)


def test_the_last_message_is_continued(server):
    whole = ask(server, max_tokens=12, logit_bias={str(token): -100 for token in (256, 32, *range(9, 14))})
    text = whole["message"]["content"]
    begun = [USER, {"role": "assistant", "content": text[:4]}]
    fields = {"continue_final_message": True, "add_generation_prompt": False, "max_tokens": 12 - len(text[:4].encode())}
    fields["logit_bias"] = {str(token): -100 for token in (256, 32, *range(9, 14))}
    assert ask(server, messages=begun, **fields)["message"]["content"] == text[4:]
    for wrong in ({"add_generation_prompt": True}, {"messages": [USER]}, {"messages": [*begun[:1], SILENT]}):
        error = server.refused(400, PATH, {"messages": begun, **fields, **wrong})
        assert error["param"] == "continue_final_message"


@pytest.mark.parametrize(
    ("rendered", "content", "wanted"),
    [
        ("<a>one</a><a>one</a>", "one", "<a>one</a><a>one"),
        ("<a>one two</a>", " one two \n", "<a>one two"),
        ("<a>one \n</a>", "  one \n", "<a>one \n"),
        ("<a>ONE</a>", "one", None),
    ],
)
def test_a_conversation_is_cut_after_its_last_message(rendered, content, wanted):
    if wanted is None:
        with pytest.raises(ApiError, match="cannot be continued"):
            unfinished(rendered, content)
    else:
        assert unfinished(rendered, content) == wanted


def test_a_stream_has_the_same_text_and_log_probabilities(server):
    body = {"messages": [USER], "max_tokens": 8, "seed": 1, "logprobs": True, "top_logprobs": 2, "n": 2}
    whole = server.good(PATH, body)
    pieces = server.events(PATH, {**body, "stream_options": {"include_usage": True}})
    for choice in whole["choices"]:
        own = [c for piece in pieces for c in piece["choices"] if c["index"] == choice["index"]]
        assert own[0]["delta"]["role"] == "assistant" and own[-1]["finish_reason"] == "length"
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
        scores = [score for c in own if c["logprobs"] for score in c["logprobs"]["content"]]
        assert scores == choice["logprobs"]["content"] and len(scores) == 8
        assert all(len(score["top_logprobs"]) == 2 for score in scores)
    assert pieces[-1]["usage"] == whole["usage"] | {
        "prompt_tokens_details": pieces[-1]["usage"]["prompt_tokens_details"]
    }


@pytest.mark.parametrize("seed", range(4))
def test_json_of_a_schema(server, seed):
    form = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT, "strict": True}}
    choice = ask(server, response_format=form, temperature=1, seed=seed, max_tokens=200)
    point = json.loads(choice["message"]["content"])
    assert set(point) == {"x", "name"} and 0 <= point["x"] <= 99 and choice["finish_reason"] == "stop"


def test_other_forms(server):
    completion = {"prompt": "x", "max_tokens": 60, "seed": 1}
    forms = {
        "guided_regex": r"\d{3}-[ab]{2}",
        "structured_outputs": {"regex": r"\d{3}-[ab]{2}"},
        "response_format": {"type": "regex", "regex": r"\d{3}-[ab]{2}"},
    }
    answers = [server.good("/v1/completions", {**completion, name: form}) for name, form in forms.items()]
    texts = {answer["choices"][0]["text"] for answer in answers}
    assert len(texts) == 1 and re.fullmatch(forms["guided_regex"], texts.pop())
    chosen = server.good("/v1/completions", {**completion, "guided_choice": ["yes", 'n"o']})["choices"][0]
    assert chosen["text"] in ("yes", 'n"o') and chosen["finish_reason"] == "stop"
    bias = {str(ord("}")): 50, str(ord("{")): 50}
    made = ask(server, response_format={"type": "json_object"}, max_tokens=60, logit_bias=bias)
    assert isinstance(json.loads(made["message"]["content"]), dict)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "((("}, "guided_regex"),
        ({"guided_regex": "(a{1000}){1000}"}, "guided_regex"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_json": {"$ref": "#/nowhere"}}, "guided_json"),
        ({"guided_json": "text"}, "guided_json"),
        (
            {"tools": [{**WEATHER, "function": {"name": "f", "parameters": {"type": 3}}}], "tool_choice": "required"},
            "tools",
        ),
        ({"tools": [BROKEN, TIME], "tool_choice": {"type": "function", "function": {"name": "broken"}}}, "tools"),
        ({"tools": [BROKEN, TIME], "tool_choice": "required", "stream": True}, "tools"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(server, fields, param):
    error = server.refused(400, PATH, {"messages": [USER], **fields})
    assert error["param"] == param and len(error["message"]) > 30


def test_what_takes_too_long_to_compile_is_refused_and_what_waits_for_it_may_try_again(server, monkeypatch):
    is_over = threading.Event()
    monkeypatch.setattr(server.served, "limits", Limits(compile_seconds=0.2))
    monkeypatch.setattr(server.served.grammars, "regex", lambda pattern, param: is_over.wait(20))
    with ThreadPoolExecutor(3) as pool:
        fields = {"messages": [USER], "guided_regex": "a+"}
        answers = list(pool.map(lambda _: server.post(PATH, fields), range(3)))
    is_over.set()
    refused = [answer.json()["error"] for answer in answers if answer.status_code == 400]
    assert [error["param"] for error in refused] == ["guided_regex"] * 2
    assert all("longer to compile than 0.2 seconds" in error["message"] for error in refused)
    (waited,) = (answer for answer in answers if answer.status_code == 429)
    assert waited.headers["retry-after"] == "1"


def test_a_required_tool_is_called(server):
    for seed in range(3):
        body = {
            "messages": [USER],
            "tools": [WEATHER, TIME],
            "tool_choice": "required",
            "seed": seed,
            "max_tokens": 200,
        }
        (choice,) = server.good(PATH, body)["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        arguments = json.loads(call["function"]["arguments"])
        assert call["type"] == "function" and call["function"]["name"] in ("weather", "time")
        if call["function"]["name"] == "weather":
            assert arguments["place"] in ("here", "there") and 1 <= arguments["days"] <= 9
        pieces = [c for piece in server.events(PATH, body) for c in piece["choices"]]
        (streamed,) = [c["delta"]["tool_calls"][0] for c in pieces if "tool_calls" in c["delta"]]
        assert streamed["function"] == call["function"] and pieces[-1]["finish_reason"] == "tool_calls"


def test_a_named_tool_is_called_and_its_arguments_are_streamed(server):
    choice = {"type": "function", "function": {"name": "weather"}}
    body = {"messages": [USER], "tools": [WEATHER, TIME], "tool_choice": choice, "seed": 1, "max_tokens": 200}
    (answer,) = server.good(PATH, body)["choices"]
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "weather" and json.loads(call["function"]["arguments"])["days"] > 0
    assert answer["finish_reason"] == "stop"
    deltas = [choice["delta"] for piece in server.events(PATH, body) for choice in piece["choices"]]
    calls = [delta["tool_calls"][0]["function"] for delta in deltas if "tool_calls" in delta]
    assert len(calls) > 3 and calls[0]["name"] == "weather" and all("name" not in call for call in calls[1:])
    assert "".join(called["arguments"] for called in calls) == call["function"]["arguments"]


def test_calls_are_found_in_free_text_only_if_tools_may_be_called(server):
    call = '<tool_call>{"name": "time", "arguments": {"zone": 1}}</tool_call>'
    body = {"messages": [USER], "tools": [TIME], "max_tokens": 100, "guided_choice": ["so: " + call]}
    (choice,) = server.good(PATH, body)["choices"]
    assert choice["message"]["content"] == "so:" and choice["finish_reason"] == "tool_calls"
    (made,) = choice["message"]["tool_calls"]
    assert made["function"] == {"name": "time", "arguments": '{"zone": 1}'}
    pieces = [c["delta"] for piece in server.events(PATH, body) for c in piece["choices"]]
    assert "".join(d.get("content") or "" for d in pieces).strip() == "so:"
    assert [d["tool_calls"][0]["function"]["name"] for d in pieces if "tool_calls" in d] == ["time"]
    (plain,) = server.good(PATH, {**body, "tool_choice": "none"})["choices"]
    assert plain["message"]["content"] == "so: " + call and "tool_calls" not in plain["message"]


def test_tools_are_told_to_the_model_and_calls_can_be_sent_back(server):
    called = {"id": "c1", "type": "function", "function": {"name": "time", "arguments": '{"a": 1}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    prompt = prompt_of(server, messages)
    assert '<tool_call>{"name": "time", "arguments": {"a": 1}}</tool_call>' in prompt and "tool\nnoon" in prompt
    n_plain = server.good(PATH, {"messages": [USER], "max_tokens": 1})["usage"]["prompt_tokens"]
    n_told = server.good(PATH, {"messages": [USER], "max_tokens": 1, "tools": [TIME]})["usage"]["prompt_tokens"]
    n_none = server.good(PATH, {"messages": [USER], "max_tokens": 1, "tools": [TIME], "tool_choice": "none"})
    assert n_told > n_plain + 50 and n_none["usage"]["prompt_tokens"] == n_plain


WRONG = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [3]}, "messages[0]"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [USER, {"role": "user", "content": [{"type": "text"}]}]}, "messages[1].content[0].text"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [TIME, TIME]}, "tools[1]"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": "maybe"}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
    ({"functions": [{"name": "x"}]}, "functions"),
    ({"audio": {}}, "audio"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"store": True}, "store"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[str(f)[:50] for f, _ in WRONG])
def test_a_wrong_field_is_named(server, fields, param):
    assert server.refused(400, PATH, {"messages": [USER], **fields})["param"] == param


def test_a_base_model_without_a_template_says_which_option_helps(nano):
    with live(nano, template=None) as base:
        error = base.refused(400, PATH, {"messages": [USER]})
        assert "--chat-template" in error["message"] and error["code"] == "no_chat_template"
        assert base.refused(400, "/tokenize", {"messages": [USER]})["code"] == "no_chat_template"
        assert base.good("/v1/completions", {"prompt": "x", "max_tokens": 1})
