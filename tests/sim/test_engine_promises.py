"""What the engine promises whatever happens: replayable plans, no leak after an abort in any state, no deadlock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from caesura.runtime.errors import ContextClosed, ContextTooLong, DeadlineExceeded, InvalidRequest
from caesura.runtime.kv.ledger import KVLedger
from caesura.runtime.sim import generation
from caesura.scheduler.context import Call
from caesura.scheduler.policies import POLICIES, make_policy
from caesura.scheduler.scheduler import Scheduler, SchedulerConfig
from caesura.scheduler.types import ContextId, Phase, StepPlan

from tests.sim.agents import PROFILE, Agent, World, populate


class Watcher:
    """Shows every step's plan to a function."""

    def __init__(self, look: Callable[[StepPlan], None]) -> None:
        self._look = look

    def on_step(self, engine: Any, plan: StepPlan, result: Any) -> None:
        self._look(plan)


class Recorder:
    """Stands before a scheduler and writes down every call with its arguments and plans."""

    CALLS = (
        *("open", "append", "submit", "pause", "report", "resume", "stop", "fork", "truncate", "close"),
        *("plan", "commit", "settle"),
    )

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.tape: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []

    def __getattr__(self, name: str) -> Any:
        target = getattr(self._scheduler, name)
        if name not in self.CALLS:
            return target

        def call(*args: Any, **kwargs: Any) -> Any:
            kept = tuple(list(arg) if isinstance(arg, list) else arg for arg in args)
            result = target(*args, **kwargs)
            self.tape.append((name, kept, kwargs, result if name == "plan" else None))
            return result

        return call


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_recorded_run_replays_to_identical_plans(policy: str) -> None:
    world = World(policy, seed=5, slow=20.0, check_every=0)
    recorder = Recorder(world.engine.scheduler)
    world.engine.scheduler = recorder  # type: ignore[assignment]
    populate(world, 12, faults=0.1)
    world.sim.run()
    assert replay(world, recorder)["plan"] > 50


def replay(world: World, recorder: Recorder) -> Counter[str]:
    """Play the tape to a new scheduler, which has to plan the same; how often each call stands on it."""
    policy = make_policy(world.policy)
    ledger = KVLedger(world.page_size, world.device_pages, world.host_pages if policy.uses_host else 0)
    again = Scheduler(ledger, policy, PROFILE, SchedulerConfig(world.max_step_tokens, world.max_running))
    calls: Counter[str] = Counter()
    for name, args, kwargs, result in recorder.tape:
        replayed = getattr(again, name)(*args, **kwargs)
        if name == "plan":
            assert replayed == result
        calls[name] += 1
    return calls


def run_until(world: World, condition: Callable[[], bool], steps: int = 5000) -> None:
    while not condition():
        assert steps, "the state was never reached"
        steps -= 1
        world.sim.run(until_s=world.clock.now() + 1e-4)
        world.clock.advance(1e-4)


STATES = ["queued", "prefilling", "decoding", "preserved", "swapping out", "swapped", "loading", "discarded"]


