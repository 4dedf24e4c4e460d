"""Stop patterns without backtracking: a Thompson automaton whose threads remember where they began.

A caller's pattern runs over every character a model writes, so its cost must not depend on the pattern's shape.
Python's own parser reads the pattern; groups, classes, alternation, repetition and ``^`` are taken,
look-around and back-references are refused.
"""

from __future__ import annotations

import _sre  # type: ignore[import-not-found]
import functools
import re
from collections.abc import Callable, Iterable
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as regex_parser  # type: ignore[attr-defined]
from re._casefix import _EXTRA_CASES  # type: ignore[import-not-found]
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
    def num_states(self) -> int:
        """What a character may have to visit."""
        return len(self._tests)

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
            if test is not None and test(char):
                for reached in self._closure([state + 1], char, seen):
                    after.setdefault(reached, max(begun, oldest))
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
        self._made: dict[Any, _Test] = {}  # a repeated class has one test
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
        """One character's test. Made without ``re``, which under IGNORECASE walks through all of a range."""
        if op is ops.ANY:
            return _always if self._flags & re.DOTALL else _not_line_end
        items = arg if op is ops.IN else [(ops.LITERAL, arg)]
        negated = op is ops.NOT_LITERAL or bool(items and items[0][0] is ops.NEGATE)
        key = (negated, tuple(items))
        if key not in self._made:
            self._made[key] = self._class_test([item for item in items if item[0] is not ops.NEGATE], negated)
        return self._made[key]

    def _class_test(self, items: list[tuple[Any, Any]], negated: bool) -> _Test:
        ascii_only, ignores_case = bool(self._flags & re.ASCII), bool(self._flags & re.IGNORECASE)
        single: set[str] = set()
        ranges: list[tuple[str, str]] = []
        categories: list[tuple[_Test, bool]] = []
        for op, arg in items:
            if op is ops.LITERAL:
                single.add(chr(arg))
            elif op is ops.RANGE:
                ranges.append((chr(arg[0]), chr(arg[1])))
            elif op is ops.CATEGORY and arg in _CATEGORIES:
                of, wanted = _CATEGORIES[arg]
                categories.append((_is_ascii_space if ascii_only and of is str.isspace else of, wanted))
            else:
                raise self._refused(str(op).lower())

        def test(char: str) -> bool:
            cases = _cases(char, ascii_only) if ignores_case else (char,)
            found = not single.isdisjoint(cases) or any(low <= one <= high for low, high in ranges for one in cases)
            return negated is not (
                found or any((of(char) and (char.isascii() or not ascii_only)) is wanted for of, wanted in categories)
            )

        return test


def _always(char: str) -> bool:
    return True


def _not_line_end(char: str) -> bool:
    return char != "\n"


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


def _is_ascii_space(char: str) -> bool:
    return char in " \t\n\r\f\v"


_CATEGORIES: dict[Any, tuple[_Test, bool]] = {
    ops.CATEGORY_DIGIT: (str.isdecimal, True),
    ops.CATEGORY_NOT_DIGIT: (str.isdecimal, False),
    ops.CATEGORY_SPACE: (str.isspace, True),
    ops.CATEGORY_NOT_SPACE: (str.isspace, False),
    ops.CATEGORY_WORD: (_is_word, True),
    ops.CATEGORY_NOT_WORD: (_is_word, False),
}
_OTHER_UPPER = {
    "k": "\u212a",
    "\u00e5": "\u212b",
    "\u03c9": "\u2126",
    "\u00df": "\u1e9e",
    "\u03b8": "\u03f4",
    "i": "\u0130",
}


@functools.lru_cache(maxsize=4096)
def _cases(char: str, ascii_only: bool) -> frozenset[str]:
    """What a pattern may say for this character when case does not count, as Python's own engine has it."""
    code = ord(char)
    if ascii_only:
        return frozenset((char, char.lower(), char.upper())) if char.isascii() else frozenset(char)
    lower = _sre.unicode_tolower(code)
    cases = set()
    for one in (lower, *_EXTRA_CASES.get(lower, ())):
        text = chr(one)
        uppers = (text.upper(), text.title(), _OTHER_UPPER.get(text, text))
        cases |= {text, *(upper for upper in uppers if len(upper) == 1 and _sre.unicode_tolower(ord(upper)) == one)}
    return frozenset(cases)
