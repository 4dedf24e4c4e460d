"""Durable runs: nothing is done twice by a program that is run again after it was stopped, wherever that was."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import sys
import time

import pytest
from caesura.lang import (
    ReplayError,
    ScriptedBackend,
    ScriptedReply,
    ToolTimeout,
    assistant,
    call_tool,
    call_tools,
    durable,
    function,
    gen,
    record,
    replay,
    select,
    tool,
    user,
)
from caesura.lang.errors import NoRecording


def reply(prompt, request):
    if request.name == "plan" and "<|tool" not in prompt.split("<|user|>")[-1]:
        return ScriptedReply("Hm.", [("ask", {"what": "one"}), ("ask", {"what": "two"})])
    return f"{request.name}{len(prompt)}"


asked = []


@tool
def ask(what: str) -> dict[str, str]:
    """Ask a person."""
    asked.append(what)
    return {"said": what.upper()}


@tool
async def hangs() -> str:
    """Never answer."""
    await asyncio.Event().wait()
    return ""


@function
def long(s):
    s += user("Go.")
    s += assistant(gen("plan", tools=[ask]))
    s += user("And?")
    forks = s.fork(3)
    for i, fork in enumerate(forks):
        fork += assistant("I " + gen("idea") + call_tool("said", ask, f"fork {i}"))
    forks.join()
    point = s.snapshot()
    s += assistant(gen("draft", n=2))
    s.rollback(point)
    s += user("Which?")
    s += assistant(select("which", ["the first", "the second"]))
    s += call_tools("race", [(hangs,), (ask, "race")], wait="any")
    s += "\n" + call_tool("last", ask, "last") + gen("end")
    return [s.tool_result("last").value, s["idea"]]


def outcome(state):
    return state.error(), state.text(), state.variables, state.messages(), state.ret_value


def test_a_run_that_was_stopped_anywhere_goes_on_and_does_nothing_twice(tmp_path):
    whole = tmp_path / "whole.jsonl"
    asked.clear()
    with durable(ScriptedBackend(reply), whole) as backend:
        state = long.run(backend=backend)
        expected = outcome(state)
    assert expected[0] is None
    assert expected[-1] == [{"said": "LAST"}, expected[2]["idea"]]
    everything, lines = sorted(asked), whole.read_bytes().splitlines(keepends=True)
    for cut in range(len(lines) + 1):
        path = tmp_path / f"{cut}.jsonl"
        torn = lines[cut][: len(lines[cut]) // 2] if cut < len(lines) else b""  # a crash in the middle of a write
        path.write_bytes(b"".join(lines[:cut]) + torn)
        finished = [line for line in lines[:cut] if key_of(line).startswith(("tool", "race"))]
        asked.clear()
        live = ScriptedBackend(reply)
        with durable(live, path) as backend:
            assert outcome(long.run(backend=backend)) == expected
        assert len(asked) == len(everything) - len(finished)
        assert len(live.requests) == sum(key_of(line).startswith("generate") for line in lines[cut:])
        assert live.open_sessions == 0
        assert sorted(map(key_of, path.read_bytes().splitlines())) == sorted(map(key_of, lines))
        asked.clear()
        with replay(path, strict=True) as backend:
            assert outcome(long.run(backend=backend)) == expected
        assert asked == []


@pytest.mark.parametrize("content", ['{"precious": [1, 2, 3]}', "a note\n", "\n", '{"precious": 1}\n{"key": "x'])
def test_a_file_that_is_no_recording_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    for begin in (durable, record):
        with pytest.raises(ReplayError, match="no recording"):
            begin(ScriptedBackend([]), path)
    assert path.read_text() == content


def key_of(line):
    return json.loads(line)["key"]


def test_a_process_killed_while_a_person_is_asked_is_run_again(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(
        """
import sys, time
from pathlib import Path
from caesura.lang import ScriptedBackend, call_tool, durable, function, gen, tool

marks, answer = Path("marks"), Path("answer")

def mark(text):
    with marks.open("a") as file:
        file.write(text + "\\n")

def reply(prompt, request):
    mark("model " + request.name)
    return f" {request.name} "

