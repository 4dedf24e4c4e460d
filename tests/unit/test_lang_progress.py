"""Tools that say how far they are: what of it reaches the backend, and when."""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
from caesura.lang import (
    ScriptedBackend,
    ScriptedReply,
    assistant,
    call_tool,
    call_tools,
    durable,
    function,
    gen,
    progress_reporter,
    replay,
    report_progress,
    tool,
    user,
)
from caesura.lang.backends.scripted import ScriptedSession
from caesura.lang.progress import reporting
from caesura.lang.threads import ToolThreads


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """And with no tool so late, on a busy machine, that its word is taken for a part of the pause alone."""
    monkeypatch.setattr("caesura.lang.progress.EVERY_S", 0.01)
    monkeypatch.setattr("caesura.lang.progress.AT_ONCE_S", 60.0)


@pytest.fixture
def late(monkeypatch, impatient):
    monkeypatch.setattr("caesura.lang.progress.AT_ONCE_S", 0.01)


@function
def call(s, made):
    s += "before " + made + " after"


def reports(backend):
    return [event[2:] for event in backend.events if event[0] == "report"]


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


async def until_async(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def test_a_word_reaches_the_pause_from_a_thread_and_from_the_loop():
    backend = ScriptedBackend([])

    @tool
    def build() -> str:
        report_progress(0.25)
        until(lambda: (0.25, 0) in reports(backend))
        return "built"

    @tool
    async def crawl() -> str:
        report_progress(0.75)
        await until_async(lambda: (0.75, 0) in reports(backend))
        return "crawled"

    for made in (build, crawl):
        call.run(call_tool("x", made), backend=backend).error()
    kinds = [event[0] for event in backend.events if event[0] in ("pause", "report", "resume")]
    assert kinds == ["pause", "report", "resume"] * 2


def test_threads_of_the_tool_speak_through_what_it_gives_them():
    backend = ScriptedBackend([])

    @tool
    def build() -> str:
        report = progress_reporter()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda i: report(Decimal(i) / 4), (1, 1)))
        until(lambda: reports(backend))
        return "built"

    call.run(call_tool("x", build), backend=backend).error()
    assert set(reports(backend)) == {(0.25, 0)}
    assert all(type(fraction) is float for fraction, _ in reports(backend))


def test_each_of_several_calls_speaks_for_itself_also_those_of_a_model():
    backend = ScriptedBackend([ScriptedReply(tool_calls=[("step", {"i": 1}), ("step", {"i": 2})]), "done"])

    @tool
    def step(i: int) -> str:
        report_progress(i / 10)
        until(lambda: len(reports(backend)) == 2)
        return str(i)

    @function
    def ask(s):
        s += user("go") + assistant(gen("x", tools=[step]))

    ask.run(backend=backend).error()
    assert sorted(reports(backend)) == [(0.1, 0), (0.2, 1)]
    backend.events.clear()
    call.run(call_tools("x", [(step, 3), (step, 4)]), backend=backend).error()
    assert sorted(reports(backend)) == [(0.3, 0), (0.4, 1)]


def test_a_program_within_a_tool_reports_to_its_own_pause():
    backend, inner = ScriptedBackend([]), ScriptedBackend([])

    @tool
    def leaf() -> str:
        report_progress(0.5)
        until(lambda: reports(inner))
        return "leaf"

    @tool
    def outer() -> str:
        call.run(call_tool("x", leaf), backend=inner).error()
        report_progress(0.9)
        until(lambda: reports(backend))
        return "outer"

    call.run(call_tool("x", outer), backend=backend).error()
    assert reports(inner) == [(0.5, 0)]
    assert reports(backend) == [(0.9, 0)]


def test_the_latest_word_counts_and_one_is_under_way_at_a_time():
    async def scene():
        sent, gate = [], asyncio.Event()

        async def send(fraction):
            sent.append(fraction)
            await gate.wait()

        with reporting(send, time.monotonic()):
            for i in range(1000):
                report_progress(i / 1000)
            await until_async(lambda: sent)
            report_progress(0.9995)
            await asyncio.sleep(0.1)
            first = list(sent)
            gate.set()
            await until_async(lambda: len(sent) == 2)
        return first, sent

    first, sent = asyncio.run(scene())
    assert len(first) == 1
    assert sent == [first[0], 0.9995]


