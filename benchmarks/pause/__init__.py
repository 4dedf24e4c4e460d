"""Pause policies compared: simulated at the scale of the papers, and on the real engine of this machine."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """``python -m benchmarks pause``: see ``cli.py``."""
    from benchmarks.pause.cli import main as pause

    return pause(arguments)
