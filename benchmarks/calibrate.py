"""Measure what iterations and copies of the real engine cost here, and write it down as a machine to simulate."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from caesura.runtime.calibrate import measure
from caesura.runtime.engine import Engine
from caesura.runtime.executors.cost import MachineCosts
from caesura.scheduler.types import StepPlan, StepResult
from rich.console import Console

from benchmarks.common import hardware
from benchmarks.dummy import SHAPES, VOCAB
from benchmarks.pause.drive import Load
from benchmarks.pause.profiles import FOLDER, Machine, write_machine
from benchmarks.pause.real import real_engine, real_simulation
from benchmarks.workloads import find_workload

Floats = npt.NDArray[np.float64]
COLUMNS = ("step_s", "row_s", "slice_s", "pair_s", "read_s")
OUTLIER = 3.0  # times the fitted time: a step that something else on the machine held up


@dataclass(frozen=True, slots=True)
class StepSample:
    """One step: its work, and the wall time from its beginning to the next one's."""

    rows: int
    slices: int
    pairs: float
    read: int
    seconds: float


class StepWatch:
    """An observer that times steps from beginning to beginning, as long as they follow each other without a gap."""

    def __init__(self) -> None:
        self.samples: list[StepSample] = []
        self._last: tuple[float, StepPlan] | None = None

    def on_step(self, engine: Engine, plan: StepPlan, result: StepResult) -> None:
        """Close the sample of the step before."""
        if self._last is not None and self._last[1].slices:
            began, before = self._last
            pairs = sum(piece.num_tokens * (piece.start + piece.num_tokens / 2) for piece in before.slices)
            read = sum(piece.start + piece.num_tokens for piece in before.slices)
            self.samples.append(StepSample(before.num_query_tokens, len(before.slices), pairs, read, plan.now - began))
        self._last = (plan.now, plan) if engine.has_work else None


def fit(samples: Sequence[StepSample]) -> tuple[MachineCosts, float]:
    """Non-negative least squares of the step time on its work; returns it (copies still 0) and the mean relative error.

    Steps weigh by the inverse of their time, so that the many short ones count as much as the few long ones. Steps
    far above the fit are left out and the rest fitted again.
    """
    if len(samples) < 2 * len(COLUMNS):
        raise ValueError(f"{len(samples)} steps are too few to fit {len(COLUMNS)} costs; measure for longer")
    work = np.array([[1.0, s.rows, s.slices, s.pairs, s.read] for s in samples])
    seconds = np.array([s.seconds for s in samples])
    kept = np.ones(len(samples), dtype=bool)
    costs = np.zeros(len(COLUMNS))
    for _ in range(3):
        costs = _non_negative(work[kept], seconds[kept])
        kept = seconds < OUTLIER * (work @ costs)
        if kept.sum() < 2 * len(COLUMNS):
            break
    error = float(np.mean(np.abs(work[kept] @ costs - seconds[kept]) / seconds[kept]))
    values = dict(zip(COLUMNS, (float(cost) for cost in costs), strict=True))
    return MachineCosts(copy_base_s=0.0, copy_token_s=0.0, **values), error


def _non_negative(work: Floats, seconds: Floats) -> Floats:
    """Weighted least squares; the most negative coefficient is dropped until none is."""
    scale = work.max(axis=0) + 1e-30
    weights = 1.0 / np.sqrt(np.maximum(seconds, 1e-6))
    active = list(range(work.shape[1]))
    costs = np.zeros(work.shape[1])
    while active:
        found = np.linalg.lstsq((work / scale)[:, active] * weights[:, None], seconds * weights, rcond=None)[0]
        if (found >= 0).all():
            costs[active] = found
            break
        del active[int(np.argmin(found))]
    result: Floats = costs / scale
    return result


def calibrate(model: str, seconds: float, machine: Machine) -> tuple[Machine, float, int]:
    """Run the mix on the real engine for a while and fit; returns the machine, the fit's error and the steps seen."""
    watch = StepWatch()
    with real_engine(model, "min_waste", machine) as engine:
        copies = measure(engine.executor, wide=machine.device != "cpu")  # pools are idle before the load
        engine.observers.append(watch)
        simulation = real_simulation(engine)
        for name, rate_rps in (("mix", 1.0), ("mix-512", 3.0), ("mix-4096", 2.0)):
            arrivals = find_workload(name).arrivals(rate_rps, 1.0, 1)
            load = Load(engine, simulation, arrivals, tool_scale=0.02, vocab_size=VOCAB)
            load.start()
            simulation.run(simulation.clock.now() + seconds / 3)
            load.close()
        token_bytes = engine.executor.page_bytes // engine.executor.page_size
    costs, error = fit(watch.samples)
    costs = replace(costs, copy_base_s=copies.swap_base_s, copy_token_s=copies.swap_token_s)
    saturation = min(machine.max_step_tokens, max(16, round(costs.step_s / max(costs.row_s, 1e-9))))
    return (
        replace(
            machine,
            costs=costs,
            saturation_tokens=saturation,
            token_bytes=token_bytes,
            given=f"measured on {_place(machine)}: {len(watch.samples)} steps of the engine, "
            f"mean error of the fit {error:.1%}",
            assumed="copies run beside the iterations and cost them nothing",
        ),
        error,
        len(watch.samples),
    )


def _place(machine: Machine) -> str:
    about = hardware()
    if machine.device == "cpu":
        return f"{about['cores']} cores of {about['cpu']}"
    import torch

    return f"{torch.cuda.get_device_name()} in {machine.dtype}"


def blank(
    name: str, kv_tokens: int, host_tokens: int, threads: int | None, device: str = "cpu", dtype: str = "float32"
) -> Machine:
    """A machine whose costs are still to be measured."""
    return Machine(
        name=name,
        costs=MachineCosts(5e-3, 1e-4, 0.0, 1e-6),
        saturation_tokens=64,
        max_step_tokens=256 if device == "cpu" else 2048,
        max_running=64,
        kv_tokens=kv_tokens,
        host_tokens=host_tokens,
        token_bytes=1,
        page_size=16,
        given="",
        assumed="",
        threads=threads,
        device=device,
        dtype=dtype,
    )


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks calibrate", description=__doc__)
    parser.add_argument("--model", default="15M", choices=tuple(SHAPES))
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the engine is watched")
    # With tools at a quarter of their time these are about as short as the published machine's pools.
    parser.add_argument("--kv-tokens", type=int, default=8_192)
    parser.add_argument("--host-tokens", type=int, default=8_192)
    parser.add_argument("--threads", type=int, help="threads of the engine")
    parser.add_argument("--out", type=Path, help="file to write; DEVICE-MODEL.json among the machines by default")
    parser.add_argument("--device", default="cpu", help="where the model computes: cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args(arguments)
    name = f"{options.device.split(':')[0]}-{options.model.lower()}"
    start = blank(name, options.kv_tokens, options.host_tokens, options.threads, options.device, options.dtype)
    machine, error, steps = calibrate(options.model, options.seconds, start)
    path = options.out or FOLDER / f"{name}.json"
    write_machine(machine, path)
    console = Console()
    console.print(f"{steps} steps, mean error of the fit {error:.1%}")
    console.print(machine.costs)
    console.print(f"written to {os.path.relpath(path)}")
    return 0
