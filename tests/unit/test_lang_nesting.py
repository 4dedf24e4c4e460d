"""Programs in tools, async programs in sync ones, forks after forks; calls whose values JSON does not know."""

from __future__ import annotations

import enum
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from caesura.lang import ScriptedBackend, call_tool, call_tools, function, gen, tool
from caesura.lang.dsl import invocation
from caesura.lang.toolrun import call_text
from caesura.lang.typed import output_type
from pydantic import BaseModel


@tool
def leaf(q: str) -> str:
    return "leaf " + q


@function
def sub(s: Any, q: str) -> None:
    s += call_tool("r", leaf, q)


@tool(timeout_s=10)
def ask(q: str) -> str:
    return str(sub.run(q)["r"])


def test_tools_that_run_programs_do_not_wait_for_each_other() -> None:
    @function
    def many(s: Any, q: str) -> None:
        s += call_tool("a", ask, q)
        s += call_tools("b", [(ask, f"{q}.{n}") for n in range(13)])

    states = many.run_batch([{"q": str(n)} for n in range(14)], backend=ScriptedBackend())
    for n, state in enumerate(states):
        assert state["a"] == f"leaf {n}"
        assert state["b"] == [f"leaf {n}.{m}" for m in range(13)]


def test_an_async_program_called_from_a_sync_one_runs_at_once() -> None:
    @function
    async def deeper(s: Any) -> str:
        s += gen("x")
        return str(await s.get_async("x"))

    @function
    async def inner(s: Any) -> str:
        s += "<"
        found = await deeper(s)
        s += ">"
        return found

    @function
    def outer(s: Any) -> str:
        found = inner(s)
        s += "after"
        return found

    state = outer.run(backend=ScriptedBackend(["told"]))
    assert state.text() == "<told>after"
    assert state.ret_value == "told"


def test_each_join_brings_what_its_children_have_set() -> None:
    @function
    def rounds(s: Any) -> list[Any]:
        s += gen("kept")
        seen = []
        for _ in range(2):
            forks = s.fork(2)
            forks += gen("t")
            forks.join()
            seen.append(s["t"])
        return [*seen, s["kept"]]

    state = rounds.run(backend=ScriptedBackend(["k", "a", "b", "c", "d"]))
    assert state.ret_value == [["a", "b"], ["c", "d"], "k"]


@pytest.mark.parametrize("how", ["program", "text", "tool"])
def test_a_forks_node_reads_its_parent_while_that_joins(how: str) -> None:
    @tool
    def look() -> str:
        return str(parent[0]["topic"])

    @function
    def branch(b: Any) -> None:
        b.set_var("t", parent[0].text() if how == "text" else parent[0]["topic"])

    @function
    def main(s: Any) -> None:
        parent.append(s)
        s += gen("topic")
        forks = s.fork(2)
        forks += call_tool("t", look) if how == "tool" else branch()
        forks.join()
        s += gen("topic")

    parent: list[Any] = []
    state = main.run(backend=ScriptedBackend(["pauses", "rests"]), deadline_s=3)
    assert state.error() is None
    assert (state["t"], state["topic"]) == (["pauses"] * 2, "rests")


def test_programs_in_forks_read_what_the_other_fork_has_said() -> None:
    @function
    def critique(b: Any, peer: Any) -> None:
        b += "Other: " + peer["draft"] + gen("final")

    @function
    def main(s: Any) -> None:
        forks = s.fork(2)
        forks += gen("draft")
        forks += lambda i: critique(peer=forks[1 - i])
        forks.join()

    def answer(prompt: str, request: Any) -> str:
        return "mine" if request.name == "draft" else prompt

    state = main.run(backend=ScriptedBackend(answer), deadline_s=3)
    assert state.error() is None
    assert state["final"] == ["mineOther: mine"] * 2


