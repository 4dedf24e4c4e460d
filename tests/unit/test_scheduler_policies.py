"""Each policy's decision on small views, against arithmetic done by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from caesura.lang.cli.output import POLICY_HELP
from caesura.scheduler.context import Context
from caesura.scheduler.estimate import ESTIMATORS
from caesura.scheduler.ledger import Segment
from caesura.scheduler.policies import DEFAULT_POLICY, POLICIES, PausedContext, View, make_policy
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import Action, ContextId

# no step cost, 1 ms a token; copies 0.1 ms a token; chunks of 100
PROFILE = CostProfile(0.0, 0.001, 0.0, 0.0, 0.0001, 100)


def paused(
    number: int,
    *,
    remaining_s: float = 1.0,
    tokens: int = 100,
    tool: str = "search",
    since: float = 0.0,
    elapsed_s: float | None = None,
) -> PausedContext:
    return PausedContext(
        id=ContextId(number),
        arrival=float(number),
        tool=tool,
        since=since,
        elapsed_s=remaining_s if elapsed_s is None else elapsed_s,
        remaining_s=remaining_s,
        held_tokens=tokens,
        exclusive_tokens=tokens,
        decided=None,
        hold_s=remaining_s,
        program=ContextId(number),
    )


def run(number: int, holders: Sequence[int], *, tokens: int = 100, parent: int | None = None, start: int = 0,
        on_host: bool = False) -> Segment:  # fmt: skip
    return Segment(
        number, parent, start, tokens, tokens // 10, on_host, False, tuple(ContextId(holder) for holder in holders)
    )


def view(
    contexts: Sequence[PausedContext],
    segments: Sequence[Segment] = (),
    *,
    batch_tokens: int = 0,
    query_tokens: int = 10,
    has_host: bool = True,
    free_host_pages: int = 100,
    free_pages: int = 0,
    profile: CostProfile = PROFILE,
    now: float = 10.0,
    num_pages: int = 100,
    batch_pages: int = 25,
) -> View:
    return View(
        now=now,
        show_paused=lambda: tuple(contexts),
        hold_s=lambda context: next(paused.hold_s for paused in contexts if paused.id == context),
        held_tokens=lambda context: next(paused.held_tokens for paused in contexts if paused.id == context),
        segments=lambda: list(segments),
        profile=profile,
        batch_tokens=batch_tokens,
        running_rows=query_tokens,
        query_tokens=query_tokens,
        free_pages=free_pages,
        num_pages=num_pages,
        page_size=10,
        copying_pages=0,
        free_host_pages=free_host_pages,
        has_host=has_host,
        batch_pages=batch_pages,
    )


def actions(policy: str, shown: View) -> dict[int, Action]:
    return {choice.context: choice.action for choice in make_policy(policy).review(shown)}


@pytest.mark.parametrize(
    ("policy", "action"),
    [
        ("discard", Action.DISCARD),
        ("improved_discard", Action.DISCARD),
        ("lru", Action.RELEASE),
        ("lru_host", Action.RELEASE),
        ("preserve", Action.PRESERVE),
        ("swap", Action.SWAP),
    ],
)
def test_single_minded_policies(policy: str, action: Action) -> None:
    assert actions(policy, view([paused(1), paused(2)])) == {1: action, 2: action}


@pytest.mark.parametrize("policy", ["discard", "improved_discard", "preserve", "swap", "infercept"])
def test_a_thinking_program_is_not_a_tool_call(policy: str) -> None:
    assert actions(policy, view([paused(1, tool="")])) == {}


def test_min_waste_does_nothing_unasked() -> None:
    assert actions("min_waste", view([paused(1, remaining_s=100.0)])) == {}


def test_infercept_compares_waiting_with_recomputing() -> None:
    # W_CD of 100 tokens beside 900: 0.1 s * 100 / 2 + 0.1 s * 900 = 95; W_P = T * 100; no swap budget
    shown = view([paused(1, remaining_s=0.9), paused(2, remaining_s=1.0)], batch_tokens=900, has_host=False)
    assert actions("infercept", shown) == {1: Action.PRESERVE, 2: Action.DISCARD}


def test_infercept_gives_the_swap_budget_to_the_largest_waste() -> None:
    # T_fwd(10) = 10 ms = T_swap(100 tokens): one of the two fits
    shown = view([paused(1, remaining_s=0.2), paused(2, remaining_s=0.5)], batch_tokens=900, query_tokens=10)
    assert actions("infercept", shown) == {1: Action.PRESERVE, 2: Action.SWAP}


def test_min_waste_takes_the_run_that_is_missed_last() -> None:
    contexts = [paused(1, remaining_s=0.1), paused(2, remaining_s=60.0)]
    takes = list(make_policy("min_waste").reclaim(view(contexts, [run(7, [1]), run(8, [2])]), 5))
    assert takes[0].segment.id == 8
    assert takes[0].num_pages == 5  # only what is wanted, from the end


def test_min_waste_keeps_a_shared_run_for_its_first_sharer() -> None:
    contexts = [paused(1, remaining_s=0.1), paused(2, remaining_s=60.0), paused(3, remaining_s=5.0)]
    shared, own = run(1, [1, 2]), run(3, [3])
    takes = list(make_policy("min_waste").reclaim(view(contexts, [shared, own]), 5))
    assert [take.segment.id for take in takes] == [3, 1]  # T(shared) = 0.1, not 60


def test_min_waste_takes_leaves_before_what_they_hang_from() -> None:
    contexts = [paused(1, remaining_s=0.1), paused(2, remaining_s=60.0)]
    trunk, leaf, twig = run(1, [1, 2]), run(2, [2], parent=1, start=100), run(3, [1], parent=1, start=100)
    order = [take.segment.id for take in make_policy("min_waste").reclaim(view(contexts, [trunk, leaf, twig]), 99)]
    assert order == [2, 3, 1]


def test_min_waste_copies_when_that_is_cheaper_and_drops_without_a_host() -> None:
    shown = view([paused(1)], [run(1, [1])], batch_tokens=900)
    assert next(make_policy("min_waste").reclaim(shown, 1)).action is Action.SWAP
    for has_host, room in ((False, 100), (True, 0)):
        shown = view([paused(1)], [run(1, [1])], batch_tokens=900, has_host=has_host, free_host_pages=room)
        take = next(make_policy("min_waste").reclaim(shown, 1))
        assert take.action is Action.DISCARD
        assert "recomputing" in take.reason
    shown = view([paused(1)], [run(1, [1], on_host=True)], batch_tokens=900, free_host_pages=0)
    assert next(make_policy("min_waste").reclaim(shown, 1)).action is Action.SWAP  # the copy is there


def test_min_waste_copies_the_longest_absent_ahead_in_batches() -> None:
    # four batches of 25 pages; of a long run its end, as much as one batch holds
    contexts = [paused(number, remaining_s=float(number), tokens=200) for number in range(1, 7)]
    segments = [run(number, [number], tokens=200) for number in range(1, 6)] + [run(6, [6], tokens=400)]
    ahead = make_policy("min_waste").copy_ahead(view(contexts, segments, free_pages=5))
    assert [(segment.id, pages) for segment, pages in ahead] == [(6, 25), (5, 20), (4, 20), (3, 20), (2, 15)]
    segments[5] = run(6, [6], tokens=400, on_host=True)
    ahead = make_policy("min_waste").copy_ahead(view(contexts, segments, free_pages=5))
    assert ahead[0][0].id == 5


def test_min_waste_prices_the_part_that_is_wanted() -> None:
    # the last 50 of 100 tokens, 1000 in memory: T m = 2 * 50; 0.05 s * 1000; 5 ms * 100 on return, 5 ms * 50 before
    (take,) = make_policy("min_waste").reclaim(view([paused(1, remaining_s=2.0)], [run(1, [1])]), 5)
    assert take.costs.preserve_token_s == pytest.approx(100.0)
    assert take.costs.discard_token_s == pytest.approx(50.0)
    assert take.costs.swap_token_s == pytest.approx(0.75)
    (take,) = make_policy("min_waste").reclaim(view([paused(1)], [run(1, [1], on_host=True)]), 5)
    assert take.costs.swap_token_s == pytest.approx(0.5)  # the way out is paid


def test_min_waste_weighs_waste_against_the_time_it_buys() -> None:
    # both back in 2 s. Taking 50 tokens makes 400 wait in one case and 100 in the other
    contexts = [paused(1, remaining_s=2.0, tokens=400), paused(2, remaining_s=2.0, tokens=100)]
    segments = [run(1, [1], tokens=400), run(2, [2], tokens=100)]
    assert next(make_policy("min_waste").reclaim(view(contexts, segments), 5)).segment.id == 2
    # but twenty times as long an absence is worth more than four times the wait
    contexts = [paused(1, remaining_s=40.0, tokens=400), paused(2, remaining_s=2.0, tokens=100)]
    assert next(make_policy("min_waste").reclaim(view(contexts, segments), 5)).segment.id == 1


def test_an_unfinished_page_counts_as_the_run_before_it() -> None:
    """Nine tokens of who is back in 0.5 s cost less each than the one token of who is back in 5 s."""
    contexts = [paused(1, remaining_s=0.5), paused(2, remaining_s=5.0)]
    tails = [
        run(-number, [number], tokens=100, parent=number, start=100)._replace(num_tokens=tokens, num_pages=1)
        for number, tokens in ((1, 9), (2, 1))
    ]
    dear_steps = CostProfile(0.01, 0.001, 0.0, 0.0, 0.0001, 100)
    seen = replace(view(contexts, [run(1, [1]), run(2, [2]), *tails]), profile=dear_steps)
    takes = make_policy("min_waste").reclaim(seen, 5)
    assert [take.segment.id for take in takes] == [-2, 2, -1, 1]


def test_min_waste_copies_ahead_once_in_a_pause() -> None:
    policy = make_policy("min_waste")
    seen = view([paused(1), paused(2)], [run(1, [1]), run(2, [2], on_host=True)])
    assert [segment.id for segment, _ in policy.copy_ahead(seen)] == [1]
    assert policy.copy_ahead(seen) == []  # its copy had to give way to another one
    policy.saw_paused(Context(ContextId(1), 0.0), 9.0)
    assert [segment.id for segment, _ in policy.copy_ahead(seen)] == [1]


def test_min_waste_lets_others_pass_for_a_second_only() -> None:
    waiting = Context(ContextId(1), 0.0, waiting_since=5.0)
    policy = make_policy("min_waste")
    assert policy.lets_pass(waiting, 5.5)
    assert not policy.lets_pass(waiting, 6.0)
    assert not make_policy("infercept").lets_pass(waiting, 5.5)


def test_the_command_line_lists_every_policy_and_estimator() -> None:
    _, policies, estimators = re.split(r"Policies: |Estimators: ", POLICY_HELP)
    assert set(re.findall(r"[a-z_]{3,}", policies.replace("(default)", ""))) == set(POLICIES)
    assert set(re.findall(r"[a-z_]{3,}", estimators)) == set(ESTIMATORS)
    assert f"{DEFAULT_POLICY} (default)" in policies


def test_an_unknown_policy_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="min_waste"):
        make_policy("nope")
    assert {"discard", "lru", "infercept", "min_waste"} <= set(POLICIES)
