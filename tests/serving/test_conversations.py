"""Sessions over HTTP, templates, and requests that fail by themselves."""

from __future__ import annotations

import json
import math
import threading

import pytest
import torch
from live_server import live

from anymamba.generation.scheduling.reading import PieceReader
from anymamba.models.checkpoints import open_checkpoint
from anymamba.serving.loading import EngineOptions
from anymamba.serving.protocol.errors import ApiError
from anymamba.serving.security import Guard
from anymamba.serving.templates import ChatTemplate, load_template

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def cached(answer) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


# ------------------------------------------------------------------------------------ sessions


def test_the_next_turn_after_a_restart_reads_only_what_is_new(nano, tmp_path):
    first = [user("one " * 50)]
    options = {"session": "a/../b \u00fc", "temperature": 0, "max_tokens": 10}
    with live(nano, sessions=tmp_path) as server:
        answer = server.good(CHAT, {"messages": first, **options})
        total, text = answer["usage"]["total_tokens"], answer["choices"][0]["message"]["content"]
        assert cached(answer) == 0
    second = [*first, {"role": "assistant", "content": text}, user("two")]
    with live(nano, sessions=tmp_path) as server:
        answer = server.good(CHAT, {"messages": second, **options})
        assert cached(answer) == total - 1  # all but the last token, whose logits were not needed
        fresh = server.good(CHAT, {"messages": second, "temperature": 0, "max_tokens": 10})
        assert answer["choices"] == fresh["choices"]
        (listed,) = server.client.get("/v1/sessions").json()["data"]
        assert listed["id"] == options["session"]
        path = "/v1/sessions/a%2F..%2Fb%20%C3%BC"
        kept = server.client.get(path).json()
        assert kept["n_tokens"] == listed["n_tokens"] and kept["text"].startswith("<|im_start|>user\none one")
        assert server.client.delete(path).json()["deleted"] is True
        assert server.client.get(path).json()["error"]["code"] == "session_not_found"
        assert server.client.delete(path).status_code == 404
        assert server.client.get("/v1/sessions").json()["data"] == []


def test_an_answer_that_was_cut_leaves_the_end_of_its_prompt_to_go_on_from(nano, tmp_path):
    """A stop string is in the state at the end of the answer, and not in the text that the client sends back."""
    prompt = "Count: " * 20
    body = {"prompt": prompt, "guided_regex": "one STOP two", "stop": "STOP", "max_tokens": 30}
    with live(nano, sessions=tmp_path, packed=True) as server:
        for name in ("text", "ids"):
            assert server.good(COMPLETE, {**body, "session": name})["choices"][0]["text"] == "one "
    with live(nano, sessions=tmp_path, engine=EngineOptions(cache_memory=0), packed=True) as server:
        text = f"{prompt}one, two"
        for name, sent in (("text", text), ("ids", list(text.encode()))):
            body = {"prompt": sent, "max_tokens": 9, "seed": 3}
            answer = server.good(COMPLETE, {**body, "session": name})
            assert cached(answer) == len(prompt)
            assert answer["choices"] == server.good(COMPLETE, body)["choices"]


def test_two_requests_of_a_session_at_once_fork_and_the_last_to_end_is_kept(server):
    body = {"prompt": "forked", "session": "forked", "seed": 1, "ignore_eos": True}
    slow: list = []
    asking = threading.Thread(target=lambda: slow.append(server.good(COMPLETE, {**body, "max_tokens": 1500})))
    asking.start()
    fast = server.good(COMPLETE, {**body, "max_tokens": 3})
    assert asking.is_alive()
    asking.join()
    texts = [answer["choices"][0]["text"] for answer in (fast, slow[0])]
    assert texts[1].startswith(texts[0])
    assert server.client.get("/v1/sessions/forked").json()["n_tokens"] == 6 + 1500 - 1


def test_an_edit_in_the_middle_goes_on_from_the_longest_match(server):
    options = {"session": "edited", "max_tokens": 4, "temperature": 0}
    server.good(COMPLETE, {"prompt": "a" * 700, **options})
    edited = server.good(COMPLETE, {"prompt": "a" * 650 + "b" * 50, **options})
    assert 0 < 650 - cached(edited) < 512


def test_states_go_to_a_folder_when_memory_is_full(nano, tmp_path):
    options = EngineOptions(cache_memory=60_000, cache_folder=tmp_path / "states")
    with live(nano, engine=options) as server:
        prompts = [f"{number} prompt" for number in range(40)]
        for prompt in prompts:
            server.good(COMPLETE, {"prompt": prompt, "max_tokens": 1})
        assert list((tmp_path / "states").iterdir())
        answers = [server.good(COMPLETE, {"prompt": prompt, "max_tokens": 1}) for prompt in prompts]
        assert all(cached(answer) == answer["usage"]["prompt_tokens"] for answer in answers)


def test_keys_have_sessions_and_cached_states_of_their_own(nano, tmp_path):
    with live(nano, sessions=tmp_path, guard=Guard(["one", "two"])) as server:
        body = {"prompt": "shared words", "max_tokens": 2, "session": "s"}
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        assert cached(server.post(COMPLETE, body, headers=one).json()) == 0
        assert cached(server.post(COMPLETE, body, headers=two).json()) == 0
        assert cached(server.post(COMPLETE, body, headers=one).json()) == 12
        assert server.client.delete("/v1/sessions/s", headers=two).status_code == 200
        assert len(server.client.get("/v1/sessions", headers=one).json()["data"]) == 1


