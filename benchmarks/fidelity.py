"""How far the simulator is from the real engine: the same arrivals through both, and the error of every metric.

Every real run has two counterparts in virtual time. *Foretold* knows what the machine cost before the run; on one that
others use as well it errs by as much as the machine drifts. *Replayed* has costs fitted to the steps of that very run
(five numbers for some thousands of steps): what is left is the error of the simulator, and that is what is promised.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from caesura.scheduler.policies import make_policy
from rich.table import Table

from benchmarks.calibrate import StepWatch, calibrate, fit
from benchmarks.common import CpuClock, hardware, positive, positives, software, whole, wide_console
from benchmarks.dummy import SHAPES
from benchmarks.pause.profiles import Machine, find_machine, machine_names
from benchmarks.pause.runs import RunRefused, RunSpec, run_on
from benchmarks.workloads import find_workload

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
    """One metric: medians over the seeds of all three worlds, the errors of the medians, and what was promised."""

    policy: str
    rate_rps: float
    metric: str
    real: float
    foretold: float
    replayed: float
    limit: float | None

    @property
    def foretold_error(self) -> float | None:
        """Relative to the real engine, with the costs measured before; None where that has 0."""
        return self.foretold / self.real - 1 if self.real else None

    @property
    def replayed_error(self) -> float | None:
        """The same with the costs of the run's own steps."""
        return self.replayed / self.real - 1 if self.real else None

    @property
    def holds(self) -> bool | None:
        """The simulator's error is within the limit; None when there is none."""
        return None if self.limit is None or self.replayed_error is None else abs(self.replayed_error) <= self.limit


@dataclass(frozen=True, slots=True)
class Twins:
    """The same arrivals in three worlds, and the machines that the two in virtual time were given."""

    real: dict[str, Any]
    foretold: dict[str, Any]
    replayed: dict[str, Any]
    before: Machine
    own: Machine
    fit_error: float


def compare(policy: str, rate_rps: float, seeds: Sequence[Twins]) -> list[Compared]:
    """All worlds' runs of the same seeds, metric by metric."""
    return [
        Compared(
            policy,
            rate_rps,
            words,
            _median([twins.real for twins in seeds], path),
            _median([twins.foretold for twins in seeds], path),
            _median([twins.replayed for twins in seeds], path),
            limit,
        )
        for words, path, limit in METRICS
    ]


def _median(runs: Sequence[dict[str, Any]], path: tuple[str, ...]) -> float:
    found = [value for value in (_at(one, path) for one in runs) if value is not None]
    return statistics.median(found) if found else 0.0


def _at(result: dict[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = result
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return None if value is None else float(value)


def main(arguments: Sequence[str]) -> int:
    """Run all worlds, print the errors, and leave with 1 when a promise does not hold."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = wide_console()
    policies = options.policies.split(",")
    try:
        find_workload(options.workload)
        for policy in policies:
            make_policy(policy)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        machine = find_machine(options.profile or f"cpu-{options.model.lower()}")
    except ValueError as error:
        parser.error(f"{error}; measure one with python -m benchmarks calibrate")
    rates = options.rates if len(options.rates) > 1 else options.rates * len(policies)
    if len(rates) != len(policies):
        parser.error(f"--rates has {len(rates)} for {len(policies)} policies; give one for all, or one each")
    cpu = CpuClock()
    rows: list[Compared] = []
    runs: list[dict[str, Any]] = []
    for policy, rate_rps in zip(policies, rates, strict=True):
        base = RunSpec(
            options.workload, policy, rate_rps, 0, options.minutes, engine=options.model, tool_scale=options.tool_scale
        )
        seeds = []
        for seed in range(options.seeds):
            console.print(f"[dim]{policy}, {rate_rps:g} requests/s, seed {seed}[/]")
            try:
                seeds.append(_twins(replace(base, seed=seed), machine, options.calibrate))
            except RunRefused as error:
                parser.error(str(error))
        rows += compare(policy, rate_rps, seeds)
        runs += [asdict(twins) for twins in seeds]
    console.print(_table(rows))
    if options.json:
        document = {
            "rows": [_record(row) for row in rows],
            "runs": runs,
            "hardware": hardware(),
            "software": software(),
            "stolen_cpu_share": cpu.stolen_share(),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all(row.holds is not False for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks fidelity",
        description="The same arrivals through the simulator and the real engine, and the error of every metric.",
    )
    parser.add_argument("--workload", default="mix", help="a workload or a trace file")
    parser.add_argument("--policies", default="discard,lru_host,min_waste")
    parser.add_argument("--rates", type=positives, default=[0.5], help="requests per second: one, or one a policy")
    parser.add_argument("--minutes", type=positive, default=3.0)
    parser.add_argument("--seeds", type=whole(1), default=3)
    parser.add_argument("--tool-scale", type=float, default=0.25, help="multiplies tool times")
    parser.add_argument("--model", default="15M", choices=tuple(SHAPES))
    parser.add_argument("--profile", help=f"a file, or one of {', '.join(machine_names())}; cpu-MODEL by default")
    parser.add_argument(
        "--calibrate",
        type=positive,
        metavar="SECONDS",
        help="measure the machine anew before every real run: one that others use as well drifts",
    )
    parser.add_argument("--json", type=Path, help="write everything here")
    return parser


def _twins(spec: RunSpec, machine: Machine, calibrate_s: float | None) -> Twins:
    """What the real engine and the simulator make of the same arrivals."""
    if calibrate_s is not None:
        machine, _, _ = calibrate(spec.engine, calibrate_s, machine)
    watch = StepWatch()
    real = run_on(machine, spec, observers=(watch,))
    costs, fit_error = fit(watch.samples)
    copies = machine.costs
    costs = replace(costs, copy_base_s=copies.copy_base_s, copy_token_s=copies.copy_token_s)
    own = replace(machine, costs=costs, given=f"fitted to {len(watch.samples)} steps of the run")
    simulated = replace(spec, engine="simulated")
    return Twins(real, run_on(machine, simulated), run_on(own, simulated), machine, own, fit_error)


def _record(row: Compared) -> dict[str, Any]:
    return asdict(row) | {"foretold_error": row.foretold_error, "replayed_error": row.replayed_error}


def _table(rows: Sequence[Compared]) -> Table:
    table = Table(title="simulator against the real engine", title_justify="left")
    headings = ("policy", "requests/s", "metric", "real", "foretold", "error", "replayed", "error", "promised")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("policy", "metric") else "right")
    for row in rows:
        verdict = {True: "holds", False: "FAILS", None: ""}[row.holds]
        limit = "" if row.limit is None else f"{row.limit:.0%} {verdict}"
        foretold, replayed = _percent(row.foretold_error), _percent(row.replayed_error)
        table.add_row(
            row.policy,
            f"{row.rate_rps:g}",
            row.metric,
            *(f"{row.real:,.4g}", f"{row.foretold:,.4g}", foretold, f"{row.replayed:,.4g}", replayed, limit),
        )
    return table


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:+.1%}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
