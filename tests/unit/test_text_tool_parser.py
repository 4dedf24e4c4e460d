"""Tool calls in text: what counts as one, what does not, and what it costs to find out."""

from __future__ import annotations

import json
import time

import pytest
from caesura.runtime.text.tool_events import MAX_ARGUMENT_CHARS, MAX_CALLS
from caesura.runtime.text.tool_parser import (
    CallArguments,
    CallEnded,
    CallStarted,
    ContentDelta,
    ParsedCall,
    ToolCallParser,
    ToolFormat,
    detect_format,
    parse,
)

from tests.text_builders import STYLES

HERMES, LLAMA3, PYTHONIC = ToolFormat.HERMES, ToolFormat.LLAMA3_JSON, ToolFormat.PYTHONIC
NAMES = ["f", "g", "get_weather", "ns.search-2"]


def call(name: str, **arguments: object) -> ParsedCall:
    return ParsedCall(name, json.dumps(arguments))


def loaded(calls: list[ParsedCall]) -> list[tuple[str, object]]:
    assert all(item.complete for item in calls)
    return [(item.name, json.loads(item.arguments)) for item in calls]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("just text", "just text", []),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [call("f", a=1)]),
        ('<tool_call>{"name":"f","arguments":{}}</tool_call>', "", [call("f")]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [call("f")]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [call("f")]),
        ('<tool_call>{"name": "f", "arguments": ""}</tool_call>', "", [call("f")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [call("f", a=1)]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [call("f", a=1)]),
        ('<tool_call>{"name": "f", "parameters": {"a": 1}, "id": "x1"}</tool_call>', "", [call("f", a=1)]),
        ('<tool_call>{"id": "x", "type": "function", "function": {"name": "f", "arguments": {"a": 2}}}</tool_call>',
         "", [call("f", a=2)]),
        ('Let me see.\n<tool_call>{"name": "g"}</tool_call>\nDone.', "Let me see.\nDone.", [call("g")]),
        ('<tool_call>[{"name": "f"}, {"name": "g", "arguments": {"x": [1]}}]</tool_call>', "",
         [call("f"), call("g", x=[1])]),
        ('<tool_call>{"name": "f"}\n{"name": "g"}</tool_call>', "", [call("f"), call("g")]),
        ('<tool_call>{"name": "f"}<tool_call>{"name": "g"}</tool_call>', "", [call("f"), call("g")]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "", [call("f", a=1)]),
        ('<tool_call>{"name": "f", "arguments": {"code": "a\nb\t\\"}\\""}}</tool_call>', "",
         [call("f", code='a\nb\t"}"')]),
        ('<tool_call>{"name": "f", "arguments": {"h": "</tool_call><tool_call>{"}}</tool_call>', "",
         [call("f", h="</tool_call><tool_call>{")]),
        ('<tool_call>{"name": "f", "arguments": {"d": "日本😀 \\u00e9"}}</tool_call>', "", [call("f", d="日本😀 é")]),
        ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', "", [call("unknown")]),
        ("a <tool_ b", "a <tool_ b", []),
        ("prose on <tool_call> tags", "prose on <tool_call> tags", []),
        ("<tool_call>{not json}</tool_call>", "<tool_call>{not json}</tool_call>", []),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
        ('<tool_call>{"name": "f" "x"}</tool_call>', '<tool_call>{"name": "f" "x"}</tool_call>', []),
        ("<<tool_call>", "<<tool_call>", []),
        ('<tool_call><tool_call>{"name": "f"}</tool_call>', "<tool_call>", [call("f")]),
        ("x  \n ", "x  \n ", []),
    ],
)  # fmt: skip
def test_hermes(text: str, content: str, calls: list[ParsedCall]) -> None:
    found_content, found = parse(text, HERMES, NAMES)
    assert found_content == content
    assert loaded(found) == loaded(calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', "", [call("f", a=1)]),
        ('  {"name": "f", "arguments": {"a": 1}}\n', "", [call("f", a=1)]),
        ('<|python_tag|>{"name": "f", "parameters": {}}', "", [call("f")]),
        ('{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [call("f", a=1)]),
        ('{"name": "f"}; {"name": "g"};{"name": "f"}', "", [call("f"), call("g"), call("f")]),
        ('[{"name": "f"}, {"name": "g"}]', "", [call("f"), call("g")]),
        ('Sure: {"name": "f", "parameters": {"q": "a;b"}} ok', "Sure: ok", [call("f", q="a;b")]),
        ('{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        ('{"answer": {"name": "f"}}', '{"answer":}', [call("f")]),
        ("a {b} [c] <d>", "a {b} [c] <d>", []),
        ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ],
)
def test_llama3(text: str, content: str, calls: list[ParsedCall]) -> None:
    found_content, found = parse(text, LLAMA3, NAMES)
    assert loaded(found) == loaded(calls)
    assert found_content.split() == content.split()


def test_llama3_without_tool_names_takes_an_answer_that_is_a_call() -> None:
    assert loaded(parse('{"name": "any", "parameters": {}}', LLAMA3)[1]) == [("any", {})]
    assert parse('The JSON is {"name": "any", "parameters": {}}', LLAMA3)[1] == []


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("[f()]", "", [call("f")]),
        ("[f(a=1, b='x'), g()]", "", [call("f", a=1, b="x"), call("g")]),
        ("[f( a = 1 , ), ]", "", [call("f", a=1)]),
        ("[ns.search-2(q=\"it's\")]", "", [call("ns.search-2", q="it's")]),
        ("[f(a=-1.5e3, b=+2, c=.5, d=1., e=007, g=1_000)]", "", [call("f", a=-1500.0, b=2, c=0.5, d=1.0, e=7, g=1000)]),
        ("[f(a=True, b=False, c=None, d=true, e=null)]", "", [call("f", a=True, b=False, c=None, d=True, e=None)]),
        ("[f(a=[1, [2, ()], {}], b={'k': {'z': \"q\"}, 2: None})]", "",
         [call("f", a=[1, [2, []], {}], b={"k": {"z": "q"}, "2": None})]),
        (r"""[f(a='\'\n\x41\u00e9\U0001F600\\', b="\"")]""", "", [call("f", a="'\nAé😀\\", b='"')]),
        ('[f(a="""x "y" \'z\'\nw""", b=\'\', c="")]', "", [call("f", a="x \"y\" 'z'\nw", b="", c="")]),
        ("[f(a='[g()]')]", "", [call("f", a="[g()]")]),
        ("Sure! [f(a=1)] there", "Sure! there", [call("f", a=1)]),
        ("[link](url) [1] [f] [f(1)] [unknown()]", "[link](url) [1] [f] [f(1)] [unknown()]", []),
        ("[f(**x)]", "[f(**x)]", []),
        ("[[f(a=1)]", "[", [call("f", a=1)]),
    ],
)  # fmt: skip
def test_pythonic(text: str, content: str, calls: list[ParsedCall]) -> None:
    found_content, found = parse(text, PYTHONIC, NAMES)
    assert loaded(found) == loaded(calls)
    assert found_content.split() == content.split()


