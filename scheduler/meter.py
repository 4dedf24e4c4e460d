"""The running account: tokens computed and recomputed, bytes moved, and waste in token-seconds by cause."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from caesura.scheduler.context import ContextTable
from caesura.scheduler.ledger import Ledger
from caesura.scheduler.types import Action, MoveKind, Phase, StepPlan, StepResult


@dataclass(slots=True)
class WasteMeter:
    """Sums over steps.

    Idle memory is waste only while someone wants it: *preserve* counts tokens held by paused contexts in steps
    where a context had to wait for pages (``idle_token_s`` counts all steps, as InferCept's
    equation 2 does). *Recompute* counts the KV of the running batch for the part of a step that went into tokens
    computed before; *swap* the tokens at either end of a copy in flight.
    """

    page_size: int
    steps: int = 0
    busy_s: float = 0.0
    tokens_computed: int = 0
    tokens_recomputed: int = 0
    pages_out: int = 0
    pages_in: int = 0
    pages_to_disk: int = 0  # of pages_out, and what moved down from host memory
    pages_from_disk: int = 0  # of pages_in
    copies_failed: int = 0  # the disk was full or broken, or a page did not match its checksum
    preemptions: int = 0
    evicted_pages: int = 0
    decisions_preserve: int = 0
    decisions_swap: int = 0
    decisions_discard: int = 0
    decisions_release: int = 0
    idle_token_s: float = 0.0
    preserve_token_s: float = 0.0
    recompute_token_s: float = 0.0
    swap_token_s: float = 0.0

    @property
    def waste_token_s(self) -> float:
        """Preserve, recompute and swap together."""
        return self.preserve_token_s + self.recompute_token_s + self.swap_token_s

    def record(
        self,
        plan: StepPlan,
        result: StepResult,
        ledger: Ledger,
        contended: bool,
        contexts: ContextTable,
    ) -> None:
        """Account for one step. Called before its results change the ledger."""
        rows = plan.num_query_tokens
        again = sum(piece.num_recomputed_tokens for piece in plan.slices)
        self.steps += 1
        self.busy_s += result.duration_s
        self.tokens_computed += rows
        self.tokens_recomputed += again
        self.preemptions += len(plan.preempted)
        self.evicted_pages += plan.evicted_pages
        for move in plan.moves:
            below = move.source if move.kind is MoveKind.IN else move.target
            on_disk = sum(page >= ledger.num_host_pages for page in below)
            if move.kind is MoveKind.IN:
                self.pages_in += len(below)
                self.pages_from_disk += on_disk
            else:
                self.pages_out += len(below) if move.kind is MoveKind.OUT else 0
                self.pages_to_disk += on_disk
        self.copies_failed += len(result.moves_failed)
        for decision in plan.decisions:
            self._count(decision.action)
        held = ledger.paused_pages * self.page_size
        self.idle_token_s += held * result.duration_s
        if contended:
            self.preserve_token_s += held * result.duration_s
        if again:
            batch = sum(ledger.computed(c.id) for c in contexts.in_phase(Phase.RUNNING))
            self.recompute_token_s += result.duration_s * again / rows * batch
        self.swap_token_s += ledger.copying_pages * self.page_size * result.duration_s

    def _count(self, action: Action) -> None:
        name = f"decisions_{action.value}"
        setattr(self, name, getattr(self, name) + 1)

    def snapshot(self) -> dict[str, float]:
        """All sums, for statistics and reports."""
        return asdict(self) | {"waste_token_s": self.waste_token_s}
