"""Runs the systems against each other: in turns, on an otherwise idle machine, everybody else stopped meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import CpuClock
from benchmarks.peers.environments import FOLDER, ROOT, Place
from benchmarks.peers.systems import Settings
from benchmarks.peers.workload import Scenario

START_S = 600.0
WARM_UP_S = 300.0
STOP_S = 20.0


class RunFailed(Exception):
    """A system did not start or did not finish; says why."""


@dataclass(frozen=True, slots=True)
class Run:
    """One system's run of one scenario. ``stolen_share``: CPU time that went to other guests of the host."""

    figures: dict[str, float]
    tokens: tuple[int, ...]
    complete: bool
    stolen_share: float


@dataclass(slots=True)
class Finding:
    """All runs of one system in one scenario, or why there are none."""

    runs: list[Run] = field(default_factory=list)
    failure: str | None = None


class Worker:
    """A system in its process, stopped (SIGSTOP) whenever it is not its turn, so that idle threads cost nobody."""

    def __init__(self, settings: Settings, place: Place) -> None:
        """Start it. Raises RunFailed."""
        self.name = settings.system
        self.log = FOLDER / f"{self.name}-{settings.pool}-{settings.quantization}.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_"))}
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [str(place.python), "-m", "benchmarks.peers.worker", json.dumps(asdict(settings))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=environment,
                start_new_session=True,  # one group for it and its children
            )
        self._read = bytearray()
        try:
            answer = self._answer(START_S)
        except RunFailed:
            self.close()
            raise
        self.start_s = float(answer["start_s"])
        self.about: dict[str, str] = answer["about"]

    def ask(self, limit_s: float, **task: Any) -> dict[str, Any]:
        """Let it run one task. Raises RunFailed."""
        self._signal(signal.SIGCONT)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._answer(limit_s)
        except OSError as error:
            raise RunFailed(f"{self.name} is gone ({error})") from error
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End it and its children. Idempotent."""
        self._signal(signal.SIGCONT)
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        self._signal(signal.SIGTERM)
        time.sleep(0.2)
        self._signal(signal.SIGKILL)
        self._process.wait(STOP_S)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        """The next line of its answers."""
        assert self._process.stdout is not None
        until = time.monotonic() + limit_s
        while b"\n" not in self._read:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise RunFailed(f"{self.name} gave no answer in {limit_s:.0f} s")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise RunFailed(f"{self.name} ended without an answer (see {self.log.relative_to(ROOT)})")
            self._read += part
        line, _, rest = bytes(self._read).partition(b"\n")
        self._read = bytearray(rest)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RunFailed(f"{self.name}: {answer['error']}")
        return answer

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


@dataclass(frozen=True, slots=True)
class Entry:
    """A system that takes part: what it is opened with, and where it lies."""

    settings: Settings
    place: Place


def compete(
    entries: Sequence[Entry],
    scenarios: Sequence[Scenario],
    *,
    vocab: int,
    repeats: int,
    run_s: float,
    say: Callable[[str], None],
) -> tuple[dict[tuple[str, str], Finding], dict[str, dict[str, str]]]:
    """All runs by (scenario, system), and what each system says about itself.

    One start per system, for scenarios with the same pool. In every repeat each scenario is run by one system after
    the other; who begins changes with the repeat. Whoever fails in a scenario is left out of the rest of it, and of
    everything if it does not answer any more.
    """
    findings = {(scenario.name, entry.settings.system): Finding() for scenario in scenarios for entry in entries}
    abouts: dict[str, dict[str, str]] = {}
    workers: dict[str, Worker] = {}

    def drop(name: str, reason: str) -> None:
        say(f"{name} is left out: {reason}")
        if name in workers:
            workers.pop(name).close()
        for (_, system), finding in findings.items():
            if system == name and finding.failure is None:
                finding.failure = reason

    try:
        for entry in entries:
            name = entry.settings.system
            try:
                workers[name] = worker = Worker(entry.settings, entry.place)
                worker.ask(WARM_UP_S, scenario="warm-up", vocab=vocab)
                abouts[name] = worker.about
                say(f"{name} started in {worker.start_s:.1f} s")
            except RunFailed as error:
                drop(name, str(error))
        for repeat in range(repeats):
            for scenario in scenarios:
                for name in turns(list(workers), repeat):
                    clock = CpuClock()
                    try:
                        answer = workers[name].ask(run_s, scenario=scenario.name, seed=repeat, vocab=vocab)
                    except RunFailed as error:
                        drop(name, f"{error}, in scenario {scenario.name}")
                        continue
                    run = Run(answer["figures"], tuple(answer["tokens"]), answer["complete"], clock.stolen_share())
                    findings[scenario.name, name].runs.append(run)
                    say(line(scenario, name, run))
    finally:
        for worker in workers.values():
            worker.close()
    return findings, abouts


def turns(names: Sequence[str], repeat: int) -> list[str]:
    """The order of one repeat: everybody once, another one first each time."""
    first = repeat % len(names) if names else 0
    return [*names[first:], *names[:first]]


def line(scenario: Scenario, name: str, run: Run) -> str:
    """One run for the screen."""
    missing = "" if run.complete else "  INCOMPLETE: fewer tokens than asked for"
    figure = f"{run.figures[scenario.metric]:9.1f} {scenario.metric:13}  {run.figures['total_s']:7.2f} s"
    return f"{scenario.name:>3} {name:>13} {figure}  stolen {run.stolen_share:.1%}{missing}"


def scratch_folder() -> Path:
    """Where a disk tier may put its file."""
    folder = FOLDER / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