@pytest.mark.parametrize(
    "payload",
    [
        "__import__('os').system('id')",
        "().__class__.__bases__[0]",
        "open('/etc/passwd').read()",
        "1+1",
        "[x for x in y]",
        "lambda: 0",
        "f'{1}'",
        "b'x'",
        "9" * 5_000,
        "1e999",
        "nan",
        "0x10",
        "[" * 10_000,
        "{'a':" * 10_000,
        r"'\N{BULLET}'",
        r"'\uD8'",
    ],
)
def test_nothing_is_evaluated(payload: str) -> None:
    for text in (f"[f(a={payload})]", f"[f(a=1, b={payload}"):
        _, calls = parse(text, PYTHONIC, NAMES)
        assert not any(item.complete for item in calls)


@pytest.mark.parametrize("count", range(6))
@pytest.mark.parametrize("between", ["", "\n", "\n\n", " ", " and then "])
def test_parallel_calls_with_any_separator(count: int, between: str) -> None:
    hermes = between.join(
        f'<tool_call>\n{{"name": "f", "arguments": {{"i": {i}}}}}\n</tool_call>' for i in range(count)
    )
    content, calls = parse(f"before\n{hermes}\nafter", HERMES, NAMES)
    assert loaded(calls) == [("f", {"i": i}) for i in range(count)]
    assert content.split() == ["before", *between.split() * max(0, count - 1), "after"]


def test_events_stream_while_a_call_is_written() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    assert parser.push("Hi <tool_call>\n") == [ContentDelta("Hi")]
    assert parser.push('{"name": "get_weather", "argum') == []
    assert parser.push('ents": {"city": "Zü') == [CallStarted(0, "get_weather"), CallArguments(0, '{"city": "Zü')]
    assert parser.push('rich"}}') == [
        CallArguments(0, 'rich"}'),
        CallEnded(0, '{"city": "Zürich"}'),
    ]
    assert parser.push("\n</tool_call>\n<tool_call>") == []
    assert parser.push('{"name": "f"}') == [CallStarted(1, "f"), CallArguments(1, "{}"), CallEnded(1, "{}")]
    assert parser.finish() == []
    assert parser.finish() == []


