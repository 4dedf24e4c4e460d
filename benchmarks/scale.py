"""How long the simulator takes for 10,000 programs with 100,000 pauses on one core."""

from __future__ import annotations

import time

from benchmarks.common import Bench
from benchmarks.pause.runs import RunSpec
from benchmarks.pause.runs import run as carry_out

PROGRAMS = 10_000
WORKLOAD = "turns"  # ten pauses a program
RATES_RPS = (4.0, 6.0)  # the pool of the profile is half full, and full


def run(bench: Bench, *, quick: bool) -> None:
    """Simulate at both loads and record processor seconds."""
    programs = PROGRAMS // 20 if quick else PROGRAMS
    bench.configure(workload=WORKLOAD, policy="min_waste", profile="gptj-6b-a100")
    for rate in RATES_RPS:
        begun = time.process_time()
        result = carry_out(RunSpec(WORKLOAD, "min_waste", rate, minutes=programs / rate / 60))
        seconds = time.process_time() - begun
        arrived = result["requests"]["arrived"]
        details = {"steps": result["steps"], "kv_tokens_used": result["used_tokens_mean"]}
        bench.record(f"{arrived:,} programs, {10 * arrived:,} pauses, {rate:g}/s", [seconds], unit="s", details=details)
    bench.note("processor seconds of one process; the goal is 120 s for 10,000 programs with 100,000 pauses")
