"""A picture of a running engine: the radix tree, the contexts, the pools, and what happened lately.

Numbers, states and tool names only: no token, no text, no namespace. Taken between two steps on the engine's thread,
bounded in size and work whatever the engine holds: ``MAX_NODES`` nodes and ``MAX_CONTEXTS`` contexts are told one by
one, the rest is summed up.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from caesura.runtime.engine import Engine
from caesura.runtime.history import (
    History,
    OpenSpan,
    PastDecision,
    PastSpan,
    PoolSample,
    ToolTimes,
    sample,
)
from caesura.runtime.kv.node import Hold, Node, PrefixLease
from caesura.scheduler.context import Context
from caesura.scheduler.types import ContextId, Phase

MAX_NODES = 320
MAX_CONTEXTS = 256
MAX_HOLDERS = 8
MAX_VIEWS = 2 * MAX_NODES
PROBE_BUDGET_TOKENS = 1 << 16
WALK_BUDGET = 4096  # nodes looked at to sum up what is not told one by one


@dataclass(frozen=True, slots=True)
class NodeView:
    """A run of the radix tree, or what a context has after it.

    ``kind``: ``run`` (whole pages of the tree), ``tail`` (a context's unfinished last page and the pages being filled),
    ``gone`` (tokens that were computed once and must be again), ``rest`` (``count`` runs summed up).
    ``state``: running, preserved, swapped (on the host alone), discarded, cached. Ids of runs are the tree's own;
    the others have none of their own (-1). ``parent`` is None below a root: what shares no prefix at all.
    """

    id: int
    parent: int | None
    kind: str
    state: str
    start: int
    num_tokens: int
    device_pages: int
    host_pages: int
    copying: bool
    count: int
    num_holders: int
    holders: tuple[ContextId, ...]
    last_used_step: int


@dataclass(frozen=True, slots=True)
class ContextView:
    """A context. ``state``: its phase, and for a tool pause what became of its KV; so since ``state_since_s``, and in
    the same pause since ``since_s``. ``held_tokens`` are on the device."""

    id: ContextId
    state: str
    tool: str
    since_s: float
    state_since_s: float
    num_tokens: int
    held_tokens: int
    expected_remaining_s: float | None


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """An engine at one moment. Moments are seconds on its clock; ``life`` tells one engine from the next.

    ``spans``, ``decisions`` and ``samples`` are those after the event asked for; ``cursor`` is what to ask for next.
    """

    life: str
    cursor: int
    now_s: float
    step: int
    policy: str
    page_size: int
    page_bytes: int
    device_pages: int
    host_pages: int
    copying_pages: int
    pool: PoolSample
    num_nodes: int
    nodes: tuple[NodeView, ...]
    num_contexts: int
    contexts: tuple[ContextView, ...]
    tools: tuple[ToolTimes, ...]
    account: dict[str, float]
    spans: tuple[PastSpan, ...]
    decisions: tuple[PastDecision, ...]
    samples: tuple[PoolSample, ...]


def take_snapshot(engine: Engine, history: History, since: int = 0) -> EngineSnapshot:
    """Look at the engine, between two steps. ``since``: the last event already known."""
    now = engine.clock.now()
    history.look(engine, now)
    ledger, meter = engine.ledger, engine.scheduler.meter
    if since > history.number:  # another engine's count
        since = 0
    return EngineSnapshot(
        life=history.life,
        cursor=history.number,
        now_s=now,
        step=meter.steps,
        policy=engine.scheduler.policy.name,
        page_size=ledger.page_size,
        page_bytes=engine.executor.page_bytes,
        device_pages=ledger.num_device_pages,
        host_pages=ledger.num_host_pages,
        copying_pages=ledger.copying_pages,
        pool=sample(engine, history.number, now),
        num_nodes=len(ledger.tree.nodes) - len(ledger.tree.roots()),
        nodes=tuple(_nodes(engine)),
        num_contexts=len(engine.scheduler.contexts),
        contexts=tuple(_contexts(engine, history.open, now)),
        tools=history.tools(),
        account=meter.snapshot(),
        spans=history.spans(since),
        decisions=history.decisions(since),
        samples=history.samples(since),
    )


# -- the tree -------------------------------------------------------------------------------------------------


def _nodes(engine: Engine) -> list[NodeView]:
    """Parents first. Held and lately used runs come one by one, what is beyond the bound is summed up per parent."""
    ledger = engine.ledger
    shown: dict[int, Node] = {}
    waiting: list[tuple[bool, int, int, Node]] = []

    def offer(node: Node) -> None:
        room = MAX_NODES - len(shown)  # a node is never older than those below it, and holds count on the whole path
        for child in heapq.nlargest(room, node.children.values(), key=_prominence):
            heapq.heappush(waiting, (not child.held, -child.tick, child.id, child))

    roots = list(ledger.tree.roots().values())
    for root in roots:
        offer(root)
    while waiting and len(shown) < MAX_NODES:
        node = heapq.heappop(waiting)[-1]
        shown[node.id] = node
        offer(node)
    views = [_run(node) for node in shown.values()]
    budget = WALK_BUDGET
    for node in (*roots, *shown.values()):
        hidden = [child for child in node.children.values() if child.id not in shown]
        if hidden:
            rest, walked = _rest(node, hidden, budget)
            budget -= walked
            views.append(rest)
        if len(views) < MAX_VIEWS:
            for lease in list(node.leases.values())[:MAX_HOLDERS]:
                views += _beyond(engine.scheduler.contexts[lease.holder], lease, ledger.page_size)
    views += _let_go(engine, shown)
    return views


def _prominence(node: Node) -> tuple[bool, int, int]:
    return node.held, node.tick, -node.id


def _state(node: Node) -> str:
    if not node.device:
        return "swapped"
    return "running" if node.running else "preserved" if node.paused else "cached"


def _parent(node: Node) -> int | None:
    """The id of a node that is none of the roots."""
    return None if node.parent is None else node.id


def _run(node: Node) -> NodeView:
    assert node.parent is not None
    return NodeView(
        id=node.id,
        parent=_parent(node.parent),
        kind="run",
        state=_state(node),
        start=node.start,
        num_tokens=len(node.tokens),
        device_pages=len(node.device),
        host_pages=len(node.host),
        copying=node.transfer is not None,
        count=1,
        num_holders=node.running + node.paused,
        holders=tuple(sorted(node.leases))[:MAX_HOLDERS],
        last_used_step=node.tick,
    )


def _rest(node: Node, hidden: list[Node], budget: int) -> tuple[NodeView, int]:
    """What is below ``node`` and not shown, summed up; and how many nodes were looked at for it."""
    device = host = count = longest = 0
    pending = list(hidden)
    while pending and count < max(budget, len(hidden)):
        below = pending.pop()
        pending.extend(below.children.values())
        device, host, count = device + len(below.device), host + len(below.host), count + 1
        longest = max(longest, below.end)
    states = [_state(child) for child in hidden]
    view = NodeView(
        id=-1,
        parent=_parent(node),
        kind="rest",
        state=max(set(states), key=states.count),
        start=node.end,
        num_tokens=longest - node.end,
        device_pages=device,
        host_pages=host,
        copying=False,
        count=count,
        num_holders=sum(child.running + child.paused for child in hidden),
        holders=(),
        last_used_step=max(child.tick for child in hidden),
    )
    return view, count


def _beyond(context: Context, lease: PrefixLease, page_size: int) -> Iterator[NodeView]:
    """What a context has after its run of the tree: pages being filled, and tokens whose KV was given up."""
    node = lease.node
    end = node.end
    if lease.tail:
        tokens = max(lease.ahead, min(context.num_tokens - end, len(lease.tail) * page_size))
        state = "running" if lease.hold is Hold.RUNNING else "preserved"
        yield _of_context(context, node, "tail", state, end, tokens, len(lease.tail))
        end += tokens
    if context.high_water_tokens > end:
        yield _of_context(context, node, "gone", "discarded", end, context.high_water_tokens - end)


def _let_go(engine: Engine, shown: dict[int, Node]) -> Iterator[NodeView]:
    """What contexts without any lease would compute again: all their tokens but the prefix that is still there."""
    ledger, budget = engine.ledger, PROBE_BUDGET_TOKENS
    for context in engine.scheduler.contexts.values():
        if budget <= 0:
            return
        if context.id in ledger.leases or not context.high_water_tokens:
            continue
        budget -= context.high_water_tokens
        root = ledger.tree.roots().get(ledger.namespaces[context.id])
        node, start = root, 0
        for below, length in ledger.tree.walk(root, context.tokens, context.high_water_tokens) if root else ():
            node, start = below, below.start + length
        known = node is None or node.parent is None or node.id in shown
        if known and context.high_water_tokens > start:
            yield _of_context(context, node, "gone", "discarded", start, context.high_water_tokens - start)


def _of_context(
    context: Context, node: Node | None, kind: str, state: str, start: int, num_tokens: int, device_pages: int = 0
) -> NodeView:
    return NodeView(
        id=-1,
        parent=None if node is None else _parent(node),
        kind=kind,
        state=state,
        start=start,
        num_tokens=num_tokens,
        device_pages=device_pages,
        host_pages=0,
        copying=False,
        count=1,
        num_holders=1,
        holders=(context.id,),
        last_used_step=0 if node is None else node.tick,
    )


# -- contexts -------------------------------------------------------------------------------------------------

_ORDER = {Phase.RUNNING: 0, Phase.QUEUED: 1, Phase.PAUSED: 2}


def _contexts(engine: Engine, spans: dict[ContextId, OpenSpan], now: float) -> Iterator[ContextView]:
    """Running ones, queued ones, then paused ones, the latest pause first."""

    def key(context: Context) -> tuple[int, bool, float]:
        paused = context.phase is Phase.PAUSED
        return _ORDER.get(context.phase, 3), paused and not context.pause.calls, -spans[context.id].start_s

    for context in heapq.nsmallest(MAX_CONTEXTS, engine.scheduler.contexts.values(), key=key):
        span = spans[context.id]
        remaining = engine.scheduler.policy.estimator.remaining_s(context.pause, now) if span.tool else None
        yield ContextView(
            id=context.id,
            state=span.state,
            tool=span.tool,
            since_s=span.start_s if span.paused_s is None else span.paused_s,
            state_since_s=span.start_s,
            num_tokens=context.num_tokens,
            held_tokens=engine.ledger.held_tokens(context.id),
            expected_remaining_s=remaining,
        )
