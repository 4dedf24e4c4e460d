"""What the live view shows of an engine: a snapshot taken between two steps. No drawing here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from caesura.runtime.engine import Engine
from caesura.runtime.trace import state_of
from caesura.scheduler.types import ContextId, PauseDecision, Phase


@dataclass(frozen=True, slots=True)
class ContextRow:
    """One context: its state in a person's words, and the last decision about its KV, if there was one.

    ``fresh``: the decision is about the pause that it is in, not about an earlier one.
    """

    state: str
    tool: str
    elapsed_s: float  # of the pause
    num_tokens: int
    decision: PauseDecision | None
    fresh: bool


@dataclass(frozen=True, slots=True)
class PoolView:
    """Pages of the device pool by use; they add up to ``total``. Host pages that hold copies beside it."""

    total: int
    running: int
    preserved: int
    cached: int
    free: int
    moving: int
    page_size: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An engine at one moment."""

    pool: PoolView
    rows: Mapping[int, ContextRow] = field(default_factory=dict)  # by agent
    tokens_recomputed: int = 0
    bytes_swapped: int = 0
    waste_token_s: float = 0.0

    @property
    def variety(self) -> tuple[int, int]:
        """How much there is to see: different states, and decisions about present pauses."""
        return len({row.state for row in self.rows.values()}), sum(row.fresh for row in self.rows.values())


def take_snapshot(engine: Engine, roster: Mapping[ContextId, int]) -> Snapshot:
    """Look at the engine; to be called on its thread. ``roster`` says which context is which agent's."""
    now = engine.clock.now()
    ledger, meter = engine.ledger, engine.scheduler.meter
    used = ledger.num_device_pages - ledger.free_pages - ledger.evictable_pages
    rows: dict[int, ContextRow] = {}
    for context in list(engine.scheduler.contexts.values()):
        agent = roster.get(context.id)
        if agent is None:
            continue
        paused = context.phase is Phase.PAUSED
        decision = next(reversed(engine.decisions(context.id)), None)
        rows[agent] = ContextRow(
            state=state_of(context),
            tool=context.pause.tool if paused else "",
            elapsed_s=max(0.0, now - context.pause.since) if paused else 0.0,
            num_tokens=context.num_tokens,
            decision=decision,
            fresh=paused and decision is not None and decision.now >= context.pause.since,
        )
    return Snapshot(
        pool=PoolView(
            total=ledger.num_device_pages,
            running=used - ledger.paused_pages,
            preserved=ledger.paused_pages,
            cached=ledger.evictable_pages,
            free=ledger.free_pages,
            moving=ledger.copying_pages,
            page_size=ledger.page_size,
        ),
        rows=rows,
        tokens_recomputed=meter.tokens_recomputed,
        bytes_swapped=(meter.pages_out + meter.pages_in) * engine.executor.page_bytes,
        waste_token_s=meter.waste_token_s,
    )
