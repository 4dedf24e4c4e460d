"""How far the simulator is from the real engine: the same arrivals through both, and the error of every metric."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.calibrate import calibrate
from benchmarks.common import CpuClock, hardware, software
from benchmarks.dummy import SHAPES
from benchmarks.pause.profiles import Machine, find_machine, machine_names, write_machine
from benchmarks.pause.runs import RunSpec, run

METRICS: tuple[tuple[str, tuple[str, ...], float | None], ...] = (
    ("throughput, requests/s", ("throughput_rps",), 0.10),
    ("throughput, output tokens/s", ("throughput_output_tok_s",), 0.10),
    ("normalized latency, mean", ("normalized_latency_s",), 0.10),
    ("latency without tools, p50", ("served_s", "p50"), 0.10),
    ("latency without tools, p90", ("served_s", "p90"), None),
    ("latency without tools, p99", ("served_s", "p99"), 0.20),
    ("first token, p50", ("ttft_s", "p50"), None),
    ("first token after a tool, p50", ("post_tool_ttft_s", "p50"), None),
    ("first token after a tool, p99", ("post_tool_ttft_s", "p99"), None),
    ("tokens computed", ("tokens_computed",), None),
    ("tokens computed again", ("tokens_recomputed",), None),
    ("bytes over the link", ("link_bytes",), None),
)


@dataclass(frozen=True, slots=True)
class Compared:
    """One metric: medians over the seeds of both worlds, the relative error of the medians, and what was promised."""

    policy: str
    metric: str
    real: float
    simulated: float
    error: float | None
    limit: float | None

    @property
    def holds(self) -> bool | None:
        """Within the limit; None when there is none."""
        return None if self.limit is None or self.error is None else abs(self.error) <= self.limit


def compare(policy: str, real: Sequence[dict[str, Any]], simulated: Sequence[dict[str, Any]]) -> list[Compared]:
    """Both worlds' runs of the same seeds, metric by metric."""
    rows = []
    for words, path, limit in METRICS:
        values = []
        for runs in (real, simulated):
            found = [_at(one, path) for one in runs]
            values.append(
                statistics.median(value for value in found if value is not None)
                if any(value is not None for value in found)
                else 0.0
            )
        error = values[1] / values[0] - 1 if values[0] else None
        rows.append(Compared(policy, words, values[0], values[1], error, limit))
    return rows


def _at(result: dict[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = result
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return None if value is None else float(value)


def main(arguments: Sequence[str]) -> int:
    """Run both worlds, print the errors, and leave with 1 when a promise does not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks fidelity", description=__doc__)
    parser.add_argument("--workload", default="mix", help="a workload or a trace file")
    parser.add_argument("--policies", default="discard,lru_host,min_waste")
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tool-scale", type=float, default=0.1)
    parser.add_argument("--model", default="15M", choices=tuple(SHAPES))
    parser.add_argument("--profile", help=f"a file, or one of {', '.join(machine_names())}; cpu-MODEL by default")
    parser.add_argument(
        "--calibrate",
        type=float,
        metavar="SECONDS",
        help="measure the machine anew before every real run: one that others use as well drifts",
    )
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args(arguments)
    console = Console()
    profile = options.profile or f"cpu-{options.model.lower()}"
    try:
        machine = find_machine(profile)
    except ValueError as error:
        parser.error(f"{error}; measure one with python -m benchmarks calibrate")
    cpu = CpuClock()
    rows: list[Compared] = []
    runs: list[dict[str, Any]] = []
    for policy in options.policies.split(","):
        base = RunSpec(
            options.workload, policy, options.rate, 0, options.minutes, profile, tool_scale=options.tool_scale
        )
        real, simulated = [], []
        for seed in range(options.seeds):
            console.print(f"[dim]{policy}, seed {seed}[/]")
            one, other = _both(replace(base, seed=seed), options.model, machine, options.calibrate)
            real.append(one)
            simulated.append(other)
        rows += compare(policy, real, simulated)
        runs += [*real, *simulated]
    console.print(_table(rows))
    if options.json:
        document = {
            "rows": [{name: getattr(row, name) for name in Compared.__slots__} for row in rows],
            "runs": runs,
            "hardware": hardware(),
            "software": software(),
            "stolen_cpu_share": cpu.stolen_share(),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all(row.holds is not False for row in rows) else 1


def _both(
    spec: RunSpec, model: str, machine: Machine, calibrate_s: float | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the real engine and the simulator make of the same arrivals, on what machine."""
    if calibrate_s is not None:
        machine, _, _ = calibrate(model, calibrate_s, machine)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{machine.name}.json"
        write_machine(machine, path)
        spec = replace(spec, machine=str(path))
        measured = {"machine": asdict(machine)}  # the file is gone when the results are read
        return run(replace(spec, engine=model)) | measured, run(spec) | measured


def _table(rows: Sequence[Compared]) -> Table:
    table = Table(title="simulator against the real engine", title_justify="left")
    for heading in ("policy", "metric", "real", "simulated", "error", "promised"):
        table.add_column(heading, justify="left" if heading in ("policy", "metric") else "right")
    for row in rows:
        error = "-" if row.error is None else f"{row.error:+.1%}"
        verdict = {True: "holds", False: "FAILS", None: ""}[row.holds]
        limit = "" if row.limit is None else f"{row.limit:.0%} {verdict}"
        table.add_row(row.policy, row.metric, f"{row.real:,.4g}", f"{row.simulated:,.4g}", error, limit)
    return table


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
