"""Text of models, tools and servers, made harmless for whoever shows it."""

from __future__ import annotations


def printable(text: str, keep: str = "\n\t") -> str:
    """``text`` with U+FFFD for what would command a terminal or cannot be shown; ``keep`` stays as it is."""
    return "".join(char if char.isprintable() or char in keep else "\N{REPLACEMENT CHARACTER}" for char in text)
