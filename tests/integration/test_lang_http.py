"""Programs on a Caesura server: the same tokens as in this process, many at once, busy servers, restarts, the CLI."""

from __future__ import annotations

import asyncio
import json
import runpy
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from caesura.lang import (
    DeadlineExceeded,
    Engine,
    HTTPBackend,
    ProgramState,
    RemoteError,
    ServerUnavailable,
    assistant,
    call_tool,
    flush_cache,
    function,
    gen,
    get_server_info,
    report_progress,
    select,
    set_default_backend,
    system,
    tool,
    unconditional_likelihood_normalized,
    user,
)
from caesura.lang.backends.engine import EngineBackend
from caesura.lang.cli.app import app as cli
from caesura.runtime.config import EngineConfig
from caesura.runtime.embedded.calculator import calculate
from caesura.runtime.errors import ContextTooLong, EngineStopped, GrammarError, InvalidRequest
from caesura.runtime.server import ServerConfig, create_app
from caesura.runtime.service import EngineService
from typer.testing import CliRunner

from tests.integration.live_server import Live, live, live_server

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineBackend]:
    """Every figure is to be the same on both ways, so the engine is deterministic."""
    with Engine(kv_tokens=1 << 14, deterministic=True, num_threads=1) as backend:
        yield backend


@pytest.fixture(scope="module")
def server(engine: EngineBackend) -> Iterator[Live]:
    with live_server(engine.service) as running:
        yield running


@pytest.fixture(scope="module")
def remote(server: Live) -> Iterator[HTTPBackend]:
    with HTTPBackend(server.url) as backend:
        yield backend


@pytest.fixture(autouse=True)
def nothing_is_left(engine: EngineBackend) -> Iterator[None]:
    yield
    for _ in range(300):
        contexts = get_server_info(engine)["contexts"]
        if not any(contexts.values()):
            return
        time.sleep(0.01)
    raise AssertionError(f"contexts are left: {contexts}")


@tool
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    return calculate(expression)


@function
def everything(s: ProgramState) -> None:
    s += system("You calculate.")
    s += user("What is 4827 * 396?")
    s += assistant(gen("answer", tools=[calculator], max_tokens=96, temperature=0))
    s += user("What is 3 + 4?")
    point = s.snapshot()
    s += assistant(
        "The answer is " + select("seven", ["7", "carrot"], choices_method=unconditional_likelihood_normalized)
    )
    s.rollback(point)
    s += assistant(gen("again", max_tokens=20, temperature=0, return_logprob=True, top_logprobs_num=2, stop="."))
    s += user("Value: ")
    s += assistant(
        gen("number", type=int, max_tokens=40, seed=3)
        + gen("shape", regex="[ab]{3}-[0-9]", seed=4)
        + gen("object", json_schema={"type": "object", "properties": {}, "additionalProperties": False}, seed=5)
        + gen("n", n=3, max_tokens=4, seed=6)
        + call_tool("tool", calculator, "12 + 30", expected_s=0.01)
        + gen("rest", max_tokens=6, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=7, ignore_eos=True,
              frequency_penalty=0.5, presence_penalty=0.1, repetition_penalty=1.1, logit_bias={40: -5.0})
    )  # fmt: skip
    forks = s.fork(2)
    forks += lambda i: f" {i}" + gen("fork", max_tokens=4, temperature=0)
    forks.join()
    s += user("tail") + assistant(gen("scored", max_tokens=2, temperature=0, return_logprob=True, logprob_start_len=5))


def _outcome(backend: Any, *, stream: bool) -> dict[str, Any]:
    flush_cache(backend)
    state = everything.run(backend=backend, stream=stream)
    pieces = "".join(state.text_iter("again"))
    with_meta = ("answer", "again", "number", "rest", "scored", "n")
    return {
        "text": state.text(),
        "pieces": pieces,
        "variables": state.variables,
        "messages": state.messages(),
        "calls": [(call.tool, call.arguments, result.text) for call, result in state.tool_calls("answer")],
        "meta": {name: state.get_meta_info(name) for name in with_meta},
        "usage": replace(state.usage(), tool_s=0.0),
    }


def test_every_token_and_figure_is_that_of_the_engine(engine: EngineBackend, remote: HTTPBackend) -> None:
    """Text, variables, messages, logprobs with their token ids, token counts and cached tokens."""
    expected = _outcome(engine, stream=False)
    assert expected["calls"] == [("calculator", expected["calls"][0][1], "1911492")]
    for stream in (False, True):
        assert _outcome(remote, stream=stream) == expected


@pytest.mark.parametrize("there", [False, True], ids=["here", "over http"])
def test_a_tool_tells_the_scheduler_how_far_it_is(engine: EngineBackend, remote: HTTPBackend, there: bool) -> None:
    told: list[float] = []

    def look() -> list[float]:
        contexts = engine.service.call_now(lambda engine: list(engine.scheduler.contexts.values()))
        return [report.fraction for context in contexts for report in context.pause.progress if report is not None]

    @tool
    def build() -> str:
        report_progress(0.25)
        end = time.monotonic() + 20
        while not told and time.monotonic() < end:
            told.extend(look())
            time.sleep(0.005)
        return "built"

    @function
    def program(s: ProgramState) -> None:
        s += "make: " + call_tool("x", build) + gen("y", max_tokens=1)

    program.run(backend=remote if there else engine).error()
    assert told == [0.25]
    assert not look()


