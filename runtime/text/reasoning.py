"""Thinking and answer: told apart in a reasoning model's text, while it streams.

``split`` is the streaming splitter fed once, so the two can never disagree. No regular expressions, time linear.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThinkMarks:
    """What a model writes around its thinking. ``opened``: its template writes the opening mark, not the model."""

    opening: str
    closing: str
    opened: bool = False


MARKS: dict[str, ThinkMarks] = {  # of equal marks the first name is told
    "qwen3": ThinkMarks("<think>", "</think>"),
    "deepseek-r1": ThinkMarks("<think>", "</think>", True),
    "deepseek-v3": ThinkMarks("<think>", "</think>"),
    "glm45": ThinkMarks("<think>", "</think>"),
    "kimi": ThinkMarks("◁think▷", "◁/think▷"),
    "qwen3-thinking": ThinkMarks("<think>", "</think>", True),
}


def detect_marks(template_source: str) -> ThinkMarks | None:
    """The marks that a chat template knows; None for a model that does not think aloud."""
    for marks in (MARKS["qwen3"], MARKS["kimi"]):
        if marks.closing in template_source:
            return marks
    return None


def marks_name(marks: ThinkMarks | None) -> str | None:
    """The model type that stands for these marks."""
    return next((name for name, known in MARKS.items() if known == marks), None)


class ThinkSplitter:
    """Splits a stream of text into thinking and answer.

    Thinking stands at the beginning, or nowhere: a mark inside the answer is text. ``inside``: the prompt ended with
    the opening mark, so the text begins in the middle of thinking. Line breaks around both parts are dropped.
    """

    def __init__(self, marks: ThinkMarks, *, inside: bool | None = None) -> None:
        self._marks = marks
        self._inside = marks.opened if inside is None else inside
        self._begun = False  # whether the opening mark has been read or ruled out
        self._answering = False
        self._held = ""
        self._thought = self._answered = False  # whether any of it has been given out

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside thinking."""
        return self._inside and not self._answering

    def push(self, text: str) -> tuple[str, str]:
        """(thinking, answer) that more text completes."""
        if self._answering and not self._held:
            return "", self._answer(text)
        self._held += text
        if not self._begun:
            if not self._begin():
                return "", ""
            if not self._inside:
                self._answering = True
        if self._answering:
            text, self._held = self._held, ""
            return "", self._answer(text)
        return self._think()

    def finish(self) -> tuple[str, str]:
        """What was held back. Thinking that never ends leaves no answer. May be called again, to no effect."""
        text, self._held = self._held, ""
        if self._inside and not self._answering:
            return self._given(text).rstrip("\n"), ""
        self._begun = self._answering = True
        return "", self._answer(text)

    def _begin(self) -> bool:
        """Whether it is decided how the text begins."""
        rest = self._held.lstrip()
        opening = self._marks.opening
        if rest.startswith(opening):
            self._held, self._inside = rest[len(opening) :], True
        elif opening.startswith(rest):
            return False
        self._begun = True
        return True

    def _think(self) -> tuple[str, str]:
        at = self._held.find(self._marks.closing)
        if at >= 0:
            text, rest = self._held[:at], self._held[at + len(self._marks.closing) :]
            self._held, self._answering = "", True
            return self._given(text).rstrip("\n"), self._answer(rest)
        keep = _overlap(self._held, self._marks.closing)
        body = self._held[: len(self._held) - keep].rstrip("\n")
        text, self._held = body, self._held[len(body) :]
        return self._given(text), ""

    def _given(self, text: str) -> str:
        if not self._thought:
            text = text.lstrip("\n")
            self._thought = bool(text)
        return text

    def _answer(self, text: str) -> str:
        if self._inside and not self._answered:
            text = text.lstrip("\n")
            self._answered = bool(text)
        return text


def split(text: str, marks: ThinkMarks) -> tuple[str, str]:
    """(thinking, answer) of a whole text. Where the template opens the thinking, text without marks is all of it."""
    splitter = ThinkSplitter(marks)
    first, last = splitter.push(text), splitter.finish()
    return first[0] + last[0], first[1] + last[1]


def opens_thinking(prompt_end: str, marks: ThinkMarks) -> bool:
    """Whether a prompt ends with the opening mark, so that the model goes on inside its thinking."""
    return prompt_end.rstrip().endswith(marks.opening)


def ends_thinking(prompt_end: str, marks: ThinkMarks) -> bool:
    """Whether a prompt ends with the closing mark: its template has left no room for thinking."""
    return prompt_end.rstrip().endswith(marks.closing)


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``mark``."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0
