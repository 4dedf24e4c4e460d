"""The picture of a running engine: it agrees with the engine, stays small, and misses no pause."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from caesura.runtime import snapshot as module
from caesura.runtime.history import KEPT_DECISIONS, KEPT_SAMPLES, KEPT_SPANS, KEPT_TOOLS, LOOK_INTERVAL_S, History
from caesura.runtime.ipc import messages as m
from caesura.runtime.snapshot import MAX_NODES, MAX_VIEWS, EngineSnapshot, take_snapshot
from caesura.runtime.trace import TraceRecorder, state_of
from caesura.scheduler.context import Call
from caesura.scheduler.types import Phase

from tests.sim.agents import World, populate


def watched(policy: str, seed: int = 3) -> tuple[World, History]:
    world = World(policy, seed=seed)
    history = History()
    world.engine.observers.append(history)
    return world, history


def check_picture(world: World, picture: EngineSnapshot) -> None:
    """Every figure of the picture against the engine's own."""
    engine = world.engine
    ledger = engine.ledger
    runs = {node.id: node for node in ledger.tree.nodes.values() if node.parent is not None}
    told = {view.id: view for view in picture.nodes if view.kind == "run"}
    assert told.keys() == runs.keys(), "a small tree is told whole"
    seen: set[int | None] = {None}
    for view in picture.nodes:
        assert view.parent in seen, "parents come first"
        seen.add(view.id if view.id >= 0 else None)
        if view.kind != "run":
            continue
        node = runs[view.id]
        assert (view.start, view.num_tokens) == (node.start, len(node.tokens))
        assert (view.device_pages, view.host_pages) == (len(node.device), len(node.host))
        assert (view.state == "swapped") == (not node.device)
        assert (view.state == "cached") == (bool(node.device) and not node.held)
    tails = sum(view.device_pages for view in picture.nodes if view.kind == "tail")
    assert tails >= sum(len(lease.tail) > 0 for lease in ledger.leases.values()), "every unfinished page is told"
    pool = picture.pool
    pages = pool.running_pages + pool.paused_pages + pool.cached_pages + pool.free_pages
    assert pages == picture.device_pages == ledger.num_device_pages
    assert {view.id: view.state for view in picture.contexts} == {
        context.id: state_of(context) for context in engine.scheduler.contexts.values()
    }
    for view in picture.contexts:
        context = engine.scheduler.contexts[view.id]
        assert view.held_tokens <= context.num_tokens == view.num_tokens
        assert view.since_s <= picture.now_s
        if context.phase is Phase.PAUSED:
            assert (view.tool, view.since_s) == (context.pause.tool, context.pause.since)


@pytest.mark.parametrize("policy", ["min_waste", "infercept", "discard", "preserve", "lru"])
def test_the_picture_agrees_with_the_engine_at_every_step(policy: str) -> None:
    world, history = watched(policy)
    populate(world, 12)
    states: set[str] = set()
    cursor = 0
    step, world.sim._on_step = world.sim._on_step, lambda: None

    def look() -> None:
        nonlocal cursor
        step()
        picture = take_snapshot(world.engine, history, cursor)
        check_picture(world, picture)
        numbers = [event.number for ring in (picture.spans, picture.decisions, picture.samples) for event in ring]
        assert len(set(numbers)) == len(numbers) and all(cursor < number <= picture.cursor for number in numbers)
        cursor = picture.cursor
        states.update(view.state for view in picture.nodes)

    world.sim._on_step = look
    world.sim.run()
    assert world.finished and not world.wrong
    assert "running" in states and "cached" in states
    if policy in ("min_waste", "infercept"):
        assert {"swapped", "discarded"} & states


def test_looking_seldom_misses_no_pause_that_lasts_and_tells_its_length() -> None:
    world, history = watched("min_waste")
    exact = TraceRecorder()  # looks at every context in every step
    world.engine.observers.append(exact)
    populate(world, 16)
    world.sim.run()
    history.look(world.engine, world.clock.now())

    calls = sum(times.calls for times in history.tools())
    spans = history.spans(0)
    for span in spans:
        assert span.start_s <= span.end_s
    by_context: dict[int, list[tuple[float, float]]] = {}
    for span in spans:
        by_context.setdefault(span.context, []).append((span.start_s, span.end_s))
    for lane in by_context.values():
        assert all(before[1] == after[0] for before, after in pairwise(lane)), "no gap, no overlap"
    every = [span for span in exact.finished_spans() if span.tool]
    long = {(span.context, span.tool) for span in every if span.end - span.start > LOOK_INTERVAL_S}
    seen = {(span.context, span.tool) for span in spans if span.tool}
    assert long <= seen <= {(span.context, span.tool) for span in every}
    assert calls >= len(seen) >= 10


