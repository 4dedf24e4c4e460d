"""Text of models, tools and servers, made harmless for whoever shows it."""

from __future__ import annotations

from unicodedata import category

_UNSEEN = ("Cc", "Cf", "Cs")  # they command a terminal, change the direction of text, or cannot be encoded
_WRITTEN = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}\N{SOFT HYPHEN}"  # words and emoji are made with them


def printable(text: str, keep: str = "\n\t") -> str:
    """``text`` with U+FFFD for what would command a terminal or cannot be shown; ``keep`` stays as it is, and a line
    that ends as on Windows ends with a line feed."""
    lines = text.replace("\r\n", "\n")
    return "".join(char if char in keep or _is_harmless(char) else "\N{REPLACEMENT CHARACTER}" for char in lines)


def _is_harmless(char: str) -> bool:
    return char.isprintable() or char in _WRITTEN or category(char) not in _UNSEEN
