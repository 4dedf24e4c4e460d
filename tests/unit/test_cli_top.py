"""``caesura top`` against a server of canned answers: what it shows, and what it says when it cannot."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import msgspec
import pytest
from caesura.lang.cli.app import app
from caesura.lang.cli.top_command import Lost, StateSource
from caesura.lang.cli.top_view import top_view
from caesura.runtime.history import History
from caesura.runtime.snapshot import take_snapshot
from rich.console import Console
from typer.testing import CliRunner, Result

from tests.sim.agents import World, populate

KEY = "sk-admin-0123456789"
EVIL = "\x1b]0;owned\x07[red]calc[/red]<script>"


def picture(agents: int) -> dict[str, Any]:
    """An engine's answer, in the middle of simulated work."""
    world, history = World("min_waste"), History()
    world.engine.observers.append(history)
    populate(world, agents)
    world.sim.run(until_s=1.5)
    engine = msgspec.to_builtins(take_snapshot(world.engine, history))
    server = {"model": "simulated", "uptime_s": 75.0, "draining": False, "requests": 0, "kept_contexts": 0}
    return {"server": server, "engine": engine}


class Canned(HTTPServer):
    """Answers every request with ``status`` and ``body`` and notes what was asked."""

    status = 200
    body: bytes = b""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Canned

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["authorization"]))
        self.send_response(self.server.status)
        self.send_header("location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Canned]:
    canned = Canned()
    thread = threading.Thread(target=canned.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield canned
    canned.shutdown()
    thread.join(timeout=10)
    canned.server_close()


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["top", *arguments])


def test_once_shows_contexts_pools_decisions_and_tools(server: Canned) -> None:
    state = picture(24)
    server.body = json.dumps(state).encode()
    done = invoke("--url", server.url)  # no terminal: once without asking
    assert done.exit_code == 0, done.output
    assert done.stdout == invoke("--url", server.url, "--once").stdout
    for word in ("simulated", "min_waste", "75 s", "device", "host", "tokens/s", "waits for", "keep", "drop", "median"):
        assert word in done.stdout, word
    assert all(f"#{context['id']}" in done.stdout for context in state["engine"]["contexts"])
    assert "\x1b" not in done.stdout, "no colours where there is no terminal"


def test_json_is_the_servers_answer(server: Canned) -> None:
    state = picture(6)
    server.body = json.dumps(state).encode()
    assert json.loads(invoke("--url", server.url, "--json").stdout) == json.loads(server.body)


def test_the_key_goes_in_a_header_alone(server: Canned) -> None:
    server.body = json.dumps(picture(2)).encode()
    assert invoke("--url", server.url, "--key", KEY, "--once").exit_code == 0
    assert CliRunner(env={"CAESURA_KEY": KEY, "CAESURA_URL": server.url}).invoke(app, ["top", "--once"]).exit_code == 0
    assert [key for _, key in server.asked] == [f"Bearer {KEY}"] * 2
    assert not any(KEY in path for path, _ in server.asked)


@pytest.mark.parametrize(
    ("status", "key", "words", "code"),
    [
        (401, None, "asks for a key", 2),
        (401, KEY, "does not know this key", 2),
        (403, KEY, "an admin key may", 2),
        (404, None, "is no Caesura server", 2),
        (503, None, "restarting", 3),
        (500, None, "answers 500", 3),
        (302, KEY, "answers 302", 3),
        (200, None, "no state of an engine", 2),
    ],
)
def test_every_refusal_says_what_to_do(server: Canned, status: int, key: str | None, words: str, code: int) -> None:
    server.status, server.body = status, b'{"not": "a state"}'
    done = invoke("--url", server.url, *(["--key", key] if key else []))
    assert done.exit_code == code
    assert words in done.stderr and "try: " in done.stderr and "Traceback" not in done.stderr
    assert KEY not in done.stderr
    assert len(server.asked) == 1, "no redirect is followed: it would carry the key away"


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "http://a:b@host", "http://host:99999999", "http://host:x", "://"]
)
def test_a_bad_address_is_the_callers_mistake(url: str) -> None:
    done = invoke("--url", url)
    assert done.exit_code == 2 and "is no server's address" in done.stderr


def test_an_unreachable_server_is_an_error_and_not_a_traceback(server: Canned) -> None:
    port = server.server_port
    server.shutdown()
    server.server_close()
    done = invoke("--url", f"127.0.0.1:{port}")
    assert done.exit_code == 3 and "does not answer" in done.stderr and "caesura serve" in done.stderr
    server.socket = socket.socket()  # the fixture closes it once more


def test_a_source_follows_the_engine_and_starts_anew_after_a_restart(server: Canned) -> None:
    source = StateSource(server.url, None)
    first = picture(24)
    server.body = json.dumps(first).encode()
    source.read()
    kept = len(source.decisions)
    assert kept == len(first["engine"]["decisions"][-64:]) > 0
    engine = first["engine"]
    assert server.asked[0][0].endswith("life=&since=0")
    server.status = 503
    with pytest.raises(Lost):
        source.read()
    assert server.asked[1][0].endswith(f"life={engine['life']}&since={engine['cursor']}")
    server.status, server.body = 200, json.dumps(picture(0)).encode()
    source.read()
    assert source.decisions == []


def drawn(state: dict[str, Any], *, width: int = 100, height: int | None = None, lost: str | None = None) -> str:
    class Past:
        url = "http://here"
        samples = state["engine"]["samples"]
        decisions = [entry["decision"] for entry in state["engine"]["decisions"]]

    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    console.print(top_view(Past, state, lost, height))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_names_do_not_steer_the_terminal() -> None:
    state = picture(6)
    state["server"]["model"] = state["engine"]["policy"] = EVIL
    for context in state["engine"]["contexts"]:
        context["tool"] = context["state"] = EVIL
    state["engine"]["tools"] = [{"tool": EVIL, "calls": 1, "waiting": 1, "median_s": 0.1, "longest_s": 1.0}]
    for entry in state["engine"]["decisions"]:
        entry["decision"]["action"] = EVIL
    text = drawn(state, width=160, lost=EVIL)
    assert "\x1b" not in text and "\x07" not in text
    assert "[red]calc[/red]<script>" in text, "markup is not read"


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("agents", [0, 3, 40])
def test_it_fits_the_terminal(width: int, agents: int) -> None:
    text = drawn(picture(agents), width=width, height=40, lost="http://here does not answer")
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 40 or width < 80
    assert "trying again" in text
