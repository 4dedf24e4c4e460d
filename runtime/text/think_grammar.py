"""A grammar that begins where the thinking ends: a model thinks freely and its answer is held all the same."""

from __future__ import annotations

import json
from collections.abc import Mapping

from caesura.runtime.sampling import Constraint, ConstraintKind, spaced
from caesura.runtime.text.reasoning import ThinkMarks
from caesura.runtime.text.tool_grammar import mark_of


def after_thinking(
    constraint: Constraint, marks: ThinkMarks, *, opened: bool, special_ids: Mapping[str, int]
) -> Constraint:
    """The constraint for what follows the thinking, in Lark as llguidance reads it.

    ``opened``: the prompt opened the thinking, so there is some; else the model may leave it out.
    """
    close = mark_of(marks.closing, special_ids)
    if marks.closing in special_ids:
        thought = f"thinking: THOUGHT {close}\nTHOUGHT: /(?s:.*)/"
    else:
        closing = marks.closing.replace("/", "\\/")
        thought = f"thinking[lazy]: /(?s:.*){closing}/"
    start = "thinking THINK_GAP held"
    if not opened:
        start = f"held | {mark_of(marks.opening, special_ids)} {start}"
    lines = [f"start: {start}", thought, "THINK_GAP: /\\n{0,2}/", f"held: {_body(constraint)}"]
    return Constraint(ConstraintKind.EBNF, "\n".join(lines) + "\n")


def _body(constraint: Constraint) -> str:
    source = constraint.source
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return f"%json {json.dumps(spaced(json.loads(source)))}"
        case ConstraintKind.REGEX:
            return f"/{_slashed(source)}/"
        case ConstraintKind.EBNF:
            return f"%lark {{\n{source}\n}}"
        case ConstraintKind.CHOICES:
            return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(source))


def _slashed(regex: str) -> str:
    """A regex between slashes: its own slashes escaped, line breaks written out."""
    out, escaped = [], False
    for char in regex:
        if char == "/" and not escaped:
            out.append("\\/")
        elif char == "\n":
            out.append("n" if escaped else "\\n")
        else:
            out.append(char)
        escaped = char == "\\" and not escaped
    return "".join(out)
