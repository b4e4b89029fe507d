"""Two replicas under Ray Serve on this machine: sessions stay with a replica, and go on when it is killed.

`make test-ray` runs these tests.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from contextlib import nullcontext
from types import SimpleNamespace

import httpx
import pytest
import torch

from anymamba.data.tokenizer import load_tokenizer
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.serving.protocol.errors import ApiError

ray = pytest.importorskip("ray", reason="needs Ray Serve (make test-ray installs it)")
serve = pytest.importorskip("ray.serve")
replicas = pytest.importorskip("anymamba.serving.ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A byte-level model with random weights, as a folder; its answers end only at the limit."""
    folder = tmp_path_factory.mktemp("models") / "nano"
    torch.manual_seed(0)
    LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=257)).save_pretrained(folder, load_tokenizer(None))
    return folder


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    """A client of two replicas that share a folder of sessions."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    sessions = tmp_path_factory.mktemp("sessions")
    serve.run(
        replicas.app({"model": str(model), "sessions": str(sessions), "replicas": "2", "chat_template": "chatml"})
    )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield client
    serve.shutdown()
    ray.shutdown()


def ask(client, prompt: str, **fields) -> httpx.Response:
    """Complete a prompt, with a new attempt while a replica is being replaced, as OpenAI's client does."""
    body = {"prompt": prompt, "max_tokens": 8, "logit_bias": {"256": -100}, **fields}
    for _ in range(20):
        answer = client.post("/v1/completions", json=body)
        if answer.status_code != 503:
            break
        time.sleep(0.5)
    assert answer.status_code == 200, answer.text
    return answer


def test_the_whole_server_answers(client):
    assert client.get("/v1/models").json()["data"][0]["id"] == "nano"
    assert "<title>anymamba</title>" in client.get("/").text
    assert "script-src 'self'" in client.get("/").headers["content-security-policy"]
    wrong = client.post("/v1/completions", json={"prompt": "a", "max_tokens": -1})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "max_tokens"
    large = client.post("/v1/completions", content=b" " * (5 << 20), headers={"content-type": "application/json"})
    assert large.status_code == 413
    foreign = client.get("/v1/models", headers={"origin": "https://example.org"})
    assert foreign.status_code == 403


def test_a_session_stays_with_its_replica(client):
    found = set()
    for number in range(8):
        answers = [ask(client, "Hello " * turn, session=f"s{number}") for turn in (1, 2, 3)]
        assert len({answer.headers["x-replica"] for answer in answers}) == 1
        found.add(answers[0].headers["x-replica"])
    assert len(found) == 2, "sessions are spread over the replicas"
    listed = {info["id"] for info in client.get("/v1/sessions").json()["data"]}
    assert {f"s{number}" for number in range(8)} <= listed


def test_streams_come_piece_by_piece(client):
    times = []
    body = {"prompt": "a", "max_tokens": 3000, "stream": True, "logit_bias": {"256": -100}}
    with client.stream("POST", "/v1/completions", json=body) as stream:
        for line in stream.iter_lines():
            times += [time.monotonic()] if line.startswith("data: ") else []
            last = line or last
    assert last == "data: [DONE]" and len(times) > 1000
    assert times[0] < times[-1] - 0.5 * (times[-1] - times[0]), "the first piece came long before the last"


def test_a_killed_replica_breaks_its_streams_and_its_sessions_go_on_with_the_other(client):
    first = ask(client, "Remember all of this. ", session="kept")
    told = "Remember all of this. " + first.json()["choices"][0]["text"]
    replica = first.headers["x-replica"]
    body = {"prompt": told, "max_tokens": 16_000, "stream": True, "session": "kept", "logit_bias": {"256": -100}}
    with client.stream("POST", "/v1/completions", json=body) as stream:
        assert stream.headers["x-replica"] == replica, "the session's replica runs it"
        lines = (line for line in stream.iter_lines() if line)
        for _ in range(20):
            next(lines)
        ray.kill(ray.get_actor(f"SERVE_REPLICA::default#Replica#{replica}", namespace="serve"))
        rest = list(lines)
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert error["code"] == "replica_gone" and error["type"] == "server_error"
    again = ask(client, told + " And?", session="kept")
    assert again.headers["x-replica"] != replica
    cached = again.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= len("Remember all of this. "), "the state came from the store"


def test_a_client_that_leaves_frees_its_place(client):
    body = {"prompt": "a", "max_tokens": 16_000, "stream": True, "session": "left", "logit_bias": {"256": -100}}
    with client.stream("POST", "/v1/completions", json=body) as stream:
        replica = stream.headers["x-replica"]
        next(stream.iter_lines())
    rows, seen = "1", time.monotonic()
    while rows != "0" and time.monotonic() < seen + 20:
        figures = client.get("/metrics")
        if figures.headers["x-replica"] == replica:
            rows = re.search(r"^anymamba_rows (\d+)", figures.text, re.MULTILINE).group(1)
    assert rows == "0"


def test_without_keys_only_this_machine_is_served():
    front = replicas.Front(None, has_keys=False)
    for host, allowed in (("127.0.0.1", True), ("::1", True), ("10.0.0.7", False), ("testclient", False)):
        request = SimpleNamespace(client=SimpleNamespace(host=host))
        with nullcontext() if allowed else pytest.raises(ApiError, match="set api_key_file"):
            front._require_allowed(request)
        replicas.Front(None, has_keys=True)._require_allowed(request)


def test_what_decides_about_the_replica():
    def call(body: bytes, key: bytes = b"") -> str:
        return replicas.session_of(replicas.Call("POST", "/v1/completions", b"", [(b"authorization", key)], body))

    assert call(b'{"session": "a"}') == call(b'{"session": "a", "prompt": "x"}') != call(b'{"session": "b"}')
    assert call(b'{"session": "a"}', b"Bearer x") != call(b'{"session": "a"}', b"Bearer y")
    assert call(b'{"prompt_cache_key": "a"}') == call(b'{"session": null, "prompt_cache_key": "a"}') != ""
    for body in (b"", b"{", b"[1]", b'{"session": 3}', b'{"prompt": "x"}', b"[" * 100_000, b"\xff"):
        assert call(body) == ""


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"replicsa.*did you mean 'replicas'"):
        replicas.app({"model": "x", "replicsa": 2})
    with pytest.raises(TypeError, match="model"):
        replicas.app({})
    assert replicas.RayOptions("x").sessions is None
