"""Numbers: a thousand programs in a few threads, batches with failures, and what importing costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from caesura.lang import (
    BatchError,
    DefinitionError,
    ProgramCancelled,
    ProgramState,
    ScriptedBackend,
    ScriptedReply,
    ScriptError,
    function,
    gen,
)


def num_threads() -> int:
    """Threads of this process as the kernel counts them."""
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else threading.active_count()


THOUSAND = """
import asyncio, json, os, threading, time
from caesura.lang import ScriptedBackend, call_tool, function, gen, tool

most = {"programs": 0, "threads": 0}
arrived = []

@tool
async def everyone() -> str:
    "Answers when all programs are here, so that all of them are in flight at once."
    arrived.append(1)
    most["threads"] = max(most["threads"], len(os.listdir("/proc/self/task")), threading.active_count())
    while len(arrived) < 1000:
        await asyncio.sleep(0.01)
    return "all here"

@tool
def blocking(i: int) -> str:
    time.sleep(0.001)
    most["threads"] = max(most["threads"], len(os.listdir("/proc/self/task")), threading.active_count())
    return f"tool {i}"

@function
def program(s, i):
    s += f"program {i} "
    s += gen("x") + " "
    s += call_tool("wait", everyone) + " "
    assert s["wait"] == "all here"
    most["programs"] = max(most["programs"], backend.open_sessions)
    s += call_tool("y", blocking, i)
    return s["y"] + s["x"]

