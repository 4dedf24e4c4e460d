"""Wrong usage: an error, where the mistake is written, that names the thing, the limit and what to do."""

from __future__ import annotations

import re
import threading
from typing import Any

import numpy as np
import pydantic
import pytest
from caesura.lang import (
    DefinitionError,
    Engine,
    ProgramState,
    ScriptedBackend,
    StateError,
    UnknownVariable,
    call_tool,
    call_tools,
    function,
    gen,
    select,
    set_default_backend,
    tool,
)
from caesura.lang.toolrun import call_deadline_s, expected_s


class Person(pydantic.BaseModel):
    name: str


@tool
def search(query: str) -> str:
    """Look a topic up."""
    return query


@function
def ask(s, question):
    s += question + gen("answer")
    return s["answer"]


class Desk:
    @function
    def stateless(self):
        """Somebody forgot the state."""


WRONG: list[tuple[Any, str]] = [
    (lambda: gen(128), "the name of gen is 128; the first argument is the variable"),
    (lambda: select(["a", "b"]), "the name of select is ['a', 'b']"),
    (lambda: call_tool(search, "q"), "the name of call_tool is Tool('search')"),
    (lambda: call_tools(search, [(search, "q")]), "the name of call_tools is Tool('search')"),
    (lambda: gen("x", max_tokens=5.5), "max_tokens is 5.5; it must be an int"),
    (lambda: gen("x", n=2.0), "n is 2.0; it must be an int"),
    (lambda: gen("x", temperature="hot"), "temperature is 'hot'; it must be a number"),
    (lambda: gen("x", stop=5), "stop is 5; it must be a list of str"),
    (lambda: gen("x", stop=["a", 5]), "stop is ['a', 5]; it must be a list of str"),
    (lambda: gen("x", stop=["a", ""]), "no stop string may be empty"),
    (lambda: gen("x", stop_token_ids=["a"]), "stop_token_ids is ['a']; it must be a list of int"),
    (lambda: gen("x", stop_regex="("), "stop_regex '(' cannot be compiled"),
    (lambda: gen("x", logit_bias={"a": 1}), "logit_bias is {'a': 1}; it must map token ids to numbers"),
    (lambda: gen("x", regex=re.compile("a")), "regex is re.compile('a'); it must be a str"),
    (lambda: gen("x", ebnf=5), "ebnf is 5; it must be a str"),
    (lambda: gen("x", json_schema=Person), "it must be a dict or JSON text (type= takes Python types)"),
    (lambda: gen("x", json_schema={"type": str}), "json_schema is no JSON"),
    (lambda: gen("x", choices="yes"), "choices of select('x') is 'yes'; give a list"),
    (lambda: gen("x", choices=["1"], type=int), "choices and type are given; a generation is held to one of them"),
    (lambda: gen("x", choices=["1"], tools=[search]), "choices and tools are given"),
    (lambda: gen("x", tools=search), "tools of gen('x') is Tool('search'); give a list of tools"),
    (
        lambda: gen("x", tools=[ask]),
        "'ask' is a program, no tool; give a function that runs it: ask.run(...).ret_value",
    ),
    (lambda: gen("x", tools=[search], max_tool_rounds=1.5), "max_tool_rounds is 1.5; it must be an int"),
    (lambda: call_tool("x", ask, "q"), "'ask' is a program, no tool"),
    (lambda: call_tool("x", search, gen("q")), "gen('q'), whose value is not known yet"),
    (lambda: call_tool("x", search, "q", timeout_s="5"), "timeout_s of a call of 'search' is '5'; it must be a number"),
    (lambda: call_tool("x", search, "q", retries=1.5), "retries of a call of 'search' is 1.5; it must be an int"),
    (lambda: call_tool("x", search, "q", expected_s=-1), "expected_s of a call of 'search' is -1"),
    (lambda: call_tools("x", search), "calls of call_tools('x') is Tool('search'); give a list of (tool, args...)"),
    (lambda: tool(expected_s="5")(search.function), "expected_s of tool 'search' is '5'; it must be a number"),
    (lambda: tool(timeout_s=float("inf"))(search.function), "timeout_s of tool 'search' is inf"),
    (lambda: function(tools=search)(ask.func), "tools of program 'ask' is Tool('search'); give a list"),
    (lambda: function(tools=[search, search])(ask.func), "two tools of program 'ask' have one name"),
    (
        lambda: ask.run("q", max_tokens=5),
        "takes no argument 'max_tokens'; its own are: question; did you mean 'max_new",
    ),
    (lambda: ask.run("q", qwertz=5), "every run takes stream, backend, use_thread, deadline_s, namespace and sampling"),
    (
        lambda: ask.run_batch([("q",)], num_thread=4),
        "takes no argument 'num_thread'; its own are: question; did you mean 'num_th",
    ),
    (lambda: ask.run_batch({"question": "q"}), "the items are {'question': 'q'}; give a list of dicts"),
    (lambda: ask.run_batch(None), "the items are None; give a list of dicts"),
    (lambda: Desk().stateless, "program 'stateless' needs a parameter after self, which becomes the state"),
    (lambda: gen("x", type=threading.Lock), "has no JSON schema"),
    (lambda: ask.run("q", deadline_s="5"), "deadline_s is '5'; it must be a number above 0"),
    (lambda: ask.run("q", backend=ScriptedBackend), "ScriptedBackend'>; it must be an object, as Engine() gives one"),
    (lambda: Engine(polcy="min_waste"), "unexpected keyword argument 'polcy'; its options are model, revision,"),
    (lambda: Engine(kv_tokens="1000"), "'int' and 'str'; its options are model, revision,"),
    (lambda: ask.run("q", backend=Engine), "it must be an object, as Engine() gives one"),
]