def test_two_hundred_programs_at_once_on_one_pool(server: Live, engine: EngineBackend) -> None:
    @function
    def program(s: ProgramState, i: int) -> None:
        s += f"{i} + {i} = " + gen("x", max_tokens=1, temperature=0)
        if i % 10 == 0:
            s += call_tool("y", calculator, f"{i} + {i}") + gen("z", max_tokens=1, temperature=0)

    with HTTPBackend(server.url, max_connections=24) as backend:
        items = [{"i": i} for i in range(200)]
        states = program.run_batch(items, backend=backend, deadline_s=120)
        assert [state["y"] for state in states[::10]] == [str(2 * i) for i in range(0, 200, 10)]
    for i in (0, 77, 190):
        assert program.run(i, backend=engine).text() == states[i].text()


def test_errors_have_the_engines_kinds_and_words(engine: EngineBackend, remote: HTTPBackend) -> None:
    asks: list[tuple[type[Exception], dict[str, Any], str]] = [
        (InvalidRequest, {"stop": ["x"] * 17}, ""),
        (InvalidRequest, {"min_tokens": 9, "max_tokens": 4}, ""),
        (GrammarError, {"ebnf": "this is no grammar("}, ""),
        (ContextTooLong, {"max_tokens": 4}, "word " * 20_000),
    ]

    @function
    def program(s: ProgramState, text: str, arguments: dict[str, Any]) -> None:
        s += "a " + text + gen("x", **arguments)

    for kind, arguments, text in asks:
        failures = [program.run(text, arguments, backend=backend).error() for backend in (engine, remote)]
        roots = [failure.root for failure in failures if failure is not None]
        assert [type(root) for root in roots] == [kind, kind]
        assert str(roots[0]) == str(roots[1]), arguments


