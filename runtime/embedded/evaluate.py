"""Score the embedded model on held-out tasks, greedily, with the real calculator in the loop and without it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from caesura.runtime.embedded.chat import (
    CALCULATOR_TOOL,
    TURN_END,
    Message,
    calls_message,
    parse_calls,
    render,
)
from caesura.runtime.embedded.data import solved_turns, system_prompt
from caesura.runtime.embedded.examples import token_id
from caesura.runtime.embedded.net import Cache, TinyLlama
from caesura.runtime.embedded.tasks import CalculatorError, Kind, Split, Task, calculate, check, make_tasks
from tokenizers import Tokenizer

MAX_TURN_TOKENS = 160
MAX_CALLS = 4


@dataclass(frozen=True, slots=True)
class Score:
    """How one row of the report went."""

    name: str
    right: int
    total: int
    context_tokens: int  # of the longest conversation in this row

    @property
    def share(self) -> float:
        return self.right / max(1, self.total)


class Chat:
    """One conversation with the model; keys and values are kept from turn to turn."""

    def __init__(
        self,
        model: TinyLlama,
        tokenizer: Tokenizer,
        *,
        system: str = "",
        tools: Sequence[Mapping[str, Any]] = (CALCULATOR_TOOL,),
    ) -> None:
        self._model, self._tokenizer, self._tools = model, tokenizer, list(tools)
        self._end = token_id(tokenizer, TURN_END)
        self._cache = Cache([], [])
        self._cached: list[int] = []
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    @property
    def context_tokens(self) -> int:
        return len(self._cached)

    @property
    def token_ids(self) -> list[int]:
        """The context as computed so far: everything but the token that ended the last turn."""
        return list(self._cached)

    def ask(self, question: str) -> str:
        """Answer a question; calls the calculator as often as the model asks, at most MAX_CALLS turns."""
        self.messages.append({"role": "user", "content": question})
        for _ in range(MAX_CALLS):
            text = self._turn()
            expressions = parse_calls(text)
            if not expressions:
                self.messages.append({"role": "assistant", "content": text})
                return text
            self.messages.append(calls_message(expressions))
            self.messages += [
                {"role": "tool", "name": "calculator", "content": _calculated(expression)} for expression in expressions
            ]
        return ""

    def conclude(self) -> str:
        """The model's next turn, as text, after messages that the caller put in place."""
        return self._turn()

    def _turn(self) -> str:
        """One assistant turn, greedy."""
        text = render(self.messages, self._tools, add_generation_prompt=True)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        shared = 0
        while shared < min(len(ids) - 1, len(self._cached)) and ids[shared] == self._cached[shared]:
            shared += 1
        self._cache.crop(shared)
        self._cached = ids[:shared]
        written: list[int] = []
        fresh = ids[shared:]
        while len(written) < MAX_TURN_TOKENS and len(self._cached) + len(fresh) < self._model.shape.max_positions:
            token = self._next(fresh)
            if token == self._end:
                break
            written.append(token)
            fresh = [token]
        return str(self._tokenizer.decode(written, skip_special_tokens=True))

    @torch.inference_mode()
    def _next(self, ids: list[int]) -> int:
        hidden = self._model.hidden_states(torch.tensor([ids]), self._cache)
        self._cached += ids
        return int(self._model.logits(hidden[0, -1]).argmax())


def _calculated(expression: str) -> str:
    try:
        return calculate(expression)
    except CalculatorError as error:
        return f"error: {error}"


def ask_each(
    model: TinyLlama, tokenizer: Tokenizer, tasks: Sequence[Task], name: str, *, with_tool: bool = True
) -> Score:
    """Every task in a conversation of its own."""
    right, longest = 0, 0
    for task in tasks:
        chat = Chat(model, tokenizer, tools=[CALCULATOR_TOOL] if with_tool else [])
        right += check(task, chat.ask(task.question))
        longest = max(longest, chat.context_tokens)
    return Score(name, right, len(tasks), longest)


def ask_in_a_row(
    model: TinyLlama, tokenizer: Tokenizer, tasks: Sequence[Task], name: str, *, questions: int, sentences: int
) -> Score:
    """``questions`` tasks in each conversation, after a system prompt of ``sentences`` sentences."""
    rng = random.Random(f"{name}/{len(tasks)}")
    right, longest = 0, 0
    for start in range(0, len(tasks), questions):
        chat = Chat(model, tokenizer, system=system_prompt(rng, sentences=sentences))
        right += sum(check(task, chat.ask(task.question)) for task in tasks[start : start + questions])
        longest = max(longest, chat.context_tokens)
    return Score(name, right, len(tasks), longest)


def copies_results(model: TinyLlama, tokenizer: Tokenizer, tasks: Sequence[Task], name: str) -> Score:
    """Share of tasks whose last answer repeats a tool result that was replaced by a random number."""
    rng = random.Random(name)
    right, longest = 0, 0
    for task in tasks:
        chat = Chat(model, tokenizer)
        turns = solved_turns(task, rng, odd_share=1.0, error_share=0.0)
        chat.messages = list(turns[:-1])
        right += chat.conclude() == turns[-1]["content"]
        longest = max(longest, chat.context_tokens)
    return Score(name, right, len(tasks), longest)


def evaluate(model: TinyLlama, tokenizer: Tokenizer, *, seed: int, tasks: int) -> list[Score]:
    """All rows of the report; ``tasks`` held-out tasks in each."""
    rows = []
    mixed = make_tasks(seed, tasks, Split.HELD_OUT)
    for kind in Kind:
        drawn = make_tasks(seed + 1, tasks, Split.HELD_OUT, kinds=[kind])
        rows.append(ask_each(model, tokenizer, drawn, f"{kind.value}, with the tool"))
    rows.append(ask_each(model, tokenizer, mixed, "mixed, with the tool"))
    rows.append(ask_each(model, tokenizer, mixed, "mixed, without the tool", with_tool=False))
    rows.append(ask_in_a_row(model, tokenizer, mixed, "mixed, five in a row, long prompt", questions=5, sentences=20))
    rows.append(copies_results(model, tokenizer, mixed, "uses a surprising result"))
    return rows