def test_a_forks_node_waits_for_what_its_parent_sets_before_the_join() -> None:
    @function
    def branch(b: Any) -> None:
        b.set_var("seen", parent[0]["plan"])

    @function
    def main(s: Any) -> None:
        parent.append(s)
        s += gen("plan")
        forks = s.fork(2)
        forks += branch()
        s += gen("plan")
        forks.join()
        s += gen("plan")

    parent: list[Any] = []
    state = main.run(backend=ScriptedBackend(["1", "2", "3"], latency_s=0.01), deadline_s=3)
    assert state.error() is None
    assert (state["seen"], state["plan"]) == (["2", "2"], "3")


def test_a_childs_read_waits_for_programs_rollbacks_and_joins() -> None:
    @function
    def refine(s: Any) -> None:
        s += gen("draft")

    @function
    def main(s: Any) -> list[Any]:
        s += gen("draft")
        (fork,) = s.fork(1)
        point = fork.snapshot()
        fork += refine()
        seen = [fork["draft"]]
        fork.rollback(point)
        seen.append(fork["draft"])
        inner = fork.fork(2)
        inner += gen("draft")
        inner.join()
        return [*seen, fork["draft"]]

    state = main.run(backend=ScriptedBackend(["1", "2", "3", "4"], latency_s=0.01), deadline_s=3)
    assert state.ret_value == ["2", "1", ["3", "4"]]


def test_a_childs_rollback_forgets_that_it_has_set_a_variable() -> None:
    @function
    def main(s: Any) -> Any:
        s += gen("x")
        forks = s.fork(2)
        for fork in forks:
            point = fork.snapshot()
            fork += gen("x")
            fork.rollback(point)
        forks.join()
        return s["x"]

    assert main.run(backend=ScriptedBackend(["old", "a", "b"])).ret_value == "old"


def test_a_tool_may_have_a_parameter_called_name() -> None:
    @tool
    def greet(name: str, tool: str) -> str:
        return f"{name} {tool}"

    @function
    def program(s: Any) -> None:
        s += call_tool("x", greet, name="Bob", tool="hammer")

    assert program.run(backend=ScriptedBackend())["x"] == "Bob hammer"


class Plain:
    pass


@dataclass
class Order:
    tags: set[str]


class Model(BaseModel):
    tags: set[str]


def test_a_call_reads_the_same_in_every_process() -> None:
    code = """
from tests.unit.test_lang_nesting import *
print(call_text(invocation(leaf, ({"ann", "bob", "cyd", "dan"},), {}, None, None, None, None)))
print(call_text(invocation(leaf, ([Plain(), {(1, 2): 3}],), {}, None, None, None, None)))
tags = {"ann", "bob", "cyd", "dan"}
print(call_text(invocation(leaf, ([Order(tags), Model(tags=tags)],), {}, None, None, None, None)))
"""
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PATH": ""}, cwd=Path(__file__).parents[2],
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(told) == 1
    sets, objects, records = map(json.loads, told.pop().splitlines())
    assert sets == {"q": ["ann", "bob", "cyd", "dan"]}
    assert objects["q"][1] == {"(1, 2)": 3}
    assert records["q"] == [{"tags": ["ann", "bob", "cyd", "dan"]}] * 2


def test_a_value_that_holds_itself_is_told_all_the_same() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert json.loads(call_text(invocation(leaf, (endless,), {}, None, None, None, None))) == {"q": "[[...]]"}


class Colour(enum.Enum):
    RED = "red"
    CRIMSON = "red"  # noqa: PIE796 - an alias
    BLUE = " blue"


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Literal[" yes", " no"], " yes", " yes"),
        (Literal["yes", "no"], " yes\n", "yes"),
        (Colour, "red", Colour.RED),
        (Colour, " blue", Colour.BLUE),
    ],
)
def test_choices_may_begin_with_a_blank_and_have_second_names(kind: Any, text: str, value: Any) -> None:
    assert output_type(kind).parse(text) == value
