"""Tools that are called: by programs, side by side, and everything that can go wrong."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from caesura.lang import (
    ProgramError,
    ScriptedBackend,
    ToolError,
    ToolTimeout,
    call_tool,
    call_tools,
    function,
    gen,
    tool,
)
from caesura.lang.calls import ENDED
from caesura.lang.threads import NoToolThread, ToolThreads


@tool
def search(query: str, limit: int = 3) -> str:
    """Look a topic up."""
    return f"{limit} pages on {query}"


@tool
async def weather(city: str) -> dict[str, object]:
    """Weather of a city."""
    await asyncio.sleep(0.001)
    return {"city": city, "degrees": 21}


@function
def call(s, made):
    s += "before " + made + " after"


def run(made, backend=None):
    backend = backend or ScriptedBackend([])
    state = call.run(made, backend=backend)
    state.error()
    assert backend.open_sessions == 0
    return state, backend


# -- call_tool --------------------------------------------------------------------------------------------------


def test_a_tool_is_still_a_function_and_may_be_a_method():
    class Shop:
        def __init__(self, price):
            self.price = price

        @tool
        def cost(self, number: int) -> int:
            """Cost of a number of things."""
            return self.price * number

    assert search("x") == "3 pages on x"
    shop = Shop(7)
    assert shop.cost(3) == 21
    assert list(shop.cost.parameters["properties"]) == ["number"]
    state, _ = run(call_tool("x", shop.cost, 2))
    assert state["x"] == "14"


def test_the_pause_lies_around_the_call():
    backend = ScriptedBackend([])
    seen = []

    @tool
    def probe() -> str:
        seen.extend(event[0] for event in backend.events)
        return "result"

    state, _ = run(call_tool("x", probe), backend)
    assert state.text() == "before result after"
    assert seen == ["open", "append", "pause"]
    assert [event[0] for event in backend.events] == ["open", "append", "pause", "append", "resume", "close"]


def test_hints_reach_the_backend():
    calls = []

    class Spy(ScriptedBackend):
        def _session(self, token_ids):
            session = super()._session(token_ids)
            pause = session.pause

            async def spy(pending, *, wait="all"):
                calls.extend(pending)
                await pause(pending, wait=wait)

            session.pause = spy
            return session

    run(call_tool("x", search, "q", expected_s=1.5, timeout_s=4, retries=1), Spy([]))
    assert (calls[0].tool, calls[0].expected_s) == ("search", 1.5)
    assert calls[0].deadline_s == pytest.approx(8.05)


def test_async_tools_and_json_results():
    state, _ = run(call_tool("x", weather, city="Rome"))
    assert state["x"] == '{"city":"Rome","degrees":21}'
    result = state.tool_result("x")
    assert (result.ok, result.value, result.attempts) == (True, {"city": "Rome", "degrees": 21}, 1)
    assert result.elapsed_s > 0


def test_plain_functions_are_tools_too():
    state, _ = run(call_tool("x", lambda: None))
    assert state["x"] == "null"


def test_arguments_may_be_variables():
    @function
    def program(s):
        s += gen("topic") + ": "
        s += call_tool("found", search, s["topic"], limit=1)

    assert program.run(backend=ScriptedBackend(["cats"])).text() == "cats: 1 pages on cats"


def test_an_error_is_an_observation():
    @tool
    def broken() -> str:
        raise KeyError("no such page")

    state, _ = run(call_tool("x", broken))
    assert state["x"] == "Error: KeyError: 'no such page'"
    assert state.text() == "before Error: KeyError: 'no such page' after"
    result = state.tool_result("x")
    assert (result.ok, result.value, type(result.exception)) == (False, None, KeyError)
    assert state.error() is None
    assert state.usage().tool_errors == 1


def test_or_it_is_raised():
    @tool(on_error="raise")
    def broken() -> str:
        raise OSError("disk on fire")

    state, backend = run(call_tool("x", broken))
    with pytest.raises(ToolError, match=r"failed at call_tool\('x', broken\): ToolError: .*disk on fire") as raised:
        state.text()
    assert isinstance(raised.value, ProgramError)
    assert isinstance(raised.value.root.__cause__, OSError)
    assert "resume" in [event[0] for event in backend.events]
    assert run(call_tool("x", broken, on_error="observe"))[0]["x"].startswith("Error: OSError")


def test_retries():
    attempts = []

    @tool(retries=2)
    def flaky() -> str:
        attempts.append(1)
        if len(attempts) < 3:
            raise ConnectionError("again")
        return "done"

    state, _ = run(call_tool("x", flaky))
    assert (state["x"], state.tool_result("x").attempts) == ("done", 3)
    attempts.clear()
    state, _ = run(call_tool("x", flaky, retries=0))
    assert state.tool_result("x").attempts == 1


@pytest.mark.parametrize("kind", ["sync", "async", "stubborn"])
def test_a_hung_tool_times_out(kind):
    release = threading.Event()

    def sync() -> str:
        release.wait(30)
        return "late"

    async def gentle() -> str:
        await asyncio.sleep(30)
        return "late"

    async def stubborn() -> str:
        for _ in range(100):
            try:
                await asyncio.sleep(0.3)
            except asyncio.CancelledError:
                if release.is_set():
                    raise
        return "late"

    hung = tool(timeout_s=0.05)({"sync": sync, "async": gentle, "stubborn": stubborn}[kind])
    started = time.monotonic()
    state, _ = run(call_tool("x", hung))
    assert state["x"] == f"Error: tool {hung.name!r} gave no result within 0.05 s"
    assert time.monotonic() - started < 10
    state, _ = run(call_tool("x", hung, on_error="raise"))
    assert isinstance(state.error(), ToolTimeout)
    assert isinstance(state.error(), TimeoutError)
    release.set()


def test_ten_megabytes_are_cut_with_a_mark():
    @tool
    def big() -> str:
        return "x" * (10 << 20)

    state, _ = run(call_tool("x", big))
    assert state["x"].endswith("\n[cut: 65536 of 10485760 characters shown]")
    assert len(state["x"]) < 65536 + 100
    assert len(state.tool_result("x").value) == 10 << 20

    @tool(max_chars=10)
    def failing() -> str:
        raise ValueError("y" * (10 << 20))

    state, _ = run(call_tool("x", failing))
    assert len(state["x"]) < 100


def test_results_that_json_cannot_say():
    @tool
    def odd() -> object:
        return threading.Lock()

    state, _ = run(call_tool("x", odd))
    assert state["x"].startswith("Error: ValueError: the result is a lock, which JSON cannot express")

    @tool
    def endless() -> object:
        value: list[object] = []
        value.append(value)
        return value

    assert run(call_tool("x", endless))[0]["x"].startswith("Error: ValueError: the result is a list")


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(1)])
@pytest.mark.parametrize("is_async", [False, True])
def test_even_an_exit_does_not_end_the_loop(error, is_async):
    def sync() -> str:
        raise error

    async def coroutine() -> str:
        raise error

    state, _ = run(call_tool("x", coroutine if is_async else sync))
    assert state["x"].startswith("Error: ")
    assert run(call_tool("x", search, "q"))[0]["x"] == "3 pages on q"


def test_a_tool_that_waits_for_its_own_program_is_told():
    @function
    def program(s):
        @tool
        def curious() -> str:
            return s["x"]

        s += call_tool("x", curious)

    state = program.run(backend=ScriptedBackend([]))
    assert "no variable 'x'" in state["x"]


def test_blocking_in_an_async_tool_is_told():
    @function
    def program(s):
        @tool
        async def curious() -> str:
            return s["before"]

        @tool
        async def patient() -> str:
            return await s.get_async("before")

        s += gen("before")
        s += call_tool("x", curious)
        s += call_tool("y", patient)

    state = program.run(backend=ScriptedBackend(["hi"]))
    assert "await state.get_async(name)" in state["x"]
    assert state["y"] == "hi"


# -- call_tools -------------------------------------------------------------------------------------------------


def test_parallel_calls():
    barrier = threading.Barrier(3, timeout=5)

    @tool
    def together(i: int) -> str:
        barrier.wait()
        return str(i)

    made = call_tools("x", [(together, 0), (together, {"i": 1}), (together, 2)])
    state, backend = run(made)
    assert state["x"] == ["0", "1", "2"]
    assert state.text() == "before 0\n1\n2 after"
    assert [result.value for result in state.tool_results("x")] == ["0", "1", "2"]
    assert ("pause", 1, "together", "together", "together") in backend.events


def test_one_failure_among_parallel_calls():
    @tool
    async def broken() -> str:
        raise ValueError("no")

    state, _ = run(call_tools("x", [(search, "q"), (broken,)]))
    assert state["x"] == ["3 pages on q", "Error: ValueError: no"]
    state, _ = run(call_tools("x", [(search, "q"), (broken,)], on_error="raise"))
    assert isinstance(state.error(), ToolError)


def test_the_first_of_several_calls():
    cancelled = []

    @tool
    async def slow() -> str:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(1)
            raise
        return "slow"

    @tool
    async def broken() -> str:
        raise ValueError("no")

    state, _ = run(call_tools("x", [(slow,), (broken,), (weather, "Rome")], wait="any"))
    assert state["x"][-1] == '{"city":"Rome","degrees":21}'
    assert cancelled == [1]
    (pause,) = (span for _, span in state.trace().root.walk() if span.kind == "pause")
    assert {call.attributes["id"]: call.attributes["result"] for call in pause.children} == {
        "x-0": ENDED,
        "x-1": "Error: ValueError: no",
        "x-2": state["x"][-1],
    }
    assert state.usage().tool_calls == 2


# -- threads ------------------------------------------------------------------------------------------------------


def test_hung_threads_are_replaced_within_a_bound():
    pool = ToolThreads(max_threads=2, max_replacements=1)
    release = threading.Event()

    async def main():
        loop = asyncio.get_running_loop()
        for _ in range(3):  # two threads and their one replacement are taken and given up
            job = pool.submit(release.wait, loop)
            await asyncio.wait_for(job.started, 5)
            pool.abandon(job)
        assert pool.num_hung == 3
        with pytest.raises(NoToolThread, match="all 3 tool threads"):
            pool.submit(lambda: 1, loop)
        release.set()
        while pool.num_hung:
            await asyncio.sleep(0.01)
        return await asyncio.wait_for(pool.submit(lambda: 7, loop).done, 5)

    assert asyncio.run(main()) == 7


def test_queued_calls_fail_when_the_last_thread_hangs():
    pool = ToolThreads(max_threads=1, max_replacements=0)
    release = threading.Event()

    async def main():
        loop = asyncio.get_running_loop()
        job = pool.submit(release.wait, loop)
        await asyncio.wait_for(job.started, 5)
        waiting = pool.submit(lambda: 1, loop)
        pool.abandon(job)
        with pytest.raises(NoToolThread):
            await asyncio.wait_for(waiting.done, 5)
        release.set()

    asyncio.run(main())
