"""However a text is cut into pushes, the parsers and the detokenizer give the same result as for the whole."""

from __future__ import annotations

import itertools
import json

import pytest
from caesura.runtime.text.detokenizer import IncrementalDetokenizer, StopChecker
from caesura.runtime.text.tool_parser import (
    CallArguments,
    CallEnded,
    CallStarted,
    ContentDelta,
    ToolCallParser,
    ToolFormat,
    collect,
    parse,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

NAMES = ("f", "get_time", "g.h")
FRAGMENTS = {
    ToolFormat.HERMES: [
        "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {"a": [1, "x"]}}', '{"name": "zz"}', "<tool_",
    ],
    ToolFormat.LLAMA3_JSON: ["<|python_tag|>", '{"name": "f", "parameters": {"a": {"b": "}"}}}', '{"name": "zz"}', ";"],
    ToolFormat.PYTHONIC: ["[f(a=1, b='x]')", "[f()", "[", "]", ", g.h(q=[{'k': None}, (1,)])", "[zz()]", '"""'],
}  # fmt: skip
COMMON = [" ", "\n", " " * 70, "text ", "日本😀", '"', "\\", "{", "}", "[", "]", ",", "'", "\x07", '"name"', ": "]


def texts(fmt: ToolFormat) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(FRAGMENTS[fmt] + COMMON) | st.text(max_size=3), max_size=14).map("".join)


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("fmt", list(ToolFormat))
@settings(max_examples=150, deadline=None)
@given(data=st.data(), places=st.lists(st.integers(0, 500), max_size=12))
def test_any_cut_gives_the_same_calls(fmt: ToolFormat, data: st.DataObject, places: list[int]) -> None:
    text = data.draw(texts(fmt))
    whole = parse(text, fmt, NAMES)
    for parts in (cut(text, places), list(text)):
        parser = ToolCallParser(fmt, NAMES)
        events = [event for part in parts for event in parser.push(part)] + parser.finish()
        assert collect(events) == whole
        streamed: dict[int, str] = {}
        open_call = None
        for event in events:
            if isinstance(event, CallStarted):
                assert open_call is None and event.index == len(streamed)
                open_call = event.index
                streamed[event.index] = ""
            elif isinstance(event, CallArguments):
                assert open_call == event.index
                streamed[event.index] += event.delta
            elif isinstance(event, CallEnded):
                assert open_call == event.index and streamed[event.index] == event.arguments
                open_call = None
            else:
                assert isinstance(event, ContentDelta) and event.text
        assert open_call is None


scalars = st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.text(max_size=8)
json_values = st.recursive(
    scalars | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
keywords = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=6), json_values, max_size=4)), max_size=4
    )
)
def test_json_calls_round_trip(calls: list[tuple[str, dict[str, object]]]) -> None:
    hermes = "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
        for name, arguments in calls
    )
    llama = "; ".join(json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls)
    for fmt, text in ((ToolFormat.HERMES, hermes), (ToolFormat.LLAMA3_JSON, llama)):
        content, found = parse(text, fmt, NAMES)
        assert content == ""
        assert [(c.name, json.loads(c.arguments), c.complete) for c in found] == [(n, a, True) for n, a in calls]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.dictionaries(keywords, json_values, max_size=4)), min_size=1, max_size=4
    )
)
@example([("f", {"a": "'\"\n\\ \u2028 \x00 \U0001f600"})])
def test_pythonic_calls_round_trip(calls: list[tuple[str, dict[str, object]]]) -> None:
    written = ", ".join(f"{name}({', '.join(f'{k}={v!r}' for k, v in args.items())})" for name, args in calls)
    content, found = parse(f"[{written}]", ToolFormat.PYTHONIC, NAMES)
    assert content == ""
    assert [(c.name, json.loads(c.arguments), c.complete) for c in found] == [(n, a, True) for n, a in calls]


class Bytes:
    """One token a byte."""

    vocab_size = 256
    eos_ids: frozenset[int] = frozenset()
    bos_id = None
    special_ids: dict[str, int] = {}
    hidden_ids: frozenset[int] = frozenset()
    strips_leading_space = True

    def encode(self, text: str, *, allow_special: bool = False, continuation: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        raw = bytes(ids)
        return (raw if continuation else raw.removeprefix(b" ")).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode), st.booleans())
def test_detokenized_bytes_equal_the_whole(raw: bytes, continuation: bool) -> None:
    tokenizer = Bytes()
    stream = IncrementalDetokenizer(tokenizer, continuation=continuation)  # type: ignore[arg-type]
    text = "".join(stream.push(byte) for byte in raw) + stream.flush()
    assert text == tokenizer.decode(list(raw), continuation=continuation)


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="abc", max_size=30),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(0, 50), max_size=6),
    st.booleans(),
)
def test_stops_do_not_depend_on_cuts(text: str, stops: list[str], places: list[int], as_patterns: bool) -> None:
    checker = StopChecker((), tuple(stops)) if as_patterns else StopChecker(tuple(stops))
    shown = "".join(checker.push(part)[0] for part in cut(text, places))
    if checker.matched is None:
        shown += checker.flush()
    ends = {at + len(stop): stop for stop in sorted(stops, key=len) if (at := text.find(stop)) >= 0}
    if not ends:
        assert (shown, checker.matched) == (text, None)
    else:
        first = min(ends)
        assert checker.matched == ends[first]
        assert shown == text[: first - len(ends[first])]
