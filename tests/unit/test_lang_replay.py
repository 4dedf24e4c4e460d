"""Record and replay: the same run without backend and tools, and a clear error when the program has changed."""

from __future__ import annotations

import json

import pytest
from caesura.lang import (
    ReplayError,
    ScriptedBackend,
    ScriptedReply,
    assistant,
    call_tool,
    call_tools,
    function,
    gen,
    record,
    replay,
    select,
    tool,
    unconditional_likelihood_normalized,
    user,
)

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


def test_no_recording(tmp_path):
    path = tmp_path / "broken.jsonl"
    for text in ("", "{", '{"key": "backend", "value": {}}'):
        path.write_text(text)
        with pytest.raises(ReplayError, match="no recording"):
            replay(path)
