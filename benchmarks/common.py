"""What all benchmarks share: repeated timing, a table on the screen, and a JSON file that says where it came from.

A figure alone says little on a shared machine, so every row has its spread (minimum and maximum over the repeats),
its ratio to a named baseline of the *same run*, and the file has the CPU share that other guests took meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent.parent / "out" / "benchmarks"
OWN_ARGUMENTS = ("pause", "simulate", "calibrate", "fidelity")  # these have a command line of their own
FILE_WIDTH = 160  # of tables in a file or a pipe, where nothing has to be folded
Setting = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured quantity over its repeats."""

    name: str
    unit: str
    median: float
    minimum: float
    maximum: float
    repeats: int
    baseline: str | None = None
    ratio: float | None = None  # median over the baseline's median
    details: Mapping[str, Setting] = field(default_factory=dict)


class CpuClock:
    """CPU time of the whole machine between two moments, from /proc/stat; zeros where there is none."""

    def __init__(self) -> None:
        self._start = self._read()

    def stolen_share(self) -> float:
        """Share of CPU time that the hypervisor gave to others since the start, 0 to 1."""
        return self._share(7)

    def busy_share(self) -> float:
        """Share of CPU time that was not idle since the start, 0 to 1, this process included."""
        return 1.0 - self._share(3) - self._share(4)

    def _share(self, column: int) -> float:
        spent = [now - then for now, then in zip(self._read(), self._start, strict=True)]
        return spent[column] / max(1, sum(spent))

    @staticmethod
    def _read() -> list[int]:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            fields = []
        return [int(value) for value in fields] or [0] * 8


def hardware() -> dict[str, Setting]:
    """CPU model, usable cores and memory of this machine."""
    model, memory_gib = platform.processor() or platform.machine(), None
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
        kib = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
        memory_gib = round(int(kib.split()[1]) / 2**20, 1)
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "memory_gib": memory_gib, "system": platform.system()}


def software() -> dict[str, Setting]:
    """Commit, interpreter and torch version (read without importing torch)."""
    try:
        torch: str | None = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = None
    commit, dirty = _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain"))
    return {"commit": commit, "dirty": dirty, "torch": torch, "python": platform.python_version()}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


class Bench:
    """One benchmark's results: collect samples, then ``finish`` prints and writes them."""

    def __init__(self, name: str, *, seed: int = 0, results: Path = RESULTS, console: Console | None = None) -> None:
        self.name = name
        self.seed = seed
        self.config: dict[str, Setting] = {}
        self.samples: dict[str, Sample] = {}
        self.notes: list[str] = []
        self._results = results
        self._console = console or Console()
        self._cpu = CpuClock()

    def configure(self, **config: Setting) -> None:
        """Note settings that the figures depend on."""
        self.config |= config

    def record(
        self,
        name: str,
        values: Sequence[float],
        *,
        unit: str,
        baseline: str | None = None,
        details: Mapping[str, Setting] | None = None,
    ) -> Sample:
        """Add a quantity. ``baseline`` names one recorded before (or the quantity itself, for ratio 1)."""
        if not values:
            raise ValueError(f"{self.name}: {name} has no values")
        if name in self.samples:
            raise ValueError(f"{self.name}: {name} is recorded twice")
        if baseline is not None and baseline != name and baseline not in self.samples:
            raise ValueError(f"{self.name}: {name} is compared with {baseline}, which has not been recorded")
        median = statistics.median(values)
        base = self.samples[baseline].median if baseline is not None and baseline != name else median
        ratio = None if baseline is None or base == 0 else median / base
        sample = Sample(name, unit, median, min(values), max(values), len(values), baseline, ratio, details or {})
        self.samples[name] = sample
        return sample

    def time(
        self,
        name: str,
        work: Callable[[], object],
        *,
        repeats: int = 7,
        per: int = 1,
        baseline: str | None = None,
        setup: Callable[[], object] | None = None,
        details: Mapping[str, Setting] | None = None,
    ) -> Sample:
        """Seconds of ``work()`` divided by ``per``, after one warm-up; ``setup`` runs untimed before each."""
        values = []
        for number in range(repeats + 1):
            if setup is not None:
                setup()
            begun = time.perf_counter()
            work()
            if number:
                values.append((time.perf_counter() - begun) / per)
        return self.record(name, values, unit="s", baseline=baseline, details=details)

    def note(self, text: str) -> None:
        """A sentence that belongs under the table."""
        self.notes.append(text)

    def document(self) -> dict[str, object]:
        """All of it as plain data."""
        return {
            "benchmark": self.name,
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seed": self.seed,
            "config": self.config,
            "hardware": hardware(),
            "software": software(),
            "stolen_cpu_share": round(self._cpu.stolen_share(), 4),
            "busy_cpu_share": round(self._cpu.busy_share(), 4),
            "samples": [asdict(sample) for sample in self.samples.values()],
            "notes": self.notes,
        }

    def finish(self) -> Path:
        """Print the table, write ``NAME.json`` and return its path."""
        document = self.document()
        table = Table(title=f"{self.name}  (CPU stolen {self._cpu.stolen_share():.1%})", title_justify="left")
        for heading in ("what", "median", "min", "max", "ratio", "to"):
            table.add_column(heading, justify="left" if heading in ("what", "to") else "right")
        for sample in self.samples.values():
            spread = (show(value, sample.unit) for value in (sample.median, sample.minimum, sample.maximum))
            ratio = "" if sample.ratio is None else f"{sample.ratio:.3g}x"
            table.add_row(sample.name, *spread, ratio, sample.baseline or "")
        self._console.print(table)
        for text in self.notes:
            self._console.print(text)
        self._results.mkdir(parents=True, exist_ok=True)
        path = self._results / f"{self.name}.json"
        path.write_text(json.dumps(document, indent=2) + "\n")
        return path


