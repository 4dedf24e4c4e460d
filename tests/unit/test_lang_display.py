"""What notebooks show: colours by source, calls folded, nothing injected, everything readable without styles."""

from __future__ import annotations

import asyncio
import re
import threading
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from caesura.lang import (
    ScriptedBackend,
    ScriptedReply,
    assistant,
    call_tool,
    function,
    gen,
    select,
    system,
    tool,
    user,
)
from caesura.lang.decisions import Decisions
from caesura.lang.display import TreePicture, live
from caesura.lang.display.decisions import bar, decision_html
from caesura.lang.display.timeline import timeline_svg
from caesura.lang.printable import printable
from caesura.lang.spans import Span
from caesura.lang.traces.run_trace import RunTrace
from hypothesis import given, settings
from hypothesis import strategies as st

ALLOWED = {
    "div", "style", "b", "span", "table", "tr", "th", "td", "strong", "em", "details", "summary", "code", "br", "svg",
    "g", "rect", "line", "text", "title",
}  # fmt: skip


class Reader(HTMLParser):
    """Elements with their attributes, and the texts inside."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.stack: list[tuple[str, str]] = []
        self.by_class: dict[str, list[str]] = {}
        self.elements: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.titles: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, name, attributes):
        self.names.append(name)
        self.elements.append((name, attributes))
        self.attributes += attributes
        if name == "br":
            self.text += "\n"
        else:
            self.stack.append((name, dict(attributes).get("class") or ""))

    def handle_endtag(self, name):
        assert self.stack.pop()[0] == name

    def handle_data(self, data):
        if any(name == "style" for name, _ in self.stack):
            return
        self.text += data
        if self.stack and self.stack[-1][0] == "title":
            self.titles.append(data)
        for _, cls in self.stack:
            self.by_class.setdefault(cls, []).append(data)


@tool
def search(query: str) -> str:
    """Look <things> up."""
    return query


def show(program, replies, *args):
    state = program.run(*args, backend=ScriptedBackend(replies))
    state.error()
    return Reader(state._repr_html_())


@function
def colours(s):
    """Colours & sources."""
    s += system("Be exact.")
    s += user("Which?")
    s += assistant(gen("free", tools=[search]))
    s += user("And?")
    s += assistant("It is " + select("which", ["this", "that"]) + gen("number", regex="[0-9]+"))


def test_text_has_the_colour_of_its_source():
    call = ScriptedReply("Let me see.", [("search", {"query": "found"})])
    page = show(colours, {"free": [call, "An answer."], "number": ["42"]})
    assert page.by_class["cz-g"][0].startswith("Let me see.")
    assert "An answer." in page.by_class["cz-g"]
    assert "42" in page.by_class["cz-k"]
    assert {"this", "that"} & set(page.by_class["cz-x"])
    assert "found" in page.by_class["cz-t"]
    assert "search(query='found') → " in page.text
    assert page.names.count("details") >= 2  # the call, the variables
    for word in ("system", "user", "assistant", "Be exact.", "2 of"[:1], "1 tool calls"):
        assert word in page.text


def test_what_the_cache_held_is_marked():
    @function
    def twice(s):
        s += "shared words at the beginning, and then some more"
        for fork in (forks := s.fork(2)):
            fork += " own words" + gen("x")
        forks.join("concate_and_append")
        s += gen("y")

    page = show(twice, lambda prompt, request: "z")
    cached = "".join(page.by_class["cz-c"])
    assert cached.startswith("shared words at the beginning")


HOSTILE = [
    "<script>alert(1)</script>",
    "</td></table><img src=x onerror=alert(1)>",
    "\x1b[31m\x00&lt;",
    "]]>--><!--",
    "\"'`",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_can_be_injected_from_anywhere(text):
    @tool(name="evil")
    def evil(argument: str) -> str:
        return text

    @function
    def program(s):
        s += user(text) + assistant(text + gen("x"))
        s += user(call_tool("y", evil, text))
        s.set_var("z", [text, text])
        raise ValueError(text)

    state = program.run(backend=ScriptedBackend(lambda p, r: text))
    assert state.error() is not None
    for page in (state._repr_html_(), state.trace()._repr_html_(), state.trace().html(), program._repr_html_()):
        body = Reader(page.replace("<!doctype html>", "").replace("<meta", "<br"))
        assert set(body.names) <= ALLOWED | {"html", "head", "body"}
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in body.attributes)
    assert "\x1b" not in str(state.trace())


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_shown_as_it_is(text):
    @function
    def program(s):
        s += "before|" + text + "|after"

    page = show(program, [])
    shown = page.text.partition("before|")[2].partition("|after")[0]
    assert len(shown) == len(text.replace("\r\n", "\n")) or "\r" in text
    assert "".join(c for c in shown if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}") == "".join(
        c for c in text if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}"
    )


def test_long_texts_are_cut():
    @function
    def program(s):
        s += "x" * 100_000

    page = program.run(backend=ScriptedBackend([]))
    page.sync()
    assert len(page._repr_html_()) < 60_000


def decision(action="swap", **costs):
    costs = SimpleNamespace(**{"preserve_token_s": 400.0, "swap_token_s": 20.0, "discard_token_s": 100.0, **costs})
    return SimpleNamespace(
        action=SimpleNamespace(value=action), tool="search", reason="swap is cheapest <now>", policy="min_waste",
        costs=costs, context_tokens=1200, affected_tokens=900, elapsed_s=0.1, expected_remaining_s=3.0,
        batch_tokens=4000, free_pages=12, now=1.0,
    )  # fmt: skip


def test_a_decision_shows_its_three_costs_to_scale():
    page = Reader(decision_html(decision()))
    assert [page.by_class[f"cz-{name}"][-1].count("█") for name in ("preserve", "discard", "swap")] == [24, 6, 1]
    assert "swap ✓" in page.text
    assert "swap is cheapest <now>" in page.text
    assert "400 token·s" in page.text
    assert "impossible" in Reader(decision_html(decision(swap_token_s=float("inf")))).text
    both = Decisions([decision(), decision("preserve")])
    assert both._repr_html_().count("✓") == 2
    assert "swap is cheapest" in repr(both)
    assert "No pause" in Decisions()._repr_html_()
    assert (bar(0.0), bar(1e-9), bar(1.0)) == ("", "▏", "█" * 24)


def test_a_notebook_shows_one_decision_as_well(monkeypatch):
    import IPython
    from caesura.scheduler.types import Action, ActionCosts, ContextId, PauseDecision
    from IPython.core.formatters import DisplayFormatter

    formatter = DisplayFormatter()
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(display_formatter=formatter))
    costs = ActionCosts(400.0, 20.0, 100.0)
    made = PauseDecision(
        ContextId(1), 1.0, "min_waste", Action.SWAP, "search", "it is cheapest", costs, 1200, 900, 0.1, 3.0, 4000, 12
    )
    one = Decisions([made, made])[0]
    shown, _ = formatter.format(one)
    assert "swap ✓" in Reader(shown["text/html"]).text
    assert len(Decisions([made, made])[:1]) == 1


def test_a_program_shows_what_it_will_do():
    page = Reader(colours._repr_html_())
    assert "Colours & sources." in page.text
    assert "gen('free')" in page.by_class["cz-g"]
    assert "select('which')" in page.by_class["cz-x"]
    assert "Be exact." in Reader(colours.trace()._repr_html_()).text


def test_a_view_changes_in_place_until_the_end(monkeypatch):
    shown, go_on = [], threading.Event()

    class Handle:
        def update(self, html):
            shown.append(html.data)
            go_on.set()

    def display(html, display_id):
        shown.append(html.data)
        return Handle()

    import IPython.display

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(live, "_in_notebook", lambda: True)

    @tool
    def waits() -> str:
        go_on.wait(30)
        return "done"

    @function
    def program(s):
        s += "Look: " + call_tool("x", waits)

    state = program.run(backend=ScriptedBackend([])).watch()
    assert state.done
    assert "running" in Reader(shown[0]).text
    last = Reader(shown[-1]).text
    assert "done" in last
    assert "Look: " in last


def test_a_program_that_watches_another_lets_it_go_on():
    @function
    def watched(s):
        s += call_tool("x", slow)

    @tool
    async def slow() -> str:
        await asyncio.sleep(0.05)
        return "done"

    @function
    def program(s):
        return watched.run().watch()["x"]

    assert program.run(backend=ScriptedBackend([])).ret_value == "done"


def test_the_radix_tree_is_drawn_to_scale_and_in_rows():
    def view(number, parent, start, tokens, state="running", kind="run", holders=()):
        return SimpleNamespace(
            id=number, parent=parent, kind=kind, state=state, start=start, num_tokens=tokens, holders=holders, count=1,
        )  # fmt: skip

    pool = SimpleNamespace(running_pages=3, paused_pages=2, host_used_pages=1)
    nodes = [
        view(1, None, 0, 100, "cached"),
        view(2, 1, 100, 50, "preserved", holders=(7,)),
        view(3, 1, 100, 20, holders=(8,)),
        view(-1, 2, 150, 16, "preserved", "tail", (7,)),
        view(-1, 2, 166, 34, "discarded", "gone", (7,)),  # goes on in the row of the tail
        view(-1, 1, 60, 140, "discarded", "gone", (9,)),  # branches off within the shared run
    ]
    snapshot = SimpleNamespace(nodes=nodes, pool=pool, device_pages=8)
    picture = TreePicture({"now": snapshot, "<later>": snapshot}, {7: "A", 8: "B & C"})._repr_svg_()
    reader = Reader(picture)
    boxes = [dict(attributes) for name, attributes in reader.elements if name == "rect"][: len(nodes)]
    shown = [(round(float(box["x"])), int(box["y"]), int(box["height"])) for box in boxes]
    unit = float(boxes[0]["width"]) / 100
    assert len({row for _, row, _ in shown[1:]}) == 3
    by_title = dict(zip([text for text in reader.titles if "tokens" in text], shown, strict=False))
    root = by_title["100 tokens, cached, nobody's"]
    tail, gone = (
        by_title["16 tokens, kept for a paused context, held by A"],
        by_title["34 tokens, to be computed again, held by A"],
    )
    assert tail[1] == gone[1]
    assert gone[0] - tail[0] == pytest.approx(16 * unit, abs=2)
    assert by_title["140 tokens, to be computed again, held by 9"][1] >= root[1] + root[2]  # below the run, not over it
    assert "now: 5 of 8 pages held, 1 on the host" in reader.text
    assert "<later>: " in reader.text


def test_ordinary_text_stays_and_only_what_commands_is_replaced():
    spaces = "\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}\N{SOFT HYPHEN}\n\t"
    ordinary = "می\N{ZERO WIDTH NON-JOINER}خواهم 👩\N{ZERO WIDTH JOINER}💻 " + spaces
    assert printable(ordinary) == ordinary
    assert printable("a\r\nb") == "a\nb"
    commands = "\x00\x1b\r\x7f\x9b\ud800\ufeff\N{RIGHT-TO-LEFT OVERRIDE}\N{LEFT-TO-RIGHT ISOLATE}"
    for char in commands:
        assert printable(char) == "\N{REPLACEMENT CHARACTER}"


def test_long_runs_are_cut():
    root = Span("program", "p", 0.0, 900.0)
    for number in range(900):
        pause = Span("pause", "t", float(number), number + 0.5, {"tools": ["t"], "decisions": [decision()] * 2})
        root.children.append(pause)
    page = RunTrace(root, 0.0, "b").html()
    assert "1400 more decisions" in page
    assert "501 more spans" in page
    assert "500 more bars, all shorter" in page
    assert page.count("<rect") < 450

    @function
    def program(s):
        s.set_var("all", list(range(5000)))
        for number in range(500):
            s.set_var(f"v{number}", 1)

    state = program.run(backend=ScriptedBackend([]))
    state.sync()
    page = state._repr_html_()
    assert "4600 more values" in page
    assert "101 more variables" in page


@pytest.mark.parametrize("whole_s", [0.0009, 0.0018, 0.0035, 0.004, 0.02, 0.7, 3.0, 59.0, 1000.0])
def test_every_moment_of_the_axis_has_a_label_of_its_own(whole_s):
    root = Span("program", "p", 0.0, whole_s)
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", timeline_svg(root))[:-1]  # the last one is the lane's name
    assert len(set(labels)) == len(labels) > 3