def test_prose_flows_and_a_false_start_is_given_back_soon() -> None:
    for fmt, start in ((HERMES, "<tool_call> "), (LLAMA3, '{"name": "'), (PYTHONIC, "[f(")):
        parser = ToolCallParser(fmt, NAMES)
        assert parser.push("word") == [ContentDelta("word")]
        assert parser.push(start) == []
        shown = "".join(event.text for event in parser.push("x" * 80) if isinstance(event, ContentDelta))
        assert start.strip() in shown


@pytest.mark.parametrize(
    ("format", "first", "begun"),
    [
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', '\n<tool_call>\n{"na'),
        (LLAMA3, '{"name": "f", "parameters": {}}', '; {"na'),
        (PYTHONIC, "[f()", ", g("),
    ],
)
def test_a_further_call_that_was_cut_off_as_it_began_is_no_content(format: ToolFormat, first: str, begun: str) -> None:
    for cut_off in (False, True):
        parser = ToolCallParser(format, NAMES)
        events = [*parser.push(first + begun), *parser.finish(cut_off=cut_off)]
        assert [event.name for event in events if isinstance(event, CallStarted)] == ["f"]
        text = "".join(event.text for event in events if isinstance(event, ContentDelta))
        assert (text == "", parser.was_cut) == (cut_off, cut_off)


def test_a_cut_off_call_is_reported_as_such() -> None:
    for fmt, text in (
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "x'),
        (LLAMA3, '{"name": "f", "parameters": {"a": "x'),
        (PYTHONIC, '[f(a="x'),
    ):
        content, calls = parse(text, fmt, NAMES)
        assert content == ""
        assert [(c.name, c.complete) for c in calls] == [("f", False)]
        assert calls[0].arguments.replace(" ", "") == '{"a":"x'


def test_malformed_arguments_are_no_complete_call() -> None:
    for arguments in ("{'a': 1}", '{"a": 1,}', '{"a": NaN}', '{"a": [1}', "[1]", "3", '{"a": ' + "9" * 5000 + "}"):
        _, calls = parse(f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>', HERMES, NAMES)
        assert not any(c.complete for c in calls)


def test_limits_on_length_depth_and_number() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "' + "x" * (MAX_ARGUMENT_CHARS + 10) + '"}}</tool_call>'
    content, calls = parse(text, HERMES, NAMES)
    assert [c.complete for c in calls] == [False]
    assert len(calls[0].arguments) == MAX_ARGUMENT_CHARS
    assert content.endswith('"}}</tool_call>')
    deep = '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 100 + "]" * 100 + "}}</tool_call>"
    assert [c.complete for c in parse(deep, HERMES, NAMES)[1]] == [False]
    many = '<tool_call>{"name": "f"}</tool_call>' * (MAX_CALLS + 5)
    content, calls = parse(many, HERMES, NAMES)
    assert len(calls) == MAX_CALLS
    assert content.count("<tool_call>") == 5


@pytest.mark.parametrize(
    ("fmt", "unit"),
    [
        (HERMES, "<tool_call>"),
        (HERMES, "<"),
        (HERMES, '<tool_call>{"name":"f","arguments":{"a":["'),
        (HERMES, '<tool_call>{"arguments":{"a":[0,'),
        (LLAMA3, '{"name":"'),
        (LLAMA3, '{"parameters":[0,'),
        (LLAMA3, "[{"),
        (LLAMA3, '{"name": "f", "parameters": {}};'),
        (PYTHONIC, "[f("),
        (PYTHONIC, "[f(a=["),
        (PYTHONIC, "[f(a='"),
        (PYTHONIC, "["),
        (HERMES, " \n"),
    ],
)
def test_hostile_text_costs_no_more_than_its_length(fmt: ToolFormat, unit: str) -> None:
    def seconds(length: int) -> float:
        text = (unit * length)[:length]
        best = float("inf")
        for _ in range(2):
            begun = time.perf_counter()
            parse(text, fmt, NAMES)
            best = min(best, time.perf_counter() - begun)
        return best

    # quadratic work would make the second 64 times the first; the bound leaves room for a busy machine
    assert seconds(80_000) < 32 * max(seconds(10_000), 0.004)


def test_formats_are_known_by_their_templates() -> None:
    assert detect_format(STYLES["qwen"]) is HERMES
    assert detect_format(STYLES["llama3"]) is LLAMA3
    assert detect_format("{{ '[func_name1(params_name1=params_value1)]' }}") is PYTHONIC
    assert detect_format(STYLES["chatml"]) is HERMES
