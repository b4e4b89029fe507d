"""Sessions through the server: what the store promises holds for answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from live_server import live

COMPLETE = "/v1/completions"


@pytest.fixture(scope="module")
def server(nano, tmp_path_factory):
    with live(nano, sessions=tmp_path_factory.mktemp("sessions")) as running:
        yield running


def test_two_requests_at_once_fork_and_the_last_one_is_kept(server):
    body = {"prompt": "Once", "max_tokens": 8, "session": "fork", "temperature": 0, "ignore_eos": True}
    first = server.good(COMPLETE, body)["choices"][0]["text"]
    prompts = [f"Once{first} and {n}" for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda prompt: server.good(COMPLETE, {**body, "prompt": prompt}), prompts))
    assert all(answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 10 for answer in answers)
    alone = [server.good(COMPLETE, {**body, "prompt": p, "session": f"alone {n}"}) for n, p in enumerate(prompts)]
    texts = [answer["choices"][0]["text"] for answer in answers]
    assert texts == [answer["choices"][0]["text"] for answer in alone], "they do not disturb each other"
    kept = server.client.get("/v1/sessions/fork").json()["text"]
    assert any(kept.startswith(prompt) for prompt in prompts), "one of them is kept whole"


def test_two_servers_share_a_folder(nano, tmp_path):
    text, before = "Once", 0
    options = {"max_tokens": 8, "session": "shared", "temperature": 0, "ignore_eos": True}
    with live(nano, sessions=tmp_path) as one, live(nano, sessions=tmp_path) as two:
        for turn, server in enumerate((one, two, one, two, two, one)):
            answer = server.good(COMPLETE, {**options, "prompt": text})
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached >= before, "each goes on from what the other has saved last"
            text += answer["choices"][0]["text"] + f" {turn}."
            before = answer["usage"]["total_tokens"] - 1


def test_a_full_quota_is_told_before_the_answer(server, monkeypatch):
    server.good(COMPLETE, {"prompt": "a", "max_tokens": 2, "session": "old"})
    monkeypatch.setattr(server.served.sessions, "_quota", 10)
    steps = server.served.worker.engine.statistics.new_tokens
    error = server.refused(403, COMPLETE, {"prompt": "a", "max_tokens": 2, "session": "new"})
    assert error["code"] == "quota_exceeded" and "delete some of them" in error["message"]
    assert server.served.worker.engine.statistics.new_tokens == steps, "nothing was generated for it"
    assert server.good(COMPLETE, {"prompt": "a", "max_tokens": 2})
