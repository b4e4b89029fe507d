"""The packages that people use as clients: openai, litellm, langchain-openai, and both API models of lm-eval."""

from __future__ import annotations

import json

import pytest
from live_server import live

from anymamba.serving.security import Guard

USER = {"role": "user", "content": "hi"}
SCHEMA = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["x"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "point", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def keyed(nano):
    with live(nano, template="plain", guard=Guard(["sk-test"]), packed=True) as running:
        running.client.headers["Authorization"] = "Bearer sk-test"
        yield running


@pytest.fixture(scope="module")
def openai_client(keyed):
    openai = pytest.importorskip("openai", reason="needs openai (pip install openai)")
    with openai.OpenAI(base_url=keyed.url + "/v1", api_key="sk-test", max_retries=0) as client:
        yield client


# ------------------------------------------------------------------------------------ openai


def test_openai_completions(openai_client):
    options = {"model": "nano", "prompt": "def ", "max_tokens": 8, "seed": 1, "logprobs": 2}
    whole = openai_client.completions.create(**options)
    stream = list(openai_client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == whole.choices[0].text
    assert stream[-1].usage.completion_tokens == 8 == whole.usage.completion_tokens
    assert len(whole.choices[0].logprobs.tokens) == 8
    assert whole.usage.prompt_tokens_details.cached_tokens == 0
    assert stream[-1].usage.prompt_tokens_details.cached_tokens == 4


def test_openai_chats(openai_client):
    options = {"model": "nano", "messages": [USER], "max_completion_tokens": 8, "seed": 1}
    whole = openai_client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    stream = list(openai_client.chat.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 3
    extended = openai_client.chat.completions.create(**options, extra_body={"top_k": 1})
    assert extended.choices[0].message.content


def test_openai_structured_output_and_tools(openai_client):
    pydantic = pytest.importorskip("pydantic", reason="needs pydantic (pip install pydantic)")

    class Point(pydantic.BaseModel):
        x: int = pydantic.Field(ge=0, le=99)

    chats = openai_client.chat.completions
    parsed = chats.parse(model="nano", messages=[USER], response_format=Point, seed=1, max_tokens=100)
    assert 0 <= parsed.choices[0].message.parsed.x <= 99
    options = {"model": "nano", "messages": [USER], "tools": [TOOL], "seed": 1, "max_tokens": 100}
    for choice in ("required", {"type": "function", "function": {"name": "point"}}):
        (call,) = chats.create(**options, tool_choice=choice).choices[0].message.tool_calls
        assert call.function.name == "point" and 0 <= json.loads(call.function.arguments)["x"] <= 99
    with chats.stream(**options, tool_choice="required") as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert call.function.name == "point"


def test_openai_sees_models_and_errors(openai_client, keyed):
    import openai

    assert [model.id for model in openai_client.models.list()] == ["nano"]
    assert openai_client.models.retrieve("nano").owned_by == "anymamba"
    with pytest.raises(openai.NotFoundError) as missing:
        openai_client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        openai_client.completions.create(model="nano", prompt="x", suffix="y")
    assert wrong.value.param == "suffix"
    with pytest.raises(openai.NotFoundError):
        openai_client.responses.create(model="nano", input="x")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=keyed.url + "/v1", api_key="wrong", max_retries=0).models.list()


def test_openai_sees_an_error_in_the_middle_of_a_stream(openai_client, keyed):
    import openai

    stream = openai_client.completions.create(
        model="nano", prompt="x", max_tokens=5000, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    loop = keyed.served.worker._loop
    loop.call_soon_threadsafe(keyed.served.worker.fail_all, RuntimeError("the disk is on fire"))
    with pytest.raises(openai.APIError, match="the disk is on fire"):
        list(stream)


def test_openai_async(keyed):
    import asyncio

    import openai

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=keyed.url + "/v1", api_key="sk-test") as client:
            asked = [client.completions.create(model="nano", prompt=f"p{i}", seed=i, max_tokens=6) for i in range(8)]
            return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    alone = [
        keyed.good("/v1/completions", {"prompt": f"p{i}", "seed": i, "max_tokens": 6})["choices"][0]["text"]
        for i in range(8)
    ]
    assert asyncio.run(ask()) == alone


# ------------------------------------------------------------------------------------ litellm, langchain


def test_litellm(keyed):
    litellm = pytest.importorskip("litellm", reason="needs litellm (pip install litellm)")
    options = {"api_base": keyed.url + "/v1", "api_key": "sk-test", "max_tokens": 6, "temperature": 0}
    whole = litellm.completion("openai/nano", messages=[USER], **options)
    stream = litellm.completion("openai/nano", messages=[USER], stream=True, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    wanted = keyed.good("/v1/completions", {"prompt": "hi", "max_tokens": 6, "temperature": 0})["choices"][0]["text"]
    assert whole.choices[0].message.content == text == wanted
    completed = litellm.text_completion(model="text-completion-openai/nano", prompt="hi", **options)
    assert completed.choices[0].text == wanted


def test_langchain(keyed):
    pytest.importorskip("langchain_openai", reason="needs langchain-openai (pip install langchain-openai)")
    from langchain_openai import ChatOpenAI, OpenAI

    options = {"model": "nano", "base_url": keyed.url + "/v1", "api_key": "sk-test", "temperature": 0}
    chat = ChatOpenAI(**options, max_completion_tokens=6)
    wanted = keyed.good("/v1/completions", {"prompt": "hi", "max_tokens": 6, "temperature": 0})["choices"][0]["text"]
    assert chat.invoke("hi").content == wanted
    assert "".join(chunk.content for chunk in chat.stream("hi")) == wanted
    assert OpenAI(**options, max_tokens=6).invoke("hi") == wanted
    called = ChatOpenAI(**options, max_completion_tokens=100).bind_tools([TOOL], tool_choice="point").invoke("hi")
    assert called.tool_calls[0]["name"] == "point" and 0 <= called.tool_calls[0]["args"]["x"] <= 99


# ------------------------------------------------------------------------------------ lm-eval


@pytest.fixture(scope="module")
def in_process(keyed):
    pytest.importorskip("lm_eval", reason="needs lm-eval (pip install 'anymamba[lm-eval]')")
    from anymamba.compat.lm_eval import AnymambaLM

    return AnymambaLM(keyed.served.model, keyed.served.tokenizer)


def requests(kind: str, *arguments: tuple):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def test_lm_eval_local_completions(keyed, in_process, monkeypatch):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    remote = LocalCompletionsAPI(
        base_url=keyed.url + "/v1/completions", model="nano", batch_size=4, auth_token="sk-test", max_gen_toks=12
    )
    pairs = [("The cat", " sat on the mat"), ("one two", " three"), ("x", "y"), ("a long context " * 30, "end")]
    asked = requests("loglikelihood", *pairs)
    here, there = in_process.loglikelihood(asked), remote.loglikelihood(asked)
    for (mine, greedy), (theirs, their_greedy) in zip(here, there, strict=True):
        assert abs(mine - theirs) < 1e-4 and greedy == their_greedy
    texts = requests("loglikelihood_rolling", ("some text to score",))
    assert abs(in_process.loglikelihood_rolling(texts)[0] - remote.loglikelihood_rolling(texts)[0]) < 1e-4
    generation = requests("generate_until", ("def ", {"until": ["\n"], "max_gen_toks": 12}))
    assert remote.generate_until(generation) == in_process.generate_until(generation)


def test_lm_eval_local_chat_completions(keyed, in_process, monkeypatch):
    from lm_eval.models.openai_completions import LocalChatCompletion

    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    remote = LocalChatCompletion(base_url=keyed.url + "/v1/chat/completions", model="nano", max_gen_toks=12)
    options = {"until": ["\n"], "max_gen_toks": 12}
    plain = requests("generate_until", ("def ", options), ("class ", options))
    chats = [remote.apply_chat_template([{"role": "user", "content": r.args[0]}]) for r in plain]
    asked = requests("generate_until", *((chat, options) for chat in chats))
    assert remote.generate_until(asked) == in_process.generate_until(plain)
