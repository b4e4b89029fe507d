"""`anymamba serve`, as a process: it prints its address, answers, and ends on a signal after its answers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import httpx
import pytest

from anymamba.cli.serve import ServeOptions, checked_options, open_guard

BODY = {"prompt": "def ", "max_tokens": 6, "seed": 1, "session": "mine"}


@pytest.fixture
def start(model_folder, tmp_path, monkeypatch):
    """Starts `anymamba serve` on a free port; gives the process and its address when it is ready."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    running = []

    def call(*flags: str) -> tuple[subprocess.Popen[str], str, str]:
        command = [sys.executable, "-m", "anymamba", "serve", "--model", str(model_folder), "--port", "0", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(process)
        lines = []
        assert process.stdout is not None
        while not lines or not lines[-1].startswith("API key"):
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()[1]
        text = "".join(lines)
        address = re.search(r"http://[\d.]+:\d+", text)
        assert address is not None, text
        return process, address.group(), text

    yield call
    for process in running:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            pipe.close()


def test_it_serves_finishes_its_answers_and_keeps_sessions(start):
    process, address, text = start("--stop-seconds", "2", "--max-new-tokens", "200000")
    assert re.search(r"nano: the page is http://127\.0\.0\.1:\d+, the API http://127\.0\.0\.1:\d+/v1\n", text)
    assert re.search(r"room: 64 answers at once; the states of [\d,]+ users, [\d.]+ MB each, fit into 1,000 MB\n", text)
    assert "API key: none" in text and "--chat-template" in text
    assert httpx.get(address + "/health").json() == {"status": "ok"}
    first = httpx.post(address + "/v1/completions", json=BODY).json()
    assert first["choices"][0]["text"] and httpx.get(address + "/").status_code == 200
    ends = ask_and_stop(process, address)
    assert ends["short"] == "data: [DONE]"
    assert json.loads(ends["long"].removeprefix("data: "))["error"]["message"] == "the server is stopping"
    _, told = process.communicate(timeout=20)
    assert process.returncode == 143 and told.endswith("terminated\n") and "Traceback" not in told

    process, address, _ = start()
    (session,) = httpx.get(address + "/v1/sessions").json()["data"]
    assert session["id"] == "mine" and session["n_tokens"] == 9
    longer = {**BODY, "prompt": "def " + first["choices"][0]["text"] + "!"}
    usage = httpx.post(address + "/v1/completions", json=longer).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 9 and usage["prompt_tokens"] == 11
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def test_it_ends_where_nobody_reads_its_lines(start):
    process, _, _ = start()
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_an_output_that_takes_no_lines_ends_nothing(model_folder):
    processes = {}
    command = [sys.executable, "-m", "anymamba", "serve", "--model", str(model_folder), "--sessions", "off"]
    for redirection in ("> >(exit)", ">&-", ">/dev/full"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        shell = ["bash", "-c", f'exec "$@" {redirection}', "bash", *command, "--port", port]
        processes[port] = subprocess.Popen(shell, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    for port, process in processes.items():
        answer = None
        while (answer is None or answer.status_code != 200) and time.monotonic() < end:
            time.sleep(0.1)
            with suppress(httpx.HTTPError):
                answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "x", "max_tokens": 1})
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=20)
        assert answer is not None and answer.status_code == 200, told
        assert process.returncode == 143
        assert [line.split()[0] for line in told.splitlines()] == ["loading", "stopping:", "terminated"], told


def ask_and_stop(process: subprocess.Popen[str], address: str) -> dict[str, str]:
    """Send SIGTERM while a short and a long answer are running. Returns the last line of each."""
    ends = {}

    def read(name: str, max_tokens: int) -> None:
        body = {"prompt": "x", "stream": True, "max_tokens": max_tokens, "ignore_eos": True}
        with httpx.stream("POST", address + "/v1/completions", json=body, timeout=30) as answer:
            ends[name] = [line for line in answer.iter_lines() if line][-1]

    threads = [threading.Thread(target=read, args=arguments) for arguments in (("short", 1500), ("long", 200_000))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 20
    while "anymamba_rows 2.0" not in httpx.get(address + "/metrics").text:
        assert time.monotonic() < end, "the answers did not begin"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    assert httpx.get(address + "/health").status_code == 503
    assert httpx.post(address + "/v1/completions", json=BODY).json()["error"]["code"] == "unavailable"
    for thread in threads:
        thread.join(20)
    return ends


def test_a_port_in_use_is_one_error(refused, model_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = refused(1, "serve", "--model", model_folder, "--port", port)
    assert f"port {port}" in told and "--port" in told


def test_flags_that_cannot_be_served_are_refused(refused, model_folder, tmp_path):
    empty = tmp_path / "keys"
    empty.write_text("\n")
    for flags, told in (
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--port", "70000"], "--port"),
        (["--max-rows", "0"], "--max-rows"),
        (["--session-days", "nan"], "--session-days"),
        (["--api-key-file", empty], "no API key"),
        (["--chat-template", "nothing"], "plain or chatml"),
        (["--cache-folder", tmp_path, "--cache-memory", "0"], "--cache-memory"),
        (["--slowdown", "0.5"], "--slowdown must be a number of at least 1"),
        (["--longest-wait", "inf"], "--longest-wait must be a number of at least 0"),
    ):
        assert told in refused(2, "serve", "--model", model_folder, *flags)


def test_flags_reach_their_parts(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("one\n\ntwo\n")
    options = ServeOptions(
        model=tmp_path,
        api_key_file=keys,
        api_key=("three",),
        max_body=2,
        memory=7,
        sessions="redis://x",
        max_new_tokens=9,
        longest_wait=20,
        slowdown=4,
    )
    limits, engine, sessions = checked_options(options)
    assert (engine.longest_wait, engine.slowdown) == (0.02, 4)
    assert (limits.max_body, limits.chat_tokens, engine.memory) == (2_000_000, 9, 7_000_000)
    assert sessions is not None and (sessions.place, sessions.quota) == ("redis://x", 2_000_000_000)
    owners = {open_guard(options).owner({"authorization": f"Bearer {key}"}) for key in ("one", "two", "three")}
    assert len(owners) == 3
    assert checked_options(ServeOptions(model=tmp_path, sessions="off"))[2] is None
