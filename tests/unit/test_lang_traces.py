"""Traces: what spans a run leaves, and the four forms they can be had in."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from caesura.lang import (
    DefinitionError,
    ScriptedBackend,
    ScriptedReply,
    ScriptError,
    assistant,
    call_tool,
    call_tools,
    function,
    gen,
    select,
    tool,
    user,
)
from caesura.lang.decisions import note_decisions
from caesura.lang.spans import Span
from caesura.lang.traces.describe import details, title
from caesura.lang.traces.run_trace import RunTrace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


@tool
def search(query: str) -> str:
    """Look up."""
    if query == "bad":
        raise ValueError("nothing there")
    return f"found {query}"


@function
def inner(s):
    s += gen("deep")


@function
def program(s):
    s += user("Go.")
    s += assistant(gen("answer", tools=[search]))
    forks = s.fork(2)
    forks += lambda i: f" {i}" + gen("idea")
    forks.join()
    s += select("which", ["a", "b"]) + inner()
    s += call_tools("two", [(search, "u"), (search, "bad")]) + gen("n", n=2)


def run():
    script: dict[str, Any] = {"answer": [ScriptedReply("Hm.", [("search", {"query": "cats"})]), "Cats."]}
    backend = ScriptedBackend(lambda prompt, request: script[request.name].pop(0) if request.name in script else "fine")
    state = program.run(backend=backend)
    assert state.error() is None
    return state


def shape(span):
    return (span.kind, span.name, [shape(child) for child in span.children])


def test_a_run_leaves_a_tree_of_what_it_did():
    root = run().trace().root
    assert shape(root) == (
        "program", "program", [
            ("generate", "answer", []),
            ("pause", "answer-0", [("tool", "search", [])]),
            ("generate", "answer", []),
            ("branch", "branch 0", [("generate", "idea", [])]),
            ("branch", "branch 1", [("generate", "idea", [])]),
            ("select", "which", []),
            ("program", "inner", [("generate", "deep", [])]),
            ("pause", "two", [("tool", "search", []), ("tool", "search", [])]),
            ("generate", "n", []),
            ("generate", "n", []),
        ],
    )  # fmt: skip
    for _, span in root.walk():
        assert span.end_s is not None
        assert all(span.start_s <= child.start_s and child.end_s <= span.end_s for child in span.children)
    first = root.children[0].attributes
    assert (first["finish"], first["text"].startswith("Hm.")) == ("tool_calls", True)
    assert first["prompt_tokens"] > 0
    good, bad = root.children[7].children
    assert (good.attributes["result"], good.error) == ("found u", "")
    assert (bad.attributes["ok"], bad.error) == (False, "ValueError: nothing there")


def test_a_failed_and_a_running_run_have_traces_too():
    @function
    def fails(s):
        s += "x" + gen("x")
        s += call_tool("y", search, "bad", on_error="raise")

    state = fails.run(backend=ScriptedBackend(["fine"]))
    assert state.error() is not None
    root = state.trace().root
    assert "nothing there" in root.error
    assert "nothing there" in root.children[1].error

    began, go_on = threading.Event(), threading.Event()

    @tool
    def slow() -> str:
        began.set()
        go_on.wait(30)
        return "done"

    @function
    def waits(s):
        s += call_tool("y", slow)

    state = waits.run(backend=ScriptedBackend([]))
    assert began.wait(30)
    trace = state.trace()
    pause = trace.root.children[0]
    assert (pause.kind, pause.end_s) == ("pause", None)
    assert "waits for slow" in str(trace)
    assert "so far" in trace._repr_html_()
    go_on.set()
    state.sync()
    assert pause.end_s is not None


def test_as_a_tree_in_a_terminal():
    text = str(run().trace())
    labels = ["program", "├ generate answer", "├ pause answer-0", "│ └ search(query='cats')"]
    assert all(line.startswith(f"{label} ") for line, label in zip(text.splitlines(), labels, strict=False))
    assert "found cats" in text
    assert "ValueError: nothing there" in text
    assert "█" in text


def test_as_perfetto_events(tmp_path):
    state = run()
    state.trace().save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    tracks = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    assert list(tracks) == ["program", "tools 0", "branch 0", "branch 1", "tools 1", "samples 0"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [event["tid"] for event in spans if event["cat"] == "tool"] == [
        tracks["tools 0"],
        tracks["tools 0"],
        tracks["tools 1"],
    ]
    for track in tracks.values():  # what overlaps on a track lies inside
        open_until = []
        for event in sorted((event for event in spans if event["tid"] == track), key=lambda e: (e["ts"], -e["dur"])):
            while open_until and open_until[-1] <= event["ts"]:
                open_until.pop()
            assert not open_until or event["ts"] + event["dur"] <= open_until[-1] + 2  # microseconds of rounding
            open_until.append(event["ts"] + event["dur"])


def test_as_a_page_that_needs_nothing_else(tmp_path):
    run().trace().save(tmp_path / "trace.html")
    page = (tmp_path / "trace.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<script" not in page
    assert "src=" not in page
    assert "href=" not in page
    assert "default-src 'none'" in page
    with pytest.raises(DefinitionError, match=r"\.html or as \.json"):
        run().trace().save(tmp_path / "trace.txt")


def test_as_opentelemetry_spans_with_the_conventions_names():
    provider, memory = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    trace = run().trace()
    trace.export(provider)
    spans = memory.get_finished_spans()
    by_name: dict[str, Any] = {span.name: span for span in spans}
    root = by_name["invoke_agent program"]
    assert root.parent is None
    assert root.attributes["gen_ai.agent.name"] == "program"
    assert abs(root.start_time / 1e9 - trace.begun_at) < 1e-3
    generated = next(span for span in spans if span.attributes.get("caesura.variable") == "answer")
    assert generated.attributes["gen_ai.operation.name"] == "text_completion"
    assert generated.attributes["gen_ai.request.model"] == "scripted"
    assert generated.attributes["gen_ai.usage.input_tokens"] > 0
    assert generated.attributes["gen_ai.response.finish_reasons"] == ("tool_calls",)
    calls = [span for span in spans if span.name == "execute_tool search"]
    assert [call.status.is_ok for call in calls] == [True, True, False]
    assert calls[2].attributes["error.type"] == "ValueError"
    assert all("gen_ai.tool.call.result" not in call.attributes for call in calls)  # confidential unless asked for
    assert next(span for span in spans if span.context.span_id == calls[0].parent.span_id).name == "pause"
    memory.clear()
    trace.export(provider, content=True)
    results = [span.attributes.get("gen_ai.tool.call.result") for span in memory.get_finished_spans()]
    assert "found cats" in results


@dataclass
class Decision:
    """As the scheduler's."""

    tool: str
    now: float
    elapsed_s: float
    action: Any = field(default_factory=lambda: SimpleNamespace(value="swap"))


