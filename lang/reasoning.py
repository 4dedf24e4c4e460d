"""Splitting thinking from answer in the text of a reasoning model."""

from __future__ import annotations

from caesura.lang.errors import DefinitionError

# Opening and closing marks by model type. ``implicit``: the template opens the thinking, the text starts inside it.
_MARKS: dict[str, tuple[str, str, bool]] = {
    "deepseek-r1": ("<think>", "</think>", True),
    "deepseek-v3": ("<think>", "</think>", False),
    "glm45": ("<think>", "</think>", False),
    "kimi": ("◁think▷", "◁/think▷", False),
    "qwen3": ("<think>", "</think>", False),
    "qwen3-thinking": ("<think>", "</think>", True),
}


def marks_of(model_type: str) -> tuple[str, str, bool]:
    """The marks of a model type. Raises DefinitionError with the known ones."""
    try:
        return _MARKS[model_type.lower()]
    except KeyError:
        raise DefinitionError(
            f"model_type {model_type!r} is not known to separate_reasoning; known: {', '.join(sorted(_MARKS))}"
        ) from None


def split_reasoning(text: str, model_type: str) -> tuple[str, str]:
    """``(thinking, answer)``. Thinking that never ends leaves an empty answer."""
    opening, closing, implicit = marks_of(model_type)
    start = text.find(opening)
    if start < 0 and not implicit:
        return "", text
    end = text.find(closing, max(start, 0))
    if start < 0 and end < 0:
        return (text, "") if implicit else ("", text)
    before = text[:start] if start >= 0 else ""
    inside_from = start + len(opening) if start >= 0 else 0
    if end < 0:
        return text[inside_from:].strip("\n"), before
    return text[inside_from:end].strip("\n"), before + text[end + len(closing) :].lstrip("\n")
