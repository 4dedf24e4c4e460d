"""Endings: errors, cancellation, deadlines. Whatever happens, reads tell what, nothing blocks, no session is left."""

from __future__ import annotations

import asyncio
import contextlib
import pickle  # noqa: TID251 - what process pools send errors with
import threading
import time

import pytest
from caesura.lang import (
    DeadlineExceeded,
    OutputError,
    ProgramCancelled,
    ProgramError,
    ScriptedBackend,
    ScriptedReply,
    ScriptError,
    StateError,
    assistant,
    call_tool,
    call_tools,
    function,
    gen,
    select,
    tool,
    user,
)


class Boom(Exception):
    """An error with something on it."""

    def __init__(self, message, code):
        super().__init__(message, code)
        self.code = code


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen within 5 s")


@tool
async def hang() -> str:
    await asyncio.sleep(60)
    return "never"


@tool(timeout_s=None)
def hang_in_a_thread() -> str:
    threading.Event().wait(3)
    return "never"


def test_every_read_after_a_failure_raises_the_error():
    """SGLang: a read raises KeyError, and text(), sync() and error() block for ever after the next expression."""

    @function
    def program(s):
        s += "a" + gen("ok")
        s += gen("bad")
        s += gen("later")

    backend = ScriptedBackend({"ok": "1", "bad": ScriptedReply(raises=Boom("went wrong", 7))})
    state = program.run(backend=backend)
    for read in (
        lambda: state["bad"],
        lambda: state["ok"],
        lambda: state["later"],
        state.text,
        state.messages,
        state.sync,
        lambda: state.ret_value,
        lambda: state.get_meta_info("ok"),
        lambda: list(state.text_iter()),
        lambda: state.submit(gen("more")),
    ):
        with pytest.raises(Boom, match=r"program 'program' failed at gen\('bad'\): Boom: .*went wrong") as raised:
            read()
        assert isinstance(raised.value, ProgramError)
        assert raised.value.code == 7
        assert raised.value.cause.code == 7
        assert (raised.value.program, raised.value.node) == ("program", "gen('bad')")
    assert isinstance(state.error().root, Boom)
    assert state.variables == {"ok": "1"}
    assert backend.open_sessions == 0


def test_the_body_sees_the_error_too():
    seen = []

    @function
    def program(s):
        s += gen("bad")
        try:
            s["bad"]
        except ProgramError as error:
            seen.append(error)
        try:
            s += "more"
        except ProgramError as error:
            seen.append(error)
        return "ended"

    state = program.run(backend=ScriptedBackend([]))
    assert isinstance(state.error(), ScriptError)
    assert len(seen) == 2


def test_an_exception_in_the_body():
    @function
    def program(s):
        s += gen("x")
        s["x"]
        raise Boom("in the body", 3)

    backend = ScriptedBackend(["1"])
    state = program.run(backend=backend)
    with pytest.raises(Boom, match="failed at its body"):
        state.text()
    assert backend.open_sessions == 0


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), StopIteration(5), GeneratorExit()])
def test_odd_exceptions_in_a_body_do_not_end_the_loop(error):
    @function
    def program(s):
        s += gen("x")
        raise error

    backend = ScriptedBackend(lambda p, r: "1")
    state = program.run(backend=backend)
    assert state.error().root is error or type(error).__name__ in str(state.error())

    @function
    def fine(s):
        s += gen("x")

    assert fine.run(backend=backend).text() == "1"
    assert backend.open_sessions == 0


def test_an_error_with_attributes_of_its_own_by_the_names_of_ours():
    class ParseFailed(Exception):
        @property
        def cause(self):
            return self.__cause__

    @function
    def program(s):
        raise ParseFailed("a comma is missing")

    error = program.run(backend=ScriptedBackend([])).error()
    assert isinstance(error.root, ParseFailed)
    assert "a comma is missing" in str(error)


def endings():
    yield "generating", gen("x")
    yield "in an async tool", call_tool("x", hang)
    yield "in a thread", call_tool("x", hang_in_a_thread)
    yield "in parallel tools", call_tools("x", [(hang,), (hang,)])
    yield "in several samples", gen("x", n=3)
    yield "in the tool loop", user("q") + assistant(gen("loop", tools=[hang]))


@pytest.mark.parametrize(("where", "expr"), [pytest.param(*one, id=one[0]) for one in endings()])
@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_cancel_and_deadline_free_the_session(where, expr, how):
    backend = ScriptedBackend(
        lambda p, r: ScriptedReply("", [("hang", {})]) if r.name == "loop" else ScriptedReply("x", latency_s=60)
    )

    @function
    def program(s):
        s += expr
        s["x"]

    state = program.run(backend=backend, deadline_s=0.05 if how == "deadline" else None)
    if how == "cancel":
        wait_for(lambda: backend.events and backend.events[-1][0] in ("pause", "generate"))
        state.cancel()
    kind = ProgramCancelled if how == "cancel" else DeadlineExceeded
    started = time.monotonic()
    with pytest.raises(kind, match="program 'program'"):
        state.text()
    assert time.monotonic() - started < 5
    assert backend.open_sessions == 0
    assert isinstance(state.error(), ProgramError)


def test_cancel_ends_a_body_that_waits_and_its_forks():
    ended = threading.Event()

    @function
    def program(s):
        try:
            forks = s.fork(3)
            forks += call_tool("x", hang)
            forks.join()
            s["x"]
        finally:
            ended.set()

    backend = ScriptedBackend([])
    state = program.run(backend=backend)
    wait_for(lambda: sum(event[0] == "pause" for event in backend.events) == 3)
    state.cancel()
    state.cancel()  # twice does no harm
    assert isinstance(state.error(), ProgramCancelled)
    assert ended.is_set()
    assert backend.open_sessions == 0
    state.cancel()