@tool
def look():
    mark("look")
    return "seen"

@tool(timeout_s=None)
def person():
    mark("person")
    while not answer.exists():
        time.sleep(0.01)
    return answer.read_text()

@function
def program(s):
    s += "A" + gen("one") + call_tool("seen", look) + gen("two") + call_tool("said", person) + gen("three")

with durable(ScriptedBackend(reply), "run.jsonl") as backend:
    print(program.run(backend=backend).text())
"""
    )
    command = [sys.executable, str(script)]
    first = subprocess.Popen(command, cwd=tmp_path)
    marks = tmp_path / "marks"
    end = time.monotonic() + 60
    while not marks.exists() or "person" not in marks.read_text():
        assert first.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    with pytest.raises(ReplayError, match="being written to by another run"):
        durable(ScriptedBackend([]), tmp_path / "run.jsonl")
    first.kill()
    first.wait()
    (tmp_path / "answer").write_text("yes")
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert again.stdout == "A one seen two yes three \n"
    assert marks.read_text().split("\n")[:-1] == ["model one", "look", "model two", "person", "person", "model three"]


def test_another_model_goes_on_from_the_text(tmp_path, caplog):
    path = tmp_path / "run.jsonl"
    begun = durable(ScriptedBackend(reply), path)

    @function
    def short(s, further):
        s += "A" + gen("one")
        if further:
            s += "B" + gen("two")

    assert short.run(False, backend=begun).error() is None
    begun.close()

    class Other(ScriptedBackend):
        async def server_info(self):
            return {"model": "another"}

    live = Other(reply)
    with durable(live, path) as backend:
        assert short.run(True, backend=backend).text() == "Aone1Btwo6"
    assert "going on with ['another']" in caplog.text


def test_a_late_tool_is_late_again(tmp_path):
    @function
    def waits(s):
        s += call_tool("it", hangs, timeout_s=0.01, on_error="raise")

    for make in (lambda path: durable(ScriptedBackend([]), path), replay):
        assert isinstance(waits.run(backend=make(tmp_path / "late.jsonl")).error(), ToolTimeout)


def test_a_change_is_warned_of_when_a_run_goes_on(tmp_path, caplog):
    @function
    def asks(s, what):
        s += call_tool("it", ask, what)

    for what in ("a", "b"):
        with durable(ScriptedBackend([]), tmp_path / "run.jsonl") as backend:
            assert asks.run(what, backend=backend).error() is None
    assert "1 recorded answers were not asked for; the first: call ask" in caplog.text


@function
def pays(s):
    s += "Pay." + call_tool("it", ask, "money")


def test_an_answer_is_written_in_full_or_the_run_says_that_it_is_not(tmp_path, monkeypatch):
    path, write, room = tmp_path / "run.jsonl", os.write, 10_000

    def written_in_parts(fd, data):
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room -= (done := write(fd, data[: min(50, room)]))
        return done

    monkeypatch.setattr("caesura.lang.backends.tape.os.write", written_in_parts)
    with durable(ScriptedBackend([]), path) as backend:
        assert pays.run(backend=backend).error() is None
    whole = path.read_bytes()
    room = len(whole) - 5
    with record(ScriptedBackend([]), path) as backend:
        error = pays.run(backend=backend).error()
    assert isinstance(error, NoRecording)
    assert "No space left on device; what it lacks: call ask" in str(error)
    kept = path.read_bytes()
    assert kept.endswith(b"}\n")
    assert whole.count(b"\n") == kept.count(b"\n") + 1


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "run.jsonl"
    with durable(ScriptedBackend([]), path) as backend:
        assert pays.run(backend=backend).error() is None
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"attempts"', b'"tempts"'))
    with replay(path) as backend:
        error = pays.run(backend=backend).error()
    assert isinstance(error, NoRecording)
    assert f"{path}, line 2 (call ask" in str(error)
    assert "no field 'attempts'" in str(error)
    path.write_bytes(whole[:-9])
    with replay(path) as backend:
        assert "ends in a torn line" in str(pays.run(backend=backend).error())
