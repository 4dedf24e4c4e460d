"""The command line, ``caesura``. Light to import: each command loads what it needs when it runs.

It is the topmost layer (it runs programs of the language on the engine), which is why it lives here and not in the
runtime, which knows no language.
"""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Entry point of the ``caesura`` script."""
    from caesura.lang.cli.app import app

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character loses that one, not all
    app()
