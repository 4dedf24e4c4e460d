"""Streams: the text of a variable, or of everything, as it comes; what a rollback does to it; how they end."""

from __future__ import annotations

import asyncio

import pytest
from caesura.lang import ProgramError, ScriptedBackend, function, gen


def test_streams_in_pieces():
    backend = ScriptedBackend({"a": "one two three four five six", "b": "seven"}, piece_tokens=1)

    @function
    def program(s):
        s += "start "
        s += gen("a") + " "
        s += gen("b")

    state = program.run(backend=backend, stream=True)
    assert list(state.text_iter("a")) == ["one", " two", " three", " four", " five", " six"]
    assert "".join(state.text_iter()) == "start one two three four five six seven" == state.text()
    assert list(program.run(backend=backend).text_iter("a")) == ["one two three four five six"]
    with pytest.raises(KeyError):
        list(state.text_iter("c"))


def test_a_stream_of_what_no_model_writes_is_its_text():
    backend = ScriptedBackend({"x": "x1", "y": ["y1", "y2"]})

    @function
    def program(s):
        with s.var_scope("scope"):
            s += "all of " + gen("x")
        s.set_var("set", 3)
        forks = s.fork(2)
        forks += gen("y")
        forks.join()

    state = program.run(backend=backend)
    assert [list(state.text_iter(name)) for name in ("scope", "set", "y")] == [["all of x1"], ["3"], ["['y1', 'y2']"]]


def test_a_stream_tells_that_a_rollback_has_made_its_text_void():
    backend = ScriptedBackend({"kept": "kept1", "x": ["x1", "x2"]})

    @function
    def program(s):
        s += gen("kept")
        point = s.snapshot()
        s += gen("x")
        s.sync()
        s.rollback(point)
        s += gen("x")

    async def told(name):
        return [
            "void" if meta.get("rollback") else text
            async for text, meta in state.text_async_iter(name, return_meta_data=True)
        ]

    state = program.run(backend=backend)
    state.sync()
    assert asyncio.run(told("x")) == ["x1", "void", "x2"]
    assert asyncio.run(told("kept")) == ["kept1"]


def test_async_streams_carry_metadata():
    backend = ScriptedBackend({"a": "one two three"}, piece_tokens=1)

    @function
    def program(s):
        s += gen("a")

    async def main():
        state = program.run(backend=backend, stream=True)
        return [item async for item in state.text_async_iter("a", return_meta_data=True)]

    items = asyncio.run(main())
    assert "".join(text for text, _ in items) == "one two three"
    assert [meta["completion_tokens"] for _, meta in items] == [1, 2, 3, 3]
    assert items[-1][1]["finish_reason"] == {"type": "stop"}


def test_a_stream_ends_with_the_failure():
    @function
    def program(s):
        s += "a" + gen("x") + gen("missing")

    state = program.run(backend=ScriptedBackend({"x": "1"}), stream=True)
    with pytest.raises(ProgramError, match="missing"):
        list(state.text_iter())
