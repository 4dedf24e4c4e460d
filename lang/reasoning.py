"""Splitting thinking from answer in the text of a reasoning model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from caesura.lang.errors import DefinitionError

if TYPE_CHECKING:
    from caesura.runtime.text.reasoning import ThinkMarks


def marks_of(model_type: str) -> ThinkMarks:
    """The marks of a model type. Raises DefinitionError with the known ones."""
    from caesura.runtime.text.reasoning import MARKS  # the runtime is imported where it is needed

    try:
        return MARKS[model_type.lower()]
    except KeyError:
        raise DefinitionError(
            f"model_type {model_type!r} is not known to separate_reasoning; known: {', '.join(sorted(MARKS))}"
        ) from None


def split_reasoning(text: str, model_type: str) -> tuple[str, str]:
    """``(thinking, answer)``. Thinking that never ends leaves an empty answer."""
    from caesura.runtime.text.reasoning import split

    return split(text, marks_of(model_type))
