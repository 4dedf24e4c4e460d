"""Splitting thinking from answer in the text of a reasoning model."""

from __future__ import annotations

from caesura.lang.errors import DefinitionError
from caesura.runtime.text.reasoning import MARKS, ThinkMarks, split


def marks_of(model_type: str) -> ThinkMarks:
    """The marks of a model type. Raises DefinitionError with the known ones."""
    try:
        return MARKS[model_type.lower()]
    except KeyError:
        raise DefinitionError(
            f"model_type {model_type!r} is not known to separate_reasoning; known: {', '.join(sorted(MARKS))}"
        ) from None


def split_reasoning(text: str, model_type: str) -> tuple[str, str]:
    """``(thinking, answer)``. Thinking that never ends leaves an empty answer."""
    return split(text, marks_of(model_type))
