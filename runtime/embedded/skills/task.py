"""A task, its calls, and the teacher that shows how to solve it: a generator that yields calls and is sent results."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from caesura.runtime.embedded.chat import FAILED_TEXT

_SUGGESTION = re.compile(r'"([^"]*)"; (?:did you mean|use) "([^"]*)"')


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool by its own name and arguments, whatever the conversation calls them."""

    tool: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


# Yields a round of calls, is sent their results as texts, returns the answer.
Teacher = Generator[list[Call], list[str], str]


@dataclass(frozen=True, slots=True)
class Task:
    """A question, the tools a right solution needs, and a teacher. ``solved`` looks at the world afterwards;
    ``writes`` are keys of notes that are then to be as the teacher leaves them."""

    question: str
    needs: tuple[str, ...]
    solve: Callable[[], Teacher]
    solved: Callable[[], bool] = lambda: True
    writes: tuple[str, ...] = ()


def is_error(result: str) -> bool:
    """Whether a tool's result tells of a failure."""
    return result[:6].lower() == "error:"


def corrected(call: Call, error: str) -> Call | None:
    """The call to make after an error: with the word the error suggests, the same once more, or none."""
    if "try again" in error:
        return call
    found = _SUGGESTION.search(error)
    if found is None or found[1] not in call.arguments.values():
        return None
    return Call(call.tool, {key: found[2] if value == found[1] else value for key, value in call.arguments.items()})


def careful(teacher: Teacher) -> Teacher:
    """A teacher that corrects or repeats a failed call once, and gives up when that is no help."""
    try:
        calls = next(teacher)
    except StopIteration as stop:
        return str(stop.value)
    while True:
        results = yield calls
        failed = [i for i, result in enumerate(results) if is_error(result)]
        if failed:
            again = [corrected(calls[i], results[i]) for i in failed]
            retries = [call for call in again if call is not None]
            if len(retries) < len(failed):
                return FAILED_TEXT
            repeated = yield retries
            if any(is_error(result) for result in repeated):
                return FAILED_TEXT
            for i, result in zip(failed, repeated, strict=True):
                results[i] = result
        try:
            calls = teacher.send(results)
        except StopIteration as stop:
            return str(stop.value)
