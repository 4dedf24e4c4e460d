"""What the engine counts for operators, against a world in which every second is known."""

from __future__ import annotations

from typing import Any

import pytest
from caesura.runtime.clock import VirtualClock
from caesura.runtime.engine import Engine
from caesura.runtime.executors.sim import SimExecutor
from caesura.runtime.sim import generation
from caesura.runtime.telemetry import MAX_PAUSED_TOOLS, MAX_TOOLS, OTHER, SEVERAL, Distribution, Telemetry
from caesura.scheduler.context import Call
from caesura.scheduler.policies import make_policy
from caesura.scheduler.profile import GPT_J_6B_A100
from caesura.scheduler.scheduler import SchedulerConfig
from caesura.scheduler.types import ContextId, MoveId, MoveKind, StepPlan, StepResult


class Steps:
    """When every step ended, and how many tokens it sampled."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.starts: list[float] = []

    def on_step(self, engine: Engine, plan: StepPlan, result: StepResult) -> None:
        if plan.slices:
            self.starts.append(plan.now)
            self.ends.append(plan.now + result.duration_s)


def make(
    policy: str = "min_waste",
    pages: int = 64,
    host: int = 0,
    running: int = 8,
    executor: type[SimExecutor] = SimExecutor,
) -> tuple[Engine, Telemetry, Steps]:
    clock = VirtualClock()
    world = executor(GPT_J_6B_A100, clock, num_device_pages=pages, num_host_pages=host, slow=1000)
    engine = Engine(world, make_policy(policy), GPT_J_6B_A100, clock, SchedulerConfig(max_running=running))
    steps = Steps()
    telemetry = Telemetry(engine)
    engine.observers.append(steps)
    return engine, telemetry, steps


def begin(engine: Engine, tokens: list[int], new: int) -> ContextId:
    context = engine.open()
    engine.append(context, tokens)
    engine.generate(context, generation(engine, context, new, lambda _: None))
    return context


def work(engine: Engine) -> None:
    for _ in range(10_000):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("the engine does not come to rest")


def count(snapshot: dict[str, Any]) -> int:
    return int(sum(snapshot["counts"]))


def test_a_request_that_is_preempted_is_one_request() -> None:
    engine, telemetry, _ = make(pages=16)
    for number in range(2):
        begin(engine, [(token + number) % 50 for token in range(100)], 100)
    work(engine)
    account = telemetry.account(engine)
    assert engine.scheduler.meter.snapshot()["preemptions"] > 0
    assert (account["requests"], account["prompt_tokens"], account["generated_tokens"]) == (2, 200, 200)
    assert count(account["first_token_s"]) == count(account["request_s"]) == 2


def test_times_and_tokens_of_two_requests_one_of_which_waits() -> None:
    engine, telemetry, steps = make(running=1)
    prompt = [token % 50 for token in range(100)]
    begin(engine, prompt, 5)
    begin(engine, prompt, 3)
    work(engine)
    account = telemetry.account(engine)
    assert len(steps.ends) == 8
    assert account["requests"] == 2 and account["prompt_tokens"] == 200 and account["generated_tokens"] == 8
    assert account["cached_tokens"] == 96, "the second found the first one's whole pages"
    assert [count(account[key]) for key in ("queue_s", "first_token_s", "request_s")] == [2, 2, 2]
    assert count(account["between_tokens_s"]) == 6
    ends = steps.ends
    assert account["queue_s"]["sum"] == steps.starts[0] + steps.starts[5]
    assert account["first_token_s"]["sum"] == ends[0] + ends[5]
    assert account["request_s"]["sum"] == ends[4] + ends[7]
    between = ends[4] - ends[0] + ends[7] - ends[5]
    assert abs(account["between_tokens_s"]["sum"] - between) < 1e-9
    assert account["prompts"]["sum"] == 200 and account["answers"]["sum"] == 8
    assert account["step_tokens"]["sum"] == engine.scheduler.meter.tokens_computed


def test_a_context_that_goes_on_is_a_new_request_that_finds_itself_cached() -> None:
    engine, telemetry, _ = make()
    context = begin(engine, [1] * 40, 4)
    work(engine)
    engine.append(context, [2] * 10)
    engine.generate(context, generation(engine, context, 2, lambda _: None))
    work(engine)
    account = telemetry.account(engine)
    assert account["requests"] == 2 and account["prompt_tokens"] == 40 + 54
    assert account["cached_tokens"] == 43, "all but the last sampled token was computed"


@pytest.mark.parametrize("broken", [False, True])
def test_what_a_load_brings_is_cached_when_it_is_there(broken: bool) -> None:
    class Lossy(SimExecutor):
        """Copies come back from the host, unless it is broken."""

        def acknowledged(self, *, wait_s: float = 0.0) -> list[MoveId]:
            coming = {move.id for _, move in self._flying if move.kind is MoveKind.IN}
            done = super().acknowledged(wait_s=wait_s)
            self._failed.update(coming.intersection(done) if broken else ())
            return done

    engine, telemetry, _ = make("swap", host=64, executor=Lossy)
    context = begin(engine, list(range(48)), 1)
    work(engine)
    engine.pause(context, [Call("t")])
    work(engine)
    assert not engine.ledger.held_tokens(context)
    engine.resume(context)
    engine.generate(context, generation(engine, context, 1, lambda _: None))
    work(engine)
    assert telemetry.account(engine)["cached_tokens"] == (0 if broken else 48)


def test_tools_are_timed_from_pause_to_resume_and_bounded_in_number() -> None:
    engine, telemetry, _ = make()
    clock: Any = engine.clock
    context = begin(engine, [1] * 20, 2)
    work(engine)
    engine.pause(context, [Call("search"), Call("shell")])
    clock.advance(2.5)
    engine.resume(context)
    engine.resume(context)
    tools = telemetry.account(engine)["tools"]
    assert {name: times["sum"] for name, times in tools.items()} == {"search": 2.5, "shell": 2.5}
    assert [count(times) for times in tools.values()] == [1, 1]
    for number in range(MAX_TOOLS + 20):
        engine.pause(context, [Call(f"tool {number}")])
        engine.resume(context)
    tools = telemetry.account(engine)["tools"]
    assert len(tools) == MAX_TOOLS + 1 and count(tools[OTHER]) == 22


def test_paused_contexts_by_what_became_of_them() -> None:
    def paused(policy: str, host: int = 0) -> dict[str, dict[str, int]]:
        engine, telemetry, _ = make(policy, host=host)
        contexts = [begin(engine, [token] * 40, 2) for token in (1, 2, 3)]
        work(engine)
        begin(engine, [4] * 20, 20)  # steps that compute do not wait for copies
        engine.pause(contexts[0], [Call("search")])
        engine.pause(contexts[1], [Call("search"), Call("shell")])
        seen = [telemetry.account(engine)["paused"]]
        for _ in range(200):
            if engine.has_work:
                engine.step()
                seen.append(telemetry.account(engine)["paused"])
        assert sum(sum(by_tool.values()) for by_tool in seen[-1].values()) == 2, "the third is idle, and no tool's"
        if policy == "swap":
            assert any("swapping" in modes for modes in seen)
        found: dict[str, dict[str, int]] = seen[-1]
        return found

    assert paused("preserve") == {"preserved": {"search": 1, SEVERAL: 1}}
    assert paused("discard") == {"discarded": {"search": 1, SEVERAL: 1}}
    assert paused("swap", host=64) == {"swapped": {"search": 1, SEVERAL: 1}}


def test_nothing_grows_with_contexts_that_are_gone_or_tools_that_are_made_up() -> None:
    engine, telemetry, _ = make(pages=256)
    for number in range(300):
        context = begin(engine, [number % 50, 1, 2], 50)
        engine.step()
        engine.close(context)
    assert len(telemetry._requests) <= 64 + 1
    held = []
    for number in range(MAX_PAUSED_TOOLS + 10):
        held.append(engine.open())
        engine.pause(held[-1], [Call(f"tool {number}")])
    by_tool = telemetry.account(engine)["paused"]["preserved"]
    assert len(by_tool) == MAX_PAUSED_TOOLS + 1 and by_tool[OTHER] == 10


def test_a_distribution_counts_each_value_once_in_the_first_bucket_that_holds_it() -> None:
    found = Distribution((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        found.add(value)
    assert found.snapshot() == {"bounds": [1.0, 2.0], "counts": [2, 2, 1], "sum": 7.5}
