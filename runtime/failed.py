"""What a step that failed leaves behind: contexts that are given up, and nothing that could be found of them."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

from caesura.runtime.errors import ContextClosed
from caesura.scheduler.types import ContextId, PageId, Phase, StepPlan

if TYPE_CHECKING:
    from caesura.runtime.engine import Engine


def fail_step(engine: Engine, plan: StepPlan, error: Exception, live: Set[ContextId] | None = None) -> None:
    """Nothing of ``plan`` came about. ``live``: its contexts, but for those that have ended or stopped since."""
    contexts = frozenset(piece.context_id for piece in plan.slices)
    own = contexts if live is None else contexts & live
    spoil(engine, plan, contexts, own)
    for context in own:
        _give_up(engine, context, f"the step failed: {error}")


def spoil(engine: Engine, plan: StepPlan, broken: Set[ContextId], live: Set[ContextId]) -> None:
    """What ``plan`` should have computed for the broken contexts is not to be found, though it may be in the cache
    by now. Who runs on it is given up, who rests computes it again; the broken ones that are ``live`` are the
    caller's business."""
    ledger, contexts = engine.ledger, engine.scheduler.contexts
    size, written = ledger.page_size, set[PageId]()
    pieces = [piece for piece in plan.slices if piece.context_id in broken]
    for piece in pieces:
        written.update(piece.pages[piece.start // size : -(-(piece.start + piece.num_tokens) // size)])
    had_it = ledger.spoil(written)
    for context in (had_it | broken) - (broken & live):
        state = contexts.get(context)
        if state is not None and state.phase is Phase.RUNNING:
            _give_up(engine, context, "the KV it shares could not be computed")
    for piece in pieces:
        if piece.context_id in contexts and piece.context_id not in live:  # stopped in between, and still open
            ledger.truncate(piece.context_id, piece.start)


def _give_up(engine: Engine, context: ContextId, why: str) -> None:
    """Close a context and leave nothing of its KV to be found."""
    if context in engine.scheduler.contexts:
        engine.ledger.discard(context)
        engine.close(context, ContextClosed(why))
