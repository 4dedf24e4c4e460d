"""``python -m benchmarks.peers``: arguments, preparation, what is written."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common import CpuClock, hardware, software
from benchmarks.limits import Limits, best, measure_limits
from benchmarks.peers.environments import CannotInstall, prepare
from benchmarks.peers.referee import Entry, Finding, compete, scratch_folder
from benchmarks.peers.report import agreement, scenario_document, table
from benchmarks.peers.roofline import SHAPES, Machine, Roofline
from benchmarks.peers.systems import Settings
from benchmarks.peers.workload import BATCH, SCENARIOS, SMALL_POOL_TOKENS, Scenario

PEERS = ("vllm", "openvino", "llamacpp", "transformers")
AMPLE_TOKENS = 24576  # (b) and (d) hold 10,240 and 7,680 tokens at once; the rest is what earlier runs left behind
LIMITS_S = 6.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 2 for wrong usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        scenarios = parse_scenarios(options.scenarios)
        peers = parse_peers(options.peers)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every worker is ended on the way out
    console = Console()
    clock, begun = CpuClock(), time.monotonic()
    document, notes = _measure(options, scenarios, peers, console)
    document |= {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "stolen_cpu_share": round(clock.stolen_share(), 4),
        "hardware": hardware(),
        "software": software(),
        "notes": notes,
    }
    console.print(table(document))
    for note in notes:
        console.print(note)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
        console.print(f"written to {options.json}")
    return 0


def parse_scenarios(text: str) -> list[Scenario]:
    """``abcde`` or ``a,b,e2``. Raises ValueError."""
    names = [name for part in text.split(",") for name in ([part] if part in SCENARIOS else list(part))]
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown or not names:
        raise ValueError(f"scenarios are {text!r}; there are {', '.join(SCENARIOS)}, as in abcd or a,b,e2")
    return [scenario for name, scenario in SCENARIOS.items() if name in names]


def parse_peers(text: str) -> list[str]:
    """Comma-separated names; empty or ``none`` for nobody. Raises ValueError."""
    names = [name for name in text.split(",") if name and name != "none"]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ValueError(f"peers are {text!r}; there are {', '.join(PEERS)}")
    return list(dict.fromkeys(names))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="Caesura beside other runtimes on this CPU: same checkpoint, alternating runs, limits beside.",
    )
    listed = "; ".join(f"{scenario.name}: {scenario.title}" for scenario in SCENARIOS.values())
    parser.add_argument("--scenarios", default="abcde", help=listed)
    parser.add_argument("--peers", default="vllm,openvino", help=f"comma-separated: {', '.join(PEERS)}; or none")
    parser.add_argument("--model", default="135m", choices=tuple(SHAPES))
    parser.add_argument("--quantization", default="none", choices=("none", "int8"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--run-limit", type=float, default=300.0, help="seconds after which a run counts as not finished"
    )
    parser.add_argument("--json", type=Path)
    return parser


def _measure(
    options: argparse.Namespace, scenarios: list[Scenario], peers: list[str], console: Console
) -> tuple[dict[str, Any], list[str]]:
    shape = SHAPES[options.model]
    notes: list[str] = []
    entries = []
    for system in ["caesura", *peers]:
        try:
            entries.append((system, prepare(system, options.model, options.quantization)))
        except CannotInstall as error:
            notes.append(f"skipped: {error}")
            console.print(notes[-1])
    measured: list[Limits] = [measure_limits(LIMITS_S)]
    findings: dict[tuple[str, str], Finding] = {}
    systems: dict[str, dict[str, dict[str, str]]] = {}
    for pool in ("ample", "tiered", "short"):
        group = [scenario for scenario in scenarios if scenario.pool == pool]
        if not group:
            continue
        scratch = str(scratch_folder())
        found, abouts = compete(
            [
                Entry(
                    Settings(
                        system,
                        str(place.model),
                        pool,
                        options.quantization,
                        AMPLE_TOKENS,
                        SMALL_POOL_TOKENS,
                        shape.kv_bytes,
                        scratch,
                    ),
                    place,
                )
                for system, place in entries
            ],
            group,
            vocab=shape.vocab,
            repeats=options.repeats,
            run_s=options.run_limit,
            say=lambda text: console.print(text, highlight=False, soft_wrap=True),
        )
        shutil.rmtree(scratch, ignore_errors=True)
        findings |= found
        systems[pool] = abouts
        measured.append(measure_limits(LIMITS_S))
    limits = best(measured)
    machine = Machine(limits.read_bytes_s, limits.fp32_ops_s, limits.int8_ops_s)
    roofline = Roofline(shape, machine, 1 if options.quantization == "int8" else 4)
    document: dict[str, Any] = {
        "benchmark": "peers",
        "model": options.model,
        "quantization": options.quantization,
        "repeats": options.repeats,
        "scenarios": {
            scenario.name: scenario_document(scenario, findings, roofline.limit(scenario)) for scenario in scenarios
        },
        "systems": systems,
        "limits": {"best": asdict(limits), "measured": [asdict(one) for one in measured]},
    }
    return document, notes + _words(scenarios, findings)


def _words(scenarios: list[Scenario], findings: dict[tuple[str, str], Finding]) -> list[str]:
    words = [
        "Limit: bytes over bandwidth or operations over the matrix rate, with the rates measured in this run. "
        "Batches: " + f"{BATCH} prompts or agents; e2: 64."
    ]
    if any(scenario.pool == "tiered" for scenario in scenarios):
        words.append(
            "e: on a CPU the KV pool and the host pool are the same memory; e2 is the one with all of it short."
        )
    for scenario in scenarios:
        words += agreement(scenario, findings)
    reasons = dict.fromkeys(finding.failure for finding in findings.values() if finding.failure is not None)
    return words + [f"left out: {reason}" for reason in reasons]
