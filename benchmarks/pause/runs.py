"""One run: a workload, a policy, a rate, a seed and a machine; and everything measured of it.

*Window*: requests that arrive after the first tenth and before three quarters of the run are measured; arrivals go on
to the end, so that they live their lives under the load they came to. Waste, throughput and memory are counted from
the first tenth to the end.

*Normalized latency* (InferCept, section 5): seconds from arrival to end without the time in which the program merely
waited for tools, over the tokens it generated; the mean over the measured requests. One that is unfinished at the end
is counted with its seconds until then over the tokens of the segments it has begun - not left out, which would
reward starving it. (InferCept's own script also counts the tokens that tools return; ``with_returned`` does.)
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from caesura.runtime.clock import VirtualClock
from caesura.runtime.engine import Engine, Observer
from caesura.runtime.errors import ContextTooLong
from caesura.runtime.executors.cost import CostExecutor
from caesura.runtime.sim import Simulation
from caesura.scheduler.policies import make_policy
from caesura.scheduler.scheduler import SchedulerConfig

from benchmarks.pause.drive import Load, Record
from benchmarks.pause.profiles import Machine, find_machine
from benchmarks.workloads import find_workload

WARM_SHARE, MEASURED_SHARE = 0.10, 0.75
CHECK_EVERY_S = 5.0


class RunRefused(ValueError):
    """A run that cannot be made, or that has nothing to measure; the message says what to change."""


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What is run.

    ``engine`` is "simulated", or the dummy model (15M, 135M) of a run in real time. ``tool_scale`` multiplies all tool
    times. ``limit_s``: stop as soon as the normalized latency is certain to exceed this. ``alone``: each program comes
    when the one before has ended.
    """

    workload: str
    policy: str
    rate_rps: float
    seed: int = 0
    minutes: float = 30.0
    machine: str = "gptj-6b-a100"
    kv_tokens: int | None = None
    host_tokens: int | None = None
    limit_s: float | None = None
    engine: str = "simulated"
    tool_scale: float = 1.0
    alone: bool = False

    def sized_machine(self) -> Machine:
        """The machine with this run's pools."""
        return find_machine(self.machine).sized(self.kv_tokens, self.host_tokens)


