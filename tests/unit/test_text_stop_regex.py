"""Stop patterns find what Python's own engine finds, at a cost that does not depend on the pattern's shape."""

from __future__ import annotations

import re
from typing import Any

import pytest
from caesura.runtime.errors import InvalidRequest
from caesura.runtime.text.stop_regex import MAX_PENDING_CHARS, StopRegex, _Program
from hypothesis import given
from hypothesis import strategies as st

PATTERNS = ["a+b", "(a|b)*c", "^ab", "(ab?){1,3}c", "(?:a?){5}b", "x|xy|xyz", "(?m)^b+a", "[ab]{2,4}c?", "(a*b*)+c"]


def first_match(pattern: str, text: str) -> tuple[int, int] | None:
    """Where the first match to end ends, and the length of the longest one that ends there."""
    compiled = re.compile(pattern)
    for end in range(1, len(text) + 1):
        for begin in range(end):
            if compiled.fullmatch(text, begin, end):
                return end, end - begin
    return None


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=st.text("abcxyz\n", max_size=25))
def test_the_first_match_is_found_as_it_ends(pattern: str, text: str) -> None:
    search = StopRegex(pattern)
    found = None
    for number, char in enumerate(text, 1):
        length = search.step(char)
        if length is not None:
            found = number, length
            break
    assert found == first_match(pattern, text)


CLASSES = [
    r"[a-z]", r"[^a-z]", r"[A-Z0-9_]", r"\w", r"\W", r"[\d\s]", r"[^\S]", "k", "[^k]", "s", "i", ".", r"[\w-]",
    "\u00b5", "\u03c3", "\u0130", "\u1e9e", "\u01c5", "[\u0370-\u03ff]", "[K-\u00ff]", "[\u1f80-\u1fff]",
    "[\u0100-\uff00]", "[^\u0100-\uff00]",
]  # fmt: skip


@pytest.mark.parametrize("pattern", CLASSES)
@pytest.mark.parametrize("flags", ["", "(?i)", "(?a)", "(?ia)", "(?s)"])
def test_a_character_is_in_a_class_when_python_says_so(pattern: str, flags: str) -> None:
    (test, _), compiled = _Program(flags + pattern).tests, re.compile(flags + pattern)
    assert test is not None
    for code in [*range(0x2200), *range(0x2C00, 0x2E00), *range(0xA640, 0xABC0), 0xFB05, 0xFB06, 0xFF21, 0x10400]:
        assert test(chr(code)) == bool(compiled.match(chr(code))), f"{code:x}"


class Counted(list[Any]):
    """A list that counts how often it is read."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)


def test_a_character_visits_each_state_once() -> None:
    search = StopRegex(r"(?:[^\x00]?){900}\x00")
    search._jumps = jumps = Counted(search._jumps)
    for char in "abc" * 10:
        jumps.reads = 0
        search.step(char)
        assert jumps.reads <= 2 * len(jumps)  # once for those under way, once for a match that begins here


@pytest.mark.parametrize("empty", ["()", "(?:)", "(?:(){2000})", "(b{0})"])
def test_repetitions_of_nothing_are_bounded_too(monkeypatch: pytest.MonkeyPatch, empty: str) -> None:
    """They make no state, so only the work of compiling them can be counted."""
    work = 0
    one = _Program._one

    def counted(self: _Program, op: Any, arg: Any) -> None:
        nonlocal work
        work += 1
        one(self, op, arg)

    monkeypatch.setattr(_Program, "_one", counted)
    with pytest.raises(InvalidRequest, match="too large with its repetitions"):
        StopRegex(f"a(({empty}{{2000}}){{2000}}){{2000}}")
    assert work < 10_000


@pytest.mark.parametrize("pattern", ["a[\\s\\S]*?b", "a[^b]*b", "(a|x)+b"])
def test_a_match_that_is_longer_than_what_is_held_back_still_stops(pattern: str) -> None:
    regex = StopRegex(pattern)
    steps = [regex.step(char) for char in "a" + "x" * (2 * MAX_PENDING_CHARS) + "b"]
    assert set(steps[:-1]) == {None}
    assert steps[-1] is not None and steps[-1] >= MAX_PENDING_CHARS
    assert regex.pending_chars <= MAX_PENDING_CHARS + 1