@pytest.mark.parametrize(("make", "told"), WRONG, ids=[told for _, told in WRONG])
def test_a_mistake_is_told_where_it_is_written(make, told):
    with pytest.raises(DefinitionError, match=re.escape(told)) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_numbers_and_lists_of_other_libraries_are_no_mistakes():
    class Indexed:
        """As torch's data sets are: without ``__iter__``."""

        def __getitem__(self, i):
            return [("a",), ("b",)][i]

    def body(s):
        s += gen("x", stop_token_ids=np.array([1, 2]), temperature=np.float64(0.5))
        s += call_tool("found", search, "q", timeout_s=np.float32(5), retries=np.int64(1), expected_s=np.float32(1))
        s.fork(np.int64(2)).join()

    backend = ScriptedBackend("fine")
    state = function(body).run(backend=backend, deadline_s=np.float32(60))
    assert state.error() is None
    asked = backend.requests[0].request
    assert asked.stop_token_ids == (1, 2)
    assert {type(token) for token in asked.stop_token_ids} == {int}
    call = call_tool("found", search, "q", timeout_s=np.float32(5), expected_s=np.int64(1)).call
    assert {type(expected_s(call)), type(call_deadline_s(call))} == {float}, "remote backends write them as JSON"
    assert gen("x", tools=[search], max_tool_rounds=np.int64(2)).max_tool_rounds == 2
    assert [state["answer"] for state in ask.run_batch(Indexed(), backend=backend)] == ["fine"] * 2


def run(body: Any, *replies: str) -> ProgramState:
    """Run a body whose mistakes are its own to catch."""
    backend = ScriptedBackend(list(replies))
    state = function(body).run(backend=backend)
    state.sync()
    assert backend.open_sessions == 0
    return state


def test_mistakes_with_states():
    def body(s):
        with pytest.raises(DefinitionError, match="call it, and add what it gives"):
            s += ask
        with pytest.raises(StateError, match=r"rollback to 'x': give what snapshot\(\) gave"):
            s.rollback("x")
        with pytest.raises(StateError, match="fork size is '2'; it must be an int of at least 1"):
            s.fork("2")
        with pytest.raises(UnknownVariable, match="no variable 'x' in program 'body'; there are: none"):
            s["x"]

    state = run(body)
    with pytest.raises(UnknownVariable, match="no variable 0"):
        list(state)


def test_what_a_program_gives_in_a_program_is_no_state():
    def body(s):
        with pytest.raises(AttributeError, match=r"no attribute 'ret_value': inside a program, ask\(...\) is an exp"):
            ask("q").ret_value  # noqa: B018
        s += ask("q")
        return s["answer"]

    assert run(body, "fine").ret_value == "fine"


def test_forks_are_joined_while_their_program_runs():
    def body(s):
        forks = s.fork(2)
        forks.join()
        with pytest.raises(StateError, match="a fork cannot be joined: it was joined already"):
            forks.join()
        return s.fork(2)

    with pytest.raises(StateError, match="a fork cannot be joined: its program has ended"):
        run(body).ret_value.join()


def test_a_default_backend_that_is_none():
    set_default_backend(Engine)  # type: ignore[arg-type]
    try:
        with pytest.raises(DefinitionError, match="it must be an object"):
            ask.run("q")
    finally:
        set_default_backend(None)


def test_a_script_of_one_answer_is_for_every_time():
    backend = ScriptedBackend("always this")
    assert [ask.run("q", backend=backend).ret_value for _ in range(2)] == ["always this"] * 2
