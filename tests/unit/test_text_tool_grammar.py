"""Tool grammars: every walk over allowed tokens ends in calls that parse and satisfy their schemas."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from caesura.runtime.errors import InvalidRequest
from caesura.runtime.text.tool_parser import ParsedCall, ToolFormat, parse, tool_grammar
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

HERMES, LLAMA3, PYTHONIC = ToolFormat.HERMES, ToolFormat.LLAMA3_JSON, ToolFormat.PYTHONIC
MARKS = ["<tool_call>", "</tool_call>", "<|python_tag|>"]
TOOLS: list[dict[str, Any]] = [
    {
        "name": "find",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 99},
                "b": {"type": "string", "maxLength": 4},
                "c": {"type": "boolean"},
                "d": {"enum": ["x", 'y"z', None]},
                "e": {"type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 2},
            },
            "required": ["a", "c"],
            "$defs": {
                "point": {
                    "type": "object",
                    "properties": {"u": {"type": "null"}},
                    "required": ["u"],
                    "additionalProperties": False,
                }
            },
        },
    },
    {"type": "function", "function": {"name": "now-2.0"}},
    {"name": "note", "parameters": {"type": "object", "properties": {"t": {"type": "string", "maxLength": 3}}}},
]
NAMES = ["find", "now-2.0", "note"]


class Vocabulary:
    """One token a byte, some longer ones across the borders of a call's parts, marks as control tokens or not."""

    def __init__(self, marks: Sequence[str]) -> None:
        longer = [
            b'{"',
            b'", "',
            b'": ',
            b"<tool",
            b"_call>",
            b"[find(",
            b'{"name"',
            b"</",
            b'"}}',
            b")]",
            b"}\n",
            b"True",
        ]
        self.tokens = [bytes([byte]) for byte in range(256)] + longer + [mark.encode() for mark in marks] + [b"<|end|>"]
        self.eos_token_id = len(self.tokens) - 1
        self.bos_token_id = None
        self.special_ids = {mark: 256 + len(longer) + i for i, mark in enumerate(marks)}
        self.special_token_ids = [*self.special_ids.values(), self.eos_token_id]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


class Walk:
    """A generation under a grammar, one token at a time."""

    def __init__(self, vocabulary: Vocabulary, grammar: str) -> None:
        self.vocabulary = vocabulary
        self._matcher = LLMatcher(LLTokenizer(TokenizerWrapper(vocabulary)), grammar, log_level=0)
        assert not self._matcher.is_error(), self._matcher.get_error()
        self.text = b""

    def allowed(self) -> list[int]:
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        return [int(i) for i in np.flatnonzero(bits[: len(self.vocabulary.tokens)])]

    def take(self, token_id: int) -> None:
        assert token_id in self.allowed(), (self.text, self.vocabulary.tokens[token_id])
        assert self._matcher.consume_token(token_id), self._matcher.get_error()
        self.text += self.vocabulary.tokens[token_id]

    def write(self, text: str) -> Walk:
        for byte in text.encode():
            self.take(byte)
        return self

    def may_end(self) -> bool:
        return self.vocabulary.eos_token_id in self.allowed()

    def finish(self, rng: random.Random, limit: int = 600) -> str:
        """Random printable tokens until the grammar is complete and a coin says so."""
        for _ in range(limit):
            allowed = self.allowed()
            assert allowed, self.text
            if self.vocabulary.eos_token_id in allowed and (len(allowed) == 1 or rng.random() < 0.3):
                return self.text.decode()
            allowed = [i for i in allowed if i != self.vocabulary.eos_token_id]
            printable = [i for i in allowed if i > 255 or 32 <= i < 127 or i == 10]
            self.take(rng.choice(printable or allowed))
        raise AssertionError(f"no end within {limit} tokens: {self.text!r}")


def check(call: ParsedCall) -> None:
    assert call.complete
    arguments = json.loads(call.arguments)
    if call.name == "now-2.0":
        assert arguments == {}
    elif call.name == "note":
        assert set(arguments) <= {"t"} and len(arguments.get("t", "")) <= 3
    else:
        assert {"a", "c"} <= set(arguments) <= {"a", "b", "c", "d", "e"}
        assert type(arguments["a"]) is int and 0 <= arguments["a"] <= 99
        assert isinstance(arguments["c"], bool)
        assert len(arguments.get("b", "")) <= 4
        assert arguments.get("d") in ("x", 'y"z', None)
        assert all(item == {"u": None} for item in arguments.get("e", [])) and len(arguments.get("e", [])) <= 2