def test_decisions_are_given_to_the_pauses_they_belong_to():
    def tree():
        root = Span("program", "p", 100.0, 200.0)
        for start, name in ((110.0, "a"), (120.0, "b"), (130.0, "a")):
            root.children.append(Span("pause", name, start, start + 5.0, {"tools": [name]}))
        branch = Span("branch", "branch 0", 105.0, 199.0)
        branch.children.append(Span("pause", "a", 130.0, 131.0, {"tools": ["a"]}))
        root.children.append(branch)
        return root

    root = tree()
    here = [Decision("a", 110.0, 0.0), Decision("a", 112.0, 2.0), Decision("a", 130.5, 0.5)]
    note_decisions(root, here)
    note_decisions(root, here)  # as often as one likes
    assert [span.attributes.get("decisions") for span in root.children[:3]] == [here[:2], None, here[2:]]
    assert "decisions" not in root.children[3].children[0].attributes  # a fork has decisions of its own
    root = tree()
    elsewhere = [Decision("b", 5.0, 0.0), Decision("b", 6.0, 1.0), Decision("a", 9.0, 0.0)]  # another machine's clock
    note_decisions(root, elsewhere)
    assert [span.attributes.get("decisions") for span in root.children[:3]] == [None, elsewhere[:2], elsewhere[2:]]


