"""Malformed requests: none gives a 500 or a hang. Thousands of them are tried in the slow tests."""

from __future__ import annotations

import json
import random
import time
from itertools import product
from pathlib import Path

import httpx
import pytest

from anymamba.serving.protocol.events import encode_in_pieces
from anymamba.serving.protocol.tables import CHAT, COMPLETION, DETOKENIZE, TOKENIZE
from anymamba.serving.sessions.store import LONGEST_NAME

TABLES = {
    "/v1/completions": (COMPLETION, {"prompt": "ab", "max_tokens": 2}),
    "/v1/chat/completions": (CHAT, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}),
    "/tokenize": (TOKENIZE, {"prompt": "ab"}),
    "/detokenize": (DETOKENIZE, {"tokens": [1, 2]}),
}
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3.5, 1e308, -1e-308, 10**30, 2**63, "", "a", "\0", "\ufeff", "null", "é" * 50),
    *([], [[]], [None], [1, 2], [300], ["a"], [[1], ["a"]], {}, {"a": 1}, {"type": "text"}, {"role": "user"}, [{}]),
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": ["string", "integer"], "maxLength": 3}}},
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}},
    {"type": "json_schema", "json_schema": {"schema": {"pattern": "("}}},
    {"type": "regex", "regex": "[a-c]{3}"},
    {"type": "function", "function": {"name": "f"}},
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}],
    [{"role": "tool", "content": "x", "tool_call_id": 3}, {"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
]
EXPECTED = {200, 400, 404, 409, 413, 415, 429}


def mutated(random_: random.Random) -> tuple[str, bytes]:
    """A path, and a body that is nearly right: some fields have odd values, and some bytes may be damaged."""
    path = random_.choice(list(TABLES))
    table, body = TABLES[path]
    body = dict(body)
    for _ in range(random_.randint(1, 3)):
        body[random_.choice([*table, "unknown"])] = random_.choice(VALUES)
    if random_.random() < 0.2:
        del body[random_.choice(list(body))]
    if isinstance(body.get("max_tokens"), int) and body["max_tokens"] > 1000:
        body["max_tokens"] = 5
    body.setdefault("max_completion_tokens", 3)
    data = bytearray(json.dumps(body).encode())
    if random_.random() < 0.3:
        for _ in range(random_.randint(1, 4)):
            place = random_.randrange(len(data))
            data[place : place + random_.randint(0, 3)] = random_.randbytes(random_.randint(0, 3))
    return path, bytes(data)


def try_bodies(server, seed: int, count: int) -> dict[int, int]:
    """Send mutated bodies. Returns how often each status came."""
    random_, counts = random.Random(seed), dict[int, int]()
    for number in range(count):
        path, body = mutated(random_)
        start = time.monotonic()
        answer = server.client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in EXPECTED, (answer.status_code, path, body, answer.text[:500], number)
        assert time.monotonic() - start < 20, (path, body)
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, (path, body)
        elif not answer.headers["content-type"].startswith("text/event-stream"):
            answer.json()
        counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
    return counts


def test_damaged_bodies(server):
    counts = try_bodies(server, 0, 100)
    assert counts[200] > 5 and counts[400] > 40, counts
    assert server.served.worker.n_rows == 0


@pytest.mark.slow
def test_ten_thousand_damaged_bodies(server):
    try_bodies(server, 1, 10_000)
    assert server.served.worker.n_rows == 0 and server.client.get("/health").status_code == 200


def test_json_is_encoded_in_pieces():
    value = {"a": [{"b": list(range(1000)), "é": None}, [1.5, "x"]], "c": [{"d": [i]} for i in range(401)], "e": []}
    assert json.loads(encode_in_pieces(value)) == value


def test_the_description_is_openapi_and_has_every_field(server):
    found = server.client.get("/openapi.json").json()
    assert found["openapi"].startswith("3.1")
    for path, (table, _) in TABLES.items():
        schema = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(schema["properties"]) == set(table)
        named = schema["properties"].get("session")
        assert named is None or named["anyOf"][0]["maxLength"] == LONGEST_NAME, "as long as the stores take it"


def test_the_page_of_the_server_tells_every_field():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    missing = {name for table in (COMPLETION, CHAT) for name in table if f"`{name}" not in page}
    assert not missing


@pytest.mark.slow
def test_requests_made_from_the_description(server):
    """schemathesis makes requests that fit the description and such that do not; the answers fit it."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis (pip install schemathesis)")
    import hypothesis
    from schemathesis import checks

    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    wanted = [checks.not_a_server_error]
    names = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
    wanted += checks.CHECKS.get_by_names(names)
    modes = schemathesis.GenerationMode
    for operation, mode in product(schema.get_all_operations(), (modes.POSITIVE, modes.NEGATIVE)):
        if mode == modes.NEGATIVE and not operation.ok().body:
            continue

        @hypothesis.given(case=operation.ok().as_strategy(generation_mode=mode))
        @hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
        def try_case(case):
            limit_tokens(case)
            case.call_and_validate(checks=wanted, timeout=30)

        try_case()


def limit_tokens(case) -> None:
    """Keep answers short: the number of tokens is not what is tried."""
    if isinstance(case.body, dict):
        for name in ("max_tokens", "max_completion_tokens"):
            if isinstance(case.body.get(name), int) and case.body[name] > 20:
                case.body[name] = 20
        if case.path.startswith("/v1/chat") and not isinstance(case.body.get("max_completion_tokens"), str):
            case.body["max_completion_tokens"] = 5


def test_a_server_goes_on_after_connections_that_break(server):
    host, port = server.url.removeprefix("http://").split(":")
    import socket

    for data in (b"", b"POST", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{", b"\0" * 100):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(data)
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/health").status_code == 200
