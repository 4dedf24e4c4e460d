"""A study: capacities of all policies on all workloads and pool sizes, then the curves around them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from caesura.scheduler.policies import POLICIES

from benchmarks.common import hardware, software
from benchmarks.pause.capacity import LATENCY_FACTOR
from benchmarks.pause.pool import Chain, run_all
from benchmarks.pause.profiles import find_machine
from benchmarks.pause.runs import RunSpec
from benchmarks.pause.store import Store, code_fingerprint

LONG = frozenset({"coding", "mix-4096", "forks", "shift", "hang"})  # contexts for which the depth of attention counts
QUICK_POLICIES = ("discard", "preserve", "swap", "lru_host", "infercept", "min_waste")
REAL_POLICIES = ("discard", "lru_host", "infercept", "min_waste")
QUICK_WORKLOADS = ("mix", "mix-4096", "coding")
FULL_WORKLOADS = ("mix", "mix-512", "mix-4096", "forks", "coding", "shift", "hang", "qa", "chat", "virtual_env")
UNSURE_STRETCH, SURE_STRETCH = 1.5, 1.06  # steps of a search that begins with a rival's capacity, with its own
GRID = (0.25, 0.5, 0.7, 0.85, 1.0, 1.15, 1.35)  # of the median capacity over policies
GRID_LIMIT = 8.0  # times the unloaded latency: beyond it a curve is over


@dataclass(frozen=True, slots=True)
class Study:
    """What is compared. ``kv_tokens`` None: the machine's own pool. ``rates`` empty: around the capacities."""

    policies: tuple[str, ...]
    workloads: tuple[str, ...]
    seeds: tuple[int, ...]
    minutes: float
    machine: str = "gptj-6b-a100"
    kv_tokens: tuple[int | None, ...] = (None,)
    host_tokens: int | None = None
    rates: tuple[float, ...] = ()
    curves: bool = True
    tolerance: float = 1.03
    engine: str = "simulated"
    tool_scale: float = 1.0
    guess_rps: float = 3.0

    def spec(self, workload: str, kv_tokens: int | None, policy: str, seed: int) -> RunSpec:
        """A run of this study, its rate still to be chosen."""
        machine = self.machine
        if machine == "gptj-6b-a100" and workload in LONG:
            machine = "gptj-6b-a100-long"
        spec = RunSpec(workload, policy, 1.0, seed, self.minutes, machine, kv_tokens, self.host_tokens)
        return replace(spec, engine=self.engine, tool_scale=self.tool_scale)


def quick_study(**changes: Any) -> Study:
    """A few minutes on two cores."""
    settings = {"policies": QUICK_POLICIES, "workloads": QUICK_WORKLOADS, "seeds": (0,), "minutes": 3.0}
    return Study(**{**settings, "tolerance": 1.08, "curves": False, **changes})


def real_study(model: str, tool_scale: float, **changes: Any) -> Study:
    """The engine of this machine in real time."""
    settings = {
        "policies": REAL_POLICIES,
        "workloads": ("mix", "mix-512"),
        "seeds": (0, 1, 2),
        "minutes": 3.0,
        "machine": f"cpu-{model.lower()}",
        "engine": model,
        "tool_scale": tool_scale,
        "tolerance": 1.08,
        "curves": False,
    }
    return Study(**{**settings, **changes})


def full_study(**changes: Any) -> Study:
    """Everything: hours."""
    settings = {"policies": tuple(POLICIES), "workloads": FULL_WORKLOADS, "seeds": (0, 1, 2), "minutes": 30.0}
    return Study(**{**settings, **changes})


