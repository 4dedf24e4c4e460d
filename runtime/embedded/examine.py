"""Held-out tasks on a running engine: real tools, greedy. What ``caesura eval embedded`` runs.

Every task is tried three times: with its tools, calls held to their grammar as `EngineService` and server hold them;
with its tools and no grammar; and without any tools.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from caesura.runtime.api import PendingCall
from caesura.runtime.embedded.skills.mixture import SKILLS, Exam, held_out_task
from caesura.runtime.embedded.skills.task import Call
from caesura.runtime.errors import ContextTooLong
from caesura.runtime.handle import ContextHandle
from caesura.runtime.sampling import Constraint, ConstraintKind, SamplingParams
from caesura.runtime.service import EngineService
from caesura.runtime.text.template import Piece
from caesura.runtime.text.tokenizer import encode_pieces
from caesura.runtime.text.tool_grammar import tool_grammar
from caesura.runtime.text.tool_parser import ToolFormat

WINDOW = 2048  # positions of the embedded model
MAX_ROUNDS = 32
MAX_TURN_TOKENS = 256
CONCURRENT = 32
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {"string": (str,), "integer": (int,), "number": (int, float)}


class Terms(StrEnum):
    """How a task is tried."""

    HELD = "held"  # tools on offer, calls held to the grammar of the tools
    FREE = "free"  # tools on offer, no grammar
    ALONE = "alone"  # no tools


@dataclass(slots=True)
class Tally:
    """How many tasks were right of how many."""

    right: int = 0
    total: int = 0

    def add(self, right: bool) -> None:
        self.right += right
        self.total += 1


@dataclass(slots=True)
class Report:
    """The outcome of an evaluation. Without a grammar, ``malformed_calls`` of ``free_calls`` were no call of a tool on
    offer."""

    tallies: dict[Terms, Tally] = field(default_factory=lambda: {terms: Tally() for terms in Terms})
    skills: dict[str, Tally] = field(default_factory=dict)  # with tools and grammar
    free_calls: int = 0
    malformed_calls: int = 0


def exams(seed: int, count: int, skills: Sequence[str] = tuple(SKILLS)) -> list[Exam]:
    """``count`` held-out tasks, the skills in turn; made anew, worlds included, with every call."""
    return [held_out_task(seed, number // len(skills), skills[number % len(skills)]) for number in range(count)]


async def examine(
    service: EngineService,
    seed: int,
    count: int,
    *,
    skills: Sequence[str] = tuple(SKILLS),
    progress: Callable[[], None] = lambda: None,
) -> Report:
    """Every task on all terms. ``progress`` is called after each of the ``len(Terms) * count`` attempts."""
    report = Report(skills={skill: Tally() for skill in skills})
    gate = asyncio.Semaphore(CONCURRENT)

    async def one(exam: Exam, terms: Terms) -> None:
        async with gate:
            answer = await Attempt(service, exam, terms, report).run()
        right = exam.right(answer)
        report.tallies[terms].add(right)
        if terms is Terms.HELD:
            report.skills[exam.skill].add(right)
        progress()

    runs = [one(exam, terms) for terms in Terms for exam in exams(seed, count, skills)]
    await asyncio.gather(*runs)
    return report


class Attempt:
    """One task in one context of the engine: generate, call, append the results, until the model answers."""

    def __init__(self, service: EngineService, exam: Exam, terms: Terms, report: Report) -> None:
        self._service, self._exam, self._terms, self._report = service, exam, terms, report
        self._offers = {} if terms is Terms.ALONE else {offer.name: offer for offer in exam.offers}
        self._specs = [offer.spec for offer in self._offers.values()]
        self._constraint = self._grammar() if terms is Terms.HELD else None

    async def run(self) -> str:
        """The model's final answer; "" when it never gave one within MAX_ROUNDS turns or the window."""
        template, tools = self._service.template, self._specs or None
        asked = [{"role": "user", "content": self._exam.task.question}]
        pieces = template.pieces(asked, tools=tools, add_generation_prompt=True)
        context = await self._service.open()
        try:
            for _ in range(MAX_ROUNDS):
                text = await self._turn(context, pieces)
                if _OPEN not in text:
                    return text
                await context.pause([PendingCall("tool")])
                results = [("tool", self._result(body)) for body in text.split(_OPEN)[1:]]
                pieces = template.tool_results(results, tools=tools)
                await context.resume()
            return ""
        except ContextTooLong:
            return ""
        finally:
            await context.close()

    async def _turn(self, context: ContextHandle, pieces: Sequence[Piece]) -> str:
        continuation = context.num_tokens > 0
        length = await context.append(encode_pieces(self._service.tokenizer, pieces, continuation=continuation))
        room = max(1, min(MAX_TURN_TOKENS, WINDOW - length))
        params = SamplingParams(temperature=0.0, max_new_tokens=room, constraint=self._constraint)
        return "".join([chunk.text async for chunk in context.generate(params)])

    def _grammar(self) -> Constraint | None:
        special_ids = self._service.tokenizer.special_ids
        source = tool_grammar(ToolFormat.HERMES, self._specs, special_ids=special_ids)
        return None if source is None else Constraint(ConstraintKind.EBNF, source)

    def _result(self, body: str) -> str:
        free = self._terms is Terms.FREE
        self._report.free_calls += free
        try:
            call = self._parsed(body)
        except ValueError as error:
            self._report.malformed_calls += free
            return f"error: {error}"
        try:
            return self._exam.world.run(call)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # values that a tool did not foresee
            return f"error: {error}"

    def _parsed(self, body: str) -> Call:
        """The call between the tags, by the tool's own names. Raises ValueError unless it is one that was offered."""
        inside, mark, rest = body.partition(_CLOSE)
        value = _read(inside)
        name = value.get("name") if isinstance(value, dict) else None
        offer = self._offers.get(name) if isinstance(name, str) else None
        if not mark or rest.strip() or offer is None:
            raise ValueError("no call of a tool on offer")
        own = {shown: name for name, shown in offer.arguments.items()}
        types = offer.spec["function"]["parameters"]["properties"]
        arguments = value.get("arguments")
        if not isinstance(arguments, dict) or set(arguments) != set(own):
            raise ValueError(f"{offer.name} takes {', '.join(own) or 'no arguments'}")
        for key, argument in arguments.items():
            if type(argument) not in _PYTHON_TYPES[types[key]["type"]]:
                raise ValueError(f"{key} is no {types[key]['type']}")
        return Call(offer.tool, {own[key]: argument for key, argument in arguments.items()})


def _read(text: str) -> Any:
    """JSON that can be written again as text: without NaN, without halves of characters. Raises ValueError."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value
