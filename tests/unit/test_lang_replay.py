"""Record and replay: the same run without backend and tools, and a clear error when the program has changed."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from caesura.lang import (
    ReplayError,
    ScriptedBackend,
    ScriptedReply,
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
    unconditional_likelihood_normalized,
    user,
)
from caesura.lang.backend import GenRequest
from caesura.lang.backends.scripted import PlainChat
from caesura.lang.backends.tape import ContextKeys, key
from caesura.lang.errors import NoRecording

ran = []


@tool
def search(query: str) -> str:
    """Look up."""
    ran.append(query)
    if query == "bad":
        raise ValueError("nothing there")
    return f"found {query} {len(ran)}"


@function
def program(s, question="q", temperature=0.5):
    s += user(question)
    s += assistant(gen("a", tools=[search], temperature=temperature))
    s += user("And?")
    s += assistant("I " + select("how", ["do", "will"], choices_method=unconditional_likelihood_normalized))
    point = s.snapshot()
    s += gen("n", n=2)
    s.rollback(point)
    forks = s.fork(2)
    forks += lambda i: f" {i}" + gen("x", return_logprob=True, top_logprobs_num=1)
    forks.join()
    s += call_tool("bad", search, "bad") + call_tools("two", [(search, "u"), (search, "v")])


def test_a_replay_gives_the_same_without_running_anything(tmp_path):
    path = tmp_path / "run.jsonl"

    def reply(prompt, request):
        if request.name == "a" and "<|tool" not in prompt.split("<|user|>")[-1]:
            return ScriptedReply("Hm.", [("search", {"query": "cats"}), ("search", {"query": 1})])
        return f"{request.name} after {len(prompt)}"

    backend = ScriptedBackend(reply)
    recorded = program.run(backend=record(backend, path))
    assert recorded.error() is None
    assert backend.open_sessions == 0
    ran.clear()
    replayed = program.run(backend=replay(path), stream=True)
    assert replayed.error() is None
    assert ran == []
    assert replayed.text() == recorded.text()
    assert replayed.messages() == recorded.messages()
    assert replayed.variables == recorded.variables
    assert replayed.get_meta_info("a") == recorded.get_meta_info("a")
    assert not replayed.tool_result("bad").ok
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_changed_program_is_told_what_changed(tmp_path):
    path = tmp_path / "run.jsonl"
    program.run(backend=record(ScriptedBackend(lambda p, r: "fine"), path)).sync()
    assert program.run(backend=replay(path)).error() is None
    with pytest.raises(ReplayError, match=r"no \(further\) generation of 'a' .* after .*other question"):
        program.run("other question", backend=replay(path)).text()
    assert isinstance(program.run(temperature=0.6, backend=replay(path)).error(), ReplayError)
    used = replay(path)
    program.run(backend=used).sync()
    assert isinstance(program.run(backend=used).error(), ReplayError)


def test_a_strict_replay_is_told_of_answers_that_were_not_asked_for(tmp_path):
    path = tmp_path / "run.jsonl"
    with record(ScriptedBackend(lambda p, r: "fine"), path) as backend:
        program.run(backend=backend).sync()

    @function
    def shorter(s):
        s += user("q")
        s += assistant(gen("a", tools=[search], temperature=0.5))

    with replay(path) as backend:
        assert shorter.run(backend=backend).error() is None
    with (
        pytest.raises(ReplayError, match="not asked for; the first: choice among"),
        replay(path, strict=True) as backend,
    ):
        shorter.run(backend=backend).sync()
    with replay(path, strict=True) as backend:
        program.run(backend=backend).sync()


class LateChat(PlainChat):
    """A format that knows its stop strings once it has written a turn."""

    async def turn(self, role, *, first, tools=None):
        self.stop = ("\nUSER:",)
        return await super().turn(role, first=first, tools=tools)


def test_stop_strings_that_a_format_learns_of_are_recorded_with_its_turns(tmp_path):
    path = tmp_path / "run.jsonl"

    @function
    def talk(s):
        s += user("q") + assistant(gen("x"))

    backend = ScriptedBackend(["yes\nUSER: no"], chat=LateChat())
    with durable(backend, path) as taped:
        assert talk.run(backend=taped)["x"] == "yes"
    assert backend.requests[0].request.stop == ("\nUSER:",)
    with durable(ScriptedBackend(chat=LateChat()), path) as taped:
        assert talk.run(backend=taped)["x"] == "yes"
    with replay(path, strict=True) as taped:
        assert talk.run(backend=taped)["x"] == "yes"


def test_what_a_tools_own_program_asked_is_known_with_the_tools_answer(tmp_path):
    path = tmp_path / "run.jsonl"

    @function
    def expert(s, question):
        s += question + gen("a")

    @tool
    def ask(question: str) -> str:
        return expert.run(question)["a"]

    @tool
    async def ask_async(question: str) -> str:
        return await expert.run(question).get_async("a")

    @function
    def talk(s, times):
        for number in range(times):
            s += call_tool(f"x{number}", ask, "q")
        s += call_tools("two", [(ask, "u"), (ask_async, "q")])

    with durable(ScriptedBackend(["one", "two", "three"]), path) as backend:
        first = talk.run(1, backend=backend)
        assert first.error() is None
    with replay(path, strict=True) as backend:
        replayed = talk.run(1, backend=backend)
        assert replayed.error() is None
        assert replayed.variables == first.variables
    with durable(ScriptedBackend(["new"] * 9), path) as backend:
        again = talk.run(2, backend=backend)
        assert (again["x0"], again["x1"]) == (first["x0"], "new"), "an answer given in the course of a call is its own"
        assert again.error() is None


def test_a_run_that_outlives_its_recording_fails(tmp_path):
    ran.clear()
    going, closed = threading.Event(), threading.Event()

    @tool
    def slow() -> str:
        """Take until the file is closed."""
        going.set()
        assert closed.wait(20)
        return "done"

    @function
    def pay(s):
        s += call_tool("x", slow)

    with durable(ScriptedBackend(), tmp_path / "run.jsonl") as taped:
        state = pay.run(backend=taped)
        assert going.wait(20)
    closed.set()
    error = state.error()
    assert isinstance(error, NoRecording)
    assert "run.jsonl is closed: wait for the program" in str(error) and "what it lacks: call slow" in str(error)


def test_a_context_that_was_being_opened_for_one_who_stopped_is_there_for_the_next(tmp_path):
    class Slow(ScriptedBackend):
        async def open(self, **options):
            await asyncio.sleep(0.05)
            return await super().open(**options)

    backend = Slow(["a", "b"])

    async def ask(taped):
        session = await taped.open()
        first = asyncio.ensure_future(anext(session.generate(GenRequest("x"))))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled()
        text = "".join([chunk.text async for chunk in session.generate(GenRequest("x"))])
        await session.close()
        return text

    with durable(backend, tmp_path / "run.jsonl") as taped:
        assert asyncio.run(ask(taped)) == "a"
    assert (backend.most_open_sessions, backend.open_sessions) == (1, 0)


def test_no_recording(tmp_path):
    path = tmp_path / "broken.jsonl"
    for text in ("", "{", '{"key": "backend", "value": {}}', '{"key": 1}\n{"key": "a", "value": 1}\n'):
        path.write_text(text)
        with pytest.raises(ReplayError, match="no recording"):
            replay(path)
    with pytest.raises(ReplayError, match="cannot be read"):
        replay(tmp_path / "nothing")


def test_the_keys_of_a_context_that_grows_are_those_of_the_whole():
    parts = ['a "quoted"\n', "\ud83d", "\ude00 é\u2028", ""]
    keys, text = ContextKeys("/0.1"), ""
    for part in parts:
        keys.add(part)
        text += part
        for asked in ((), ({"b": (1, 2), "a": None}, [0.5])):
            assert keys.key("generate", *asked) == key("generate", "/0.1", text, *asked)
