"""Programs: how they are defined, called, bound, traced and nested."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest
from caesura.lang import (
    DefinitionError,
    NoBackend,
    ProgramError,
    ScriptedBackend,
    UnknownVariable,
    function,
    gen,
    select,
    set_default_backend,
)


def echo(prompt: str, request: object) -> str:
    return f"<{request.name}>"  # type: ignore[attr-defined]


@pytest.fixture
def backend():
    backend = ScriptedBackend(echo)
    yield backend
    assert backend.open_sessions == 0


@function
def question(s, topic, n=2):
    """Ask."""
    s += f"About {topic}: "
    s += gen("first") + " and " + gen("second")
    return n * 2


def test_run_returns_a_state_that_waits(backend):
    state = question.run("cats", backend=backend)
    assert state["first"] == "<first>"
    assert state.text() == "About cats: <first> and <second>"
    assert state.ret_value == 4
    assert state.error() is None
    assert state.done


def test_call_outside_a_program_runs_it(backend):
    set_default_backend(backend)
    try:
        assert question("cats", n=5).ret_value == 10
    finally:
        set_default_backend(None)


def test_no_backend_says_what_to_do():
    with pytest.raises(NoBackend, match=r"set_default_backend"):
        question.run("cats")


def test_wrong_arguments_are_told_at_once(backend):
    with pytest.raises(DefinitionError, match="missing a required argument: 'topic'"):
        question.run(backend=backend)
    with pytest.raises(DefinitionError, match="takes no argument 'topik'"):
        question.run(topik="x", backend=backend)
    with pytest.raises(DefinitionError, match="temperature is -1"):
        question.run("x", temperature=-1, backend=backend)


def test_a_program_may_own_a_name_that_run_also_has(backend):
    @function
    def clash(s, stop, n):
        s += f"{stop}{n}"

    assert clash.run(stop="!", n=3, backend=backend).text() == "!3"


def test_run_arguments_are_defaults_of_gen(backend):
    @function
    def two(s):
        s += gen("a") + gen("b", max_tokens=7, temperature=0.5)

    two.run(backend=backend, max_new_tokens=50, temperature=0.1, top_p=0.9, stop="#").sync()
    a, b = (record.request for record in backend.requests)
    assert (a.max_tokens, a.temperature, a.top_p, a.stop) == (50, 0.1, 0.9, ("#",))
    assert (b.max_tokens, b.temperature, b.top_p) == (7, 0.5, 0.9)


def test_defaults_are_sglangs(backend):
    @function
    def plain(s):
        s += gen("a")

    plain.run(backend=backend).sync()
    request = backend.requests[0].request
    assert (request.max_tokens, request.temperature, request.top_p, request.top_k) == (128, 1.0, 1.0, -1)


def test_methods_and_any_name_for_the_state(backend):
    class Agent:
        def __init__(self, name):
            self.name = name

        @function
        def greet(self, anything, other):
            anything += f"{self.name} greets {other}: " + gen("words")
            return self.name

    state = Agent("Ada").greet.run("Bob", backend=backend)
    assert state.text() == "Ada greets Bob: <words>"
    assert state.ret_value == "Ada"
    assert Agent("Eve").greet.arg_names == ["other"]


def test_async_programs_may_await_and_read(backend):
    @function
    async def slow(s, word):
        s += word
        await asyncio.sleep(0.001)
        s += gen("x")
        seen = s["x"]  # a blocking read in a coroutine: the loop goes on
        async with asyncio.timeout(5):
            s += await asyncio.sleep(0.001, "!")
        return seen, await s.get_async("x")

    assert slow.run("w", backend=backend).ret_value == ("<x>", "<x>")


def test_arun_from_a_foreign_loop(backend):
    async def main():
        states = await asyncio.gather(*(question.arun(str(i), backend=backend) for i in range(5)))
        return [await state.text_async() for state in states]

    assert asyncio.run(main())[3] == "About 3: <first> and <second>"


def test_cancelling_arun_cancels_the_program(backend):
    backend.latency_s = 30.0

    async def main():
        task = asyncio.ensure_future(question.arun("x", backend=backend))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    wait_for(lambda: backend.open_sessions == 0)


def wait_for(condition):
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen within 5 s")


def test_nested_program_runs_in_place(backend):
    @function
    def inner(s, word):
        s += f"[{word}:" + gen("inside") + "]"
        assert s["inside"] == "<inside>"
        return word.upper()

    @function
    def outer(s):
        s += "a"
        s += inner("w")
        s += "b" + gen("after")
        return s["inside"]

    state = outer.run(backend=backend)
    assert state.text() == "a[w:<inside>]b<after>"
    assert state.ret_value == "<inside>"


def test_nested_program_called_with_the_state_gives_its_return_value(backend):
    @function
    def inner(s, word):
        s += word + gen("inside")
        return word.upper()

    @function
    def outer(s):
        return inner(s, "w"), s["inside"]

    assert outer.run(backend=backend).ret_value == ("W", "<inside>")


def test_nested_run_stands_on_its_own(backend):
    @function
    def inner(s, word):
        s += word + gen("x")

    @function
    def outer(s):
        others = [inner.run(str(i), backend=backend) for i in range(3)]
        s += "/".join(other.text() for other in others)

    assert outer.run(backend=backend).text() == "0<x>/1<x>/2<x>"


def test_a_nested_run_is_on_the_backend_of_its_program():
    @function
    def inner(s):
        s += gen("x")
        return s["x"]

    @function
    def outer(s):
        return [inner.run().ret_value, *(state["x"] for state in inner.run_batch([{}, {}]))]

    here, elsewhere = ScriptedBackend({"x": "here"}), ScriptedBackend({"x": "elsewhere"})
    set_default_backend(elsewhere)
    try:
        assert outer.run(backend=here).ret_value == ["here"] * 3
    finally:
        set_default_backend(None)
    assert not elsewhere.requests


def test_failure_in_a_nested_program_names_both():
    @function
    def inner(s):
        s += gen("missing")

    @function
    def outer(s):
        s += inner()

    state = outer.run(backend=ScriptedBackend({}))
    with pytest.raises(ProgramError, match=r"'outer' failed at program inner: .*'inner' failed at gen\('missing'\)"):
        state.text()


def test_a_program_call_inside_a_program_is_no_state(backend):
    @function
    def inner(s):
        s += gen("x")

    @function
    def outer(s):
        return inner()["x"]

    with pytest.raises(ProgramError, match=r"inner.run\(...\)"):
        outer.run(backend=backend).sync()


def test_bind_wins_over_later_values(backend):
    bound = question.bind(topic="dogs")
    assert bound.run(topic="cats", backend=backend).text().startswith("About dogs")
    with pytest.raises(DefinitionError, match="no argument 'color'"):
        question.bind(color="red")


def test_decorator_arguments_and_bad_programs():
    @function(num_api_spec_tokens=64, name="renamed")
    def program(s):
        s += "x"

    assert program.name == "renamed"
    with pytest.raises(DefinitionError, match="first parameter"):
        function(lambda: None)
    with pytest.raises(DefinitionError, match="generator"):

        @function
        def bad(s):
            yield s


def test_expressions_are_checked_where_they_are_written(backend):
    @function
    def program(s):
        with pytest.raises(DefinitionError, match="None cannot be added"):
            s += None
        with pytest.raises(DefinitionError, match="int cannot be added"):
            s += 3
        with pytest.raises(DefinitionError, match="f-string"):
            s += f"{gen('x')}"
        s += "fine"

    assert program.run(backend=backend).text() == "fine"
    for bad in (
        lambda: gen(max_tokens=-1),
        lambda: gen(top_p=2),
        lambda: gen(regex="("),
        lambda: gen(json_schema="{"),
        lambda: gen(regex="a", ebnf="b"),
        lambda: gen(dtype=list),
        lambda: gen(stop=""),
        lambda: select("x", []),
        lambda: select("x", ["a", "a"]),
        lambda: select("x", ["a"], temperature=0.7),
        lambda: gen("x", choices=[""]),
    ):
        with pytest.raises(DefinitionError):
            bad()


def test_context_variables_reach_bodies_and_tools(backend):
    from caesura.lang import call_tool, tool

    who = contextvars.ContextVar("who", default="nobody")

    @tool
    def name_of() -> str:
        return who.get()

    @function
    def program(s):
        s += who.get() + "/"
        s += call_tool("a", name_of) + "/"
        who.set("inner")
        s += call_tool("b", name_of)

    who.set("outer")
    assert program.run(backend=backend).text() == "outer/outer/inner"
    assert who.get() == "outer"


def test_unknown_variables_are_told_with_those_there_are(backend):
    @function
    def program(s):
        s += gen("x")
        with pytest.raises(UnknownVariable, match=r"no variable 'y'.*there are: x"):
            s["y"]
        assert "x" in s and "y" not in s

    state = program.run(backend=backend)
    state.sync()
    with pytest.raises(KeyError):
        state["z"]


def test_use_thread_false_waits(backend):
    assert question.run("x", backend=backend, use_thread=False).done
