"""A study: capacities of all policies on all workloads and pool sizes, then the curves around them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from caesura.scheduler.policies import POLICIES

from benchmarks.common import hardware, software
from benchmarks.pause.capacity import LATENCY_FACTOR
from benchmarks.pause.pool import Chain, run_all
from benchmarks.pause.profiles import ENDLESS_TOKENS, FREE_COPIES, find_machine
from benchmarks.pause.runs import RunSpec
from benchmarks.pause.store import Store, code_fingerprint

QUICK_POLICIES = ("discard", "preserve", "swap", "lru_host", "infercept", "min_waste")
REAL_POLICIES = ("discard", "lru_host", "infercept", "min_waste")
QUICK_WORKLOADS = ("mix", "mix-4096", "coding")
FULL_WORKLOADS = ("mix", "mix-512", "mix-4096", "forks", "coding", "shift", "hang", "qa", "chat", "virtual_env")
UNSURE_STRETCH, SURE_STRETCH = 1.5, 1.06  # steps of a search that begins with a rival's capacity, with its own
SAME_LIMIT = 0.02  # an unloaded latency this near the common one needs no search of its own
CURVES = ("mix", "mix-4096", "forks", "coding")  # workloads that get curves when there are more of them
GRID = (0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)  # of the median capacity over policies


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
    short_minutes: float | None = None  # of workloads other than the paper's mix
    curves: bool = True
    own_limits: bool = True  # also search where each policy reaches twice its *own* unloaded latency
    bound: bool = True  # also search what is carried where a pause costs nothing: no decision can gain more
    tolerance: float = 1.03
    engine: str = "simulated"
    tool_scale: float = 1.0
    in_turns: bool = False  # the policies' searches side by side, for a machine that is not always as fast
    guess_rps: float = 3.0
    near: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # where to begin: by label, by policy

    def spec(self, workload: str, kv_tokens: int | None, policy: str, seed: int) -> RunSpec:
        """A run of this study, its rate still to be chosen."""
        minutes = self.minutes if workload == "mix" else self.short_minutes or self.minutes
        spec = RunSpec(workload, policy, 1.0, seed, minutes, self.machine, kv_tokens, self.host_tokens)
        return replace(spec, engine=self.engine, tool_scale=self.tool_scale)

    def stretch(self, known: float | None) -> float:
        """The steps of a search: small ones where its answer is about known."""
        return max(SURE_STRETCH, self.tolerance) if known else UNSURE_STRETCH


def quick_study(**changes: Any) -> Study:
    """A few minutes on two cores: tools take a quarter of their time and the pool is a quarter, so that a short run
    comes to the same balance of load and memory."""
    settings = {
        "policies": QUICK_POLICIES,
        "workloads": QUICK_WORKLOADS,
        "seeds": (0,),
        "minutes": 1.5,
        "kv_tokens": (32_000,),
        "host_tokens": 75_000,
        "tool_scale": 0.25,
        "tolerance": 1.08,
        "curves": False,
        "own_limits": False,
        "bound": False,
    }
    return Study(**{**settings, **changes})


def real_study(model: str, tool_scale: float, **changes: Any) -> Study:
    """The engine of this machine in real time."""
    settings = {
        "policies": REAL_POLICIES,
        "workloads": ("mix", "mix-512"),
        "seeds": (0, 1, 2),
        "minutes": 2.0,
        "machine": f"cpu-{model.lower()}",
        "engine": model,
        "tool_scale": tool_scale,
        "in_turns": True,
        "guess_rps": 0.5,
        "tolerance": 1.08,
        "curves": False,
        "own_limits": False,
        "bound": False,
    }
    return Study(**{**settings, **changes})


def full_study(**changes: Any) -> Study:
    """Everything: many hours."""
    settings = {"policies": tuple(POLICIES), "workloads": FULL_WORKLOADS, "seeds": (0, 1, 2), "minutes": 30.0}
    return Study(**{**settings, "short_minutes": 12.0, **changes})


Capacities = dict[str, dict[str, list[dict[str, Any]]]]  # by label and policy, one entry a seed


@dataclass(slots=True)
class Findings:
    """What a study has found so far. ``label`` is the workload, with the pool size if several are compared."""

    study: Study
    runs: list[dict[str, Any]] = field(default_factory=list)
    unloaded_s: dict[str, float] = field(default_factory=dict)
    capacities: Capacities = field(default_factory=dict)
    own_unloaded_s: dict[str, dict[str, float]] = field(default_factory=dict)
    own_capacities: Capacities = field(default_factory=dict)
    bounds: Capacities = field(default_factory=dict)  # in place of policies: what the machine was given for nothing

    def label(self, workload: str, kv_tokens: int | None) -> str:
        """What a case is called: the workload, and the pool where several are compared."""
        return workload if len(self.study.kv_tokens) == 1 else f"{workload}@{kv_tokens}"

    def median_rps(self, label: str, policy: str) -> float | None:
        """Median capacity over the seeds that are done."""
        found = self.capacities.get(label, {}).get(policy, [])
        return statistics.median(entry["rps"] for entry in found) if found else None

    def add_runs(self, runs: Iterable[dict[str, Any]]) -> None:
        """Keep runs, each once."""
        for run in runs:
            named = {"label": self.label(run["workload"], run["kv_tokens"])} | run
            if named not in self.runs:
                self.runs.append(named)

    def document(self) -> dict[str, Any]:
        """The JSON of ``--json``."""
        return {
            "runs": self.runs,
            "capacity_rps": _medians(self.capacities),
            "capacity_seeds_rps": self.capacities,
            "unloaded_s": self.unloaded_s,
            "own_capacity_rps": _medians(self.own_capacities),
            "own_unloaded_s": self.own_unloaded_s,
            "bound_rps": _medians(self.bounds),
            "config": {
                "study": asdict(self.study),
                "latency_factor": LATENCY_FACTOR,
                "machines": {run["machine"]: asdict(find_machine(run["machine"])) for run in self.runs},
                "code": code_fingerprint(),
                "hardware": hardware(),
                "software": software(),
            },
        }


def _medians(capacities: Capacities) -> dict[str, dict[str, float]]:
    return {
        label: {policy: statistics.median(entry["rps"] for entry in found) for policy, found in policies.items()}
        for label, policies in capacities.items()
    }


def conduct(study: Study, store: Store, jobs: int, say: Callable[[str], None]) -> Findings:
    """Run the study: the empty machine, the first seed's capacities, the other seeds', the curves."""
    findings = Findings(study)
    in_turns = len(study.policies) if study.in_turns else 1
    cases = [(workload, kv) for workload in study.workloads for kv in study.kv_tokens]

    def noted(chain: Chain, run: dict[str, Any]) -> None:
        spec = chain.spec
        say(
            f"{findings.label(spec.workload, spec.kv_tokens)} {run['policy']} seed {spec.seed}: "
            f"{run['rate_rps']:.3g}/s {_outcome(run)} ({run['wall_s']:.0f} s)"
        )

    largest = max(study.kv_tokens, key=lambda size: size or math.inf)
    empty = [Chain("unloaded", study.spec(workload, largest, "preserve", 0)) for workload in study.workloads]
    limits = {}
    for chain, outcome in run_all(empty, store, jobs, noted):
        findings.unloaded_s[chain.spec.workload] = outcome["unloaded_s"]
        limits[chain.spec.workload] = LATENCY_FACTOR * outcome["unloaded_s"]
    if study.bound:
        places = _bounds(findings, cases, limits)
        for chain, outcome in run_all(places, store, jobs, noted):
            for label, given in places[chain]:
                findings.bounds.setdefault(label, {}).setdefault(given, []).append(_carried(chain, outcome))
            say(f"{chain.spec.workload} seed {chain.spec.seed}: {given} would carry {outcome['rps']:.3g} requests/s")
    searches = (
        _search(findings, case, policy, seed, limits[case[0]])
        for seed in study.seeds
        for case in cases
        for policy in study.policies
    )
    for chain, outcome in run_all(searches, store, jobs, noted, in_turns=in_turns):
        label = _note_capacity(findings, findings.capacities, chain, outcome)
        say(f"{label} {chain.spec.policy} seed {chain.spec.seed}: carries {outcome['rps']:.3g} requests/s")
    if study.own_limits:
        _own_limits(findings, cases, limits, lambda chains: run_all(chains, store, jobs, noted))
    if study.curves or study.rates:
        for _, outcome in run_all(_curves(study, findings, cases), store, jobs, noted):
            findings.add_runs(outcome["runs"])
    return findings


def _outcome(run: dict[str, Any]) -> str:
    """A run in a few words."""
    latency_s = run["normalized_latency_s"]
    if run["decided_early"]:
        return "over the limit"
    return "nothing measured" if latency_s is None else f"{latency_s * 1e3:.1f} ms a token"


def _carried(chain: Chain, outcome: dict[str, Any]) -> dict[str, Any]:
    """A capacity as it is kept; JSON has no infinity, so where no load was too much ``high_rps`` is None."""
    high = outcome["high_rps"]
    found = {"rps": outcome["rps"], "low_rps": outcome["low_rps"], "high_rps": None if math.isinf(high) else high}
    return {"seed": chain.spec.seed} | found


def _note_capacity(findings: Findings, where: Capacities, chain: Chain, outcome: dict[str, Any]) -> str:
    label = findings.label(chain.spec.workload, chain.spec.kv_tokens)
    where.setdefault(label, {}).setdefault(chain.spec.policy, []).append(_carried(chain, outcome))
    findings.add_runs(outcome["runs"])
    return label


def _own_limits(
    findings: Findings,
    cases: list[tuple[str, int | None]],
    limits: dict[str, float],
    outcomes: Callable[[Iterable[Chain]], Iterator[tuple[Chain, dict[str, Any]]]],
) -> None:
    """Where each policy reaches twice its own unloaded latency: who is slow alone has a higher limit. One seed."""
    study = findings.study
    alone = [
        Chain("unloaded", study.spec(*case, policy, study.seeds[0])) for case in cases for policy in study.policies
    ]
    searches = []
    for chain, outcome in outcomes(alone):
        spec = chain.spec
        label = findings.label(spec.workload, spec.kv_tokens)
        findings.own_unloaded_s.setdefault(label, {})[spec.policy] = outcome["unloaded_s"]
        limit_s = LATENCY_FACTOR * outcome["unloaded_s"]
        if abs(limit_s / limits[spec.workload] - 1) <= SAME_LIMIT:
            first = findings.capacities[label][spec.policy][:1]
            findings.own_capacities.setdefault(label, {})[spec.policy] = first
        else:
            case = (spec.workload, spec.kv_tokens)
            searches.append(_search(findings, case, spec.policy, study.seeds[0], limit_s))
    for chain, outcome in outcomes(searches):
        _note_capacity(findings, findings.own_capacities, chain, outcome)


def _bounds(
    findings: Findings, cases: list[tuple[str, int | None]], limits: dict[str, float]
) -> dict[Chain, list[tuple[str, str]]]:
    """Searches for what would be carried if nothing ever had to be given up, and if giving up and coming back cost
    nothing; each with the labels it stands for and what is given."""
    study = findings.study
    places: dict[Chain, list[tuple[str, str]]] = {}
    for workload, kv in cases:
        for seed in study.seeds:
            spec = study.spec(workload, kv, "min_waste", seed)
            given = {
                "endless memory": replace(spec, policy="preserve", kv_tokens=ENDLESS_TOKENS),
                "free copies": replace(spec, machine=study.machine + FREE_COPIES, host_tokens=None),
            }
            label = findings.label(workload, kv)
            for name, free in given.items():
                known = study.near.get(label, {}).get(name)
                guess, stretch = known or study.guess_rps, study.stretch(known)
                chain = Chain("capacity", free, limits[workload], guess, study.tolerance, stretch)
                places.setdefault(chain, []).append((label, name))
    return places


def _search(findings: Findings, case: tuple[str, int | None], policy: str, seed: int, limit_s: float) -> Chain:
    """A capacity search that begins at what is known: of this policy with another seed or from an earlier study, else
    of other policies."""
    study, (workload, kv) = findings.study, case
    label = findings.label(workload, kv)
    known = findings.median_rps(label, policy) or study.near.get(label, {}).get(policy)
    others = _carry_something(findings.median_rps(label, other) for other in findings.capacities.get(label, {}))
    bound = _carry_something(entry["rps"] for entry in findings.bounds.get(label, {}).get("free copies", []))
    guess = known or statistics.median(others or bound or [study.guess_rps])
    spec = study.spec(workload, kv, policy, seed)
    return Chain("capacity", spec, limit_s, guess, study.tolerance, study.stretch(known))


def _carry_something(found: Iterable[float | None]) -> list[float]:
    """Capacities to guess from: a policy that carries nothing says nothing about others."""
    return [rps for rps in found if rps]


def _curves(study: Study, findings: Findings, cases: list[tuple[str, int | None]]) -> list[Chain]:
    """Runs at the same rates for all policies, from far below to far above what they carry; at ``study.rates``, with
    every seed."""
    chains = []
    chosen = study.workloads if study.rates else [name for name in study.workloads if name in CURVES] or study.workloads
    for workload, kv in cases:
        if workload not in chosen:
            continue
        label = findings.label(workload, kv)
        carried = _carry_something(findings.median_rps(label, policy) for policy in study.policies)
        middle = statistics.median(carried or [study.guess_rps])
        rates = study.rates or tuple(float(f"{share * middle:.3g}") for share in GRID)
        for seed in study.seeds if study.rates else study.seeds[:1]:
            for rate in rates:
                for policy in study.policies:
                    spec = study.spec(workload, kv, policy, seed)
                    chains.append(Chain("run", replace(spec, rate_rps=rate)))
    return chains