def test_cancel_ends_async_bodies_and_nested_programs():
    @function
    async def inner(s):
        await asyncio.sleep(60)

    @function
    def outer(s):
        other = inner.run(backend=backend)
        nested.append(other)
        s += gen("x")
        s += inner()
        other.text()

    nested = []
    backend = ScriptedBackend(["1"])
    state = outer.run(backend=backend)
    assert state["x"] == "1"
    state.cancel()
    assert isinstance(state.error(), ProgramCancelled)
    assert isinstance(nested[0].error(), ProgramCancelled)
    assert backend.open_sessions == 0


def test_a_body_that_swallows_cancellation_still_gives_its_sessions_back():
    @function
    def program(s):
        s += call_tool("x", hang)
        for _ in range(3):
            with contextlib.suppress(BaseException):
                s["x"]

    backend = ScriptedBackend([])
    state = program.run(backend=backend)
    wait_for(lambda: backend.open_sessions == 1)
    state.cancel()
    assert state.error() is not None
    assert backend.open_sessions == 0


def test_a_call_that_is_stopped_before_it_has_begun(recwarn):
    @function
    async def program(s):
        s += call_tool("x", hang)
        await asyncio.sleep(0)
        s.stop()
        await asyncio.sleep(0.01)
        return "x" in s.variables

    assert program.run(backend=ScriptedBackend()).ret_value is False
    assert [str(warning.message) for warning in recwarn if "never awaited" in str(warning.message)] == []


def test_nothing_can_be_added_after_the_end():
    @function
    def program(s):
        s += "x"

    state = program.run(backend=ScriptedBackend([]))
    state.sync()
    with pytest.raises(StateError, match="its program has ended"):
        state += gen("late")
    assert state.text() == "x"


def test_an_abandoned_generation_does_not_leak():
    """Leaving a stream early, or never reading the state at all, changes nothing for the session."""

    @function
    def program(s):
        s += gen("x")

    backend = ScriptedBackend({"x": "a b c d e f"}, piece_tokens=1)
    for _ in range(5):
        for _piece in program.run(backend=backend, stream=True).text_iter("x"):
            break
        program.run(backend=backend)
    wait_for(lambda: backend.open_sessions == 0 and len(backend.requests) == 10)


def test_a_choices_method_that_raises():
    def broken(**_):
        raise ZeroDivisionError("no scores")

    broken.requires_unconditional_logprobs = False

    @function
    def program(s):
        s += select("x", ["a", "b"], choices_method=broken)

    backend = ScriptedBackend([])
    assert isinstance(program.run(backend=backend).error(), ZeroDivisionError)
    assert backend.open_sessions == 0


def test_a_backend_that_cannot_open():
    class Closed(ScriptedBackend):
        async def open(self, **_):
            raise ConnectionError("nobody there")

    @function
    def program(s):
        s += gen("x")

    with pytest.raises(ConnectionError, match="nobody there"):
        program.run(backend=Closed([])).text()


def test_a_session_that_cannot_close_is_only_logged(caplog):
    class Sticky(ScriptedBackend):
        def _session(self, token_ids):
            session = super()._session(token_ids)

            async def close():
                raise OSError("sticky")

            session.close = close
            return session

    @function
    def program(s):
        s += gen("x")

    assert program.run(backend=Sticky(["fine"])).text() == "fine"
    assert "closing a session failed" in caplog.text


def test_errors_of_many_readers_do_not_mix():
    @function
    def program(s):
        s += gen("x")

    state = program.run(backend=ScriptedBackend([]))
    raised = []

    def read():
        try:
            state["x"]
        except ProgramError as error:
            raised.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert len({id(error) for error in raised}) == 8
    assert len({str(error) for error in raised}) == 1


def test_a_body_that_computes_long_is_named(caplog, monkeypatch):
    from caesura.lang import fibers

    monkeypatch.setattr(fibers, "SLOW_STEP_S", 0.02)

    @function
    def heavy(s):
        time.sleep(0.05)
        s += "x"

    heavy.run(backend=ScriptedBackend([])).sync()
    assert "program 'heavy' computed for" in caplog.text


def test_a_failure_crosses_process_borders():
    @function
    def program(s):
        s += gen("x")
        raise LookupError("no")

    error = pickle.loads(pickle.dumps(program.run(backend=ScriptedBackend("fine")).error()))  # noqa: S301
    assert isinstance(error, ProgramError) and isinstance(error, LookupError)
    assert (str(error.root), error.program) == ("no", "program")


def test_a_program_in_place_that_cancels_itself_fails():
    @function
    async def inner(s):
        job = asyncio.create_task(asyncio.sleep(60))
        job.cancel()
        await job

    @function
    def outer(s):
        s += inner()
        s += " after"

    state = outer.run(backend=ScriptedBackend([]))
    assert "cancelled from within" in str(state.error())


def test_a_variable_that_a_failed_attempt_was_to_set_is_not_there():
    @function
    def program(s):
        point = s.snapshot()
        s += gen("n", type=float, max_tokens=1)
        try:
            return s["n"]
        except OutputError:
            s.rollback(point)
        s.sync()
        return "n" in s

    assert program.run(backend=ScriptedBackend(["2.50"])).ret_value is False, "it was cut off"