@dataclass(slots=True)
class Findings:
    """What a study has found so far. ``label`` is the workload, with the pool size if several are compared."""

    study: Study
    runs: list[dict[str, Any]] = field(default_factory=list)
    unloaded_s: dict[str, float] = field(default_factory=dict)
    capacities: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)

    def label(self, workload: str, kv_tokens: int | None) -> str:
        return workload if kv_tokens is None else f"{workload}@{kv_tokens}"

    def median_rps(self, label: str, policy: str) -> float | None:
        """Median capacity over the seeds that are done."""
        found = self.capacities.get(label, {}).get(policy, [])
        return statistics.median(entry["rps"] for entry in found) if found else None

    def add_runs(self, runs: Iterable[dict[str, Any]]) -> None:
        """Keep runs, each once."""
        for run in runs:
            if run not in self.runs:
                self.runs.append(run)

    def document(self) -> dict[str, Any]:
        """The JSON of ``--json``."""
        medians = {
            label: {policy: statistics.median(entry["rps"] for entry in found) for policy, found in policies.items()}
            for label, policies in self.capacities.items()
        }
        return {
            "runs": self.runs,
            "capacity_rps": medians,
            "capacity_seeds_rps": self.capacities,
            "unloaded_s": self.unloaded_s,
            "config": {
                "study": asdict(self.study),
                "latency_factor": LATENCY_FACTOR,
                "machines": {run["machine"]: asdict(find_machine(run["machine"])) for run in self.runs},
                "code": code_fingerprint(),
                "hardware": hardware(),
                "software": software(),
            },
        }


def conduct(study: Study, store: Store, jobs: int, say: Callable[[str], None]) -> Findings:
    """Run the study: the empty machine, the first seed's capacities, the other seeds', the curves."""
    findings = Findings(study)
    cases = [(workload, kv) for workload in study.workloads for kv in study.kv_tokens]

    def noted(chain: Chain, run: dict[str, Any]) -> None:
        spec = chain.spec
        latency = "over the limit" if run["decided_early"] else f"{run['normalized_latency_s'] * 1e3:.1f} ms a token"
        say(
            f"{findings.label(spec.workload, spec.kv_tokens)} {run['policy']} seed {spec.seed}: "
            f"{run['rate_rps']:.3g}/s {latency} ({run['wall_s']:.0f} s)"
        )

    empty = [Chain("unloaded", study.spec(workload, None, "preserve", 0)) for workload in study.workloads]
    limits = {}
    for chain, outcome in run_all(empty, store, jobs, noted):
        findings.unloaded_s[chain.spec.workload] = outcome["unloaded_s"]
        limits[chain.spec.workload] = LATENCY_FACTOR * outcome["unloaded_s"]
    searches = (
        _search(findings, case, policy, seed, limits[case[0]])
        for seed in study.seeds
        for case in cases
        for policy in study.policies
    )
    for chain, outcome in run_all(searches, store, jobs, noted):
        label = findings.label(chain.spec.workload, chain.spec.kv_tokens)
        found = findings.capacities.setdefault(label, {}).setdefault(chain.spec.policy, [])
        found.append({"seed": chain.spec.seed} | {key: outcome[key] for key in ("rps", "low_rps", "high_rps")})
        findings.add_runs(outcome["runs"])
        say(f"{label} {chain.spec.policy} seed {chain.spec.seed}: carries {outcome['rps']:.3g} requests/s")
    if study.curves or study.rates:
        for _, outcome in run_all(_curves(study, findings, cases), store, jobs, noted):
            findings.add_runs(outcome["runs"])
    return findings


def _search(findings: Findings, case: tuple[str, int | None], policy: str, seed: int, limit_s: float) -> Chain:
    """A capacity search that begins at what is known: of this policy with another seed, else of other policies."""
    study, (workload, kv) = findings.study, case
    label = findings.label(workload, kv)
    known = findings.median_rps(label, policy)
    others = [findings.median_rps(label, other) or 0.0 for other in findings.capacities.get(label, {})]
    guess = known or (statistics.median(others) if others else study.guess_rps)
    spec = study.spec(workload, kv, policy, seed)
    stretch = max(SURE_STRETCH, study.tolerance) if known else UNSURE_STRETCH
    return Chain("capacity", spec, limit_s, guess, study.tolerance, stretch)


def _curves(study: Study, findings: Findings, cases: list[tuple[str, int | None]]) -> list[Chain]:
    """Runs at the same rates for all policies, from far below to just above what they carry."""
    chains = []
    for workload, kv in cases:
        label = findings.label(workload, kv)
        carried = [findings.median_rps(label, policy) or 1.0 for policy in study.policies]
        middle = statistics.median(carried)
        rates = study.rates or tuple(float(f"{share * middle:.3g}") for share in GRID)
        limit_s = GRID_LIMIT * findings.unloaded_s[workload]
        for seed in study.seeds[:1]:
            for policy in study.policies:
                for rate in rates:
                    spec = study.spec(workload, kv, policy, seed)
                    chains.append(Chain("run", replace(spec, rate_rps=rate, limit_s=limit_s)))
    return chains
