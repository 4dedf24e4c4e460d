"""``caesura demo``: one fleet of tool-calling agents under several pause policies, in a KV pool too small for all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from caesura.lang.cli.fleet import MAX_ANSWER_TOKENS, QUESTIONS, Agent, FleetRun, count_right, make_fleet
from caesura.lang.cli.output import FAILED, USAGE, CliError
from caesura.lang.cli.watch import Snapshot, take_snapshot
from caesura.runtime.config import EMBEDDED, EngineConfig
from caesura.runtime.native.library import NoNativeLibrary, native_library
from caesura.runtime.service import EngineService
from caesura.runtime.trace import TraceRecorder, write_perfetto
from caesura.scheduler.policies import POLICIES
from caesura.scheduler.profile import CostProfile

POOL_SHARE = 3  # the pool holds one third of what the fleet's contexts grow to
HOST_SHARE = 2  # the host pool holds twice the device pool
START_GAP_S = 0.03
TURN_TOKENS = 90  # a question, its calls and their results, about
REFRESH_S = 0.125
TIME_LIMIT_S = 600.0
COMPILED_WITHIN_S = 0.3  # the decoder, where it has been compiled before
UNMEASURED = CostProfile(0.002, 0.00005, 1e-9, 0.0, 0.000005, 384)  # where nothing depends on it


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of the fleet."""

    wall_s: float
    tokens_computed: int
    tokens_recomputed: int
    bytes_swapped: int
    waste_token_s: float
    answers_right: int
    answers_total: int

    def as_dict(self) -> dict[str, Any]:
        """The shape of ``--json``."""
        return {
            "wall_s": round(self.wall_s, 3),
            "tokens_computed": self.tokens_computed,
            "tokens_recomputed": self.tokens_recomputed,
            "bytes_swapped": self.bytes_swapped,
            "waste_token_s": round(self.waste_token_s, 1),
            "answers_right": self.answers_right,
            "answers_total": self.answers_total,
        }


@dataclass(slots=True)
class Report:
    """Everything the demo found. ``same_answers`` says that all policies gave the same texts."""

    model: str
    agents: int
    pool_tokens: int
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    unaided: Outcome | None = None
    same_answers: bool = True
    failures: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        unaided = self.unaided
        return {
            "model": self.model,
            "policies": {name: outcome.as_dict() for name, outcome in self.outcomes.items()},
            "without_tool": {
                "answers_right": unaided.answers_right if unaided else 0,
                "answers_total": unaided.answers_total if unaided else 0,
            },
        }


class Viewer(Protocol):
    """Whoever looks on. ``show`` is called a few times a second when ``wants_snapshots``."""

    wants_snapshots: bool

    def say(self, what: str) -> None: ...

    def begin(self, title: str, run: FleetRun) -> None: ...

    def show(self, snapshot: Snapshot) -> None: ...

    def end(self, title: str, outcome: Outcome) -> None: ...


class SilentViewer:
    """Shows nothing."""

    wants_snapshots = False

    def say(self, what: str) -> None: ...

    def begin(self, title: str, run: FleetRun) -> None: ...

    def show(self, snapshot: Snapshot) -> None: ...

    def end(self, title: str, outcome: Outcome) -> None: ...