def test_tool_times_are_those_of_whole_pauses() -> None:
    """A pause that is announced twice, or whose KV goes meanwhile, is one call."""
    world, history = watched("discard")
    engine = world.engine
    for length_s in (0.5, 1.5, 4.0):
        context = engine.open()
        engine.append(context, [1, 2, 3, 4, 5])
        engine.prefill(context, lambda _: None)
        world.sim.run()
        engine.pause(context, [Call("look <b>up</b>")])
        engine.step()
        world.clock.advance_to(world.clock.now() + 0.01)
        engine.pause(context, [Call("look <b>up</b>", 1.0)], deadline_at=world.clock.now() + 60)  # told again: a hint
        engine.step()
        world.clock.advance_to(world.clock.now() + length_s / 2)
        engine.step()
        (waiting,) = (times for times in history.tools() if times.waiting)
        assert waiting.waiting == 1
        world.clock.advance_to(world.clock.now() + length_s / 2)
        engine.resume(context)
        engine.close(context)
        engine.step()
    (times,) = history.tools()
    assert (times.tool, times.calls, times.waiting) == ("look <b>up</b>", 3, 0)
    assert times.median_s == pytest.approx(1.5, abs=0.05)
    assert times.longest_s == pytest.approx(4.0, abs=0.05)


def test_a_large_tree_is_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("min_waste", device_pages=4000, max_step_tokens=4096, max_running=64, check_every=1 << 30)
    history = History()
    engine = world.engine
    engine.observers.append(history)
    for first in range(40):
        for second in range(40):
            context = engine.open()
            engine.append(context, [first] * 4 + [second] * 4 + [7])
            engine.prefill(context, lambda _: None)
            world.sim.run()
            if second:
                engine.close(context)
    picture = take_snapshot(engine, history)
    assert picture.num_nodes == 40 * 41 > MAX_NODES
    assert len(picture.nodes) <= MAX_VIEWS + 8
    runs = [view for view in picture.nodes if view.kind in ("run", "rest")]
    assert sum(view.count for view in runs) == picture.num_nodes, "nothing is lost, only summed up"
    assert sum(view.device_pages for view in runs) == sum(len(n.device) for n in engine.ledger.tree.nodes.values())
    held = {lease.node.id for lease in engine.ledger.leases.values()}
    assert held <= {view.id for view in picture.nodes}, "what somebody holds comes first"
    assert len(m.encode(m.Seen(1, picture))) < 200_000
    monkeypatch.setattr(module, "WALK_BUDGET", 10)
    assert len(take_snapshot(engine, history).nodes) <= MAX_VIEWS + 8


def test_rings_and_names_are_bounded() -> None:
    world, history = watched("min_waste")
    engine = world.engine
    context = engine.open()
    engine.append(context, [1, 2, 3])
    engine.prefill(context, lambda _: None)
    world.sim.run()
    for number in range(KEPT_SPANS):
        engine.pause(context, [Call(f"{number} " + "x" * 500)])
        engine.step()
        world.clock.advance_to(world.clock.now() + 1.0)
        engine.resume(context)
        engine.step()
    picture = take_snapshot(engine, history)
    assert len(picture.spans) <= KEPT_SPANS
    assert len(picture.decisions) <= KEPT_DECISIONS
    assert len(picture.samples) <= KEPT_SAMPLES
    assert len(picture.tools) == KEPT_TOOLS
    assert max(len(times.tool) for times in picture.tools) <= 80
    assert take_snapshot(engine, history, picture.cursor).spans == ()
    assert take_snapshot(engine, history, 1 << 60).spans == picture.spans, "a cursor of another engine starts anew"
    assert msgspec.msgpack.decode(m.encode(m.Seen(1, picture)), type=m.Event) == m.Seen(1, picture)
