"""Symbolic runs: what a program's nodes and its constant prefix are before anything is generated."""

from __future__ import annotations

import pytest
from caesura.lang import ScriptedBackend, function, gen, system, user


def test_a_trace_ends_where_only_a_run_knows_more():
    @function
    async def rules(s):
        s += system("Be brief.")

    @function
    def added(s, q):
        s += rules()
        s += user("Q: " + q) + gen("a")

    @function
    def called(s, q):
        rules(s)
        s += user("Q: " + q) + gen("a")

    @function
    def joined(s):
        forks = s.fork(2)
        forks += gen("x")
        forks.join("concate_and_append")
        s += "then"

    for program, told in ((added, "async"), (called, "async"), (joined, "join"), (rules, "async")):
        trace = program.trace()
        assert not trace.complete and told in trace.stopped_by
        assert trace.prefix_text == ""


def test_trace_gives_nodes_and_the_constant_prefix():
    @function
    def program(s, word):
        s += system("You are kind.")
        s += user("Say it: ")
        s += "constant"
        s += word
        s += gen("x")
        f = s.fork(2)
        f += lambda i: f"branch {i}" + gen("y")
        s += s["x"] + "end"

    trace = program.trace()
    assert trace.complete
    assert trace.prefix_text == "You are kind.Say it: constant"
    assert len(trace.branches) == 2
    assert "gen('x')" in trace.print_graph_dfs()
    assert program.trace(word="w").prefix_text == "You are kind.Say it: constantw"


def test_trace_keeps_what_came_before_a_run_time_value():
    @function
    def program(s, word):
        s += "prefix "
        s += f"{word}"

    trace = program.trace()
    assert not trace.complete
    assert "f-string" in trace.stopped_by
    assert trace.prefix_text == "prefix "


@pytest.mark.parametrize(
    "asks",
    [
        lambda value: value == "x",
        lambda value: value != "x",
        lambda value: value in ("x", "y"),
        lambda value: value in {"x", "y"},
        lambda value: "x" in value,
        lambda value: bool(value),
        lambda value: not value,
        lambda value: value < "x",
        len,
        list,
        int,
        str,
    ],
)
def test_trace_stops_where_a_value_is_asked_for(asks):
    @function
    def program(s, word):
        s += "prefix " + gen("x")
        asks(s["x"])
        s += "never"

    @function
    def branches(s, word):
        s += "prefix "
        asks(word)
        s += "never"

    for traced, name in ((program.trace(), "x"), (branches.trace(), "word")):
        assert not traced.complete
        assert traced.stopped_by == f"TraceStopped: the value of {name!r} is known only when the program runs"
        assert "never" not in traced.print_graph_dfs()
    assert program.trace() == program.trace()


def test_trace_of_a_loop_without_end_ends():
    @function
    def long(s):
        while "x" not in s:
            s += "more"

    @function
    def deep(s):
        while True:
            (s,) = s.fork(1)

    for program, why in ((long, "at most 5000 nodes"), (deep, "100 deep")):
        assert not program.trace().complete
        assert why in program._repr_html_()


def test_cache_computes_the_prefix():
    backend = ScriptedBackend()

    @function
    def program(s, word):
        s += "a long prefix "
        s += word + gen("x")

    assert program.cache(backend) == len("a long prefix ")
    assert [event[0] for event in backend.events] == ["open", "append", "prefill", "close"]