@pytest.mark.parametrize("state", STATES)
def test_abort_in_any_state_gives_every_page_back(state: str) -> None:
    policy = {"discarded": "discard", "preserved": "preserve"}.get(state, "swap")
    world = World(policy, device_pages=64, host_pages=64, slow=3000.0, max_running=1 if state == "queued" else 8)
    engine = world.engine
    first = engine.open()
    engine.append(first, list(range(40)) * 3)
    if state == "queued":
        other = engine.open()
        engine.append(other, [1] * 40)
        engine.generate(other, generation(engine, other, 30, lambda _: None))
    engine.generate(first, generation(engine, first, 3, lambda _: None))
    context = engine.scheduler.contexts[first]
    computed = lambda: engine.ledger.computed(first)  # noqa: E731

    if state == "prefilling":
        run_until(world, lambda: 0 < computed() < 100)
    elif state == "decoding":
        run_until(world, lambda: context.num_tokens > 120 and context.phase is Phase.RUNNING)
    elif state == "queued":
        engine.step()
        assert engine.scheduler.contexts[other].phase is Phase.QUEUED
    else:
        run_until(world, lambda: context.phase is Phase.PAUSED)
        engine.pause(first, [Call("search")])
        engine.step()
        if state == "swapping out":
            assert engine.ledger.copying_pages
        if state in ("swapped", "loading"):
            run_until(world, lambda: not engine.ledger.copying_pages)
            assert computed() == 0
        if state == "loading":
            engine.append(first, [1])
            engine.generate(first, generation(engine, first, 3, lambda _: None))
            engine.step()
            assert engine.ledger.is_loading(first)
    engine.check()
    for open_context in list(engine.scheduler.contexts):
        engine.close(open_context)
    engine.check()
    world.settle()


def test_two_hundred_hanging_agents_do_not_stop_the_others() -> None:
    world = World("min_waste", device_pages=64, host_pages=8, check_every=11)
    hanging = 0
    for number in range(200):
        context = world.engine.open()
        world.engine.append(context, [number % 50] * 9)
        world.engine.generate(context, generation(world.engine, context, 2, lambda _: None))
    world.sim.run()
    for context in list(world.engine.scheduler.contexts):
        world.engine.pause(context, [Call("never answers")])
        hanging += 1
    worker = Agent(world, "worker", 4, [1, 2, 3])
    worker.start()
    world.sim.run()
    assert hanging == 200
    assert "worker" in world.transcripts
    for context in list(world.engine.scheduler.contexts):
        world.engine.close(context)
    world.settle()


def test_what_was_copied_in_for_one_gives_way_to_another_ahead_of_it() -> None:
    world = World("swap", page_size=4, device_pages=20, host_pages=40)
    engine = world.engine
    done: list[int] = []
    contexts = []
    for number in range(2):  # each fills more than half of the pool
        context = engine.open()
        engine.append(context, [number] * 44)
        engine.prefill(context, lambda _: None)
        world.sim.run()
        engine.pause(context, [Call("search")])
        world.sim.run()
        assert engine.ledger.computed(context) == 0
        contexts.append(context)
        world.clock.advance(1.0)

    def go_on(context: ContextId) -> None:
        engine.append(context, [5, 6])
        engine.prefill(context, done.append)

    older, younger = contexts
    go_on(younger)
    engine.step()
    assert engine.ledger.computed(younger) == 44  # copied in; it would be admitted in the next step
    go_on(older)  # comes first now, and does not fit beside the other
    world.sim.run()
    assert done == [46, 46]
    for context in contexts:
        engine.close(context)
    world.settle()


def test_a_tool_past_its_deadline_closes_the_context_and_says_so() -> None:
    world = World("min_waste")
    heard: list[Exception] = []
    context = world.engine.open(on_closed=heard.append)
    world.engine.append(context, [1, 2, 3])
    world.engine.pause(context, [Call("person")], deadline_at=4.0)
    world.sim.run()
    assert world.clock.now() == 4.0
    assert [type(error) for error in heard] == [DeadlineExceeded]
    with pytest.raises(ContextClosed):
        world.engine.append(context, [1])
    world.settle()


def test_who_goes_on_after_a_tool_may_be_given_more_time() -> None:
    for deadline_at, lives_at in ((None, 4.0), (9.0, 9.0)):
        world = World("min_waste")
        heard: list[Exception] = []
        context = world.engine.open(deadline_at=4.0, on_closed=heard.append)
        world.engine.append(context, [1, 2, 3])
        world.engine.pause(context, [Call("person")])
        world.sim.at(3.0, partial(world.engine.resume, context, deadline_at))
        world.sim.run()
        assert world.clock.now() == lives_at
        assert [type(error) for error in heard] == [DeadlineExceeded]
        world.settle()


