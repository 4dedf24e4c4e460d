"""One workload under one policy in virtual time: what ``caesura simulate`` runs."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from caesura.scheduler.policies import POLICIES, make_policy
from rich.console import Console
from rich.table import Table

from benchmarks.pause.profiles import machine_names
from benchmarks.pause.runs import RunRefused, RunSpec, run
from benchmarks.workloads import WORKLOADS, find_workload


def main(arguments: Sequence[str]) -> int:
    """Simulate and print; 2 for wrong usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    spec = RunSpec(
        workload=options.workload,
        policy=options.policy,
        rate_rps=options.rate,
        seed=options.seed,
        minutes=options.minutes,
        machine=options.profile,
        kv_tokens=options.kv_tokens,
        host_tokens=options.host_tokens,
    )
    try:
        find_workload(spec.workload)
        machine = spec.sized_machine()
        make_policy(spec.policy)
        _check(spec, machine.page_size)
    except UnicodeDecodeError:
        parser.error(f"workload is {spec.workload!r}; a trace is JSON lines, and this is no text")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    console = Console(stderr=True)
    try:
        with console.status("simulating") as status:
            result = run(spec, lambda share: status.update(f"simulating: {share:.0%}"))
    except RunRefused as error:
        parser.error(str(error))
    if options.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return 0
    out = Console()
    out.print(_table(result))
    out.print(f"[dim]machine {machine.name}: given {machine.given}; assumed {machine.assumed}[/]")
    return 0


def _check(spec: RunSpec, page_tokens: int) -> None:
    """Raise ValueError for numbers that make no run."""
    for name, value in (("--rate", spec.rate_rps), ("--minutes", spec.minutes)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value:g}; it must be above 0 and finite")
    if spec.kv_tokens is not None and spec.kv_tokens < page_tokens:
        raise ValueError(f"--kv-tokens is {spec.kv_tokens}; the pool needs at least a page of {page_tokens}")
    if spec.host_tokens is not None and spec.host_tokens < 0:
        raise ValueError(f"--host-tokens is {spec.host_tokens}; it must be at least 0")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="caesura simulate", description="The engine's own loop and scheduler in virtual time, on a cost profile."
    )
    parser.add_argument("workload", help=f"a trace file (JSON lines), or one of {', '.join(WORKLOADS)}")
    parser.add_argument("--policy", default="min_waste", help=f"one of {', '.join(POLICIES)}")
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second")
    parser.add_argument("--minutes", type=float, default=10.0, help="simulated minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", default="gptj-6b-a100", help=f"a file, or one of {', '.join(machine_names())}")
    parser.add_argument("--kv-tokens", type=int, help="device pool")
    parser.add_argument("--host-tokens", type=int, help="host pool")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _table(result: dict[str, Any]) -> Table:
    title = f"{result['workload']} under {result['policy']}, {result['rate_rps']:g} requests/s, seed {result['seed']}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    requests, latency_s = result["requests"], result["normalized_latency_s"]
    rows: list[tuple[str, str]] = [
        ("normalized latency", "nothing measured" if latency_s is None else f"{latency_s * 1e3:.2f} ms a token"),
        ("throughput", f"{result['throughput_rps']:.3f} requests/s"),
        ("requests", f"{requests['arrived']:,} arrived, {requests['completed']:,} completed in the window"),
        ("measured", f"{requests['measured']:,}, of them {requests['unfinished']:,} unfinished at the end"),
    ]
    for name, words in (("ttft_s", "first token"), ("post_tool_ttft_s", "first token after a tool")):
        if result[name]:
            values = "  ".join(f"{key} {result[name][key] * 1e3:.0f} ms" for key in ("p50", "p90", "p99"))
            rows.append((words, values))
    for cause in ("preserve", "recompute", "swap", "idle"):
        waste = result["waste"][cause]
        rows.append((f"waste: {cause}", f"{waste['gb_s']:,.1f} GB s  ({waste['share']:.2%} of the pool)"))
    rows += [
        ("longest wait", f"{result['max_wait_s']:.2f} s"),
        ("prefill", f"{result['prefill_tokens']:,.0f} tokens, {result['tokens_recomputed']:,.0f} of them again"),
        ("over the link", f"{result['link_bytes'] / 1e9:,.1f} GB"),
        ("simulated", f"{result['simulated_s']:,.0f} s, {result['steps']:,.0f} steps, in {result['wall_s']:.1f} s"),
    ]
    for words, value in rows:
        table.add_row(words, value)
    return table
