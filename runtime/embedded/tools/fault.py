"""What a tool raises when it cannot answer, and words close to one that it does not know."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from caesura.runtime.errors import CaesuraError


class ToolFault(CaesuraError, ValueError):
    """A call that cannot be answered; the message is written for whoever called, and says how to go on if it can."""


def unknown(kind: str, word: str, known: Iterable[str]) -> ToolFault:
    """``no KIND "WORD"``, with the one known word that is close to it."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.75)
    return ToolFault(f'no {kind} "{word}"' + (f'; did you mean "{near[0]}"?' if near else ""))
