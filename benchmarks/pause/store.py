"""Results on disk, one run a line, so that an interrupted night goes on where it stopped."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.pause.runs import RunSpec

STORE = RESULTS / "pause" / "runs.jsonl"
_ROOT = Path(__file__).parent.parent.parent
_CODE = (
    "scheduler/**/*.py",
    "runtime/engine.py",
    "runtime/sim.py",
    "runtime/kv/*.py",
    "runtime/executors/*.py",
    "benchmarks/workloads/*.py",
    "benchmarks/pause/drive.py",
    "benchmarks/pause/runs.py",
    "benchmarks/pause/real.py",
    "benchmarks/pause/profiles.py",
)


@functools.cache
def code_fingerprint() -> str:
    """A hash of all code that a result depends on: results of different code never mix."""
    digest = hashlib.sha256()
    for pattern in _CODE:
        for path in sorted(_ROOT.glob(pattern)):
            digest.update(path.relative_to(_ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """Finished runs by what was run. Lines that cannot be read (a torn last one) are passed over."""

    def __init__(self, path: Path = STORE) -> None:
        self.path = path
        self._known: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                    self._known[record["key"]] = record["result"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue

    @staticmethod
    def key(spec: RunSpec) -> str:
        """Code, machine (measured ones may change) and all settings."""
        return json.dumps([code_fingerprint(), asdict(spec.sized_machine()), asdict(spec)], sort_keys=True)

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
            file.write(json.dumps({"key": key, "result": result}) + "\n")