def test_no_word_comes_after_the_call_and_none_is_waited_for():
    """Neither the one under way, to a server that hangs, nor the latest, which was not begun."""
    backend = ScriptedBackend([])
    seen = []

    async def report(self, fraction, call=0):
        seen.append(fraction)
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            seen.append("given up")
            raise

    @tool
    def build() -> str:
        report_progress(0.5)
        until(lambda: seen)
        report_progress(0.6)
        return "built"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptedSession, "report", report)
        state = call.run(call_tool("x", build), backend=backend)
        state.error()
        time.sleep(0.1)  # longer than until the next word would be begun
    assert state["x"] == "built"
    assert seen == [0.5, "given up"]


@pytest.mark.usefixtures("late")
def test_a_second_attempt_speaks_of_what_is_left_and_the_first_no_more():
    """It has hardly begun when it says that half is done: what that leaves is short beside what the first took."""
    backend = ScriptedBackend([])
    first = []

    @tool(retries=1)
    def build() -> str:
        if not first:
            first.append(progress_reporter())
            time.sleep(0.3)
            raise ValueError("once more")
        first[0](0.0001)
        report_progress(0.5)
        until(lambda: reports(backend))
        return "built"

    state = call.run(call_tool("x", build), backend=backend)
    state.error()
    assert state.tool_result("x").attempts == 2
    ((fraction, number),) = reports(backend)
    assert number == 0
    assert 0.5 < fraction < 1


@pytest.mark.usefixtures("late")
def test_waiting_for_a_thread_is_none_of_the_work(monkeypatch):
    """All threads are taken for a while; then the tool has half done what it began a moment ago."""
    backend = ScriptedBackend([])
    monkeypatch.setattr("caesura.lang.toolrun.tool_threads", lambda: pool)
    pool = ToolThreads(max_threads=1)

    @tool
    def first() -> str:
        time.sleep(0.3)
        return "first"

    @tool
    def second() -> str:
        report_progress(0.5)
        until(lambda: reports(backend))
        return "second"

    call.run(call_tools("x", [(first,), (second,)]), backend=backend).error()
    ((fraction, number),) = reports(backend)
    assert number == 1
    assert 0.5 < fraction < 1


def test_a_backend_that_fails_at_it_disturbs_nobody(monkeypatch):
    heard = []

    async def report(self, fraction, call=0):
        heard.append(fraction)
        raise RuntimeError("not now")

    monkeypatch.setattr(ScriptedSession, "report", report)

    @tool
    def build() -> str:
        report_progress(0.5)
        until(lambda: heard)
        return "built"

    state = call.run(call_tool("x", build), backend=ScriptedBackend([]))
    state.error()
    assert state["x"] == "built"


def test_outside_of_a_call_it_does_nothing_and_out_of_range_it_is_refused():
    report_progress(0)
    report_progress(Decimal(1))
    for wrong in (-0.01, 1.01, math.nan, math.inf):
        with pytest.raises(ValueError, match="between 0 and 1"):
            report_progress(wrong)


def test_a_callback_of_another_task_may_speak_for_the_call():
    async def scene():
        sent = []

        async def send(fraction):
            sent.append(fraction)

        given: asyncio.Queue = asyncio.Queue()

        async def elsewhere():
            report = await given.get()
            report_progress(0.1)  # this task is older than the call, and nobody's
            report(0.2)

        other = asyncio.create_task(elsewhere())
        await asyncio.sleep(0)
        with reporting(send, time.monotonic()):
            given.put_nowait(progress_reporter())
            await other
            await until_async(lambda: sent)
        return sent

    assert asyncio.run(scene()) == [0.2]


def test_a_recorded_program_passes_it_on_and_a_replayed_one_needs_nobody(tmp_path):
    live = ScriptedBackend(["a", "b"])
    runs = []

    @tool
    def build() -> str:
        runs.append(1)
        report_progress(0.5)
        until(lambda: reports(live))
        return "built"

    @function
    def program(s):
        s += gen("a") + call_tool("x", build) + gen("b")

    path = tmp_path / "run.jsonl"
    with durable(live, path) as backend:
        program.run(backend=backend).error()
    assert reports(live) == [(0.5, 0)]
    with replay(path, strict=True) as backend:
        assert program.run(backend=backend)["x"] == "built"
    assert runs == [1]
