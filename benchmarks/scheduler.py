"""Time of planning a step, of committing it, and of deciding about paused contexts, without a model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from caesura.runtime.clock import VirtualClock
from caesura.runtime.engine import Engine
from caesura.runtime.executors.cost import CostExecutor, MachineCosts
from caesura.runtime.sim import generation
from caesura.scheduler.context import Call
from caesura.scheduler.policies import DEFAULT_POLICY, POLICIES, make_policy
from caesura.scheduler.profile import GPT_J_6B_A100 as PROFILE
from caesura.scheduler.scheduler import SchedulerConfig

from benchmarks.common import Bench

CONTEXTS = 256
PROMPT = 400
WARM_STEPS = 10
RUNNING = 32  # contexts that decode beside the paused ones
SPARE_PAGES = 4  # fewer than those will soon want


def _engine(policy: str, pages: int) -> Engine:
    clock = VirtualClock()
    costs = MachineCosts(PROFILE.step_s, PROFILE.token_s, PROFILE.swap_base_s, PROFILE.swap_token_s)
    executor = CostExecutor(costs, clock, page_size=16, num_device_pages=pages, num_host_pages=2 * pages, token_bytes=1)
    config = SchedulerConfig(max_step_tokens=2048, max_running=CONTEXTS)
    return Engine(executor, make_policy(policy), PROFILE, clock, config)


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


def _paused_engine(policy: str, paused: int) -> Engine:
    """``RUNNING`` contexts decode, ``paused`` ones wait for tools, and the pool is about full."""
    pages = -(-PROMPT // 16)
    engine = _engine(policy, (paused + RUNNING) * pages + SPARE_PAGES)
    engine.scheduler.config = SchedulerConfig(max_step_tokens=1 << 16, max_running=paused + RUNNING)
    for number in range(paused + RUNNING):
        context = engine.open()
        engine.append(context, [number % 50, number // 50, *[7] * (PROMPT - 2)])
        engine.prefill(context, lambda _: None)
    while engine.has_work:
        engine.step()
    for number, context in enumerate(list(engine.scheduler.contexts)):
        if number < paused:
            engine.pause(context, [Call("search", 1.0 + number % 60)])
        else:
            engine.append(context, [1])
            engine.generate(context, generation(engine, context, 400, lambda _: None))
    return engine


def _deciding(bench: Bench, policy: str, paused: int, steps: int, baseline: str) -> None:
    """Seconds of a step that go into the policy and into what it is shown; the executor's step beside it."""
    engine = _paused_engine(policy, paused)
    desk = engine.scheduler._memory
    spent = 0.0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            nonlocal spent
            begun = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                spent += time.perf_counter() - begun

        return timed

    for name in ("review", "_reclaim", "copy_ahead"):
        setattr(desk, name, counted(getattr(desk, name)))
    for _ in range(WARM_STEPS):  # all the pauses began at once: what is done about that is not an ordinary step
        engine.step()
    samples, lengths = [], []
    for _ in range(steps):
        spent, before = 0.0, engine.clock.now()
        engine.step()
        samples.append(spent)
        lengths.append(engine.clock.now() - before)
    bench.record(f"deciding, {paused} paused, {policy}", samples, unit="s", baseline=baseline)
    share = statistics.fmean(samples) / max(1e-9, statistics.fmean(lengths))
    bench.record(f"share of the step, {paused} paused, {policy}", [100 * share], unit="%")


def run(bench: Bench, *, quick: bool) -> None:
    """256 contexts decoding; 256 paused ones under every policy; and how deciding grows with them."""
    steps = 30 if quick else 200
    bench.configure(contexts=CONTEXTS, prompt_tokens=PROMPT, running=RUNNING, steps=steps)
    _decoding(bench, steps)
    for policy in POLICIES:
        _deciding(bench, policy, CONTEXTS, steps, "plan, 256 decoding")
    for policy in ("infercept", DEFAULT_POLICY):
        for paused in (1_000,) if quick else (1_000, 10_000):
            _deciding(bench, policy, paused, steps, f"deciding, {CONTEXTS} paused, {policy}")