def show(value: float, unit: str) -> str:
    """A figure for people: seconds with a fitting prefix, everything else with its unit."""
    if unit != "s":
        return f"{value:,.4g} {unit}"
    for scale, prefix in ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}s"
    return f"{value:.3g} s"


def wide_console(*, stderr: bool = False) -> Console:
    """A console whose tables are whole also where there is no terminal."""
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console


def above(least: float) -> Callable[[str], float]:
    """Type of an option: a finite number above ``least``."""

    def number(text: str) -> float:
        value = float(text)
        if not least < value < math.inf:
            raise argparse.ArgumentTypeError(f"is {text.strip()}; it must be above {least:g} and finite")
        return value

    return number


def whole(least: int) -> Callable[[str], int]:
    """Type of an option: a whole number from ``least`` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"is {value}; it must be at least {least}")
        return value

    return number


positive = above(0)


def positives(text: str) -> list[float]:
    """Type of an option that lists them with commas."""
    return [positive(part) for part in text.split(",") if part.strip()]


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m benchmarks``: list or run."""
    from importlib import import_module

    here = Path(__file__).parent
    known = sorted(
        path.stem for path in here.glob("*.py") if not path.stem.startswith("_") and path.stem not in ("common",)
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in OWN_ARGUMENTS:
        own: int = import_module(f"{__package__}.{words[0]}").main(words[1:])
        return own
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="List benchmarks, or run some.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run, or 'all'")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON files")
    options = parser.parse_args(arguments)
    console = Console()
    modules = {name: import_module(f"{__package__}.{name}") for name in known if name not in OWN_ARGUMENTS}
    runnable = {name: module for name, module in modules.items() if hasattr(module, "run")}
    names = list(runnable) if options.names == ["all"] else options.names
    unknown = [name for name in names if name not in runnable]
    if unknown:
        parser.error(
            f"no benchmark named {', '.join(unknown)}; there are: {', '.join(sorted([*OWN_ARGUMENTS, *runnable]))}"
        )
    if not names:
        listed = {name: import_module(f"{__package__}.{name}") for name in OWN_ARGUMENTS} | runnable
        for name, module in listed.items():
            console.print(f"[bold]{name:12}[/] {(module.__doc__ or '').strip().splitlines()[0]}")
        return 0
    for name in names:
        bench = Bench(name, seed=options.seed, results=options.results, console=console)
        runnable[name].run(bench, quick=options.quick)
        console.print(f"written to {os.path.relpath(bench.finish())}")
    return 0
