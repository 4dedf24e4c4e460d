"""Programs in tools, async programs in sync ones, forks after forks; calls whose values JSON does not know."""

from __future__ import annotations

import enum
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from caesura.lang import ScriptedBackend, call_tool, call_tools, function, gen, tool
from caesura.lang.dsl import invocation
from caesura.lang.toolrun import call_text
from caesura.lang.typed import output_type


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


def test_a_call_reads_the_same_in_every_process() -> None:
    code = """
from tests.unit.test_lang_nesting import *
print(call_text(invocation(leaf, ({"ann", "bob", "cyd", "dan"},), {}, None, None, None, None)))
print(call_text(invocation(leaf, ([Plain(), {(1, 2): 3}],), {}, None, None, None, None)))
"""
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PATH": ""}, cwd=Path(__file__).parents[2],
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(told) == 1
    sets, objects = map(json.loads, told.pop().splitlines())
    assert sets == {"q": ["ann", "bob", "cyd", "dan"]}
    assert objects["q"][1] == {"(1, 2)": 3}


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
