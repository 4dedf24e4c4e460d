"""InferCept's mix on an 8B in real time, policy by policy on one executor, beside the simulator's prediction."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from caesura.runtime.calibrate import measure
from caesura.runtime.engine import Engine
from caesura.runtime.executors.cost import MachineCosts
from caesura.runtime.executors.torch_cuda import CudaExecutor
from caesura.scheduler.policies import make_policy
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.scheduler import SchedulerConfig

from benchmarks.calibrate import blank
from benchmarks.common import hardware, software
from benchmarks.dummy import VOCAB
from benchmarks.gpu.common import llama_8b, make_executor, report
from benchmarks.pause.drive import Load
from benchmarks.pause.profiles import Machine, write_machine
from benchmarks.pause.real import WaitingClock, real_simulation
from benchmarks.pause.runs import RunSpec, play, run
from benchmarks.workloads import find_workload

POLICIES = ("discard", "lru_host", "infercept", "min_waste")
KV_TOKENS = 48_000  # small enough for pressure
HOST_TOKENS = 96_000


def main(seconds: float, rate_rps: float, results: Path | None) -> None:
    """``seconds`` a policy at ``rate_rps`` requests a second."""
    executor = make_executor(llama_8b(), kv_tokens=KV_TOKENS, host_tokens=HOST_TOKENS)
    profile = measure(executor, wide=True)
    machine = _machine(profile, executor)
    kept: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gpu.json"
        write_machine(machine, path)
        for policy in POLICIES:
            spec = RunSpec("mix", policy, rate_rps, 0, seconds / 60, str(path))
            simulated = run(spec)
            real = _real(spec, machine, executor)
            kept += [simulated, real]
            for name, unit in (("throughput_output_tok_s", "tok/s"), ("normalized_latency_s", "s/token")):
                if real[name] is not None:
                    report(f"mix, {policy}: {name}", real[name], unit)
                if real[name] and simulated[name] is not None:
                    report(
                        f"mix, {policy}: {name}, simulated",
                        simulated[name],
                        f"{unit}, {simulated[name] / real[name] - 1:+.0%}",
                    )
            report(f"mix, {policy}: waste", real["waste"]["waste"]["token_s"], "token s")
    executor.close()
    if results is not None:
        about: dict[str, Any] = {
            "software": software(),
            "hardware": {**hardware(), "gpu": torch.cuda.get_device_name()},
        }
        about |= {"at": datetime.now(UTC).isoformat(), "machine": asdict(machine)}
        results.write_text(json.dumps({**about, "runs": kept}, indent=1))


def _machine(profile: CostProfile, executor: CudaExecutor) -> Machine:
    costs = MachineCosts(
        step_s=profile.step_s,
        row_s=profile.token_s,
        copy_base_s=profile.swap_base_s,
        copy_token_s=profile.swap_token_s,
        read_s=profile.attention_s,
    )
    return replace(
        blank("gpu-8b", KV_TOKENS, HOST_TOKENS, None, "cuda", "bfloat16"),
        costs=costs,
        saturation_tokens=profile.saturation_tokens,
        token_bytes=executor.page_bytes // executor.page_size,
        max_running=256,
    )


def _real(spec: RunSpec, machine: Machine, executor: CudaExecutor) -> dict[str, Any]:
    """The policy is told what the simulated one is told."""
    config, profile = SchedulerConfig(machine.max_step_tokens, machine.max_running), machine.profile
    engine = Engine(executor, make_policy(spec.policy), profile, WaitingClock(), config, overlapping=executor)
    simulation = real_simulation(engine)
    arrivals = find_workload(spec.workload).arrivals(spec.rate_rps, spec.minutes, spec.seed)
    load = Load(engine, simulation, arrivals, tool_scale=spec.tool_scale, vocab_size=VOCAB)
    found = play(spec, machine, load, lambda share: None)
    load.close()
    for context in list(engine.scheduler.contexts):
        engine.close(context)
    while engine.has_work:
        engine.step()
    return found


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