def parse_policies(text: str) -> list[str]:
    """Names from a comma-separated list. Raises CliError for unknown and repeated ones."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in POLICIES]
    if unknown or not names:
        wrong = f"{unknown[0]!r} is no policy" if unknown else "--policies names none"
        raise CliError(f"{wrong}; there are {', '.join(POLICIES)}", "caesura demo --policies lru,min_waste", USAGE)
    return list(dict.fromkeys(names))


def run_demo(
    *, agents: int, seed: int, policies: Sequence[str], trace: Path | None, viewer: Viewer | None = None
) -> Report:
    """Run the fleet without the tool, then with it under each policy. Raises CliError, CaesuraError."""
    viewer = viewer or SilentViewer()
    fleet = make_fleet(seed, agents)
    viewer.say("loading the embedded model and measuring this machine")
    compiling = _compile_decoder()
    plain = EngineConfig(model=EMBEDDED, kv_tokens=1 << 16)
    # On a new machine the first run, which is about answers and not about time, does not wait for the compiler.
    first = replace(plain, native=False, num_threads=1, profile=UNMEASURED) if compiling.is_alive() else plain
    with _engine(first) as service:
        profile = service.call_now(lambda engine: engine.scheduler.profile)
        lengths = [len(service.tokenizer.encode(agent.system_text)) + QUESTIONS * TURN_TOKENS for agent in fleet]
        pool_tokens = _pool_tokens(lengths)
        report = Report(service.model_name, agents, pool_tokens)
        report.unaided, _ = _run(service, fleet, "without the tool", viewer, report, with_tool=False)
    if first is not plain:
        viewer.say("compiling the decoder and measuring this machine, once")
        compiling.join()
        with _engine(plain) as service:
            profile = service.call_now(lambda engine: engine.scheduler.profile)
    recordings: dict[str, TraceRecorder] = {}
    answers: list[list[list[str]]] = []
    for name in policies:
        viewer.say(f"starting the engine with policy {name}")
        with _engine(_config(name, pool_tokens, profile)) as service:
            recordings[name] = TraceRecorder()
            service.observe(recordings[name])
            report.outcomes[name], given = _run(service, fleet, name, viewer, report, with_tool=True)
            answers.append(given)
    report.same_answers = all(given == answers[0] for given in answers)
    if trace is not None:
        write_perfetto(trace, recordings)
    return report


def _compile_decoder() -> threading.Thread:
    """Have the C decoder compiled, which takes some seconds on a new machine and nothing afterwards."""

    def compile_it() -> None:
        with suppress(NoNativeLibrary):  # the engine says so when it starts
            native_library()

    thread = threading.Thread(target=compile_it, name="caesura-compile", daemon=True)
    thread.start()
    thread.join(COMPILED_WITHIN_S)
    return thread


def _config(policy: str, pool_tokens: int, profile: CostProfile) -> EngineConfig:
    host_tokens = HOST_SHARE * pool_tokens if POLICIES[policy].uses_host else 0
    return EngineConfig(
        model=EMBEDDED, policy=policy, kv_tokens=pool_tokens, host_kv_tokens=host_tokens, profile=profile
    )


def _pool_tokens(lengths: Sequence[int]) -> int:
    """One third of the fleet, but room for the longest context and half of another."""
    longest = max(lengths) + 2 * MAX_ANSWER_TOKENS
    return max(sum(lengths) // POOL_SHARE, longest * 3 // 2)


@contextmanager
def _engine(config: EngineConfig) -> Iterator[EngineService]:
    with EngineService.start(config) as service:
        yield service


def _run(
    service: EngineService, fleet: Sequence[Agent], title: str, viewer: Viewer, report: Report, *, with_tool: bool
) -> tuple[Outcome, list[list[str]]]:
    run = FleetRun(service, fleet, with_tool=with_tool)
    viewer.begin(title, run)
    begun = time.perf_counter()
    look = _look(service, run, viewer)
    try:
        run.start(lambda: look(START_GAP_S))
        while not run.done:
            look(REFRESH_S if viewer.wants_snapshots else START_GAP_S)
            if time.perf_counter() - begun > TIME_LIMIT_S:
                raise CliError(
                    f"the fleet did not finish within {TIME_LIMIT_S:g} s under {title}", "caesura doctor", FAILED
                )
    except BaseException:
        run.cancel()
        raise
    wall_s = time.perf_counter() - begun
    report.failures += [f"{title}: {line}" for line in run.failures()]
    answers = run.answers()
    outcome = _outcome(service.stats(), wall_s, fleet, answers)
    viewer.end(title, outcome)
    return outcome, answers


def _look(service: EngineService, run: FleetRun, viewer: Viewer) -> Callable[[float], None]:
    """A sleep that lets the viewer see the engine at most every REFRESH_S."""
    last = 0.0

    def look(seconds: float) -> None:
        nonlocal last
        if viewer.wants_snapshots and time.perf_counter() - last >= REFRESH_S:
            viewer.show(service.call_now(lambda engine: take_snapshot(engine, run.roster)))
            last = time.perf_counter()
        time.sleep(seconds)

    return look


def _outcome(stats: dict[str, Any], wall_s: float, fleet: Sequence[Agent], answers: Sequence[Sequence[str]]) -> Outcome:
    return Outcome(
        wall_s=wall_s,
        tokens_computed=int(stats["tokens_computed"]),
        tokens_recomputed=int(stats["tokens_recomputed"]),
        bytes_swapped=int((stats["pages_out"] + stats["pages_in"]) * stats["page_bytes"]),
        waste_token_s=float(stats["waste_token_s"]),
        answers_right=count_right(fleet, answers),
        answers_total=sum(len(agent.tasks) for agent in fleet),
    )
