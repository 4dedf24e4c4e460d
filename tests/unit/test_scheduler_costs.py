"""Waste, estimates and profiles against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from caesura.scheduler.context import Call, Context, IllegalTransition, Pause, Progress
from caesura.scheduler.estimate import (
    GONE_S,
    KEPT_TOOLS,
    MOMENTS,
    Conditional,
    Elapsed,
    Hint,
    History,
    Oracle,
    Profiled,
    Reported,
    make_estimator,
)
from caesura.scheduler.profile import GPT_J_6B_A100, CostProfile
from caesura.scheduler.types import ContextId, Phase
from caesura.scheduler.waste import (
    action_costs,
    discard_token_s,
    preserve_token_s,
    swap_blocking_token_s,
    swap_hidden_token_s,
    triangular_token_s,
)
from hypothesis import example, given
from hypothesis import strategies as st

# 10 ms a step, 1 ms a token, no attention term; copies 1 ms + 0.1 ms a token; chunks of 100
PROFILE = CostProfile(0.010, 0.001, 0.0, 0.001, 0.0001, 100)


def test_preserve_is_time_times_tokens() -> None:
    assert preserve_token_s(2.0, 300) == 600.0


def test_discard_charges_own_memory_half_and_the_others_whole() -> None:
    # 200 tokens in 2 chunks: 2 * 10 ms + 200 * 1 ms = 0.22 s; 0.22 * 200 / 2 + 0.22 * 1000
    assert discard_token_s(PROFILE, 0, 200, 1000) == pytest.approx(22.0 + 220.0)


def test_deep_tokens_cost_more_to_recompute() -> None:
    deep = CostProfile(0.0, 0.001, 1e-6, 0.0, 0.0, 100)
    # attention at mean depth 50 and 1050: 100 * (0.001 + 50e-6), 100 * (0.001 + 1050e-6)
    assert deep.recompute_s(0, 100) == pytest.approx(0.105)
    assert deep.recompute_s(1000, 100) == pytest.approx(0.205)


def test_swap_blocking_and_hidden() -> None:
    # T_swap(100) = 1 ms + 10 ms
    assert swap_blocking_token_s(PROFILE, 100, 1000) == pytest.approx(2 * 0.011 * 1000)
    assert swap_hidden_token_s(PROFILE, 100, on_host=False) == pytest.approx(2 * 0.011 * 100)
    assert swap_hidden_token_s(PROFILE, 100, on_host=True) == pytest.approx(0.011 * 100)


def test_triangular_sum_of_the_published_code() -> None:
    # c = 60, n = ceil(200 / 60) - 1 = 3, l = 20; f(S) = 0.11: 0.11 * 60 * 6 + 0.001 * 60 * 3 * 1000 + 0.001 * 20 * 1020
    assert triangular_token_s(PROFILE, 200, 1000, 60) == pytest.approx(39.6 + 180.0 + 20.4)


def test_nothing_to_lose_costs_nothing() -> None:
    costs = action_costs(PROFILE, 5.0, 64, 0, 1000)
    assert (costs.preserve_token_s, costs.swap_token_s, costs.discard_token_s) == (0.0, 0.0, 0.0)


def test_hidden_tokens_fill_one_iteration() -> None:
    # T_fwd(40) = 50 ms = 1 ms + N * 0.1 ms
    assert PROFILE.hidden_tokens(40) == 490


def test_published_profile_gives_the_published_swap_budget() -> None:
    assert GPT_J_6B_A100.hidden_tokens(384) == pytest.approx(605, abs=1)


def test_elapsed_expects_as_much_again() -> None:
    assert Elapsed().remaining_s(Pause(10.0, (Call("x"),)), 13.0) == 3.0


def test_conditional_uses_the_hint_until_it_has_seen_enough() -> None:
    estimator = Conditional(prior_s=0.5)
    pause = Pause(0.0, (Call("search", 2.0),))
    assert estimator.remaining_s(pause, 0.5) == 1.5
    assert estimator.remaining_s(pause, 3.0) == 3.0  # outlasted the hint: as long again
    assert estimator.remaining_s(Pause(0.0, (Call("unknown"),)), 0.0) == 0.5


def test_conditional_is_the_mean_of_what_lasted_longer() -> None:
    estimator = Conditional()
    for duration_s in (1.0, 1.0, 1.0, 9.0):
        estimator.observe(Pause(0.0, (Call("shell"),)), duration_s)
    pause = Pause(0.0, (Call("shell", 100.0),))
    assert estimator.remaining_s(pause, 0.0) == 3.0  # (1 + 1 + 1 + 9) / 4
    assert estimator.remaining_s(pause, 2.0) == 7.0  # only the 9 is left
    assert estimator.remaining_s(pause, 10.0) == 10.0  # longer than ever seen


def test_parallel_calls_end_with_the_last_or_the_first() -> None:
    calls = (Call("a", 1.0), Call("b", 4.0))
    assert Conditional().remaining_s(Pause(0.0, calls), 0.0) == 4.0
    assert Conditional().remaining_s(Pause(0.0, calls, wait_any=True), 0.0) == 1.0


def test_a_deadline_bounds_every_expectation() -> None:
    pause = Pause(0.0, (Call("person", 60.0),), deadline_at=5.0)
    assert Conditional().remaining_s(pause, 2.0) == 3.0


def test_old_durations_are_forgotten() -> None:
    estimator, api = Conditional(), Pause(0.0, (Call("api"),))
    for _ in range(256):
        estimator.observe(api, 1.0)
    for _ in range(256):
        estimator.observe(api, 3.0)
    assert estimator.remaining_s(api, 0.0) == 3.0


def test_profiled_is_the_mean_whatever_has_elapsed() -> None:
    estimator, pause = Profiled(prior_s=0.5), Pause(0.0, (Call("shell"),))
    assert estimator.remaining_s(pause, 3.0) == 0.5
    for duration_s in (1.0, 5.0):
        estimator.observe(pause, duration_s)
    assert (estimator.remaining_s(pause, 0.0), estimator.remaining_s(pause, 9.0)) == (3.0, 3.0)


def test_hint_then_as_long_again() -> None:
    pause = Pause(0.0, (Call("shell", expected_s=4.0),))
    assert (Hint().remaining_s(pause, 1.0), Hint().remaining_s(pause, 6.0)) == (3.0, 6.0)
    assert Hint(prior_s=2.0).remaining_s(Pause(0.0, (Call("shell"),)), 0.5) == 1.5


def test_the_oracle_knows_where_there_is_something_to_know() -> None:
    known = Pause(0.0, (Call("a", true_s=4.0), Call("b", true_s=9.0)))
    assert Oracle().remaining_s(known, 1.0) == 8.0
    assert Oracle().remaining_s(known, 20.0) == 0.0
    assert Oracle().remaining_s(Pause(0.0, (Call("a", expected_s=2.0),)), 1.0) == 1.0


def test_progress_reports_go_before_everything() -> None:
    estimator, pause = Reported(), Pause(0.0, (Call("build", expected_s=1.0),))
    assert estimator.remaining_s(pause, 0.5) == 0.5
    reported = pause.reported(0, Progress(at=2.0, fraction=0.25))  # a quarter in 2 s: 6 s more
    assert estimator.remaining_s(reported, 2.0) == 6.0
    assert estimator.remaining_s(reported, 5.0) == 3.0
    assert estimator.remaining_s(reported, 9.0) == 7.0  # late: as long again as since the report
    nothing_done = pause.reported(0, Progress(at=2.0, fraction=0.0))
    assert estimator.remaining_s(nothing_done, 2.0) == estimator.remaining_s(pause, 2.0)


def test_one_report_of_two_parallel_calls() -> None:
    pause = Pause(0.0, (Call("a", expected_s=3.0), Call("b", expected_s=1.0)))
    assert Reported().remaining_s(pause, 0.5) == 2.5
    assert Reported().remaining_s(pause.reported(1, Progress(0.5, 0.1)), 0.5) == pytest.approx(4.5)


def test_the_price_of_holding_gives_up_at_the_best_moment() -> None:
    estimator, pause = Conditional(), Pause(0.0, (Call("shell"),))
    for duration_s in [0.2] * 9 + [60.0]:
        estimator.observe(pause, duration_s)
    assert estimator.remaining_s(pause, 0.0) == pytest.approx((9 * 0.2 + 60.0) / 10)
    # to 0.2 s: all ten hold 0.2 s for nine returns; to 60 s: 61.8 s for ten
    assert estimator.hold_s(pause, 0.0) == pytest.approx(2.0 / 9)
    assert estimator.hold_s(pause, 0.1) == pytest.approx(1.0 / 9)
    assert estimator.hold_s(pause, 1.0) == pytest.approx(59.0)
    assert estimator.hold_s(pause, 70.0) == 70.0
    assert Elapsed().hold_s(pause, 3.0) == 3.0


@given(
    st.lists(st.integers(1, 4000).map(lambda cents: cents / 100), min_size=1, max_size=120),
    st.lists(st.floats(0, 45), min_size=1, max_size=8),
)
@example([8.0, 9.0, 9.5], [7.9, 0.0])
@example([8.0, 9.0, 9.5], [0.0, 7.9])
def test_the_price_of_holding_is_the_same_whoever_asked_before(durations: list[float], asked: list[float]) -> None:
    seen = History()
    for duration_s in durations:
        seen.add(duration_s)
    seen.hold_s(0.0)
    alone = History()
    for duration_s in durations:
        alone.add(duration_s)
    for elapsed in asked:
        price = seen.hold_s(elapsed)
        alone._moments.clear()
        assert price == alone.hold_s(elapsed)
        if price is not None and len(seen._sorted) <= MOMENTS:
            left = [duration for duration in seen._sorted if duration > elapsed]
            held = {end: sum(min(duration, end) - elapsed for duration in left) for end in left}
            ended = {end: sum(duration <= end for duration in left) for end in left}
            assert price == pytest.approx(min(held[end] / ended[end] for end in left), rel=1e-6, abs=1e-9)


def test_a_tool_past_its_deadline_is_gone() -> None:
    pause = Pause(0.0, (Call("person", true_s=2.0),), deadline_at=5.0)
    for name in ("elapsed", "profiled", "conditional", "hint", "progress", "oracle"):
        estimator = make_estimator(name)
        assert estimator.remaining_s(pause, 4.0) <= 1.0
        assert estimator.remaining_s(pause, 5.0) == GONE_S
        assert estimator.hold_s(pause, 6.0) == GONE_S


def test_parallel_calls_learn_how_long_they_take_together() -> None:
    estimator = Conditional()
    both = Pause(0.0, (Call("a", 1.0), Call("b", 1.0)))
    for duration_s in (4.0, 5.0, 6.0):
        estimator.observe(both, duration_s)
    assert estimator.remaining_s(both, 0.0) == 5.0
    assert estimator.remaining_s(Pause(0.0, (Call("b", 1.0), Call("a", 1.0))), 0.0) == 5.0
    assert estimator.remaining_s(Pause(0.0, (Call("a", 1.0),)), 0.0) == 1.0  # alone, nothing is known of it
    assert estimator.remaining_s(Pause(0.0, both.calls, wait_any=True), 0.0) == 1.0  # nor of the first of the two


def test_hints_are_believed_as_long_as_they_are_nearer_than_history() -> None:
    estimator = Conditional()
    for duration_s in (1.0, 9.0, 1.0, 9.0, 1.0, 9.0):  # the program knows, the mean does not
        estimator.observe(Pause(0.0, (Call("job", duration_s),)), duration_s)
    assert estimator.remaining_s(Pause(0.0, (Call("job", 9.0),)), 0.0) == 9.0
    liar = Conditional()
    for _ in range(6):
        liar.observe(Pause(0.0, (Call("job", 60.0),)), 1.0)
    assert liar.remaining_s(Pause(0.0, (Call("job", 60.0),)), 0.0) == 1.0


@pytest.mark.parametrize("make", [Conditional, Profiled])
def test_tools_without_end_are_forgotten_the_oldest_first(make: Callable[[], Conditional | Profiled]) -> None:
    estimator = make()
    for number in range(3 * KEPT_TOOLS):
        for name in (f"made up {number}", "search"):
            for _ in range(3):
                estimator.observe(Pause(0.0, (Call(name),)), 7.0)
        calls = tuple(Call(f"{number} {'x' * 200} {index}") for index in range(20))
        estimator.observe(Pause(0.0, calls), 1.0)
    assert len(estimator._seen._by_name) == KEPT_TOOLS
    assert estimator.remaining_s(Pause(0.0, (Call("search"),)), 0.0) == 7.0
    if make is Conditional:  # the other knows tools alone
        assert max(map(len, estimator._seen._by_name)) <= 256


def test_phases_change_by_the_table_alone() -> None:
    context = Context(ContextId(1), 0.0)
    context.become(Phase.QUEUED)
    context.become(Phase.RUNNING)
    context.become(Phase.PAUSED)
    with pytest.raises(IllegalTransition, match="context 1: paused -> running"):
        context.become(Phase.RUNNING)
    context.become(Phase.FINISHED)
    with pytest.raises(IllegalTransition):
        context.become(Phase.QUEUED)
