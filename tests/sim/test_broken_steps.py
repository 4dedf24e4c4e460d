"""What could not be computed is nobody's: not the prefix cache's, not that of those who waited for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from caesura.runtime.clock import VirtualClock
from caesura.runtime.engine import Engine
from caesura.runtime.errors import ContextClosed, GrammarError
from caesura.runtime.executors.base import ExecOutput, SliceInput, SliceOutput
from caesura.runtime.executors.sim import SimExecutor, expected_token
from caesura.runtime.generation import TokenChunk
from caesura.runtime.sim import generation
from caesura.scheduler.policies import make_policy
from caesura.scheduler.profile import GPT_J_6B_A100
from caesura.scheduler.types import ContextId, Move

from tests.sim.late import LateExecutor

PAGE = 16
PROMPT = [(i * 7) % 50 for i in range(100)]


class Breaking(SimExecutor):
    """One step goes wrong as on a device: its rows are erased and a failure reported, or it raises."""

    wrong: str | None = "not finite"
    only: ContextId | None = None  # the one that goes wrong, when others of its step do not

    def execute(self, slices: Sequence[SliceInput], copies: Sequence[Move]) -> ExecOutput:
        if not slices or self.wrong is None:
            return super().execute(slices, copies)
        wrong, self.wrong = self.wrong, None
        if wrong == "raises":
            raise RuntimeError("the device is gone")
        output = super().execute(slices, copies)
        failed = [piece for piece in slices if self.only in (None, piece.context_id)]
        for piece in failed:
            for position in range(piece.start, piece.start + len(piece.token_ids)):
                self._device[piece.pages[position // PAGE], position % PAGE] = 0
        rest = tuple(out for out in output.outputs if self.only not in (None, out.context_id))
        return ExecOutput(
            output.duration_s, (*rest, *(SliceOutput(piece.context_id, None, failure=wrong) for piece in failed))
        )


def engine(*, late: bool, policy_name: str = "min_waste", host_pages: int = 0) -> tuple[Engine, Breaking]:
    clock = VirtualClock()
    inner = Breaking(GPT_J_6B_A100, clock, num_device_pages=64, num_host_pages=host_pages, page_size=PAGE)
    policy = make_policy(policy_name)
    if not late:
        return Engine(inner, policy, GPT_J_6B_A100, clock), inner
    executor = LateExecutor(inner)
    return Engine(executor, policy, GPT_J_6B_A100, clock, overlapping=executor), inner


def ask(running: Engine, chunks: list[TokenChunk], prompt: Sequence[int] = PROMPT) -> ContextId:
    context = running.open()
    running.append(context, prompt)
    running.generate(context, generation(running, context, 1, chunks.append))
    return context


def run(running: Engine) -> None:
    """Steps until nothing is left to do; a step that fails is noted and passed over, as a service does."""
    for _ in range(50):
        if not running.has_work:
            return
        try:
            running.step()
        except RuntimeError as error:
            assert str(error) == "the device is gone"
    raise AssertionError("the engine does not come to an end")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("wrong", ["not finite", "raises"])
def test_a_step_that_failed_is_not_found_again(wrong: str, late: bool) -> None:
    running, executor = engine(late=late)
    executor.wrong = wrong
    for expected in ("abort", "length"):
        chunks: list[TokenChunk] = []
        context = ask(running, chunks)
        run(running)
        finish = chunks[-1].finish
        assert finish is not None
        assert (finish.reason, finish.cached_tokens) == (expected, 0)
        running.close(context)
        running.check()
    assert [token for chunk in chunks for token in chunk.token_ids] == [expected_token(PROMPT, 64)]


@pytest.mark.parametrize("policy", ["min_waste", "lru", "lru_host", "continuum", "swap", "admission_only"])
@pytest.mark.parametrize("wrong", ["not finite", "raises"])
@pytest.mark.parametrize("how", ["generate", "prefill", "close", "stop"])
def test_what_failed_under_way_is_nobodys(how: str, wrong: str, policy: str) -> None:
    """Whatever becomes of the context meanwhile, and wherever its policy has put the KV: with or without a copy."""
    running, executor = engine(late=True, policy_name=policy, host_pages=64)
    executor.wrong = wrong
    context = running.open()
    running.append(context, PROMPT)
    if how == "prefill":
        running.prefill(context, lambda _: None)
    else:
        running.generate(context, generation(running, context, 1, lambda _: None))
    if how in ("close", "stop"):
        running.step()
        (running.close if how == "close" else running.stop)(context)
    run(running)
    running.check()
    if how != "stop":
        context = running.open()
        running.append(context, PROMPT)
    chunks: list[TokenChunk] = []
    running.generate(context, generation(running, context, 1, chunks.append))
    run(running)
    running.check()
    assert [token for chunk in chunks for token in chunk.token_ids] == [expected_token(PROMPT, 64)]


@pytest.mark.parametrize("late", [False, True])
def test_who_waited_for_a_prefix_that_failed_computes_it_or_is_told(late: bool) -> None:
    running, _ = engine(late=late)
    asked: list[list[TokenChunk]] = [[] for _ in range(4)]
    for chunks in asked:
        ask(running, chunks)
    run(running)
    running.check()
    finishes = [chunks[-1].finish for chunks in asked]
    reasons = [finish.reason for finish in finishes if finish is not None]
    assert reasons == ["abort", *["abort" if late else "length"] * 3]  # the next step was already built on it
    for chunks, reason in zip(asked, reasons, strict=True):
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        assert tokens == ([] if reason == "abort" else [expected_token(PROMPT, 64)])


@pytest.mark.parametrize("late", [False, True])
def test_who_shares_within_the_step_that_fails_is_told_and_the_others_go_on(late: bool) -> None:
    """A score of the same prompt is computed partly in the same step, and has the pages of the one that fails."""
    running, executor = engine(late=late)
    long = PROMPT * 3  # both together are more than a step computes
    chunks: list[TokenChunk] = []
    executor.only = ask(running, chunks, long)
    told: list[Any] = []
    scored = running.open()
    running.append(scored, long)
    running.score(scored, 1, told.append)
    others: list[TokenChunk] = []
    other = running.open()
    running.append(other, PROMPT[::-1])
    running.generate(other, generation(running, other, 5, others.append))
    run(running)
    running.check()
    assert chunks[-1].finish is not None and chunks[-1].finish.reason == "abort"
    assert len(told) == 1
    assert others[-1].finish is not None and others[-1].finish.reason == "length"
    again: list[TokenChunk] = []
    ask(running, again, long)
    run(running)
    assert [token for chunk in again for token in chunk.token_ids] == [expected_token(long, 64)]


def test_a_fork_of_who_was_stopped_within_the_step_that_fails_has_none_of_it() -> None:
    running, executor = engine(late=True)
    executor.wrong = None
    context = running.open()
    running.append(context, PROMPT)
    running.generate(context, generation(running, context, 20, lambda _: None))
    for _ in range(5):
        running.step()
    executor.wrong = "not finite"  # of the step under way: a row in a page that is not full
    running.stop(context)
    child = running.fork(context)
    running.append(child, [7])
    chunks: list[TokenChunk] = []
    running.generate(child, generation(running, child, 3, chunks.append))
    tokens = running.tokens(child)
    run(running)
    running.check()
    for token in (token for chunk in chunks for token in chunk.token_ids):
        assert token == expected_token(tokens, 64)
        tokens.append(token)
    assert len([chunk for chunk in chunks if chunk.token_ids]) == 3


class Outgrown:
    """A grammar that was fine until a token was to be read."""

    stopped = False

    def accept(self, token_id: int) -> None:
        raise GrammarError("too many items in a row")


@pytest.mark.parametrize("late", [False, True])
def test_a_grammar_that_fails_on_a_token_fails_its_own_generation(late: bool) -> None:
    running, executor = engine(late=late)
    executor.wrong = None
    asked: list[list[TokenChunk]] = [[], [], []]
    for number, chunks in enumerate(asked):
        context = running.open()
        running.append(context, [number, *PROMPT])
        work = generation(running, context, 20, chunks.append)
        if number == 1:
            work.sampler.matcher = Outgrown()  # type: ignore[assignment]
        running.generate(context, work)
    run(running)
    running.check()
    reasons = [chunks[-1].finish.reason for chunks in asked]  # type: ignore[union-attr]
    assert reasons == ["length", "abort", "length"]
    assert asked[1][-1].finish.error == "the grammar failed: too many items in a row"  # type: ignore[union-attr]
    for number in (0, 2):
        tokens = [number, *PROMPT]
        for token in (token for chunk in asked[number] for token in chunk.token_ids):
            assert token == expected_token(tokens, 64)
            tokens.append(token)
        assert len(tokens) == 121


@pytest.mark.parametrize("late", [False, True])
def test_a_prefill_and_scores_that_failed_say_so(late: bool) -> None:
    running, executor = engine(late=late)
    told: list[Any] = []
    first = running.open()
    running.append(first, PROMPT)
    running.prefill(first, told.append)
    run(running)
    assert isinstance(told[0], ContextClosed)
    assert running.ledger.computed(first) == 0
    executor.wrong = "not finite"
    second = running.open()
    running.append(second, PROMPT[::-1])
    running.score(second, 1, told.append)
    run(running)
    assert isinstance(told[1], ContextClosed)
    running.prefill(first, told.append)
    run(running)
    assert told[2] == len(PROMPT)
    running.check()
