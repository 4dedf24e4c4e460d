"""Results on disk, one run a line, so that an interrupted night goes on where it stopped."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.pause.runs import RunSpec
from benchmarks.workloads import WORKLOADS

STORE = RESULTS / "pause" / "runs.jsonl"
_ROOT = Path(__file__).parent.parent.parent
_CODE = (
    "scheduler/**/*.py",
    "runtime/**/*.py",
    "runtime/native/*.[ch]",
    "benchmarks/workloads/*.py",
    "benchmarks/dummy.py",
    "benchmarks/pause/drive.py",
    "benchmarks/pause/runs.py",
    "benchmarks/pause/real.py",
    "benchmarks/pause/profiles.py",
)
_APART = ("runtime/embedded/", "runtime/server/")  # no run comes through these


def _code() -> Iterator[tuple[str, Path]]:
    """All code that a result depends on: names and files."""
    for pattern in _CODE:
        for path in sorted(_ROOT.glob(pattern)):
            name = path.relative_to(_ROOT).as_posix()
            if not name.startswith(_APART):
                yield name, path


@functools.cache
def code_fingerprint() -> str:
    """A hash of that code: results of different code never mix."""
    digest = hashlib.sha256()
    for name, path in _code():
        digest.update(name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _trace_fingerprint(workload: str) -> str | None:
    """A hash of a workload that is a file; None for one that is code."""
    return None if workload in WORKLOADS else hashlib.sha256(Path(workload).read_bytes()).hexdigest()[:16]


class Store:
    """Finished runs by what was run. Lines that cannot be read (a torn last one) are passed over."""

    def __init__(self, path: Path = STORE) -> None:
        self.path = path
        self._known: dict[str, dict[str, Any]] = {}
        self._torn = False  # the file ends within a line
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            self._torn = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                try:
                    record = json.loads(line)
                    self._known[record["key"]] = record["result"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue

    @staticmethod
    def key(spec: RunSpec) -> str:
        """Code, all settings, and what their names stand for now: a measured machine or a trace may change."""
        meant = [asdict(spec.sized_machine()), _trace_fingerprint(spec.workload)]
        return json.dumps([code_fingerprint(), *meant, asdict(spec)], sort_keys=True)

    def find(self, spec: RunSpec) -> dict[str, Any] | None:
        """The result of this very run, by this very code."""
        return self._known.get(self.key(spec))

    def add(self, spec: RunSpec, result: dict[str, Any]) -> None:
        """Keep a result, at once."""
        key = self.key(spec)
        if key in self._known:
            return
        self._known[key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._torn + json.dumps({"key": key, "result": result}) + "\n")
        self._torn = False
