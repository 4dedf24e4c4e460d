"""``caesura simulate``: a workload under a policy in virtual time. The workloads live in the repository."""

from __future__ import annotations

from collections.abc import Mapping

from caesura.lang.cli.bench_command import bench_command


def simulate_command(workload: str, options: Mapping[str, object], *, as_json: bool) -> None:
    """Pass what was given on to ``python -m benchmarks simulate``; options that are None keep their defaults."""
    arguments = [workload]
    for name, value in options.items():
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    bench_command("simulate", [*arguments, *(["--json"] if as_json else [])])
