"""Grammars that begin where the thinking ends, of every kind, for marks that are tokens and marks that are text."""

from __future__ import annotations

import asyncio
import json
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from caesura.runtime.embedded import checkpoint_path
from caesura.runtime.embedded.chat import CALCULATOR_TOOL
from caesura.runtime.errors import GrammarError
from caesura.runtime.generation import ToolCalling
from caesura.runtime.handle import ContextHandle
from caesura.runtime.model.grammar import GrammarCompiler
from caesura.runtime.sampling import Constraint, ConstraintKind, SamplingParams
from caesura.runtime.text.reasoning import MARKS, ThinkMarks
from caesura.runtime.text.think_grammar import after_thinking
from caesura.runtime.text.tokenizer import Tokenizer, load_tokenizer
from caesura.runtime.text.tool_parser import ToolFormat, tool_grammar

# the embedded model has no marks of thinking; these of its own tokens stand in for such that are tokens
TOKENS = ThinkMarks("<tool_response>", "</tool_response>")


@lru_cache(maxsize=1)
def tools() -> tuple[Tokenizer, GrammarCompiler]:
    tokenizer = load_tokenizer(checkpoint_path())
    return tokenizer, GrammarCompiler(tokenizer)


def fits(constraint: Constraint, text: str) -> bool:
    """Whether the grammar takes the text whole."""
    tokenizer, compiler = tools()
    matcher = compiler.compile(constraint)
    try:
        for token in tokenizer.encode(text, allow_special=True):
            matcher.accept(token)
    except GrammarError:
        return False
    row = np.zeros((tokenizer.vocab_size + 31) // 32, dtype=np.int32)
    matcher.fill_mask(row)
    end = min(tokenizer.eos_ids)
    return matcher.stopped or bool(row[end // 32] >> (end % 32) & 1)


CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1"}}\n</tool_call>'
CASES = [
    (ConstraintKind.JSON_SCHEMA, json.dumps({"enum": ["x}"]}), '"x}"', '"y"'),
    (ConstraintKind.REGEX, "(yes|no)/\\/!", "yes//!", "maybe"),
    (ConstraintKind.EBNF, 'start: "left" | other\nother: "}" | "right"', "right", "up"),
    (ConstraintKind.CHOICES, '["a", "ab"]', "ab", "b"),
    (ConstraintKind.EBNF, "calls", CALL, "no call"),
]


def test_blanks_in_json_after_the_thinking_are_bounded() -> None:
    held = Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "array"}')
    free = after_thinking(held, TOKENS, opened=True, special_ids=tools()[0].special_ids)
    assert fits(free, f"{TOKENS.closing}[{' ' * 32}]")
    assert not fits(free, f"{TOKENS.closing}[{' ' * 33}]")


@pytest.mark.parametrize(("choice", "may_answer"), [("auto", True), ("required", False)])
def test_a_model_that_thinks_does_so_before_it_calls(choice: str, may_answer: bool) -> None:
    tokenizer = tools()[0]
    spec = CALCULATOR_TOOL["function"]

    async def fitting(end: str, texts: list[str]) -> list[bool]:
        async def compile(constraint: Constraint) -> Any:
            return held.append(constraint)

        async def call(command: Any) -> Any:
            return command(SimpleNamespace(tokens=lambda _: tokenizer.encode(end, allow_special=True)))

        held: list[Constraint] = []
        service = SimpleNamespace(
            tokenizer=tokenizer, tool_format=ToolFormat.HERMES, think_marks=TOKENS, compile=compile
        )
        handle = ContextHandle(cast(Any, service))
        handle.id = cast(Any, 1)
        handle._call = call  # type: ignore[method-assign]
        await handle._prepare(SamplingParams(), ToolCalling((spec,), choice, True))
        return [fits(held[0], text) for text in texts]

    thought = f"hm{TOKENS.closing}\n\n"
    texts = [CALL, "fine", f"{TOKENS.opening}{thought}{CALL}", thought + CALL, f"{TOKENS.opening}{thought}fine"]
    prompt = "<|im_start|>assistant\n"
    assert asyncio.run(fitting(prompt, texts)) == [True, may_answer, True, False, may_answer]
    opened = asyncio.run(fitting(f"{prompt}{TOKENS.opening}\n", texts))
    assert opened == [False, False, False, True, False]
    ended = asyncio.run(fitting(f"{prompt}{TOKENS.opening}\n\n{TOKENS.closing}\n\n", texts))
    assert ended == [True, may_answer, False, False, False]


@pytest.mark.parametrize("marks", [MARKS["qwen3"], TOKENS])
@pytest.mark.parametrize(("kind", "source", "right", "wrong"), CASES)
def test_the_answer_is_held_after_the_thinking(
    kind: ConstraintKind, source: str, right: str, wrong: str, marks: ThinkMarks
) -> None:
    special_ids = tools()[0].special_ids
    if source == "calls":
        spec = [CALCULATOR_TOOL["function"]]
        source = tool_grammar(ToolFormat.HERMES, spec, choice="required", special_ids=special_ids) or ""
    held = Constraint(kind, source)
    assert fits(held, right) and not fits(held, wrong)
    free = after_thinking(held, marks, opened=False, special_ids=special_ids)
    for gap in ("", "\n", "\n\n"):
        for thought in ("", f"\nhm, {wrong}? {marks.closing[:-2]} no\n"):
            text = f"{thought}{marks.closing}{gap}"
            assert fits(free, marks.opening + text + right)
            assert not fits(free, marks.opening + text + wrong)
            opened = after_thinking(held, marks, opened=True, special_ids=special_ids)
            assert fits(opened, text + right) and not fits(opened, text + wrong)
    assert fits(free, right) and not fits(free, wrong)
    assert not fits(opened, right), "a prompt that opened the thinking wants it closed"