def run(spec: RunSpec, progress: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
    """Carry a run out; the result is plain data (see ``measure``)."""
    return run_on(spec.sized_machine(), spec, progress)


def run_on(
    machine: Machine,
    spec: RunSpec,
    progress: Callable[[float], None] = lambda share: None,
    observers: Sequence[Observer] = (),
) -> dict[str, Any]:
    """The same on this machine, whatever the spec calls it; ``observers`` see the steps."""
    try:
        return _run_on(machine, spec, progress, observers)
    except ContextTooLong as error:
        raise RunRefused(f"{spec.workload} is too long for this machine: {error}") from None


def _run_on(
    machine: Machine, spec: RunSpec, progress: Callable[[float], None], observers: Sequence[Observer]
) -> dict[str, Any]:
    begun = time.perf_counter()
    arrivals = find_workload(spec.workload).arrivals(spec.rate_rps, spec.minutes, spec.seed)
    if spec.engine == "simulated":
        engine, simulation = simulated(machine, spec.policy)
        engine.observers += observers
        load = Load(engine, simulation, arrivals, tool_scale=spec.tool_scale, alone=spec.alone)
        result = play(spec, machine, load, progress)
    else:
        from benchmarks.dummy import VOCAB
        from benchmarks.pause.real import real_engine, real_simulation

        with real_engine(spec.engine, spec.policy, machine) as engine:
            simulation = real_simulation(engine)
            engine.observers += observers
            load = Load(engine, simulation, arrivals, tool_scale=spec.tool_scale, vocab_size=VOCAB, alone=spec.alone)
            result = play(spec, machine, load, progress)
    return result | {"wall_s": time.perf_counter() - begun}


def simulated(machine: Machine, policy: str) -> tuple[Engine, Simulation]:
    """An engine of this machine in virtual time, and its event loop."""
    clock = VirtualClock()
    size = machine.page_size
    executor = CostExecutor(
        machine.costs,
        clock,
        page_size=size,
        num_device_pages=-(-machine.kv_tokens // size),
        num_host_pages=-(-machine.host_tokens // size),
        token_bytes=machine.token_bytes,
    )
    config = SchedulerConfig(machine.max_step_tokens, machine.max_running)
    engine = Engine(executor, make_policy(policy), machine.profile, clock, config)
    return engine, Simulation(engine, clock)


def play(spec: RunSpec, machine: Machine, load: Load, progress: Callable[[float], None]) -> dict[str, Any]:
    """Run a load to the end of its minutes on whatever clock it has, and measure it."""
    simulation, engine = load.simulation, load.engine
    begun, length_s = simulation.clock.now(), spec.minutes * 60
    watch = _Watch(spec, load, begun, progress)
    load.start()
    simulation.at(begun + WARM_SHARE * length_s, watch.warm)
    simulation.at(begun + CHECK_EVERY_S, watch.check)
    simulation.run(begun + length_s)
    return asdict(spec) | measure(spec, machine, load, watch, engine)


class _Watch:
    """Takes the meter's reading when the run is warm, and ends runs that are decided."""

    def __init__(self, spec: RunSpec, load: Load, begun: float, progress: Callable[[float], None]) -> None:
        self.spec = spec
        self.load = load
        self.begun = begun
        self.length_s = spec.minutes * 60
        self.at_warm: dict[str, float] = {}
        self.used_tokens: list[int] = []  # KV in use on the device, sampled
        self.generated_at_warm = 0
        moments = find_workload(spec.workload).moments(spec.rate_rps, spec.seed)
        first, last = WARM_SHARE * self.length_s, MEASURED_SHARE * self.length_s
        self.expected = sum(at_s >= first for at_s in itertools.takewhile(lambda at_s: at_s < last, moments))
        self.decided_early = False
        self._progress = progress

    def warm(self) -> None:
        """Readings to subtract in the end."""
        self.at_warm = self.load.engine.scheduler.meter.snapshot()
        self.generated_at_warm = self.load.generated_tokens

    def measured(self, records: Sequence[Record]) -> list[Record]:
        """The requests of the window."""
        first, last = self.begun + WARM_SHARE * self.length_s, self.begun + MEASURED_SHARE * self.length_s
        return [record for record in records if first <= record.arrival_s < last and not record.lost]

    def check(self) -> None:
        """Every few seconds: sample the memory, and see whether the limit is certain to be exceeded."""
        clock, ledger = self.load.simulation.clock, self.load.engine.ledger
        now = clock.now()
        self._progress((now - self.begun) / self.length_s)
        if self.at_warm:
            used = ledger.num_device_pages - ledger.free_pages - ledger.evictable_pages
            self.used_tokens.append(used * ledger.page_size)
        if self.spec.limit_s is not None and self._exceeds(self.spec.limit_s, now):
            self.decided_early = True
            self.load.simulation.stop()
            return
        self.load.simulation.at(now + CHECK_EVERY_S, self.check)

    def _exceeds(self, limit_s: float, now: float) -> bool:
        """The mean over all requests of the window is certain to exceed the limit, whatever happens from now on.

        A request's share can only grow: its seconds do, and the tokens it has begun are never more than all of its own.
        One that a deadline may still close has no share that is certain, for the lost do not count.
        """
        certain = [record for record in self.measured(self.load.records) if not record.program.may_be_lost]
        least = sum(record.served_s(now) / record.program.output_tokens for record in certain)
        return least > limit_s * self.expected


def measure(spec: RunSpec, machine: Machine, load: Load, watch: _Watch, engine: Engine) -> dict[str, Any]:
    """All metrics of a run that has ended. Waste in token-seconds and in GB seconds (tokens times KV bytes)."""
    now = load.simulation.clock.now()
    window_s = max(1e-9, now - watch.begun - WARM_SHARE * watch.length_s)
    measured = watch.measured(load.records)
    meter = engine.scheduler.meter.snapshot()
    spent = {name: value - watch.at_warm.get(name, 0.0) for name, value in meter.items()}
    ended = [record for record in load.records if record.end_s is not None and not record.lost]
    in_window = [record for record in ended if record.end_s and record.end_s >= now - window_s]
    latencies = [record.served_s(now) / max(1, record.started_tokens) for record in measured]
    resumed = [seconds for record in measured for seconds in record.resumed_s]
    first = [(record.first_token_s or now) - record.arrival_s for record in measured]
    pool_token_s = machine.kv_tokens * window_s
    moved = (spent["pages_in"] + spent["pages_out"]) * machine.page_size
    return {
        "normalized_latency_s": statistics.fmean(latencies) if latencies else None,
        "normalized_latency_quantiles_s": _quantiles(latencies),
        "normalized_latency_with_returned_s": statistics.fmean(
            record.served_s(now) / max(1, record.started_tokens + record.returned_tokens) for record in measured
        )
        if measured
        else None,
        "throughput_rps": len(in_window) / window_s,
        "throughput_output_tok_s": sum(record.started_tokens for record in in_window) / window_s,
        "ttft_s": _quantiles(first),
        "post_tool_ttft_s": _quantiles(resumed),
        "served_s": _quantiles([record.served_s(now) for record in measured]),
        "requests": {
            "measured": len(measured),
            "unfinished": sum(record.end_s is None for record in measured),
            "lost": sum(record.lost for record in load.records),
            "completed": len(in_window),
            "arrived": len(load.records),
        },
        "max_wait_s": max((record.wait_s(now) for record in load.records), default=0.0),
        "waste": {
            name: {
                "token_s": spent[f"{name}_token_s"],
                "gb_s": spent[f"{name}_token_s"] * machine.token_bytes / 1e9,
                "share": spent[f"{name}_token_s"] / pool_token_s,
            }
            for name in ("preserve", "recompute", "swap", "idle", "waste")
        },
        "prefill_tokens": spent["tokens_computed"] - (load.generated_tokens - watch.generated_at_warm),
        "tokens_computed": spent["tokens_computed"],
        "tokens_recomputed": spent["tokens_recomputed"],
        "link_bytes": moved * machine.token_bytes,
        "preemptions": spent["preemptions"],
        "decisions": {name: spent[f"decisions_{name}"] for name in ("preserve", "swap", "discard", "release")},
        "busy_share": spent["busy_s"] / window_s,
        "used_tokens_mean": statistics.fmean(watch.used_tokens) if watch.used_tokens else 0.0,
        "steps": spent["steps"],
        "simulated_s": now - watch.begun,
        "decided_early": watch.decided_early or load.overrun,
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    """Mean and quantiles (nearest rank); empty when there are no values."""
    if not values:
        return {}
    ordered = sorted(values)
    found = {f"p{rank}": ordered[min(len(ordered) - 1, rank * len(ordered) // 100)] for rank in (50, 90, 99)}
    return {"mean": statistics.fmean(ordered), **found, "max": ordered[-1]}
