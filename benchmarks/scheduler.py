"""Time of planning and committing a step with 256 contexts, without a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from caesura.runtime.clock import VirtualClock
from caesura.runtime.engine import Engine
from caesura.runtime.executors.sim import SimExecutor
from caesura.runtime.sim import generation
from caesura.scheduler.context import Call
from caesura.scheduler.policies import make_policy
from caesura.scheduler.profile import GPT_J_6B_A100
from caesura.scheduler.scheduler import SchedulerConfig

from benchmarks.common import Bench

CONTEXTS = 256
PROMPT = 400


def _engine(policy: str, pages: int) -> Engine:
    clock = VirtualClock()
    executor = SimExecutor(
        GPT_J_6B_A100, clock, num_device_pages=pages, num_host_pages=2 * pages, check_kv=False, vocab_size=50
    )
    config = SchedulerConfig(max_step_tokens=2048, max_running=CONTEXTS)
    return Engine(executor, make_policy(policy), GPT_J_6B_A100, clock, config)


def _timed(call: Callable[..., Any], samples: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        begun = time.perf_counter()
        result = call(*arguments)
        samples.append(time.perf_counter() - begun)
        return result

    return timed


def _steps(engine: Engine, count: int) -> tuple[list[float], list[float]]:
    plans: list[float] = []
    commits: list[float] = []
    scheduler = engine.scheduler
    plan, commit = scheduler.plan, scheduler.commit
    scheduler.plan, scheduler.commit = _timed(plan, plans), _timed(commit, commits)  # type: ignore[method-assign]
    for _ in range(count):
        engine.step()
    scheduler.plan, scheduler.commit = plan, commit  # type: ignore[method-assign]
    return plans, commits


def _decoding(bench: Bench, steps: int) -> None:
    engine = _engine("min_waste", CONTEXTS * 40)
    for number in range(CONTEXTS):
        context = engine.open()
        engine.append(context, [number % 50] * PROMPT)
        engine.generate(context, generation(engine, context, 400, lambda _: None))
    for _ in range(60):
        engine.step()
    plans, commits = _steps(engine, steps)
    bench.record("plan, 256 decoding", plans, unit="s", baseline="plan, 256 decoding")
    bench.record("commit, 256 decoding", commits, unit="s", baseline="plan, 256 decoding")


def _pausing(bench: Bench, policy: str, steps: int) -> None:
    """Half of the contexts wait for tools, and the pool is short by a third."""
    engine = _engine(policy, CONTEXTS * PROMPT // 16 * 2 // 3)
    for number in range(CONTEXTS):
        context = engine.open()
        engine.append(context, [number % 50] * PROMPT)
        engine.prefill(context, lambda _: None)
    while engine.has_work:
        engine.step()
    for number, context in enumerate(list(engine.scheduler.contexts)):
        if number % 2:
            engine.pause(context, [Call("search", 60.0)])
        else:
            engine.append(context, [1])
            engine.generate(context, generation(engine, context, 400, lambda _: None))
    plans, _ = _steps(engine, steps)
    bench.record(f"plan, 128 paused, {policy}", plans, unit="s", baseline="plan, 256 decoding")


def run(bench: Bench, *, quick: bool) -> None:
    """256 contexts: all decoding; and half of them paused on too little memory, per policy."""
    steps = 30 if quick else 200
    bench.configure(contexts=CONTEXTS, prompt_tokens=PROMPT, steps=steps)
    _decoding(bench, steps)
    for policy in ("lru", "infercept", "min_waste"):
        _pausing(bench, policy, steps)
