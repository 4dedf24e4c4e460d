"""Seeded arithmetic tasks for the embedded model: the question, the calls a right solution makes, the answer.

Every operand of a held-out question falls into the tenth of all integers that training never draws (by a hash
of the number), and its names and things come from lists that training never uses.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from caesura.runtime.embedded.calculator import CalculatorError, calculate
from caesura.runtime.embedded.phrases import (
    ASK,
    HOLDERS,
    IN_WORDS,
    NAMES,
    PARALLEL,
    STORIES,
    SYMBOLS,
    THINGS,
    TWO_STEPS,
)

__all__ = ["CalculatorError", "Kind", "Split", "Step", "Task", "calculate", "check", "make_tasks", "split_of"]

MAX_RESULT_DIGITS = 9
MADE_UP_SHARE = 0.3
MAX_TASKS = 1_000_000
_OPERATORS = ("+", "-", "*", "/")
_DIGIT_WEIGHTS = {2: 12, 3: 30, 4: 35, 5: 23}  # mostly out of reach for mental arithmetic
_SMALL_DIGIT_WEIGHTS = {1: 25, 2: 75}  # what people try first
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")


class Split(StrEnum):
    """Which numbers and names a task may use."""

    TRAIN = "train"
    HELD_OUT = "held_out"


class Kind(StrEnum):
    """What a task demands of the model."""

    PLAIN = "plain"  # one call, the expression stands in the question
    STORY = "story"  # one call, the operator must be understood
    TWO_STEPS = "two_steps"  # the second call uses the first one's result
    PARALLEL = "parallel"  # two calls at once


_KIND_WEIGHTS = {Kind.PLAIN: 30, Kind.STORY: 35, Kind.TWO_STEPS: 25, Kind.PARALLEL: 10}


@dataclass(frozen=True, slots=True)
class Step:
    """One call. An operand of None stands for the previous step's result."""

    left: int | None
    operator: str
    right: int | None

    def expression(self, previous: str = "") -> str:
        """The calculator's input, as the model is to write it."""
        left = previous if self.left is None else str(self.left)
        right = previous if self.right is None else str(self.right)
        return f"{left} {self.operator} {right}"


@dataclass(frozen=True, slots=True)
class Task:
    """A question with its right answer.

    ``calls`` are the expressions a right solution evaluates, in order; ``answer`` is the last one's value, or, for
    parallel calls, all values joined by " and ". ``steps`` are the same calls before results are filled in.
    """

    question: str
    answer: str
    calls: tuple[str, ...]
    kind: Kind
    steps: tuple[Step, ...]


def split_of(number: int) -> Split:
    """The split an operand belongs to: about one integer in ten is held out, by a mixing hash."""
    mixed = (abs(number) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) & (1 << 64) - 1
    mixed ^= mixed >> 29
    mixed = (mixed * 0xBF58476D1CE4E5B9) & (1 << 64) - 1
    mixed ^= mixed >> 32
    return Split.HELD_OUT if mixed % 10 == 0 else Split.TRAIN


def make_tasks(
    seed: int, n: int, split: Split | str = Split.TRAIN, *, kinds: Sequence[Kind] | None = None
) -> list[Task]:
    """``n`` tasks drawn from ``seed``; the same arguments give the same tasks. ``kinds`` limits the mixture."""
    if not 0 <= n <= MAX_TASKS:
        raise ValueError(f"n is {n}; it must lie between 0 and {MAX_TASKS}")
    maker = TaskMaker(random.Random(f"{seed}/{Split(split)}"), Split(split), kinds)
    return [maker.make() for _ in range(n)]


def check(task: Task, answer_text: str) -> bool:
    """Whether a text gives the answer: its last numbers are the expected ones, in order."""
    expected = task.answer.split(" and ")
    found = _NUMBER.findall(answer_text.replace(",", ""))
    return found[-len(expected) :] == expected


