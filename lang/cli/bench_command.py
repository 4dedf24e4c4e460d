"""``caesura bench``: the benchmarks live in the repository, not in the installed package; run them from there."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from caesura.lang.cli.output import USAGE, CliError


def bench_command(what: str, arguments: Sequence[str]) -> None:
    """Run ``python -m benchmarks WHAT ...`` of the repository, in the present folder. CliError when there is none."""
    root = repository()
    if root is None:
        raise CliError(
            "the benchmarks are not part of the installed package; they need a clone of the repository",
            "git clone <repository>; cd caesura; make bench",
            USAGE,
        )
    command = [sys.executable, "-P", "-m", "benchmarks", what, *arguments]  # -P: not from the folder one is in
    found_in = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.stdout.flush()
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": found_in})  # signals and exit codes are its own


def repository() -> Path | None:
    """The clone this is run in or installed from (editable), if its benchmarks are there."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[2]):
        if (folder / "benchmarks" / "__main__.py").is_file() and (folder / "scheduler").is_dir():
            return folder
    return None