def begin(fmt: ToolFormat, walk: Walk) -> None:
    """Some prose, then the beginning of a call."""
    walk.write("Let <me> [see] {it} ")
    if fmt is HERMES and "<tool_call>" in walk.vocabulary.special_ids:
        walk.take(walk.vocabulary.special_ids["<tool_call>"])
    elif fmt is LLAMA3 and "<|python_tag|>" in walk.vocabulary.special_ids:
        walk.write('{"name"')
    else:
        walk.write({HERMES: "<tool_call>", LLAMA3: '{"name"', PYTHONIC: "[find("}[fmt])


@pytest.mark.parametrize("marks", [[], MARKS], ids=["text", "tokens"])
@pytest.mark.parametrize("fmt", list(ToolFormat))
@pytest.mark.parametrize("choice", ["auto", "required", "note"])
@pytest.mark.parametrize("parallel", [False, True])
def test_every_walk_is_calls_that_satisfy_their_schemas(
    fmt: ToolFormat, choice: str, parallel: bool, marks: list[str]
) -> None:
    vocabulary = Vocabulary(marks)
    grammar = tool_grammar(fmt, TOOLS, choice=choice, parallel=parallel, special_ids=vocabulary.special_ids)
    assert grammar is not None
    rng = random.Random(f"{fmt}{choice}{parallel}{marks}")
    counts = set()
    for _ in range(6):
        walk = Walk(vocabulary, grammar)
        if choice == "auto":
            begin(fmt, walk)
        assert not walk.may_end()
        content, calls = parse(walk.finish(rng), fmt, NAMES)
        assert calls
        assert content == ("Let <me> [see] {it}" if choice == "auto" else "")
        for call in calls:
            check(call)
            assert choice != "note" or call.name == "note"
        counts.add(len(calls))
    assert parallel or counts == {1}
    assert choice != "note" or counts == {1}


@pytest.mark.parametrize("marks", [[], MARKS], ids=["text", "tokens"])
@pytest.mark.parametrize("fmt", list(ToolFormat))
def test_auto_allows_plain_answers(fmt: ToolFormat, marks: list[str]) -> None:
    vocabulary = Vocabulary(marks)
    grammar = tool_grammar(fmt, TOOLS, special_ids=vocabulary.special_ids)
    assert grammar is not None
    walk = Walk(vocabulary, grammar)
    assert walk.may_end()
    for part in ("It is 3 < 4, héllo ", "[1, 2] (f) ", '{"k": 1} ', "<tool_ and\n\n so on"):
        walk.write(part)
        assert walk.may_end()
        assert parse(walk.text.decode(), fmt, NAMES)[1] == []


@pytest.mark.parametrize("fmt", list(ToolFormat))
def test_a_mark_in_free_text_leads_to_a_call_alone(fmt: ToolFormat) -> None:
    """No text that the parser reads as a call can be written outside the grammar's calls."""
    vocabulary = Vocabulary(MARKS)
    grammar = tool_grammar(fmt, TOOLS, special_ids=vocabulary.special_ids)
    assert grammar is not None
    spelled = {
        HERMES: ["<tool_call>"],
        LLAMA3: ['{ "name"', '{\n"function"', '{"parameters"'],
        PYTHONIC: ["[ find(", "[find (", "[ note ("],
    }[fmt]
    for text in spelled:
        walk = Walk(vocabulary, grammar).write("x " + text[:-1])
        assert ord(text[-1]) not in walk.allowed()


def test_required_starts_with_a_call() -> None:
    vocabulary = Vocabulary([])
    for fmt, first in ((HERMES, "<"), (LLAMA3, "{"), (PYTHONIC, "[")):
        grammar = tool_grammar(fmt, TOOLS, choice="required")
        assert grammar is not None
        walk = Walk(vocabulary, grammar)
        assert {vocabulary.tokens[i].decode()[0] for i in walk.allowed()} == {first}


