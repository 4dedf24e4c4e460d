"""``caesura bench pause``: arguments, progress, and what is written."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from caesura.scheduler.policies import POLICIES, make_policy
from rich.console import Console

from benchmarks.common import above, positive, positives, whole, wide_console
from benchmarks.dummy import SHAPES
from benchmarks.pause.profiles import find_machine, machine_names
from benchmarks.pause.report import screen, seconds_used
from benchmarks.pause.runs import RunRefused
from benchmarks.pause.store import STORE, Store
from benchmarks.pause.study import Study, conduct, full_study, quick_study, real_study
from benchmarks.workloads import WORKLOADS, find_workload


def main(arguments: Sequence[str]) -> int:
    """Run a study and print its tables; 2 for wrong usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = wide_console(stderr=options.json == "-")
    try:
        study = _study(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    begun = time.monotonic()
    jobs = options.jobs or (2 if options.quick and not options.real else 1)
    try:
        findings = conduct(study, Store(options.store), jobs, _say(console, options.quiet, begun))
    except RunRefused as error:
        parser.error(str(error))
    document = findings.document()
    if options.json:  # before anything is made of it
        _write(document, options.json)
    for table in screen(document):
        console.print(table)
    console.print(f"{time.monotonic() - begun:.0f} s; {seconds_used(document):.0f} s of simulation in these runs")
    if options.plots:
        from benchmarks.pause.plots import draw_all

        for path in draw_all(document, options.plots):
            console.print(f"drawn: {path}")
    return 0


def _write(document: dict[str, Any], where: str) -> None:
    text = json.dumps(document, indent=1) + "\n"
    if where == "-":
        sys.stdout.write(text)
    else:
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        Path(where).write_text(text)


def found_rps(document: Any) -> dict[str, dict[str, float]]:
    """What an earlier study found, by label: capacities by policy, and the bounds. ValueError for another document."""
    try:
        bounds = document.get("bound_rps", {})
        return {label: {**found, **bounds.get(label, {})} for label, found in document["capacity_rps"].items()}
    except (AttributeError, KeyError, TypeError):
        raise ValueError(
            "--near: there is no capacity_rps in it; give a file that --json of this command wrote"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="caesura bench pause",
        description="Pause policies compared by the load they carry. Interrupted studies go on where they stopped.",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--simulate", action="store_true", help="in virtual time on a cost profile (the default)")
    how.add_argument("--real", action="store_true", help="on the engine of this machine, with a dummy model")
    parser.add_argument("--model", default="15M", choices=tuple(SHAPES), help="--real: the dummy model")
    parser.add_argument("--tool-scale", type=float, help="multiplies tool times; 0.25 with --real, else 1")
    parser.add_argument("--guess", type=positive, help="requests/s to begin the search at")
    parser.add_argument("--near", type=Path, help="begin each search at what an earlier study (--json) found")
    parser.add_argument("--quick", action="store_true", help="a few policies and workloads: under five minutes")
    parser.add_argument("--policies", type=_names, help=f"comma-separated, or all: {', '.join(POLICIES)}")
    parser.add_argument("--workloads", type=_names, help=f"comma-separated, or trace files: {', '.join(WORKLOADS)}")
    parser.add_argument("--trace", type=Path, help="a trace file (JSON lines) instead of the workloads")
    parser.add_argument("--rates", type=positives, help="requests/s of the curves; around the capacities by default")
    parser.add_argument("--seeds", type=whole(1), help="how many seeds; the tables show medians")
    parser.add_argument("--minutes", type=positive, help="length of a run, in simulated minutes")
    parser.add_argument("--profile", help=f"the machine: a file, or one of {', '.join(machine_names())}")
    parser.add_argument("--kv-tokens", type=positives, help="device pool sizes to compare")
    parser.add_argument("--host-tokens", type=whole(0), help="size of the host pool")
    parser.add_argument("--tolerance", type=above(1), help="how close capacity is bracketed; 1.03 is 3 %%")
    parser.add_argument("--no-curves", action="store_true", help="capacities alone")
    parser.add_argument("--no-own-limits", action="store_true", help="the common limit alone")
    parser.add_argument("--no-bound", action="store_true", help="not what memory without end would carry")
    parser.add_argument("--jobs", type=int, help="processes; 2 with --quick, else 1")
    parser.add_argument("--json", help="write all results here ('-': standard output)")
    parser.add_argument("--plots", type=Path, help="draw the figures into this folder")
    parser.add_argument("--store", type=Path, default=STORE, help="where finished runs are kept")
    parser.add_argument("--quiet", action="store_true", help="tables alone")
    return parser


def _study(options: argparse.Namespace) -> Study:
    """The study asked for. ValueError for names that do not exist."""
    study = quick_study() if options.quick else full_study()
    if options.real:
        if (options.jobs or 1) > 1:
            raise ValueError("--jobs must be 1 with --real: engines that run side by side measure each other")
        study = real_study(options.model, 0.25 if options.tool_scale is None else options.tool_scale)
    elif options.tool_scale is not None:
        study = replace(study, tool_scale=options.tool_scale)
    if options.profile:
        study = replace(study, machine=options.profile)
    find_machine(study.machine)
    if options.policies:
        chosen = tuple(POLICIES) if options.policies == ["all"] else tuple(options.policies)
        for name in chosen:
            make_policy(name)
        study = replace(study, policies=chosen)
    workloads = [str(options.trace)] if options.trace else options.workloads
    if workloads:
        study = replace(study, workloads=tuple(workloads))
    for workload in study.workloads:
        find_workload(workload)
    if options.kv_tokens:
        study = replace(study, kv_tokens=tuple(int(size) for size in options.kv_tokens))
    return replace(
        study,
        seeds=study.seeds if options.seeds is None else tuple(range(options.seeds)),
        minutes=options.minutes or study.minutes,
        short_minutes=None if options.minutes else study.short_minutes,
        host_tokens=study.host_tokens if options.host_tokens is None else options.host_tokens,
        rates=tuple(options.rates or ()),
        guess_rps=options.guess or study.guess_rps,
        near=found_rps(json.loads(options.near.read_text())) if options.near else {},
        curves=(study.curves or bool(options.plots)) and not options.no_curves,
        own_limits=study.own_limits and not options.no_own_limits,
        bound=study.bound and not options.no_bound,
        tolerance=options.tolerance or study.tolerance,
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _say(console: Console, quiet: bool, begun: float) -> Callable[[str], None]:
    def say(text: str) -> None:
        if not quiet:
            console.print(f"[dim]{time.monotonic() - begun:6.0f} s[/]  {text}", highlight=False)

    return say