def test_a_chain_of_forks_ends_and_is_shown_however_long_it_is():
    @function
    def chain(s, first):
        s += gen(first)
        for _ in range(1200):
            (s,) = s.fork(1)
            s += "on"
        s += gen("last")
        return s["last"]

    state = chain.run("first", backend=ScriptedBackend(lambda prompt, request: "fine"))
    assert state.ret_value == "fine"
    trace = state.trace()
    assert all(span.end_s is not None for span in trace)
    assert len(str(trace).splitlines()) == 1203
    assert sum(event["ph"] == "X" for event in trace.perfetto()["traceEvents"]) == 1203
    assert len(trace.html()) < 1_000_000
    assert isinstance(chain.run("none", backend=ScriptedBackend({})).error(), ScriptError)


def test_a_run_ends_when_its_error_has_no_text():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    @function
    def program(s):
        raise Mute

    state = program.run(backend=ScriptedBackend([]))
    with pytest.raises(Mute):
        state.sync()
    assert state.trace().root.error == "Mute"


def test_no_name_commands_the_terminal_or_breaks_its_encoding():
    hostile = "\x1b]0;x\x07\ud800" + "z" * 1000

    @function
    def program(s):
        s += user("Go.")
        s += assistant(gen("answer", tools=[search]))
        s += select(hostile, [hostile, "b"])
        s.set_var(hostile, 1)

    replies = {"answer": [ScriptedReply("", [(hostile, {"query": "x"})]), "fine"]}
    state = program.run(backend=ScriptedBackend(replies))
    assert state.error() is None
    assert "\x1b" not in str(state.trace())
    assert all(len(title(span)) < 90 and len(details(span)) <= 80 for span in state.trace())
    for shown in (str(state.trace()), state.trace().html(), state._repr_html_()):
        assert shown.encode()


def test_the_text_is_the_same_in_every_surrounding(monkeypatch):
    trace = run().trace()
    plain = str(trace)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(trace) == plain != ""


def test_tools_of_branches_that_overlap_have_tracks_of_their_own():
    root = Span("program", "p", 0.0, 9.0)
    for number, calls in enumerate([[(0.0, 4.0)], [(1.0, 3.0), (3.0, 5.0)], [(4.0, 6.0)]]):
        branch = Span("branch", f"branch {number}", 0.0, 9.0)
        branch.children = [Span("tool", "t", *call, {"arguments": "{}", "result": ""}) for call in calls]
        root.children.append(branch)
    events = RunTrace(root, 0.0, "b").perfetto()["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    tools = [(event["ts"] / 1e6, tracks[event["tid"]]) for event in events if event.get("cat") == "tool"]
    assert tools == [(0.0, "tools 0"), (1.0, "tools 1"), (3.0, "tools 1"), (4.0, "tools 0")]


def test_words_of_errors_are_exported_only_when_content_is():
    @tool(on_error="raise")
    def secret() -> str:
        raise KeyError("patient 17")

    @function
    def fails(s):
        s += call_tool("x", secret)

    state = fails.run(backend=ScriptedBackend([]))
    assert state.error() is not None
    provider, memory = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    state.trace().export(provider)
    spans = memory.get_finished_spans()
    assert {span.name: span.attributes["error.type"] for span in spans} == {
        "invoke_agent fails": "ToolError",
        "pause": "ToolError",
        "execute_tool secret": "KeyError",
    }
    assert not any("patient" in span.to_json() for span in spans)
    memory.clear()
    state.trace().export(provider, content=True)
    assert all("patient 17" in str(span.status.description) for span in memory.get_finished_spans())