def test_nothing_to_hold_to() -> None:
    assert tool_grammar(HERMES, [], choice="auto") is None
    assert tool_grammar(HERMES, TOOLS, choice="none") is None


@pytest.mark.parametrize(
    ("tools", "choice", "reason"),
    [
        ([], "required", "tools are none"),
        (TOOLS, "absent", "'absent'"),
        ([{"name": "a b"}], "auto", "must be 1 to 64"),
        ([{"name": 'x"\n| "y'}], "auto", "must be 1 to 64"),
        ([{"name": "x" * 65}], "auto", "must be 1 to 64"),
        ([{"parameters": {}}], "auto", "no name"),
        ([{"name": "f", "parameters": []}], "auto", "JSON schema object"),
        ([{"name": "f", "parameters": {"type": "string"}}], "auto", "must describe an object"),
        ([{"name": "f"}, {"name": "f"}], "auto", "same name"),
        ([{"name": f"f{i}"} for i in range(129)], "auto", "limit is 128"),
        ([{"name": "f", "parameters": {"type": "object", "x": "y" * 70_000}}], "auto", "characters"),
        ([{"name": "f", "parameters": {"type": "object", "x": {1, 2}}}], "auto", "not plain JSON"),
    ],
)
def test_bad_tools_are_refused_by_name(tools: list[Any], choice: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        tool_grammar(HERMES, tools, choice=choice)


def test_prose_in_schemas_costs_nothing_and_parameters_may_be_called_like_it() -> None:
    tool = {
        "name": "f",
        "parameters": {
            "type": "object",
            "description": "x" * 50_000,
            "properties": {
                "description": {"type": "integer", "title": "y", "default": 3},
                "title": {"const": "default"},
            },
            "required": ["description", "title"],
        },
    }
    grammar = tool_grammar(HERMES, [tool], choice="required")
    assert grammar is not None and len(grammar) < 1_000
    walk = Walk(Vocabulary([]), grammar)
    walk.write('<tool_call>\n{"name": "f", "arguments": {"description": 12, "title": "default"}}\n</tool_call>')
    assert walk.may_end()


@pytest.mark.parametrize("fmt", list(ToolFormat))
def test_many_tools_make_a_grammar_of_bearable_size(fmt: ToolFormat) -> None:
    properties = {f"p{i}": {"type": "string", "description": "z" * 60} for i in range(6)}
    tools = [{"name": f"tool_{i}", "parameters": {"type": "object", "properties": properties}} for i in range(64)]
    grammar = tool_grammar(fmt, tools)
    assert grammar is not None and len(grammar) < 1 << 16
    walk = Walk(Vocabulary([]), grammar).write("Hello")
    assert walk.may_end()


def test_deep_schemas_and_odd_keywords_are_refused() -> None:
    deep: Any = {"type": "string"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    with pytest.raises(InvalidRequest, match="deeper than 64"):
        tool_grammar(HERMES, [{"name": "f", "parameters": {"type": "object", "properties": {"a": deep}}}])
    odd = {"name": "f", "parameters": {"type": "object", "properties": {"a b": {"type": "string"}}}}
    assert tool_grammar(HERMES, [odd]) is not None
    with pytest.raises(InvalidRequest, match="Python keyword"):
        tool_grammar(PYTHONIC, [odd])


@pytest.mark.parametrize("fmt", list(ToolFormat))
def test_what_a_grammar_cannot_say_refuses_no_tool(fmt: ToolFormat) -> None:
    """pydantic writes such schemas for Path, set and bytes, MCP servers whatever they like."""
    properties = {
        "path": {"type": "string", "format": "path", "maxLength": 4},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2, "uniqueItems": True},
    }
    odd = {"name": "open", "parameters": {"type": "object", "properties": properties, "required": ["tags"]}}
    vocabulary = Vocabulary([])
    grammar = tool_grammar(fmt, [*TOOLS, odd], choice="open", parallel=False, special_ids=vocabulary.special_ids)
    assert grammar is not None
    for seed in range(3):
        _, (call,) = parse(Walk(vocabulary, grammar).finish(random.Random(seed)), fmt, ["open"])
        assert all(type(tag) is bool for tag in json.loads(call.arguments)["tags"])
