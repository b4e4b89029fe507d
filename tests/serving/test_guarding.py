"""Who may ask, from where and with what: keys, hosts, origins, content types, sizes, slow clients, too many clients."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time

import httpx
import pytest
from live_server import live

from anymamba.serving.app import Application
from anymamba.serving.limits import Limits
from anymamba.serving.loading import EngineOptions
from anymamba.serving.protocol.bodies import parse_json
from anymamba.serving.protocol.errors import ApiError
from anymamba.serving.security import Guard
from anymamba.serving.server import listen

BODY = {"prompt": "x", "max_tokens": 1}
PATH = "/v1/completions"
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Authorization: Bearer secret-a\r\n"
)


@pytest.fixture(scope="module")
def strict(nano):
    """A server with keys and tight limits."""
    limits = Limits(
        max_body=20_000, max_prompt=100, max_new_tokens=5000, max_queued=2, header_seconds=0.5, body_seconds=0.5
    )
    guard = Guard(["secret-a", "secret-b"], allowed_origins=["https://friend.example"])
    with live(nano, limits=limits, guard=guard, engine=EngineOptions(max_rows=2)) as running:
        running.client.headers["Authorization"] = "Bearer secret-a"
        yield running


def exchange(server, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Send bytes on a connection of its own, and read until the server closes it."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        except (BrokenPipeError, ConnectionResetError):
            pass
        found = b""
        try:
            while data := connection.recv(1 << 16):
                found += data
        except ConnectionResetError:
            pass
        return found


# ------------------------------------------------------------------------------------ keys


def test_a_key_is_needed_for_all_but_health_and_the_page(strict):
    for path in ("/v1/models", "/v1/sessions", "/metrics", "/tokenizer_info", "/openapi.json", "/v1/nothing"):
        for key in (None, "Bearer wrong", "Basic secret-a", "Bearer"):
            headers = {} if key is None else {"Authorization": key}
            answer = httpx.get(strict.url + path, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", path
    assert httpx.get(strict.url + "/health").json() == {"status": "ok"}
    for key in ("secret-a", "secret-b"):
        assert httpx.get(strict.url + "/metrics", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr(
        "anymamba.serving.security.hmac.compare_digest", lambda a, b: (compared.append((a, b)), a == b)[1]
    )
    guard = Guard(["one", "two", "three"])
    owner = guard.owner({"authorization": "Bearer one"})
    assert len(compared) == 3 and all(len(a) == len(b) == 32 for a, b in compared)
    assert owner != guard.owner({"authorization": "Bearer two"}) and "one" not in owner


def test_keys_may_have_any_letters():
    guard = Guard(["schlüssel"])
    sent = "Bearer schlüssel".encode().decode("latin-1")  # as a server reads UTF-8 in a header
    assert guard.owner({"authorization": sent})


def test_an_open_address_needs_a_key():
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ValueError, match=r"API key is needed.*--api-key-file"):
            Guard([], host)
        Guard(["key"], host)
    for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"):
        Guard([], host)
    with pytest.raises(ValueError, match="empty"):
        Guard(["a", ""])


# ------------------------------------------------------------------------------------ other sites


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
    ],
)
def test_pages_of_other_sites_cannot_ask(server, headers, status):
    for answer in (server.client.get("/v1/models", headers=headers), server.post(PATH, BODY, headers=headers)):
        assert answer.status_code == status
        assert "access-control-allow-origin" not in answer.headers


def test_cors_is_only_for_allowed_origins(strict):
    question = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    friend = strict.client.options(PATH, headers={"Origin": "https://friend.example", **question})
    assert friend.headers["access-control-allow-origin"] == "https://friend.example"
    assert "Content-Type" in friend.headers["access-control-allow-headers"]
    answer = strict.post(PATH, BODY, headers={"Origin": "https://friend.example"})
    assert answer.status_code == 200 and answer.headers["vary"] == "Origin"
    stranger = strict.client.options(PATH, headers={"Origin": "https://stranger.example", **question})
    assert stranger.status_code == 403 and "access-control-allow-origin" not in stranger.headers


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_only_json_is_taken(server, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = server.client.post(PATH, content=json.dumps(BODY).encode(), headers=headers)
    assert answer.status_code == 415 and answer.json()["error"]["code"] == "content_type"


# ------------------------------------------------------------------------------------ bodies


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1, 2", "not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b"\xff\xfe{}", "UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"\\udc00": 1}', "surrogate"),
        (b"[" * 101 + b"]" * 101, "levels"),
        (b"[" * 100_000 + b"]" * 100_000, "levels"),
        (b'{"a":' * 100_000, "levels|not JSON"),
        (b"1" * 5000, "not JSON"),
    ],
)
def test_bad_json_is_refused(body, message):
    with pytest.raises(ApiError, match=message) as caught:
        parse_json(body)
    assert caught.value.status == 400


def test_good_json_is_taken():
    deep = "[" * 100 + "]" * 100
    assert parse_json(deep.encode()) == json.loads(deep)
    assert parse_json(b'{"a": "\\ud83d\\ude00", "b": [[], {}, 1e3]}') == {"a": "\U0001f600", "b": [[], {}, 1000.0]}


@pytest.mark.parametrize("body", [b"[]", b"3", b"null", b'"text"'])
def test_a_body_must_be_an_object(server, body):
    answer = server.client.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "the body must be a JSON object" in answer.text
    assert answer.json()["error"]["param"] is None


def test_large_bodies_are_refused(strict):
    error = strict.refused(413, PATH, {"prompt": "x" * 30_000})
    assert "20,000 bytes" in error["message"]
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    answer = exchange(strict, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 10)  # without an end
    assert b" 413 " in answer and b"body_too_large" in answer
    assert b" 413 " in exchange(strict, HEAD + b"Content-Length: 9999999999\r\n\r\n")


def test_slow_bodies_and_headers_are_ended(strict):
    answer = exchange(strict, HEAD + b"Content-Length: 100\r\n\r\n", *[b" "] * 8, pause=0.1)
    assert b" 408 " in answer
    start = time.monotonic()
    assert exchange(strict, *[b"GET /health HTTP/1.1\r\nX-A: b\r\n"] + [b"X-B: c\r\n"] * 8, pause=0.1) == b""
    assert exchange(strict) == b""
    assert time.monotonic() - start < 5


def test_what_is_not_http_is_refused(server):
    assert b" 400 " in exchange(server, b"\x16\x03\x01\x02\x00 not http\r\n\r\n")
    endless = exchange(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", *[b"x" * 30_000] * 5, pause=0.05)
    assert b" 400 " in endless and b'{"error": ' in endless


def test_long_prompts_and_answers_are_refused(strict):
    error = strict.refused(400, PATH, {"prompt": "x" * 101})
    assert error["param"] == "prompt" and error["code"] == "context_length_exceeded" and "101" in error["message"]
    assert strict.refused(400, PATH, {"prompt": "x", "max_tokens": 5001})["param"] == "max_tokens"


@pytest.mark.parametrize("name", ["n", "best_of", "num_beams"])
def test_more_answers_than_the_server_has_rows_are_refused_by_name(strict, name):
    error = strict.refused(400, PATH, {**BODY, name: 3})
    assert error["param"] == name and f"{name} must be at most 2" in error["message"]


# ------------------------------------------------------------------------------------ paths


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/responses", 404),
        ("GET", "/v1/responses", 404),
        ("GET", "/nothing", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/chat/completions", 405),
        ("PUT", "/v1/models", 405),
        ("POST", "/v1/models/nano", 405),
        ("PUT", "/v1/sessions/mine", 405),
        ("GET", "/v1/completions/more", 404),
        ("GET", "/tokenize", 405),
        ("GET", "/..%2f..%2fetc/passwd", 404),
        ("GET", "/v1/../../etc/passwd", 404),
    ],
)
def test_unknown_paths_and_methods_have_openais_form(server, method, path, status):
    answer = server.client.request(method, path)
    assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_an_unknown_model_is_named(server):
    for path, body in ((PATH, BODY), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})):
        error = server.refused(404, path, {**body, "model": "gpt-5"})
        assert error["code"] == "model_not_found" and error["param"] == "model" and "gpt-5" in error["message"]


# ------------------------------------------------------------------------------------ health


def test_health_is_answered_while_the_event_loop_is_busy(server):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    server.served.worker._loop.call_soon_threadsafe(time.sleep, 4)
    start = time.monotonic()
    for _ in range(3):
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status": "ok"}'
    assert time.monotonic() - start < 3
    connection.close()


def test_all_is_unavailable_until_the_model_is_loaded():
    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(Application(Guard(), Limits()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answers = [await client.get(path) for path in ("/health", "/v1/models", "/v1/sessions", "/tokenizer_info")]
            return [*answers, await client.post(PATH, json=BODY)]

    health, *others = asyncio.run(ask())
    assert health.status_code == 503 and health.json() == {"status": "loading"}
    for answer in others:
        assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
        assert answer.json()["error"]["code"] == "unavailable"


def test_odd_requests_for_health_go_the_usual_way(server):
    def health(*lines: bytes) -> bytes:
        return exchange(server, b"\r\n".join([b"GET /health HTTP/1.1", *lines, b"Connection: close", b"", b""]))

    assert b" 200 " in health(b"Host: localhost") and b"ok" in health(b"Host: localhost")
    assert b" 403 " in health(b"Host: evil.example")
    assert b" 403 " in health(b"Host: localhost", b"Origin: https://evil.example")
    assert b" 200 " in health(b"Host: localhost", b"X: " + b"x" * 20_000)
    assert server.client.head("/health").status_code == 200
    for _ in range(3):
        assert server.client.get("/health").status_code == 200  # one connection, used again
    assert server.good(PATH, BODY)  # and then for something else


# ------------------------------------------------------------------------------------ too many, and leaving


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def ask_and_hold(server, body):
    """Send a request and return its connection, from which nothing is read."""
    host, port = server.url.removeprefix("http://").split(":")
    connection, data = socket.create_connection((host, int(port))), json.dumps(body).encode()
    connection.sendall(HEAD + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def test_too_many_requests_wait_or_are_told_to_and_those_that_leave_free_their_slots(strict):
    worker = strict.served.worker
    long = {"prompt": "x", "max_tokens": 5000, "ignore_eos": True, "stream": True}
    connections = [ask_and_hold(strict, long) for _ in range(4)]
    wait_for(lambda: worker.n_rows == 4)
    refused = strict.post(PATH, BODY)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert strict.client.get("/health").status_code == 200
    before = worker.engine.statistics.new_tokens
    for connection in connections:
        connection.close()
    wait_for(lambda: worker.n_rows == 0 and worker.engine.statistics.n_rows == 0)
    assert worker.engine.statistics.new_tokens < before + 15_000, "answers were generated to their ends"
    assert strict.good(PATH, BODY)


def test_all_rows_of_a_beam_search_count(strict):
    worker = strict.served.worker
    search = {"prompt": "x", "max_tokens": 5000, "ignore_eos": True, "num_beams": 2}
    connections = [ask_and_hold(strict, search) for _ in range(2)]
    wait_for(lambda: worker.n_rows == 4)
    assert strict.post(PATH, BODY).status_code == 429
    for connection in connections:
        connection.close()
    wait_for(lambda: worker.n_rows == 0 and worker.engine.statistics.n_rows == 0)


def test_a_client_that_leaves_without_streaming_frees_its_slot(strict):
    worker = strict.served.worker
    connection = ask_and_hold(strict, {"prompt": "x", "max_tokens": 5000, "ignore_eos": True})
    wait_for(lambda: worker.engine.statistics.n_rows == 1)
    before = worker.engine.statistics.new_tokens
    connection.close()
    wait_for(lambda: worker.engine.statistics.n_rows == 0)
    assert worker.engine.statistics.new_tokens < before + 4000, "the answer was generated to its end"


def test_a_port_in_use_is_told(server):
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(OSError, match=rf"cannot listen on 127.0.0.1 port {port}: .*--port"):
        listen("127.0.0.1", port)


def test_metrics_count_without_telling_texts_or_names(server):
    server.good(PATH, {"prompt": "verysecret", "max_tokens": 2, "session": "alsosecret"})
    text = server.client.get("/metrics").text
    assert 'anymamba_requests_total{endpoint="/v1/completions",status="200"}' in text
    for name in ("rows", "queued", "step_seconds", "prompt_tokens_total", "cached_tokens_total", "new_tokens_total"):
        assert f"\nanymamba_{name} " in text
    assert "anymamba_first_token_seconds_bucket" in text and "secret" not in text


def test_an_answer_that_its_client_does_not_read_is_ended(nano):
    """Only what waits for its client is timed: a slow answer that is read goes on."""
    body = {"prompt": "x", "max_tokens": 20_000, "ignore_eos": True, "stream": True}
    scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "http_version": "1.1"}
    scope["headers"] = [(b"host", b"localhost"), (b"content-type", b"application/json")]

    async def ask(application, n_read):
        sent, given = [], [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive():
            return given.pop() if given else await asyncio.Event().wait()

        async def send(message):
            sent.append(message.get("body", b""))
            await (asyncio.sleep(0.05) if len(sent) < n_read else asyncio.Event().wait())

        await application(dict(scope), receive, send)
        return sent

    with live(nano, limits=Limits(send_seconds=0.3, max_new_tokens=20_000)) as server:
        asked = asyncio.run_coroutine_threadsafe(ask(server.application, 10), server.served.worker._loop)
        sent = asked.result(20)
        assert len(sent) == 10 and b"[DONE]" not in sent[-1], "it was read for longer than it may wait, and then not"
        wait_for(lambda: server.served.worker.engine.statistics.n_rows == 0)
        assert "anymamba_cancelled_total 1.0" in server.client.get("/metrics").text
