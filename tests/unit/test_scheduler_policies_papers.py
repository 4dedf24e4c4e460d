"""The policies of the literature: their equations against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from caesura.scheduler.context import Call, Context, ContextTable, Pause
from caesura.scheduler.estimate import KEPT_TOOLS
from caesura.scheduler.policies import PausedContext, Room, View, make_policy
from caesura.scheduler.policies.admission_only import FIRST_WINDOW, AdmissionOnly
from caesura.scheduler.policies.augserve import AugServe
from caesura.scheduler.policies.continuum import Continuum, Records, Turns
from caesura.scheduler.policies.foresight import Foresight
from caesura.scheduler.policies.lamps import Lamps, build_token_s
from caesura.scheduler.policies.lamps import strategy_costs as lamps_costs
from caesura.scheduler.policies.thunderagent import ThunderAgent
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import Action, ContextId, Phase

from tests.unit.test_scheduler_policies import actions, paused, run, view

STEPPED = CostProfile(0.010, 0.001, 0.0, 0.0, 0.0001, 100)  # as PROFILE, with 10 ms a step


def context(number: int, *, tokens: int = 100, arrival: float = 0.0) -> Context:
    state = Context(ContextId(number), arrival, [0] * tokens)
    state.submitted = arrival
    return state


def room(contexts: Sequence[Context], *, now: float = 0.0, step: int = 1, free: int = 0, capacity: int = 1000) -> Room:
    table = ContextTable()
    for state in contexts:
        table.add(state)
    held = {state.id: state.high_water_tokens for state in contexts}
    return Room(now, step, table, free, capacity, held.__getitem__, lambda _: 0, STEPPED)


def wait(policy: Any, state: Context, tool: str, since: float) -> None:
    """The context has stopped generating, and waits for a tool."""
    state.pause = Pause(since)
    policy.saw_paused(state, since)
    state.pause = Pause(since, (Call(tool),))
    policy.saw_paused(state, since)


def come_back(policy: Any, state: Context, now: float) -> None:
    policy.saw_queued(state, now)
    policy.saw_running(state, now)


# -- InferCept and its baselines -----------------------------------------------------------------------------------


def test_infercept_swaps_in_parts_and_discards_beyond_the_budget() -> None:
    # T_fwd(10) = 10 ms = T_swap(100 tokens): the first gets all of it, the second the smaller waste.
    # W_CD of 250 tokens beside 900: 0.25 * 125 + 0.25 * 900 = 256.25; W_P = 2 * 250 = 500. Of 100: 5 + 90 < 100 * 2
    shown = view([paused(1, remaining_s=2.0, tokens=250), paused(2, remaining_s=2.0)], batch_tokens=900)
    first, second = make_policy("infercept").review(shown)
    assert (first.context, first.action, first.num_tokens) == (1, Action.SWAP, 100)
    assert first.costs.discard_token_s == pytest.approx(256.25)
    assert (second.context, second.action) == (2, Action.DISCARD)


def test_infercepts_variants_differ_in_the_duration_alone() -> None:
    pause = Pause(0.0, (Call("search", true_s=9.0),))
    remaining = {}
    for name in ("infercept", "infercept_profiled", "infercept_oracle"):
        policy = make_policy(name)
        for duration_s in (4.0, 6.0):
            policy.estimator.observe(Pause(0.0, (Call("search"),)), duration_s)
        remaining[name] = policy.estimator.remaining_s(pause, 2.0)
    assert remaining == {"infercept": 2.0, "infercept_profiled": 5.0, "infercept_oracle": 7.0}


def test_blocking_swap_idles_the_whole_batch() -> None:
    # equation 3: 2 * T_swap(100) * 900 = 2 * 0.01 * 900
    (choice,) = make_policy("swap_blocking").review(view([paused(1)], batch_tokens=900))
    assert (choice.action, choice.costs.swap_token_s) == (Action.SWAP, pytest.approx(18.0))
    assert make_policy("swap_blocking").waits_for_copies
    assert not make_policy("swap").waits_for_copies


@pytest.mark.parametrize(
    ("policy", "first"),
    [("discard", 2), ("lru", 2), ("session_refs", 2), ("improved_discard", 1), ("infercept", 1), ("swap", 1)],
)
def test_who_keeps_his_place_and_who_queues_up_again(policy: str, first: int) -> None:
    early, late = context(1, arrival=1.0), context(2, arrival=2.0)
    early.submitted = 5.0  # back from a tool
    assert min((early, late), key=make_policy(policy).order_key).id == first


def test_session_refs_gives_up_what_was_used_least_recently() -> None:
    shown = [paused(1, since=5.0), paused(2, since=3.0), paused(3, since=4.0)]
    segments = [run(1, [1]), run(2, [2]), run(3, [2, 3])]  # the third was last used by context 3
    takes = list(make_policy("session_refs").reclaim(view(shown, segments), 5))
    assert [take.segment.id for take in takes] == [2, 3, 1]
    assert {take.action for take in takes} == {Action.SWAP}


# -- LAMPS and AugServe --------------------------------------------------------------------------------------------


def test_foresight_is_a_running_mean_per_tool_before() -> None:
    seen, state = Foresight(), context(1, tokens=100)
    assert (seen.tokens(state), seen.seconds(state)) == (100.0, 0.5)
    seen.saw_queued(state, 0.0)
    state.tokens.extend([0] * 40)
    wait(seen, state, "search", 1.0)
    seen.saw_queued(state, 3.0)
    assert seen.seconds(state) == 2.0  # the pause after a search is the search
    assert seen.tokens(context(2)) == 40.0  # another at its beginning
    state.tokens.extend([0] * 10)
    wait(seen, state, "search", 4.0)
    seen.saw_queued(state, 8.0)
    assert seen.tokens(state) == 10.0
    assert seen.seconds(state) == pytest.approx(2.0 + 0.05 * (4.0 - 2.0))


def test_lamps_prices_three_strategies() -> None:
    # C = 250, c = 100 - 50, n = 5 - 1 whole chunks; f(S) = 0.11 s, R = 900
    shown = view([paused(1, remaining_s=3.0, tokens=250)], batch_tokens=900, query_tokens=50, profile=STEPPED)
    costs = lamps_costs(shown, shown.paused[0])
    assert costs.preserve_token_s == 750.0
    assert costs.swap_token_s == pytest.approx(0.11 * 4 * 250 + 2 * 0.005 * 4 * 900)
    # 0.11 * 50 * 4 * 5 / 2 + 0.001 * 50 * 4 * 900; 250 is five whole chunks, so no last one
    assert costs.discard_token_s == pytest.approx(55.0 + 180.0)
    (choice,) = Lamps().review(shown)
    assert choice.action is Action.SWAP  # 146 against 235 and 750
    shown = view([paused(1, remaining_s=0.5, tokens=250)], batch_tokens=900, query_tokens=50, profile=STEPPED)
    assert Lamps().review(shown)[0].action is Action.PRESERVE


def test_lamps_ranks_by_memory_over_time_and_boosts_who_starves() -> None:
    policy, small, large = Lamps(), context(1, tokens=50, arrival=9.0), context(2, tokens=400, arrival=1.0)
    assert build_token_s(STEPPED, 250) == pytest.approx(0.11 * 100 * 3 * 4 / 2)
    # nothing learned: 100 tokens ahead, 0.5 s. b = 150: MT(150) = 33, swap 0.015 * 150 + 0.05 + MT(100) is least
    assert policy.rank(small, STEPPED) == pytest.approx(33.0 + 2.25 + 0.05 + 11.0)
    assert [state.id for state in policy.admit([large, small], room([large, small], step=1))] == [1, 2]
    assert [state.id for state in policy.admit([large], room([large], step=102))] == [2]
    policy.saw_queued(small, 0.0)
    assert [state.id for state in policy.admit([small, large], room([small, large], step=103))] == [2, 1]


def test_augserve_prices_without_chunks_and_orders_by_value() -> None:
    # T_fwd(250) = 0.26 s; W_D = 0.26 * (250 + 900); W_S = 2 * 0.025 * 900
    shown = view([paused(1, remaining_s=1.0, tokens=250)], batch_tokens=900, profile=STEPPED)
    policy = AugServe()
    assert policy.review(shown)[0].action is Action.SWAP
    costs = policy.strategy_costs(shown, shown.paused[0])
    assert costs.preserve_token_s == 250.0
    assert costs.discard_token_s == pytest.approx(299.0)
    assert costs.swap_token_s == pytest.approx(45.0)
    # V of 100 tokens, all missing, 100 ahead: catching up 0.11 * 50, decoding 100 * 0.011 * 150, the pause
    # min(0.5, 0.22, 0.04) * 200, what follows 100 * 0.011 * 250
    assert policy.value(context(1), 100, STEPPED) == pytest.approx(5.5 + 165.0 + 8.0 + 275.0)
    small, large = context(1, tokens=50, arrival=9.0), context(2, tokens=400, arrival=1.0)
    assert [state.id for state in policy.admit([large, small], room([small, large], now=9.0))] == [1, 2]
    assert [state.id for state in policy.admit([small, large], room([small, large], now=11.5))] == [2, 1]  # starved


def test_augserves_step_breathes_with_the_memory() -> None:
    resting = context(1)
    resting.high_water_tokens = 60
    policy = AugServe()
    assert policy.step_tokens(400, room([resting], free=1000)) == 400
    assert policy.step_tokens(400, room([resting], free=90)) == 150
    assert policy.step_tokens(400, room([resting], free=0)) == 100
    assert policy.step_tokens(2, room([], free=0)) == 1, "a step of no rows would never end"


# -- Continuum -----------------------------------------------------------------------------------------------------


def test_eta_is_one_for_fixed_turns_and_falls_with_their_spread() -> None:
    fixed, spread, memoryless = Turns(), Turns(), Turns()
    for number in range(10):
        fixed.add(6)
        spread.add(1 + number)  # points spread evenly over a triangle: correlation -1/2
        for _ in range(2 ** (9 - number)):
            memoryless.add(1 + number)  # half of all programs end at every turn
    assert fixed.eta == pytest.approx(1.0)
    assert spread.eta == pytest.approx(0.5)
    assert memoryless.eta < 0.05


def test_time_to_live_is_where_the_gain_is_largest() -> None:
    records = Records()
    for duration_s in (1.0, 1.0, 1.0, 9.0):
        records.add(duration_s)
    # benefit 4: keeping for 1 gains 0.75 * 4 - 1 = 2, for 9 loses 5. Benefit 1: every time loses
    assert records.time_to_live_s(4.0) == 1.0
    assert records.time_to_live_s(1.0) == 0.0
    assert records.time_to_live_s(40.0) == 9.0  # 29 at 1 s, 31 at 9 s


def test_continuum_keeps_for_its_time_and_then_lets_go() -> None:
    policy = Continuum()
    learner = context(9)
    for _ in range(100):
        wait(policy, learner, "search", 0.0)
        policy.saw_queued(learner, 0.02)
    # reload of 100 tokens: 0.01 s to copy; all calls took 0.02 s; no delay yet: not worth keeping
    assert policy.time_to_live_s(view([paused(1)]), paused(1)) == 0.0
    policy.delay_s = 0.1
    assert policy.time_to_live_s(view([paused(1)]), paused(1)) == pytest.approx(0.02)
    young, old = paused(1, elapsed_s=0.01), paused(2, elapsed_s=0.03)
    assert {c.context: c.action for c in policy.review(view([young, old]))} == {1: Action.PRESERVE, 2: Action.RELEASE}


def test_continuum_takes_a_new_pause_for_a_new_one() -> None:
    policy, state = Continuum(), context(1)
    wait(policy, state, "search", 0.0)
    policy.review(view([paused(1)]))
    policy.saw_paused(state, 0.0)  # said again, it is the same
    assert policy._ttl.keys() == {state.id}
    state.pause = Pause(3.0, (Call("shell"),))
    policy.saw_paused(state, 3.0)
    assert not policy._ttl
    policy.saw_queued(state, 4.0)
    assert {tool: seen._sorted for tool, seen in policy._records.items()} == {"search": [3.0], "shell": [1.0]}


def test_made_up_tool_names_are_forgotten() -> None:
    policy, seen, state = Continuum(), Foresight(), context(1)
    for number in range(KEPT_TOOLS + 9):
        for each in (policy, seen):
            wait(each, state, f"tool {number}", 0.0)
            each.saw_queued(state, 1.0)
    assert len(policy._records) == len(seen._seconds) == len(seen._tokens) == KEPT_TOOLS
    assert f"tool {number}" in policy._records


def test_continuum_serves_the_preempted_then_those_in_time_then_by_arrival() -> None:
    policy = Continuum()
    first, timely, preempted = context(1, arrival=1.0), context(2, arrival=2.0), context(3, arrival=3.0)
    wait(policy, timely, "search", 0.0)
    policy._ttl[timely.id] = 5.0
    come_back(policy, preempted, 4.0)
    for state in (first, timely, preempted):
        state.phase = Phase.QUEUED
        if state is not preempted:
            policy.saw_queued(state, 4.0)
    assert [s.id for s in sorted((first, timely, preempted), key=policy.order_key)] == [3, 2, 1]


# -- ThunderAgent and the window -----------------------------------------------------------------------------------


def thunder(now: float, contexts: Sequence[PausedContext], capacity: int) -> View:
    return view(contexts, now=now, num_pages=capacity // 10)


def test_thunderagent_lets_in_what_fits_shortest_first() -> None:
    policy = ThunderAgent()
    crowd = [context(1, tokens=500), context(2, tokens=200), context(3, tokens=300)]
    # 200 + 100 and 300 + 100 fit in 1000, then 500 + 100 does not
    assert [state.id for state in policy.admit(crowd, room(crowd))] == [2, 3]
    assert policy.used_tokens(0.0) == 700
    assert [state.id for state in policy.admit(crowd[:1], room(crowd))] == []


def test_thunderagent_counts_acting_programs_less_and_less() -> None:
    policy, state = ThunderAgent(), context(1, tokens=300)
    policy.admit([state], room([state]))
    wait(policy, state, "search", 10.0)
    assert policy.used_tokens(10.0) == 400
    assert policy.used_tokens(12.0) == 100  # 400 / 2 ** 2


def test_thunderagent_counts_every_branch_once() -> None:
    policy = ThunderAgent()
    first, second, idle = (context(number, tokens=tokens) for number, tokens in ((1, 100), (2, 850), (3, 50)))
    for state in (first, second, idle):
        state.program = first.id
    both = [first, second]
    for state in both:
        policy.saw_queued(state, 0.0)
    crowd = [*both, context(4, tokens=750)]
    assert policy.admit(crowd, room(crowd)) == [first]  # the stranger does not fit, nor does who comes after it
    assert policy.admit(crowd, room(crowd)) == both
    assert policy.used_tokens(0.0) == 100 + 850 + 100
    idle.pause = Pause(1.0)
    policy.saw_paused(idle, 1.0)
    first.pause = Pause(1.0)
    policy.saw_paused(first, 1.0)
    assert policy.used_tokens(9.0) == 1050  # the second still reasons


def test_thunderagent_sets_small_acting_programs_aside_first() -> None:
    policy = ThunderAgent()
    crowd = [context(1, tokens=100), context(2, tokens=300), context(3, tokens=200)]
    policy.admit(crowd, room(crowd))
    for state in crowd[:2]:
        wait(policy, state, "search", 0.0)
    # 200 + 400 + 300 against 750: the acting one of 200 is enough
    choices = policy.review(thunder(0.0, [paused(1), paused(2)], 750))
    assert {choice.context: choice.action for choice in choices} == {1: Action.RELEASE, 2: Action.PRESERVE}
    # 5 s later 400 / 32 + 300 against 280: the acting one does not do, the reasoning one leaves when it rests
    policy.review(thunder(5.0, [paused(2)], 280))
    assert policy.used_tokens(5.0) == 300
    wait(policy, crowd[2], "search", 6.0)
    assert policy.used_tokens(6.0) == 0


def test_thunderagent_sets_a_leaving_program_aside_with_its_last_reasoning_branch() -> None:
    policy = ThunderAgent()
    parent, branch = context(1, tokens=100), context(2, tokens=300)
    branch.program = parent.id
    policy.admit([parent, branch], room([parent, branch]))
    wait(policy, parent, "sub_agent", 0.0)
    policy.review(thunder(5.0, [paused(1)], 280))  # it leaves when its branch rests,
    policy.saw_closed(branch)  # or is closed
    assert policy.used_tokens(5.0) == 0


def test_the_window_grows_by_two_and_shrinks_by_a_quarter() -> None:
    policy = AdmissionOnly()
    crowd = [context(number) for number in range(1, 30)]
    assert len(policy.admit(crowd, room(crowd))) == FIRST_WINDOW
    assert len(policy.admit(crowd, room(crowd, now=1.0))) == FIRST_WINDOW + 2
    back = crowd[0]
    back.high_water_tokens, back.cached_tokens = 100, 50  # half of it is gone
    come_back(policy, back, 1.5)
    policy.admit(crowd, room(crowd, now=2.0))
    assert policy.window == 0.75 * (FIRST_WINDOW + 2)
    policy.saw_closed(crowd[1])
    assert crowd[1] not in policy.admit(crowd, room(crowd, now=2.5))  # no room for it any more
    for state in crowd[2:]:
        policy.saw_closed(state)
    come_back(policy, back, 2.6)
    policy.admit([], room(crowd, now=3.0))
    assert policy.window == 1.0  # what is cut is the window in use, and one program is always let in


def test_oracle_is_the_default_rule_with_the_truth() -> None:
    assert actions("oracle", view([paused(1, remaining_s=100.0)])) == {}
    estimator = make_policy("oracle").estimator
    assert estimator.remaining_s(Pause(0.0, (Call("x", expected_s=1.0, true_s=8.0),)), 3.0) == 5.0


def test_any_policy_takes_any_estimator() -> None:
    pause = Pause(0.0, (Call("x", true_s=8.0),))
    assert make_policy("infercept+oracle").estimator.remaining_s(pause, 3.0) == 5.0
    assert make_policy("min_waste+elapsed").estimator.remaining_s(pause, 3.0) == 3.0
    with pytest.raises(ValueError, match="must be one of elapsed, profiled"):
        make_policy("min_waste+guess")
