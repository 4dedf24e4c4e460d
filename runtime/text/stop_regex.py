"""Stop patterns without backtracking: a Thompson automaton whose threads remember where they began.

A caller's pattern runs over every character a model writes, so its cost must not depend on the pattern's shape.
Python's own parser reads the pattern; groups, classes, alternation, repetition and ``^`` are taken,
look-around and back-references are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as regex_parser  # type: ignore[attr-defined]
from typing import Any

from caesura.runtime.errors import InvalidRequest

MAX_PATTERN_CHARS = 1024
MAX_STATES = 2000
MAX_STEPS = 4 * MAX_STATES  # of compiling: what is repeated may be empty and make no state
MAX_PENDING_CHARS = 4096  # a match that is longer loses its beginning, which was shown by then

_Test = Callable[[str], bool]


class StopRegex:
    """One pattern, searched incrementally: ``step`` a character at a time.

    Raises InvalidRequest for a pattern that is malformed, too large, matches the empty text or uses what an
    automaton cannot do.
    """

    def __init__(self, source: str) -> None:
        program = _Program(source)
        self._tests = program.tests
        self._jumps = program.jumps
        self._line_start = program.line_start
        self._accept = program.accept
        self._threads: dict[int, int] = {}  # state that waits for a character -> where its match began
        self._position = 0
        self._previous = ""
        if self._closure([program.start], "") & {self._accept}:
            raise InvalidRequest(f"stop_regex {source!r} matches the empty text, so it would stop at once")
        self._start = program.start

    @property
    def pending_chars(self) -> int:
        """Length of the longest tail that may be the beginning of a match."""
        return self._position - min(self._threads.values(), default=self._position)

    def step(self, char: str) -> int | None:
        """Length of the match that ends with this character, if any; the longest one."""
        threads = dict(self._threads)
        for state in self._closure([self._start], self._previous):
            threads.setdefault(state, self._position)
        self._position += 1
        self._previous = char
        oldest = self._position - MAX_PENDING_CHARS
        after: dict[int, int] = {}
        seen: set[int] = set()  # what an older thread has been through is its own: a character costs each state once
        for state, begun in sorted(threads.items(), key=lambda thread: thread[1]):
            test = self._tests[state]
            if begun >= oldest and test is not None and test(char):
                for reached in self._closure([state + 1], char, seen):
                    after.setdefault(reached, begun)
        begun_at = after.pop(self._accept, None)
        self._threads = after
        return None if begun_at is None else self._position - begun_at

    def _closure(self, states: Iterable[int], previous: str, seen: set[int] | None = None) -> set[int]:
        """States reachable without a character, and not through those ``seen``, that wait for one, or accept."""
        todo, out = list(states), set[int]()
        seen = set() if seen is None else seen
        while todo:
            state = todo.pop()
            if state in seen:
                continue
            seen.add(state)
            if state == self._accept or self._tests[state] is not None:
                out.add(state)
            elif state in self._line_start:
                multiline = self._line_start[state]
                if previous == "" or (multiline and previous == "\n"):
                    todo.append(state + 1)
            else:
                todo.extend(self._jumps[state])
        return out


class _Program:
    """A pattern compiled to numbered states. A testing state goes on to the next number."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_PATTERN_CHARS:
            raise InvalidRequest(f"stop_regex has {len(source)} characters; the limit is {MAX_PATTERN_CHARS}")
        try:
            re.compile(source)
            tree = regex_parser.parse(source)
        except (re.error, RecursionError, OverflowError) as error:
            raise InvalidRequest(f"stop_regex {source!r:.80} is not a valid pattern: {error}") from error
        self._source = source
        self._flags = int(tree.state.flags)
        self.tests: list[_Test | None] = []
        self.jumps: list[tuple[int, ...]] = []
        self.line_start: dict[int, bool] = {}
        self.start = 0
        self._steps = 0
        try:
            self._sequence(tree)
        except RecursionError as error:
            raise InvalidRequest(f"stop_regex {source!r:.80} is nested too deeply") from error
        self.accept = self._emit()

    def _emit(self, test: _Test | None = None) -> int:
        if len(self.tests) >= MAX_STATES:
            raise InvalidRequest(f"stop_regex {self._source!r:.80} needs more than {MAX_STATES} states; simplify it")
        self.tests.append(test)
        self.jumps.append(())
        return len(self.tests) - 1

    def _sequence(self, tree: Iterable[tuple[Any, Any]]) -> None:
        self._count()
        for op, arg in tree:
            self._count()
            self._one(op, arg)

    def _count(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise InvalidRequest(f"stop_regex {self._source!r:.80} is too large with its repetitions; simplify it")

    def _one(self, op: Any, arg: Any) -> None:
        if op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
            self._emit(self._test(op, arg))
        elif op is ops.SUBPATTERN:
            if arg[1] or arg[2]:
                raise self._refused("flags inside a group")
            self._sequence(arg[3])
        elif op is ops.BRANCH:
            self._branch(arg[1])
        elif op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            self._repeat(*arg)
        elif op is ops.AT and arg in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            multiline = arg is ops.AT_BEGINNING and bool(self._flags & re.MULTILINE)
            self.line_start[self._emit()] = multiline
        else:
            raise self._refused(str(op).lower())

    def _refused(self, what: str) -> InvalidRequest:
        return InvalidRequest(
            f"stop_regex {self._source!r:.80} uses {what}; only classes, groups, alternation, repetition and ^ work"
        )

    def _branch(self, branches: Iterable[Any]) -> None:
        fork = self._emit()
        starts, ends = [], []
        for branch in branches:
            starts.append(len(self.tests))
            self._sequence(branch)
            ends.append(self._emit())
        self.jumps[fork] = tuple(starts)
        for end in ends:
            self.jumps[end] = (len(self.tests),)

    def _repeat(self, low: int, high: Any, tree: Any) -> None:
        if low > MAX_STATES or (high is not ops.MAXREPEAT and high > MAX_STATES):
            raise self._refused(f"a repetition above {MAX_STATES}")
        for _ in range(low):
            self._sequence(tree)
        if high is ops.MAXREPEAT:
            fork = self._emit()
            self._sequence(tree)
            self.jumps[self._emit()] = (fork,)
            self.jumps[fork] = (fork + 1, len(self.tests))
            return
        forks = []
        for _ in range(high - low):
            forks.append(self._emit())
            self._sequence(tree)
        for fork in forks:
            self.jumps[fork] = (fork + 1, len(self.tests))

    def _test(self, op: Any, arg: Any) -> _Test:
        """One character's test, by a compiled pattern of one character (bounded, so it cannot backtrack)."""
        flags = self._flags & (re.IGNORECASE | re.DOTALL | re.ASCII)
        if op is ops.ANY:
            text = "."
        elif op is ops.LITERAL:
            if not flags & re.IGNORECASE:
                literal = chr(arg)
                return lambda char: char == literal
            text = re.escape(chr(arg))
        elif op is ops.NOT_LITERAL:
            text = f"[^{re.escape(chr(arg))}]"
        else:
            text = self._class_text(arg)
        match = re.compile(text, flags).match
        return lambda char: match(char) is not None

    def _class_text(self, items: Iterable[tuple[Any, Any]]) -> str:
        names = {
            ops.CATEGORY_DIGIT: r"\d",
            ops.CATEGORY_NOT_DIGIT: r"\D",
            ops.CATEGORY_SPACE: r"\s",
            ops.CATEGORY_NOT_SPACE: r"\S",
            ops.CATEGORY_WORD: r"\w",
            ops.CATEGORY_NOT_WORD: r"\W",
        }
        body, sign = "", ""
        for op, arg in items:
            if op is ops.NEGATE:
                sign = "^"
            elif op is ops.LITERAL:
                body += re.escape(chr(arg))
            elif op is ops.RANGE:
                body += f"{re.escape(chr(arg[0]))}-{re.escape(chr(arg[1]))}"
            elif op is ops.CATEGORY and arg in names:
                body += names[arg]
            else:
                raise self._refused(str(op).lower())
        return f"[{sign}{body}]"