def test_an_interrupted_answer_is_rolled_back_in_the_same_context(remote: HTTPBackend) -> None:
    """The server still works on what was interrupted when the rollback comes; the client tries again."""

    @function
    async def program(s: ProgramState) -> None:
        s += "Numbers: 1 2 3"
        point = s.snapshot()
        s += gen("long", max_tokens=1500, ignore_eos=True)
        async for _ in s.text_async_iter("long"):
            break
        s.stop()
        s.rollback(point)
        s += gen("short", max_tokens=3, temperature=0)

    state = program.run(backend=remote, stream=True)
    assert state.text() == "Numbers: 1 2 3" + state["short"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_was_aborted_is_none(server: Live, remote: HTTPBackend, stream: bool) -> None:
    @function
    def program(s: ProgramState) -> None:
        s += "Numbers: 1 2 3" + gen("long", max_tokens=1500, ignore_eos=True)

    state = program.run(backend=remote, stream=stream)
    end = time.monotonic() + 20
    while not httpx.post(f"{server.url}/abort_request", json={"abort_all": True}).json()["aborted"]:
        assert time.monotonic() < end
    error = state.error()
    assert error is not None and "the request was aborted" in str(error)
    assert "long" not in state.variables


class Doorkeeper:
    """An application in front of another that refuses the first requests of every kind."""

    def __init__(self, app: Any, refusals: int, status: int, retry_after: str) -> None:
        self._app = app
        self._left: dict[str, int] = {}
        self._refusals = refusals
        self._status = status
        self._retry_after = retry_after.encode()
        self.refused = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        kind = scope["path"].rpartition("/")[2]
        left = self._left.setdefault(kind, self._refusals)
        if left <= 0:
            await self._app(scope, receive, send)
            return
        self._left[kind] -= 1
        self.refused += 1
        headers = [(b"retry-after", self._retry_after), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": self._status, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": {"message": "The request queue is full."}}'})


@function
def with_pause(s: ProgramState, work: Any = None) -> None:
    s += "The answer " + gen("x", max_tokens=3, temperature=0)
    s += call_tool("y", work or (lambda: "is"))
    s += gen("z", max_tokens=3, temperature=0)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(engine: EngineBackend, remote: HTTPBackend, status: int) -> None:
    keeper = Doorkeeper(create_app(engine.service, ServerConfig()), 2, status, "0.01")
    with live(keeper) as server, HTTPBackend(server.url) as backend:
        assert with_pause.run(backend=backend).text() == with_pause.run(backend=remote).text()
    assert keeper.refused >= 8, "contexts, append, generate, pause and resume were refused twice each"


def test_waiting_for_a_busy_server_ends_with_the_programs_deadline(engine: EngineBackend) -> None:
    keeper = Doorkeeper(create_app(engine.service, ServerConfig()), 10**6, 429, "30")
    with live(keeper) as server:
        with HTTPBackend(server.url) as backend:
            late = with_pause.run(backend=backend, deadline_s=0.2).error()
            assert late is not None and isinstance(late.root, DeadlineExceeded)
        with HTTPBackend(server.url, retry_s=0.1) as backend:
            full = with_pause.run(backend=backend).error()
    assert full is not None and isinstance(full.root, ServerUnavailable)
    assert "The request queue is full." in str(full)


def test_a_restart_in_the_middle_of_a_program_is_told_clearly(engine: EngineBackend) -> None:
    """A new server knows no contexts of the old one; a server that is gone cannot be reached; a stream that is cut
    fails; a program that starts later works again."""
    apps = (create_app(engine.service, ServerConfig()) for _ in range(4))
    server = Live(next(apps))
    server.start()
    backend = HTTPBackend(server.url, retry_s=0.3)

    def restart() -> str:
        server.stop()
        server.app = next(apps)
        server.start()
        return "restarted"

    def stop() -> str:
        server.stop()
        return "stopped"

    @function
    def streaming(s: ProgramState) -> None:
        s += "a" + gen("x", max_tokens=1900, ignore_eos=True)

    def failure(state: ProgramState) -> Exception:
        error = state.error()
        assert error is not None and isinstance(error.root, ServerUnavailable), error
        return error

    try:
        assert "no longer has this program's context" in str(failure(with_pause.run(restart, backend=backend)))
        assert with_pause.run(backend=backend).error() is None
        state = streaming.run(backend=backend, stream=True)
        next(state.text_iter("x"))
        asyncio.run(engine.service.hold(retract=False))  # else it may be done before the server gives up waiting for it
        restart()
        asyncio.run(engine.service.go_on())
        assert "run the program again" in str(failure(state))
        assert "cannot be reached" in str(failure(with_pause.run(stop, backend=backend)))
        assert "cannot be reached" in str(failure(with_pause.run(backend=backend)))
    finally:
        server.stop()
        backend.close()


def test_an_engine_that_stops_is_told_as_such() -> None:
    service = EngineService.start(EngineConfig(kv_tokens=4096, num_threads=1))
    with live_server(service) as server, HTTPBackend(server.url, retry_s=0.2) as backend:

        def die() -> str:
            service.close()
            return ""

        error = with_pause.run(die, backend=backend).error()
    assert error is not None and isinstance(error.root, EngineStopped), error
    assert "context is lost" in str(error)


def test_keys_and_strange_servers(engine: EngineBackend) -> None:
    with live_server(engine.service, api_keys=("key-of-a-user",)) as server:
        with HTTPBackend(server.url, "key-of-a-user") as backend:
            assert with_pause.run(backend=backend).error() is None
            assert get_server_info(backend)["model"] == "embedded"
        with HTTPBackend(server.url) as backend:
            error = with_pause.run(backend=backend).error()
            assert error is not None and isinstance(error.root, RemoteError) and "api_key" in str(error)

    async def other(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] in ("http", "lifespan")
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b"Not Found"})

    with live(other) as server, HTTPBackend(server.url) as backend:
        error = with_pause.run(backend=backend).error()
    assert error is not None and "this is no Caesura server" in str(error)


def test_an_address_is_a_backend(server: Live) -> None:
    assert with_pause.run(backend=server.url).error() is None
    set_default_backend(server.url)
    try:
        assert with_pause.run().error() is None
        assert get_server_info()["server"]["served_model_name"] == "embedded"
    finally:
        set_default_backend(None)


def _cli(*arguments: str, input: str | None = None) -> Any:
    return CliRunner().invoke(cli, list(arguments), input=input)


def test_examples_run_here_or_there_by_a_flag(
    server: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for extra in ([], ["--url", server.url]):
        result = _cli("run", str(EXAMPLES / "hello.py"), "--json", *extra)
        assert result.exit_code == 0, result.stderr
        texts.append(json.loads(result.stdout)["text"])
    assert texts[0] == texts[1]
    answer = _cli("run", str(EXAMPLES / "hello.py"), "--url", f"openai+{server.url}/v1?dialect=sglang")
    assert answer.exit_code == 1 and "prefill=True" in answer.stderr
    for address in (server.url, f"openai+{server.url}/v1", f"openai+{server.url}?dialect=sglang&model=any"):
        monkeypatch.setattr(sys, "argv", ["anywhere.py", address])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(EXAMPLES / "anywhere.py"), run_name="__main__")
        assert "1911492" in capsys.readouterr().out.splitlines()[-1]
    spoken = _cli("chat", "--url", server.url, input="What is 12 + 30?\n")
    assert spoken.exit_code == 0 and "calculator(expression='12 + 30')" in spoken.stdout, spoken.stderr
    assert "42" in spoken.stdout


def test_the_command_line_says_what_is_wrong_with_a_url() -> None:
    target = str(EXAMPLES / "hello.py")
    gone = _cli("run", target, "--url", "gopher://x")
    assert gone.exit_code == 2 and "http://host:port" in gone.stderr
    both = _cli("run", target, "--url", "http://127.0.0.1:9", "--policy", "lru")
    assert both.exit_code == 2 and "--policy" in both.stderr
