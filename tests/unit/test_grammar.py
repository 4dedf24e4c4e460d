"""Grammars: what they allow, what they refuse, and that a failure is one clear error."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping

import numpy as np
import pytest
from caesura.runtime.errors import GrammarError, Overloaded
from caesura.runtime.model.grammar import MAX_JSON_DEPTH, MAX_SOURCE_BYTES, GrammarCompiler
from caesura.runtime.model.grammar_limits import check_schema
from caesura.runtime.sampling import Constraint, ConstraintKind, Matcher

EOS, TOOL, HELLO, SECOND_EOS = 256, 257, 258, 259


class ByteTokenizer:
    """One token per byte, then EOS, a tool marker, one long token and a second EOS."""

    vocab_size = 260
    eos_ids = frozenset({EOS, SECOND_EOS})
    bos_id: int | None = None
    special_ids: Mapping[str, int] = {"<|end|>": EOS, "<tool>": TOOL, "<|turn|>": SECOND_EOS}

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        return b"".join(self.token_bytes(i) for i in ids if i < 256 or i == HELLO).decode()

    def token_bytes(self, token_id: int) -> bytes:
        special = {EOS: b"<|end|>", TOOL: b"<tool>", HELLO: b"hello", SECOND_EOS: b"<|turn|>"}
        return special.get(token_id) or bytes([token_id])


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(ByteTokenizer())


def allowed(matcher: Matcher, words: int = 9) -> set[int]:
    row = np.full(words, -1, dtype=np.int32)
    matcher.fill_mask(row)
    return set(np.nonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))[0].tolist())


def accept(matcher: Matcher, text: str) -> Matcher:
    for byte in text.encode():
        assert byte in allowed(matcher), (text, byte)
        matcher.accept(byte)
    return matcher


def may_end(matcher: Matcher) -> bool:
    found = allowed(matcher) & {EOS, SECOND_EOS}
    assert len(found) in (0, 2)
    return bool(found)


def test_eos_is_allowed_exactly_when_the_grammar_may_end(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Constraint(ConstraintKind.REGEX, "ab?"))
    assert allowed(matcher) == {ord("a")}
    accept(matcher, "a")
    assert allowed(matcher) == {ord("b"), EOS, SECOND_EOS}
    accept(matcher, "b")
    assert allowed(matcher) == {EOS, SECOND_EOS}
    assert matcher.stopped


def test_a_long_token_counts_as_its_bytes(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Constraint(ConstraintKind.REGEX, "hello!|hold"))
    assert allowed(matcher) == {ord("h"), HELLO}
    matcher.accept(HELLO)
    assert allowed(matcher) == {ord("!")}


def test_control_tokens_never_match_plain_text(compiler: GrammarCompiler) -> None:
    for pattern in ("<tool>", r"[\s\S]*", ".*"):
        assert TOOL not in allowed(compiler.compile(Constraint(ConstraintKind.REGEX, pattern)))
    matcher = compiler.compile(Constraint(ConstraintKind.EBNF, 'start: <tool> "x"'))
    assert allowed(matcher) == {TOOL}


def test_choices_keep_longer_ones_open(compiler: GrammarCompiler) -> None:
    choices = ["a", "ab", 'qu"ote\n', "grün", "\x7f", "back\\slash\x7f"]
    source = json.dumps(choices)
    for choice in choices:
        assert may_end(accept(compiler.compile(Constraint(ConstraintKind.CHOICES, source)), choice))
    matcher = accept(compiler.compile(Constraint(ConstraintKind.CHOICES, source)), "a")
    assert allowed(matcher) == {ord("b"), EOS, SECOND_EOS}


def test_json_schema(compiler: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    schema["additionalProperties"] = False
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema))
    matcher = accept(compiler.compile(constraint), '{"n": 12')
    assert not may_end(matcher)
    assert may_end(accept(matcher, "}"))
    assert ord("x") not in allowed(accept(compiler.compile(constraint), '{"'))


def test_whitespace_in_json_is_bounded(compiler: GrammarCompiler) -> None:
    matcher = accept(compiler.compile(Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"array"}')), "[")
    for _ in range(40):
        if ord(" ") not in allowed(matcher):
            break
        matcher.accept(ord(" "))
    assert ord(" ") not in allowed(matcher)


def test_hostile_grammars_are_refused_in_linear_time(compiler: GrammarCompiler) -> None:
    for open_literal in ('start: "' + '\\"' * 120_000, "start: /" + "\\/" * 120_000):
        with pytest.raises(GrammarError, match="cannot be compiled"):  # and not that it took too long
            compiler.compile(Constraint(ConstraintKind.EBNF, open_literal), deadline_s=60)
    check_schema({"anyOf": [{"$ref": ""} for _ in range(40_000)]}, "json_schema")


def test_a_layout_without_free_whitespace_is_kept(compiler: GrammarCompiler) -> None:
    layout = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "x-guidance": layout}
    matcher = accept(compiler.compile(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema))), "[1")
    assert ord(" ") not in allowed(matcher)
    assert allowed(accept(matcher, ",")) == {ord(" ")}


def test_matchers_of_one_grammar_are_independent(compiler: GrammarCompiler) -> None:
    constraint = Constraint(ConstraintKind.REGEX, "abc")
    first, second = compiler.compile(constraint), compiler.compile(constraint)
    accept(first, "ab")
    assert allowed(second) == {ord("a")}


def test_mask_rows_longer_and_shorter_than_the_vocabulary(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Constraint(ConstraintKind.REGEX, "ab?"))
    assert allowed(matcher, words=20) == {ord("a")}
    assert allowed(matcher, words=4) == {ord("a")}


@pytest.mark.parametrize(
    ("kind", "source", "says"),
    [
        (ConstraintKind.REGEX, "(", "unclosed group"),
        (ConstraintKind.REGEX, r"[^\s\S]", "no output matches"),
        (ConstraintKind.REGEX, "a" * (MAX_SOURCE_BYTES + 1), "bytes"),
        (ConstraintKind.REGEX, "(" * 30_000 + "a" + ")" * 30_000, "regex"),
        (ConstraintKind.EBNF, "nothing here", "ebnf"),
        (ConstraintKind.EBNF, 'start: "a" missing', "ebnf"),
        (ConstraintKind.EBNF, "start: " + "(" * 30_000 + '"a"' + ")" * 30_000, "nested"),
        (ConstraintKind.CHOICES, "[]", "between 1 and"),
        (ConstraintKind.CHOICES, '{"a": 1}', "list of strings"),
        (ConstraintKind.CHOICES, "[1]", "list of strings"),
        (ConstraintKind.CHOICES, "nonsense", "JSON"),
        (ConstraintKind.JSON_SCHEMA, "[1]", "object"),
        (ConstraintKind.JSON_SCHEMA, "false", "cannot be satisfied"),
        (ConstraintKind.JSON_SCHEMA, '{"type":"string","minLength":5,"maxLength":2}', "nsatisfiable"),
        (ConstraintKind.JSON_SCHEMA, '{"allOf":[{"type":"string"},{"type":"integer"}]}', "nsatisfiable"),
        (ConstraintKind.JSON_SCHEMA, '{"$defs":{"a":{"$ref":"#/$defs/a"}},"$ref":"#/$defs/a"}', "no output"),
        (ConstraintKind.JSON_SCHEMA, '{"$ref":"http://example.invalid/x"}', "not fetch"),
        (ConstraintKind.JSON_SCHEMA, '{"type":"strin"}', "strin"),
        (ConstraintKind.JSON_SCHEMA, "[" * 20_000 + "]" * 20_000, "json_schema"),
        (ConstraintKind.JSON_SCHEMA, '{"not":' * 40 + "{}" + "}" * 40 + " ", "json_schema"),
        (ConstraintKind.JSON_SCHEMA, '{"items":' * 80 + "{}" + "}" * 80, f"deeper than {MAX_JSON_DEPTH}"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_reason(
    compiler: GrammarCompiler, kind: ConstraintKind, source: str, says: str
) -> None:
    with pytest.raises(GrammarError) as caught:
        compiler.compile(Constraint(kind, source))
    assert says in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_token_outside_the_mask_is_refused(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Constraint(ConstraintKind.REGEX, "ab"))
    with pytest.raises(GrammarError):
        matcher.accept(ord("z"))


def test_a_compile_that_takes_too_long_ends_in_an_error() -> None:
    entered, release = threading.Event(), threading.Event()

    class Slow(ByteTokenizer):
        def token_bytes(self, token_id: int) -> bytes:
            entered.set()
            release.wait(10)
            return super().token_bytes(token_id)

    compiler = GrammarCompiler(Slow())
    try:
        with pytest.raises(GrammarError, match=r"within 0\.05 s"):
            compiler.compile(Constraint(ConstraintKind.REGEX, "a"), deadline_s=0.05)
        assert entered.is_set()
    finally:
        release.set()
    assert allowed(compiler.compile(Constraint(ConstraintKind.REGEX, "a"))) == {ord("a")}


def conjunctions(count: int) -> dict[str, dict[str, object]]:
    """Ways to hold one string to many patterns."""
    patterns = [f"^.*x.{{{number}}}y.*$" for number in range(count)]
    nested: dict[str, object] = {"type": "string"}
    for pattern in patterns:
        nested = {"type": "string", "pattern": pattern, "anyOf": [nested]}
    chain = {f"d{i}": {"pattern": pattern, "$ref": f"#/$defs/d{i + 1}"} for i, pattern in enumerate(patterns)}
    merged = [{"properties": {"a": {"pattern": pattern}}, "required": ["a"]} for pattern in patterns]
    return {
        "allOf": {"type": "string", "allOf": [{"pattern": pattern} for pattern in patterns]},
        "nested alternatives": nested,
        "a chain of references": {"$ref": "#/$defs/d0", "$defs": {**chain, f"d{count}": {"type": "string"}}},
        "a chain of anchors": {
            "$ref": "#a0",
            "$defs": {
                f"d{i}": {"$anchor": f"a{i}", "pattern": p, "$ref": f"#a{i + 1}"} for i, p in enumerate(patterns)
            },
        },
        "merged members": {"type": "object", "allOf": merged},
    }


@pytest.mark.parametrize("name", conjunctions(1))
def test_intersections_that_would_take_for_ever_are_refused_at_once(compiler: GrammarCompiler, name: str) -> None:
    """What compiles in no time with a few patterns takes minutes and gigabytes with thirty."""
    schema = json.dumps(conjunctions(30)[name])
    with pytest.raises(GrammarError, match="at most 12 can be intersected"):
        compiler.compile(Constraint(ConstraintKind.JSON_SCHEMA, schema))
    with pytest.raises(GrammarError, match="at most 12 can be intersected"):
        compiler.compile(Constraint(ConstraintKind.EBNF, f"start: A\nA: %json {schema}"))
    if "anchors" not in name:  # which the compiler does not know anyway
        compiler.compile(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(conjunctions(1)[name])))


def test_so_are_those_of_a_lark_grammar(compiler: GrammarCompiler) -> None:
    terms = [f"/(?s:.*)x.{{{number}}}y(?s:.*)/" for number in range(30)]
    with pytest.raises(GrammarError, match="at most 12 are compiled"):
        compiler.compile(Constraint(ConstraintKind.EBNF, "start: A\nA: " + " & ".join(terms)))
    compiler.compile(Constraint(ConstraintKind.EBNF, 'start: A\nA: "' + "&" * 30 + '" /[&]&&/ // & & &\n'))


def test_many_patterns_of_different_values_are_fine(compiler: GrammarCompiler) -> None:
    members = {f"m{number}": {"type": "string", "pattern": f"^[a-z]{{{number + 1}}}$"} for number in range(40)}
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}, "name": {"pattern": "^a+$", "type": "string"}}}
    for schema in ({"type": "object", "properties": members}, tree):
        compiler.compile(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema)))


def test_a_grammar_that_waits_behind_slow_ones_is_not_blamed() -> None:
    release = threading.Event()

    class Slow(ByteTokenizer):
        def token_bytes(self, token_id: int) -> bytes:
            release.wait(10)
            return super().token_bytes(token_id)

    compiler = GrammarCompiler(Slow())
    try:
        for letter in "ab":  # one for each compiler
            with pytest.raises(GrammarError, match="was not compiled"):
                compiler.compile(Constraint(ConstraintKind.REGEX, letter), deadline_s=0.05)
        with pytest.raises(Overloaded, match="other grammars"):
            asyncio.run(compiler.compile_async(Constraint(ConstraintKind.REGEX, "c"), deadline_s=0.05))
    finally:
        release.set()


def test_a_refusal_keeps_nothing_of_those_who_asked(compiler: GrammarCompiler) -> None:
    """The failed compilation is kept; its error must not gather the frames, and so the requests, of all callers."""
    found = []
    for _ in range(20):
        with pytest.raises(GrammarError) as caught:
            compiler.compile(Constraint(ConstraintKind.REGEX, "(kept"))
        found.append(caught.value)
    assert len({id(error) for error in found}) == 20
    assert all(len(list(traceback.walk_tb(error.__traceback__))) < 10 for error in found)
    kept = compiler._compiled[Constraint(ConstraintKind.REGEX, "(kept")].exception()
    assert kept is not None and kept.__traceback__ is None


def test_the_cache_of_compiled_grammars_is_bounded_and_shared_between_threads() -> None:
    compiler = GrammarCompiler(ByteTokenizer(), max_compiled=4)
    failures: list[Exception] = []

    def work(offset: int) -> None:
        try:
            for index in range(30):
                letter = chr(97 + (index + offset) % 8)
                assert allowed(compiler.compile(Constraint(ConstraintKind.REGEX, letter))) == {ord(letter)}
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(compiler._compiled) <= 4
    compiler.close()


def test_grammars_load_no_torch() -> None:
    code = "import sys, caesura.runtime.model.grammar; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
