"""Planning a step while the one before it runs: the same tokens, and nothing lost or leaked by hearing of it late."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from caesura.runtime.executors.sim import SimExecutor, expected_token
from caesura.runtime.generation import TokenChunk
from caesura.runtime.sim import generation
from caesura.runtime.telemetry import Telemetry
from caesura.scheduler.context import Call
from caesura.scheduler.policies import POLICIES
from caesura.scheduler.types import TOKEN_TO_COME, ContextId, Phase

from tests.sim.agents import VOCAB, World, populate
from tests.sim.late import LateExecutor
from tests.sim.test_engine_promises import Recorder, replay


def late(world: World, seed: int = 0) -> LateExecutor:
    return LateExecutor(world._simulated(), seed)


class LateWorld(World):
    """A world whose engine plans a step while the one before it runs; tokens are checked as in every simulated one."""

    def expect(self, context: ContextId | None, before: list[int], got: list[int]) -> None:
        tokens = list(before)
        for token in got:
            if token != expected_token(tokens, VOCAB):
                self.wrong.append(f"context {context}: token {token} after {len(tokens)} tokens is wrong")
            tokens.append(token)


def make_world(policy: str = "min_waste", seed: int = 0, **options: Any) -> LateWorld:
    return LateWorld(policy, seed=seed, make_executor=partial(late, seed=seed), overlap=True, **options)


def late_executor(world: World) -> LateExecutor:
    executor = world.engine.executor
    assert isinstance(executor, LateExecutor)
    return executor


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_same_tokens_as_one_step_at_a_time(policy: str) -> None:
    for seed in range(2):
        options: dict[str, Any] = {"slow": 30.0, "disk_pages": (0, 30)[seed], "check_every": 9}
        plain = World(policy, seed=seed, **options)
        ahead = make_world(policy, seed=seed, **options)
        for world in (plain, ahead):
            populate(world, 15)
            world.settle()
        assert ahead.transcripts == plain.transcripts
        executor = late_executor(ahead)
        assert executor.most_under_way == 2
        assert executor.placeholders > 50


@pytest.mark.parametrize("seed", range(4))
def test_aborts_faults_and_lost_clients_leave_nothing_behind(seed: int) -> None:
    world = make_world(("min_waste", "swap", "infercept", "discard")[seed], seed=seed, slow=50.0, disk_pages=20)
    populate(world, 40, faults=0.3)
    world.settle()
    assert world.lost
    assert world.finished


@pytest.mark.parametrize("policy", ["discard", "swap", "min_waste"])
def test_a_recorded_run_replays_to_identical_plans(policy: str) -> None:
    world = make_world(policy, seed=5, slow=20.0, check_every=0)
    recorder = Recorder(world.engine.scheduler)
    world.engine.scheduler = recorder  # type: ignore[assignment]
    populate(world, 12, faults=0.1)
    world.sim.run()
    assert replay(world, recorder)["settle"] > 50


def begin(world: World, prompt: list[int], count: int) -> tuple[ContextId, list[TokenChunk]]:
    engine, chunks = world.engine, []
    context = engine.open()
    engine.append(context, prompt)
    engine.generate(context, generation(engine, context, count, chunks.append))
    return context, chunks


def test_a_token_counts_one_step_late_and_the_next_step_runs_on_it_already() -> None:
    world = make_world()
    context, chunks = begin(world, [1, 2, 3], 4)
    state = world.engine.scheduler.contexts[context]
    world.engine.step()
    assert state.tokens == [1, 2, 3, TOKEN_TO_COME]
    assert not chunks
    world.engine.step()
    first = expected_token([1, 2, 3], VOCAB)
    assert state.tokens == [1, 2, 3, first, TOKEN_TO_COME]
    assert [chunk.token_ids for chunk in chunks] == [(first,)]
    world.sim.run()
    assert state.phase is Phase.PAUSED
    assert len(state.tokens) == 7
    assert chunks[-1].finish is not None
    steps = world.sim.steps
    world.engine.close(context)
    world.settle()
    assert steps <= 4, "a row was computed after the last token"


def test_an_abort_takes_back_the_token_to_come() -> None:
    world = make_world()
    context, chunks = begin(world, [1, 2, 3], 9)
    world.engine.step()
    world.engine.step()
    world.engine.stop(context)
    kept = [1, 2, 3, expected_token([1, 2, 3], VOCAB)]
    assert world.engine.tokens(context) == kept
    assert chunks[-1].finish is not None
    assert chunks[-1].finish.reason == "abort"
    heard = len(chunks)
    world.engine.append(context, [7])
    again: list[TokenChunk] = []
    world.engine.generate(context, generation(world.engine, context, 2, again.append))
    world.sim.run()
    assert len(chunks) == heard, "a chunk came after the abort"
    got = [token for chunk in again for token in chunk.token_ids]
    world.expect(context, [*kept, 7], got)
    assert len(got) == 2
    world.engine.close(context)
    world.settle()


def test_what_ends_while_the_next_step_is_under_way_is_counted_once() -> None:
    world = make_world()
    telemetry = Telemetry(world.engine)
    last = expected_token([1, 2, 3], VOCAB)
    context, chunks = world.engine.open(), []
    world.engine.append(context, [1, 2, 3])
    asked = generation(world.engine, context, 9, chunks.append)
    world.engine.generate(context, replace(asked, params=replace(asked.params, stop_token_ids=(last,))))
    world.sim.run()
    assert chunks[-1].finish.reason == "stop"
    account = telemetry.account(world.engine)
    assert account["requests"] == sum(account["first_token_s"]["counts"]) == 1
    world.engine.close(context)
    world.settle()


def test_a_context_closed_under_way_is_forgotten() -> None:
    world = make_world(policy="swap")
    for delay in range(4):
        context, _ = begin(world, [delay] * 9, 6)
        for _ in range(delay + 1):
            world.engine.step()
        world.engine.close(context)
    world.settle()


def test_holding_the_engine_takes_in_what_is_under_way() -> None:
    world = make_world()
    context, chunks = begin(world, [4, 5], 5)
    world.engine.step()
    world.engine.hold(retract=True)
    assert not world.engine.has_work
    assert chunks, "the token that was under way"
    assert TOKEN_TO_COME not in world.engine.tokens(context)
    world.engine.go_on()
    world.sim.run()
    got = [token for chunk in chunks for token in chunk.token_ids]
    world.expect(context, [4, 5], got)
    assert len(got) == 5
    world.engine.close(context)
    world.settle()


def test_who_needs_history_is_waited_for() -> None:
    """A grammar or a penalty depends on the token before, which only the host knows: then nothing overlaps."""
    world = make_world()
    context, _ = begin(world, [1, 2], 6)
    record = world.engine._records[context]
    assert record.generation is not None
    params = record.generation.sampler.params
    object.__setattr__(params, "frequency_penalty", 0.5)
    world.sim.run()
    executor = late_executor(world)
    assert executor.placeholders == 0
    assert executor.most_under_way == 1
    world.engine.close(context)
    world.settle()


def test_scores_and_prefills_are_answered_when_they_are_computed() -> None:
    world = make_world(max_step_tokens=5)
    scored: list[Any] = []
    done: list[Any] = []
    first, second = world.engine.open(), world.engine.open()
    world.engine.append(first, [3] * 17)
    world.engine.score(first, 2, scored.append)
    world.engine.append(second, [8] * 13)
    world.engine.prefill(second, done.append)
    begin(world, [9] * 4, 3)
    world.sim.run()
    assert [len(found) for found in scored] == [15]
    assert done == [13]
    world.engine.pause(second, [Call("search")])
    for context in list(world.engine.scheduler.contexts):
        world.engine.close(context)
    world.settle()


def test_a_step_that_fails_ends_its_contexts_and_those_of_the_next() -> None:
    class Failing(LateExecutor):
        def _carry_out(self, number: int, slices: Any, copies: Any) -> None:
            if number == 2:
                self._outputs[number] = None  # type: ignore[assignment]
                raise RuntimeError("out of order")
            super()._carry_out(number, slices, copies)

        def _some(self) -> None: ...

    world = LateWorld("min_waste", make_executor=lambda world: Failing(world._simulated()), overlap=True)
    _, chunks = begin(world, [1, 2, 3], 9)
    with pytest.raises(RuntimeError):
        world.sim.run()
    assert chunks[-1].finish is not None
    assert "out of order" in str(chunks[-1].finish.error)
    world.settle()
    assert isinstance(late_executor(world).inner, SimExecutor)