backend = ScriptedBackend(lambda prompt, request: prompt.split()[-1])
states = [program.run(i, backend=backend) for i in range(1000)]
right = [state.ret_value for state in states] == [f"tool {i}{i}" for i in range(1000)]
print(json.dumps(most | {"right": right, "still_open": backend.open_sessions}))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_a_thousand_concurrent_programs_take_few_threads():
    """In a process of its own, so that every thread counted is there for these programs."""
    run = subprocess.run([sys.executable, "-c", THOUSAND], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(run.stdout)
    assert found["right"]
    assert found["programs"] == 1000
    assert found["still_open"] == 0
    assert found["threads"] < 20


@function
def double(s, i):
    s += f"{i} " + gen("x")
    return s["x"]


@pytest.fixture
def backend():
    """Fails for 3 and 5."""

    def reply(prompt, request):
        number = int(prompt)
        if number in (3, 5):
            raise ScriptError(f"no {number}")
        return str(2 * number)

    return ScriptedBackend(reply)


ITEMS = [{"i": i} for i in range(8)]


def test_one_failure_takes_no_result_with_it(backend):
    """In SGLang one exception loses all results."""
    with pytest.raises(BatchError, match=r"2 of 8 programs failed; the first is number 3: .*no 3") as raised:
        double.run_batch(ITEMS, backend=backend)
    assert sorted(raised.value.errors) == [3, 5]
    good = [state.ret_value for i, state in enumerate(raised.value.states) if i not in raised.value.errors]
    assert good == ["0", "2", "4", "8", "12", "14"]
    assert backend.open_sessions == 0


def test_errors_in_place(backend):
    results = double.run_batch(ITEMS, backend=backend, return_exceptions=True)
    assert [isinstance(result, ScriptError) for result in results] == [i in (3, 5) for i in range(8)]
    assert results[7].ret_value == "14"


def test_a_generator_gives_results_in_order(backend):
    results = double.run_batch(ITEMS[:3], backend=backend, generator_style=True)
    assert not isinstance(results, list)
    assert [state["x"] for state in results] == ["0", "2", "4"]
    seen = []
    with pytest.raises(BatchError):
        seen.extend(double.run_batch(ITEMS, backend=backend, generator_style=True))
    assert [state.failure is None for state in seen] == [i not in (3, 5) for i in range(8)]
    outcomes = double.run_batch(ITEMS, backend=backend, generator_style=True, return_exceptions=True)
    assert [isinstance(outcome, ProgramState) for outcome in outcomes] == [i not in (3, 5) for i in range(8)]


def test_leaving_a_generator_cancels_the_rest():
    backend = ScriptedBackend(lambda p, r: ScriptedReply("x", latency_s=0.0 if p == "0 " else 60.0))
    results = double.run_batch(ITEMS, backend=backend, generator_style=True, num_threads=3)
    first = next(results)
    assert first["x"] == "x"
    results.close()
    for _ in range(500):
        if backend.open_sessions == 0:
            break
        time.sleep(0.01)
    assert backend.open_sessions == 0
    assert len(backend.requests) <= 5


def test_the_bound_holds(backend):
    double.run_batch([{"i": 10 + i} for i in range(40)], backend=backend, num_threads=4)
    assert backend.most_open_sessions <= 4


def test_tuples_and_bad_items(backend):
    assert [state["x"] for state in double.run_batch([(1,), (2,)], backend=backend, temperature=0.5)] == ["2", "4"]
    assert backend.requests[0].request.temperature == 0.5
    with pytest.raises(DefinitionError, match="an item is int"):
        double.run_batch([1], backend=backend)
    with pytest.raises(DefinitionError, match="num_threads"):
        double.run_batch([(1,)], backend=backend, num_threads=0)
    results = double.run_batch([{"i": 1}, {"j": 1}], backend=backend, return_exceptions=True)
    assert results[0]["x"] == "2"
    assert isinstance(results[1], DefinitionError)
    assert double.run_batch([], backend=backend) == []


def test_a_progress_bar(backend, capsys):
    assert len(double.run_batch(ITEMS[:3], backend=backend, progress_bar=True)) == 3
    assert "failed" not in capsys.readouterr().out
    double.run_batch(ITEMS, backend=backend, progress_bar=True, return_exceptions=True)
    assert "(2 failed)" in capsys.readouterr().out


def test_batches_inside_programs(backend):
    @function
    def outer(s):
        states = double.run_batch(ITEMS[:3], backend=backend)
        s += "+".join(state["x"] for state in states)

    assert outer.run(backend=backend).text() == "0+2+4"


def test_a_large_fork():
    backend = ScriptedBackend(lambda prompt, request: prompt.split()[-1])

    @function
    def program(s):
        s += "root"
        forks = s.fork(300)
        forks += lambda i: f" b{i}" + gen("x")
        forks.join()

    before = num_threads()
    assert program.run(backend=backend)["x"] == [f"b{i}" for i in range(300)]
    assert num_threads() - before < 3


def test_importing_is_light_and_quick():
    code = (
        "import sys, time; t = time.process_time(); import caesura.lang; took = time.process_time() - t; "
        "heavy = {'torch', 'numpy', 'pydantic', 'rich', 'jinja2', 'caesura.runtime'} & set(sys.modules); "
        "print(took, sorted(heavy))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(" ", 1)
        for _ in range(3)
    ]
    assert all(heavy.strip() == "[]" for _, heavy in runs)
    assert min(float(took) for took, _ in runs) < 0.3


def test_a_process_may_end_while_programs_run():
    code = """
import asyncio, atexit
from caesura.lang import *
@tool
async def hang() -> str:
    await asyncio.sleep(60)
@function
def program(s):
    s += call_tool("x", hang)
    s["x"]
backend = ScriptedBackend([])
states = [program.run(backend=backend) for _ in range(20)]
while backend.open_sessions < 20: pass
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - started < 20


def test_programs_work_in_a_forked_child():
    code = """
import json
import os
from caesura.lang import *
@tool
def add(a: int, b: int) -> int:
    return a + b
@function
def program(s):
    s += gen("x") + call_tool("y", add, 1, 2)
assert program.run(backend=ScriptedBackend(["a"])).text() == "a3"
pid = os.fork()
if pid == 0:
    ok = program.run(backend=ScriptedBackend(["b"])).text() == "b3"
    os._exit(0 if ok else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0


def test_cancelled_batch_members_do_not_stop_others(backend):
    states = [double.run(i, backend=ScriptedBackend(["1"], latency_s=60.0)) for i in range(3)]
    states[1].cancel()
    assert isinstance(states[1].error(), ProgramCancelled)
    assert not states[0].done
    for state in states:
        state.cancel()