def test_a_session_that_cannot_be_stored_is_an_error_and_not_an_answer(server, monkeypatch):
    from anymamba.serving.sessions import StoreError

    def full(owner, name, kept):
        raise StoreError("the disk is full")

    monkeypatch.setattr(server.served.sessions, "save", full)
    body = {"prompt": "x", "max_tokens": 2, "session": "full"}
    error = server.refused(507, COMPLETE, body)
    assert error["message"] == "the disk is full" and error["param"] == "session"
    text = server.post(COMPLETE, {**body, "stream": True}).text.strip().split("\n\n")
    assert json.loads(text[-1].removeprefix("data: "))["error"]["message"] == "the disk is full"
    assert 'finish_reason":"' not in "".join(text)


def test_a_session_of_another_model_is_refused_by_name(nano, tmp_path):
    from anymamba.data.tokenizer import load_tokenizer
    from anymamba.models.config import ModelConfig
    from anymamba.models.language_model import LanguageModel

    other = tmp_path / "other"
    LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=257)).save_pretrained(other, load_tokenizer(None))
    body = {"prompt": "x", "max_tokens": 2, "session": "s"}
    with live(nano, sessions=tmp_path / "sessions") as server:
        server.good(COMPLETE, body)
    with live(other, sessions=tmp_path / "sessions") as server:
        assert server.refused(409, COMPLETE, body)["code"] == "session_of_another_model"
        assert server.good(COMPLETE, {**body, "session": "t"})


def test_a_server_without_sessions_says_so(nano):
    with live(nano) as server:
        assert "--sessions" in server.refused(400, COMPLETE, {"prompt": "x", "session": "s"})["message"]


# ------------------------------------------------------------------------------------ failures


def test_logits_that_are_not_numbers_end_one_request(server, monkeypatch):
    """A poisoned token makes NaN; its request fails, and one beside it has the text that it has alone."""
    body = {"prompt": "good", "max_tokens": 30, "seed": 4}
    alone = server.good(COMPLETE, body)["choices"][0]["text"]
    real = PieceReader.read

    def poisoned(self, pieces):
        found = real(self, pieces)
        return [
            read._replace(logits=torch.full_like(read.logits, math.nan)) if 1 in piece.ids else read
            for piece, read in zip(pieces, found, strict=True)
        ]

    monkeypatch.setattr(PieceReader, "read", poisoned)
    error = server.refused(500, COMPLETE, {"prompt": ["good", "bad\1"], "max_tokens": 30, "seed": 4})
    assert error["code"] == "generation_failed" and error["type"] == "server_error"
    assert server.good(COMPLETE, body)["choices"][0]["text"] == alone
    assert server.served.worker.n_rows == 0


def test_an_error_after_the_first_byte_is_one_event_and_the_end(server, monkeypatch):
    from anymamba.serving.protocol.answers import CompletionAnswer

    monkeypatch.setattr(CompletionAnswer, "last_piece", lambda self, number: 1 / 0)
    text = server.post(COMPLETE, {"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}).text
    *pieces, last = text.strip().split("\n\n")
    assert pieces and all("choices" in piece for piece in pieces)
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


def test_an_error_of_the_engine_itself_ends_its_requests_and_the_next_ones_are_served(nano):
    with live(nano) as server:

        def broken():
            raise RuntimeError("out of memory")

        server.served.worker.engine.step = broken
        assert "out of memory" in server.refused(500, COMPLETE, {"prompt": "x"})["message"]
        assert server.good(COMPLETE, {"prompt": "x", "max_tokens": 2})


# ------------------------------------------------------------------------------------ templates


def test_the_model_s_own_template_is_used(nano, tmp_path):
    import shutil

    folder = tmp_path / "own"
    shutil.copytree(nano, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    source = (
        "{% for m in messages %}{% generation %}[{{ m['role'] }}] {{ m['content'] | trim }}"
        "{{ eos_token }}\n{% endgeneration %}{% endfor %}"
    )
    path.write_text(json.dumps({**config, "chat_template": source}))
    template = load_template(None, open_checkpoint(folder))
    assert template is not None and template.stop == ("<|endoftext|>",)
    assert template.render([user(" hi ")]) == "[user] hi<|endoftext|>\n"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    path.write_text(json.dumps({**config, "chat_template": named}))
    assert load_template(None, open_checkpoint(folder)).source == "y"
    (folder / "chat_template.jinja").write_text("z")
    assert load_template(None, open_checkpoint(folder)).source == "z"
    assert load_template(str(path), None).source == "y"
    assert load_template(None, open_checkpoint(nano)) is None


def test_a_template_in_a_gguf_file_is_used(nano, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf (pip install 'anymamba[gguf]')")
    from types import SimpleNamespace

    from anymamba.models.checkpoints import convert
    from anymamba.models.checkpoints.formats.gguf import GGUFFile

    convert(nano, tmp_path / "nano.gguf", "gguf")
    checkpoint = open_checkpoint(tmp_path / "nano.gguf")
    assert load_template(None, checkpoint) is None

    class WithTemplate(GGUFFile):
        def __init__(self, file):
            self.__dict__ = file.__dict__

        def field(self, key, default=None):
            return "{{ messages[0].content }}" if key == "tokenizer.chat_template" else super().field(key, default)

    found = load_template(None, SimpleNamespace(file=WithTemplate(checkpoint.file), path=checkpoint.path, home=None))
    assert found is not None and found.render([user("hi")]) == "hi"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system messages') }}",
        "{{ messages[5].content }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].content + 1 }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_that_fails_is_a_bad_request(source):
    with pytest.raises(ApiError) as caught:
        ChatTemplate(source, origin="a test").render([user("hi")])
    assert caught.value.status == 400


def test_a_template_that_cannot_be_parsed_is_told():
    with pytest.raises(ValueError, match=r"chat template of x\.jinja cannot be parsed"):
        ChatTemplate("{% if %}", origin="x.jinja")
