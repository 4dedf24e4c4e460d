"""Forks that fail, never come, are dropped or have a child that fails: nobody waits for them, and errors are told."""

from __future__ import annotations

import asyncio
import time

import pytest
from caesura.lang import (
    ScriptedBackend,
    ScriptError,
    ServerUnavailable,
    StateError,
    call_tool,
    function,
    gen,
    tool,
)
from caesura.lang import core as core_module
from caesura.lang.runner import runner


@tool
async def hang():
    """Never answer."""
    await asyncio.Event().wait()


def test_a_failed_fork_fails_the_join_with_its_error():
    @function
    def program(s):
        forks = s.fork(3)
        forks += ["", "", gen("missing")]
        forks.join()
        s += "after"

    backend = ScriptedBackend({})
    state = program.run(backend=backend)
    with pytest.raises(ScriptError, match=r"join.*gen\('missing'\)"):
        state.text()
    assert backend.open_sessions == 0


def test_children_of_a_fork_that_never_came_fail_with_the_parent():
    @function
    def program(s):
        s += gen("missing")
        forks = s.fork(2)
        forks += gen("x")
        with pytest.raises(ScriptError, match="missing"):
            forks[0]["x"]

    backend = ScriptedBackend({})
    assert isinstance(program.run(backend=backend).error(), ScriptError)
    assert backend.open_sessions == 0


class NoRoom(ScriptedBackend):
    """A backend whose contexts can be computed no further once they hold something."""

    def _session(self, ids):
        session = super()._session(ids)

        async def prefill():
            raise ServerUnavailable("no room for more contexts")

        session.prefill = prefill
        return session


def test_children_of_a_fork_that_fails_fail_with_it():
    @function
    def program(s):
        s += "begin"
        forks = s.fork(2)
        forks += gen("x")
        return forks[1]["x"]

    backend = NoRoom(["1"])
    state = program.run(backend=backend)
    assert isinstance(state.error(), ServerUnavailable)
    assert "fork(2)" in str(state.error())
    assert backend.open_sessions == 0


def test_a_program_goes_on_after_a_fork_that_failed():
    @function
    def program(s):
        s += "begin"
        point = s.snapshot()
        s.sync()
        forks = s.fork(2)
        forks += gen("x")
        with pytest.raises(ServerUnavailable):
            s.sync()
        s.rollback(point)
        s += gen("y")
        return s["y"]

    state = program.run(backend=NoRoom(["1"] * 3))
    assert (state.error(), state.ret_value) == (None, "1")


def test_children_of_a_fork_that_was_dropped_fail():
    @function
    def program(s):
        s += call_tool("x", hang)
        forks = s.fork(2)
        forks += gen("y")
        runner().call(s.stop)
        with pytest.raises(StateError, match="never came"):
            forks[0]["y"]
        return "went on"

    backend = ScriptedBackend(["1"])
    assert program.run(backend=backend).ret_value == "went on"
    assert backend.open_sessions == 0


def test_a_failed_child_may_be_handled():
    @function
    def program(s):
        forks = s.fork(2)
        forks += [gen("good"), gen("missing")]
        got = []
        for fork, name in zip(forks, ("good", "missing"), strict=True):
            try:
                got.append(fork[name])
            except ScriptError:
                got.append(None)
        return got

    backend = ScriptedBackend({"good": "1"})
    assert program.run(backend=backend).ret_value == ["1", None]
    assert backend.open_sessions == 0


class Secretive(ScriptedBackend):
    """A backend that has no time to tell its decisions."""

    def _session(self, ids):
        session = super()._session(ids)

        async def decisions():
            if self.latency_s:
                await asyncio.sleep(1.0)
            raise ServerUnavailable("no room for questions")

        session.decisions = decisions
        return session


@pytest.mark.parametrize("latency_s", [0.0, 0.001])
def test_decisions_that_are_not_told_neither_fail_nor_hold_up_a_program(latency_s, monkeypatch):
    monkeypatch.setattr(core_module, "DECISIONS_S", 0.05)

    @function
    def program(s):
        s += "begin"
        forks = s.fork(3)
        forks += gen("x")
        forks.join()
        others = s.fork(3)
        others += gen("y")

    backend = Secretive(["1"] * 6, latency_s=latency_s)
    began = time.monotonic()
    state = program.run(backend=backend)
    assert state.error() is None
    assert time.monotonic() - began < 1.0
    assert state["x"] == ["1"] * 3
    assert not state.decisions()
    assert backend.open_sessions == 0
