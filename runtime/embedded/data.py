"""Training conversations for the embedded model, as messages and tools. No torch here.

They vary in what must not matter: the system prompt's words and length, the tools beside the calculator, how many
questions came before.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

from caesura.runtime.embedded.chat import FAILED_TEXT, NO_TOOL_TEXT, Message, answer_text, calls_message
from caesura.runtime.embedded.phrases import NAMES, THINGS
from caesura.runtime.embedded.skills import adventures
from caesura.runtime.embedded.skills.adventures import adventure
from caesura.runtime.embedded.skills.chores import CHORES, listing
from caesura.runtime.embedded.skills.mixture import SKILLS
from caesura.runtime.embedded.skills.offers import HELD_OUT_NAMES, Offer, offer, toolset, usual
from caesura.runtime.embedded.skills.services import NEAR, unanswerable
from caesura.runtime.embedded.skills.single import arithmetic
from caesura.runtime.embedded.skills.task import Call, Task, careful
from caesura.runtime.embedded.skills.world import World
from caesura.runtime.embedded.tasks import CalculatorError, Kind, Split, calculate
from caesura.runtime.embedded.tasks import Task as ArithmeticTask

ODD_RESULT_SHARE = 0.12  # results that are wrong on purpose, so that the model copies and does not compute
FAULT_SHARE = 0.03
ERROR_SHARE = 0.02
CHORE_SHARE = 0.1
LISTING_SHARE = 0.1  # a token that is hardly ever written cannot be copied either, and names are of rare ones
NO_TOOLS_SHARE = 0.03
SMALL_TALK_SHARE = 0.02
WITHHELD_SHARE = 0.06
HARD_SHARE = 0.5  # of adventures; if all were, a treasure that lies alone would be left
LATE_SHARE = 0.4  # late in a training: adventures, and
LATE_SUMS_SHARE = 0.5  # of these, sums: one, one of another, and at once, since "and" mostly joins other things
MEDLEY_SHARE = 0.3  # of the chains: many questions for any tool, since which one is needed is the hardest to learn
MAX_OFFERS = 9  # but for what the questions themselves need

HELD_OUT_WORDS = {  # none of which training says
    word.lower()
    for words in (HELD_OUT_NAMES, *astuple(adventures.HELD_OUT), NAMES[Split.HELD_OUT], THINGS[Split.HELD_OUT])
    for word in words
}
_RULES = (
    "You are a helpful assistant.",
    "You are a careful assistant that answers arithmetic questions.",
    "Answer briefly.",
    "Use the calculator for every calculation.",
    "Always check numbers with the tool before answering.",
    "You help with sums.",
    "Be exact and short.",
    "Never guess a number.",
    "You work for a small shop and help its staff with the books.",
    "Reply in one sentence.",
    "The user may ask several questions in a row.",
    "Today is a quiet day, so take your time.",
    "Treat every question on its own.",
    "If the user greets you, greet back.",
    "Prices are in cents unless stated otherwise.",
    "You are agent {n} of a fleet.",
    "Your working day ends at {n} o'clock.",
    "Rule {n}: write plain sentences.",
)
_SYLLABLES = (
    *("ba", "ce", "di", "fo", "gu", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "zo", "an", "er"),
    *("in", "or", "ul", "st", "tr", "ch", "sh", "ing", "tion", "ment", "ly"),
)
_ERRORS = (
    "error: timed out",
    "error: the tool failed",
    "error: no answer after {n} seconds",
    "Error: connection lost",
    "error: expression: division by zero",
    "error: cancelled",
)
_SMALL_TALK = (
    ("Hello!", "Hello! Ask me a question."),
    ("Hi", "Hello! Ask me a question."),
    ("Hi there", "Hello! Ask me a question."),
    ("Good morning", "Hello! Ask me a question."),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Who are you?", "I am a small model that answers questions with tools."),
    ("What can you do?", "I am a small model that answers questions with tools."),
    ("Bye", "Goodbye!"),
)


class ConversationMaker:
    """Draws conversations. ``progress`` is the training's: contexts grow longer until 1. ``pieces`` are those of words
    that the model is to be able to copy."""

    def __init__(self, rng: random.Random, pieces: Sequence[str] = ()) -> None:
        self._rng, self._pieces = rng, pieces
        self._chores, self._chore_weights = zip(*CHORES, strict=True)
        self._chained = [name for name in SKILLS if name not in ("adventure", "no_tool")]
        self._weights = [SKILLS[name].share for name in self._chained]
        self._makers = {name: skill.make for name, skill in SKILLS.items()} | {"sums": self._sums}

    def make(self, progress: float, *, late: bool = False) -> tuple[list[Message], list[Mapping[str, Any]]]:
        """Messages and the tools on offer. ``late`` in a training there is more of what is learned last."""
        rng = self._rng
        world = World(f"train/{rng.getrandbits(64)}", Split.TRAIN, pieces=self._pieces, never=HELD_OUT_WORDS)
        if self._pieces and rng.random() < LISTING_SHARE:
            return listing(world)
        if rng.random() < CHORE_SHARE:
            (chore,) = rng.choices(self._chores, self._chore_weights)
            made: tuple[list[Message], list[Mapping[str, Any]]] = chore(world)
            return made
        messages: list[Message] = []
        long = progress > 0.4 and rng.random() < 0.1
        system = system_prompt(rng, sentences=rng.randrange(6, 40) if long else rng.choice((0, 0, 1, 1, 2, 3)))
        if system or rng.random() < 0.1:
            messages.append({"role": "system", "content": system})
        if late and rng.random() < LATE_SHARE:
            if rng.random() < LATE_SUMS_SHARE:
                return self._chain(messages, world, ["sums"] * rng.randint(1, 3))
            return self._adventure(messages, world, progress, mistakes=True)
        drawn = rng.random()
        if drawn < SKILLS["adventure"].share / 100 * (1.0 if progress > 0.4 else 0.3):
            return self._adventure(messages, world, progress)
        if drawn < (SKILLS["adventure"].share + SKILLS["no_tool"].share) / 100:
            return self._unanswerable(messages, world)
        if progress > 0.4 and rng.random() < MEDLEY_SHARE:
            return self._chain(messages, world, rng.choices(("choice", "parallel"), (3, 1), k=rng.randint(3, 6)))
        most = 1 if progress < 0.1 else 2 if progress < 0.4 else 4
        return self._chain(messages, world, rng.choices(self._chained, self._weights, k=rng.randint(1, most)))

    def _adventure(
        self, messages: list[Message], world: World, progress: float, *, mistakes: bool = False
    ) -> tuple[list[Message], list[Mapping[str, Any]]]:
        # Once the model gets on, most games are joined half-way: as many decisions, in fewer tokens.
        begun = progress >= 0.75 and self._rng.random() < 0.65
        task = adventure(world, begun=begun, hard=self._rng.random() < HARD_SHARE, mistakes=mistakes)
        act = offer("act", self._rng, Split.TRAIN) if self._rng.random() < 0.3 else usual("act")
        return [*messages, *played(task, world, {"act": act})], [act.spec]

    def _unanswerable(self, messages: list[Message], world: World) -> tuple[list[Message], list[Mapping[str, Any]]]:
        rng = self._rng
        task, without = unanswerable(world)
        offers = toolset((), rng, Split.TRAIN, distractors=rng.randint(1, 6), without=without)
        return [*messages, *played(task, world, {})], [offer.spec for offer in offers]

    def _chain(
        self, messages: list[Message], world: World, names: Sequence[str]
    ) -> tuple[list[Message], list[Mapping[str, Any]]]:
        """Several questions in a row, one set of tools. A tool that is withheld makes its questions unanswerable."""
        rng = self._rng
        world.odd_share = 1.0 if "surprise" in names else ODD_RESULT_SHARE
        world.fault_share = 0.5 if "recovery" in names else FAULT_SHARE
        bare = rng.random() < NO_TOOLS_SHARE
        used: dict[str, None] = {}
        withheld: set[str] = set()
        solved: list[tuple[Task, list[Round], str]] = []
        for name in names:
            task = self._makers[name](world)
            if not used.keys() & task.needs and rng.random() < WITHHELD_SHARE:
                withheld.update(task.needs)
            if bare or withheld & set(task.needs):
                solved.append((task, [], NO_TOOL_TEXT))
                continue
            used.update(dict.fromkeys(task.needs))
            solved.append((task, *rounds_of(task, world)))
        distractors = rng.choice((0, 0, 1, 2, 3, 4, 6)) if "choice" not in names else rng.randint(2, 7)
        distractors = min(distractors, max(0, MAX_OFFERS - len(used)))
        without = [*withheld, *(near for tool in withheld for near in NEAR.get(tool, ()))]
        offers = [] if bare else toolset(tuple(used), rng, Split.TRAIN, distractors=distractors, without=without)
        by_tool = {offer.tool: offer for offer in offers}
        for task, rounds, answer in solved:
            if rng.random() < SMALL_TALK_SHARE:
                asked, reply = rng.choice(_SMALL_TALK)
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
            messages += shown_turns(task.question, rounds, answer, by_tool)
        return messages, [offer.spec for offer in offers]

    def _sums(self, world: World) -> Task:
        """Any kind of arithmetic as often as any other, and small numbers as often as large ones."""
        return arithmetic(world, self._rng.choice(tuple(Kind)), small=self._rng.random() < 0.5)


Round = tuple[list[Call], list[str]]


def rounds_of(task: Task, world: World) -> tuple[list[Round], str]:
    """The calls of a right solution with their results, and the answer."""
    teacher = careful(task.solve())
    rounds: list[Round] = []
    try:
        calls = next(teacher)
        while True:
            results = [world.run(call) for call in calls]
            rounds.append((calls, list(results)))
            calls = teacher.send(results)
    except StopIteration as stop:
        return rounds, str(stop.value)


def shown_turns(question: str, rounds: Sequence[Round], answer: str, by_tool: Mapping[str, Offer]) -> list[Message]:
    """A solution as the turns of a conversation, tools under the names they have there."""
    messages: list[Message] = [{"role": "user", "content": question}]
    for calls, results in rounds:
        shown = [by_tool[call.tool].shown(call) for call in calls]
        messages.append({"role": "assistant", "content": "", "tool_calls": shown})
        messages += [
            {"role": "tool", "name": by_tool[call.tool].name, "content": result}
            for call, result in zip(calls, results, strict=True)
        ]
    return [*messages, {"role": "assistant", "content": answer}]


def played(task: Task, world: World, by_tool: Mapping[str, Offer]) -> list[Message]:
    """A task solved, as turns."""
    return shown_turns(task.question, *rounds_of(task, world), by_tool)


def system_prompt(rng: random.Random, *, sentences: int) -> str:
    """Rules mixed with sentences of made-up words and stray numbers."""
    parts = []
    for _ in range(sentences):
        if rng.random() < 0.65:
            parts.append(rng.choice(_RULES).format(n=rng.randrange(2, 10_000)))
        else:
            words = ["".join(rng.choices(_SYLLABLES, k=rng.randint(1, 3))) for _ in range(rng.randint(2, 9))]
            parts.append(" ".join(words).capitalize() + ".")
    return rng.choice((" ", " ", "\n")).join(parts)


def solved_turns(
    task: ArithmeticTask,
    rng: random.Random,
    *,
    tool: tuple[str, str] = ("calculator", "expression"),
    odd_share: float = ODD_RESULT_SHARE,
    error_share: float = ERROR_SHARE,
) -> list[Message]:
    """The turns of a right solution; odd tool results are used all the same, a failed call ends the attempt."""
    messages: list[Message] = [{"role": "user", "content": task.question}]
    rounds = [task.steps] if task.kind is Kind.PARALLEL else [(step,) for step in task.steps]
    values: list[str] = []
    for steps in rounds:
        calls = [step.expression(values[0] if values else "") for step in steps]
        values = [_result(call, rng, odd_share) for call in calls]
        if rng.random() < error_share:
            values[rng.randrange(len(values))] = rng.choice(_ERRORS).format(n=rng.randrange(1, 100))
        messages.append(calls_message(calls, name=tool[0], argument=tool[1]))
        messages += [{"role": "tool", "name": tool[0], "content": value} for value in values]
        if any(value.lower().startswith("error") for value in values):
            return [*messages, {"role": "assistant", "content": FAILED_TEXT}]
    return [*messages, {"role": "assistant", "content": answer_text(values)}]


def _result(call: str, rng: random.Random, odd_share: float) -> str:
    if rng.random() >= odd_share:
        try:
            return calculate(call)
        except CalculatorError as error:  # an odd earlier result led to a division by zero
            return f"error: {error}"
    digits = rng.randint(1, 10)
    value = str(rng.randrange(10 ** (digits - 1), 10**digits))
    if rng.random() < 0.1:
        value = f"{value}.{rng.randrange(1, 1000)}"
    return f"-{value}" if rng.random() < 0.1 else value