class TaskMaker:
    """Draws tasks from one random source. ``small``: about numbers of one or two digits."""

    def __init__(
        self, rng: random.Random, split: Split, kinds: Sequence[Kind] | None = None, *, small: bool = False
    ) -> None:
        self._rng = rng
        self._split = split
        self._digit_weights = _SMALL_DIGIT_WEIGHTS if small else _DIGIT_WEIGHTS
        self._kinds = tuple(kinds) if kinds else tuple(_KIND_WEIGHTS)
        self._weights = [_KIND_WEIGHTS[kind] for kind in self._kinds]

    def make(self) -> Task:
        """The next task."""
        (kind,) = self._rng.choices(self._kinds, self._weights)
        if kind is Kind.PLAIN:
            return self._plain()
        if kind is Kind.STORY:
            return self._story()
        return self._two_steps() if kind is Kind.TWO_STEPS else self._parallel()

    # -- numbers ---------------------------------------------------------------------------------------------

    def _number(self, *, max_digits: int = 5) -> int:
        sizes = [digits for digits in self._digit_weights if digits <= max_digits]
        (digits,) = self._rng.choices(sizes, [self._digit_weights[size] for size in sizes])
        while True:
            number = self._rng.randrange(10 ** (digits - 1), 10**digits)
            if digits == 1 or split_of(number) is self._split:  # nine numbers are not worth holding out
                return number

    def _operands(self, operator: str, *, negative: bool = False) -> tuple[int, int]:
        """Two operands of this split with an exact result of at most nine digits."""
        if operator == "/":
            return self._dividend(self._number(max_digits=4))
        a, b = self._number(), self._number()
        if operator == "-" and a < b and not negative:
            a, b = b, a
        if operator == "*" and a * b >= 10**MAX_RESULT_DIGITS:
            return self._operands(operator)
        return a, b

    def _dividend(self, divisor: int) -> tuple[int, int]:
        while True:
            quotient = self._rng.randrange(10, 10 ** self._rng.choice((2, 3, 3, 4)))
            dividend = divisor * quotient
            if dividend < 10**7 and split_of(dividend) is self._split:
                return dividend, divisor

    # -- words -----------------------------------------------------------------------------------------------

    def _fill(self, template: str, **values: object) -> str:
        name, other = self._rng.sample(NAMES[self._split], 2)
        thing, holder = self._rng.choice(THINGS[self._split]), self._rng.choice(HOLDERS[self._split])
        if self._split is Split.TRAIN:  # so that a word never seen before does not put the model off
            name, other = (self._made_up(word, str.capitalize) for word in (name, other))
            thing, holder = (self._made_up(word, lambda made: made + "s") for word in (thing, holder))
        return template.format(name=name, other=other, thing=thing, holder=holder, **values)

    def _made_up(self, word: str, finish: Callable[[str], str]) -> str:
        """The word itself, or in three cases of ten an invented one."""
        if self._rng.random() >= MADE_UP_SHARE:
            return word
        pairs = (
            self._rng.choice("bcdfghklmnprstvwz")
            + self._rng.choice("aeiou")
            + self._rng.choice(("", "", "l", "n", "r"))
            for _ in range(self._rng.randint(1, 3))
        )
        return finish("".join(pairs))

    def _written(self, a: int, operator: str, b: int) -> str:
        sign = self._rng.choice(SYMBOLS[operator])
        tight = sign in "+-*/" and self._rng.random() < 0.1
        return f"{a}{sign}{b}" if tight else f"{a} {sign} {b}"

    # -- kinds -----------------------------------------------------------------------------------------------

    def _plain(self) -> Task:
        operator = self._rng.choice(_OPERATORS)
        a, b = self._operands(operator, negative=self._rng.random() < 0.2)
        if self._rng.random() < 0.35 and a >= b:
            question = self._fill(self._rng.choice(IN_WORDS[operator]), a=a, b=b)
        else:
            question = self._fill(self._rng.choice(ASK), e=self._written(a, operator, b))
        return _solved(question, Kind.PLAIN, Step(a, operator, b))

    def _story(self) -> Task:
        operator = self._rng.choice(_OPERATORS)
        a, b = self._operands(operator)
        question = self._fill(self._rng.choice(STORIES[operator]), a=a, b=b)
        return _solved(question, Kind.STORY, Step(a, operator, b))

    def _two_steps(self) -> Task:
        first, second = self._rng.choice(tuple(TWO_STEPS))
        while True:
            a, b = self._operands(first)
            value = int(calculate(f"{a} {first} {b}"))
            c = self._third(value, second)
            if c is not None:
                break
        question = self._fill(self._rng.choice(TWO_STEPS[first, second]), a=a, b=b, c=c)
        last = Step(c, "-", None) if second == "r-" else Step(None, second, c)
        return _solved(question, Kind.TWO_STEPS, Step(a, first, b), last)

    def _third(self, value: int, operator: str) -> int | None:
        """The second step's own operand, or None when this first result leaves no good one."""
        if operator == "/":
            divisors = [d for d in range(10, 100) if value % d == 0 and split_of(d) is self._split]
            return self._rng.choice(divisors) if divisors else None
        c = self._number(max_digits=3 if operator == "*" else 5)
        if operator == "-":
            return c if c <= value else None
        if operator == "r-":
            return c if c >= value else None
        return c if value * c < 10**MAX_RESULT_DIGITS or operator == "+" else None

    def _parallel(self) -> Task:
        steps = []
        for _ in range(2):
            operator = self._rng.choice(_OPERATORS)
            a, b = self._operands(operator)
            steps.append(Step(a, operator, b))
        written = [self._written(s.left or 0, s.operator, s.right or 0) for s in steps]
        question = self._fill(self._rng.choice(PARALLEL), e=written[0], f=written[1])
        return _solved(question, Kind.PARALLEL, *steps)


def _solved(question: str, kind: Kind, *steps: Step) -> Task:
    calls: list[str] = []
    results: list[str] = []
    for step in steps:
        calls.append(step.expression(results[-1] if results else ""))
        results.append(calculate(calls[-1]))
    answer = " and ".join(results) if kind is Kind.PARALLEL else results[-1]
    return Task(question, answer, tuple(calls), kind, steps)