def test_a_context_that_waits_may_be_given_another_deadline() -> None:
    for lives_until, ends_at in ((None, 4.0), (3.0, 3.0), (20.0, 9.0)):
        world = World("min_waste")
        heard: list[Exception] = []
        context = world.engine.open(deadline_at=4.0, on_closed=heard.append)
        world.engine.append(context, [1, 2, 3])
        world.engine.pause(context, [Call("person")], deadline_at=9.0, lives_until=lives_until)
        world.sim.run()
        assert world.clock.now() == ends_at
        assert [type(error) for error in heard] == [DeadlineExceeded]
        world.settle()


def test_resume_and_close_are_idempotent() -> None:
    world = World("preserve")
    context = world.engine.open()
    world.engine.append(context, [1])
    world.engine.pause(context, [Call("x")])
    world.engine.resume(context)
    world.engine.resume(context)
    world.engine.close(context)
    world.engine.close(context)
    world.settle()


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    world = World("min_waste", page_size=4, device_pages=10)
    context = world.engine.open()
    with pytest.raises(ContextTooLong, match=r"needs 37 tokens; the limit is 36"):
        world.engine.append(context, [1] * 37)
    world.engine.append(context, [1] * 30)
    with pytest.raises(ContextTooLong, match="needs 40"):
        world.engine.generate(context, generation(world.engine, context, 10, lambda _: None))
    with pytest.raises(InvalidRequest, match="num_tokens is 31"):
        world.engine.truncate(context, 31)
    world.engine.close(context)
    world.settle()


def test_one_request_at_a_time_per_context() -> None:
    world = World("min_waste")
    context = world.engine.open()
    with pytest.raises(InvalidRequest, match="empty"):
        world.engine.generate(context, generation(world.engine, context, 1, lambda _: None))
    world.engine.append(context, [1, 2])
    world.engine.generate(context, generation(world.engine, context, 5, lambda _: None))
    with pytest.raises(InvalidRequest, match="busy"):
        world.engine.append(context, [3])
    world.engine.close(context)
    world.settle()


def test_scores_are_complete_across_chunks_and_preemption() -> None:
    world = World("min_waste", page_size=4, device_pages=16, max_step_tokens=3)
    found: list[Any] = []
    for number in range(4):
        context = world.engine.open()
        world.engine.append(context, [number] * 20)
        world.engine.score(context, 5, found.append)
    world.sim.run()
    assert [len(scores) for scores in found] == [15] * 4
    for context in list(world.engine.scheduler.contexts):
        world.engine.close(ContextId(context))
    world.settle()


def test_in_batch_sharing_leaves_one_copy_of_a_common_prompt() -> None:
    world = World("min_waste", page_size=4, device_pages=100)
    contexts = []
    for number in range(6):
        context = world.engine.open()
        world.engine.append(context, [7] * 40 + [number])
        world.engine.prefill(context, lambda _: None)
        contexts.append(context)
    world.sim.run()
    used = world.engine.ledger.num_device_pages - world.engine.ledger.free_pages
    assert used == 10 + 6  # forty shared tokens once, and a page for each own token
    for context in contexts:
        world.engine.close(context)
    world.settle()


def test_a_prompt_that_is_cached_whole_still_runs() -> None:
    world = World("min_waste", page_size=4, device_pages=100)
    rows: list[int] = []
    world.engine.observers.append(
        Watcher(lambda plan: rows.extend(piece.num_tokens for piece in plan.slices))  # what the executor is given
    )
    done: list[Any] = []
    for _ in range(3):
        context = world.engine.open()
        world.engine.append(context, [7] * 8)  # two full pages, which the first context leaves in the cache
        world.engine.prefill(context, done.append)
        world.sim.run()
        world.engine.close(context)
    assert done == [8, 8, 8]
    assert all(rows) and sum(rows) < 24
    world.settle()
