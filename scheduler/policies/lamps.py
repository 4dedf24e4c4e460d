"""Strategy chosen from predictions, order by predicted memory over time (LAMPS, arXiv 2410.18248)."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from caesura.scheduler.context import Context
from caesura.scheduler.estimate import Estimator
from caesura.scheduler.policies.base import Choice, PausedContext, PausePolicy, Room, View
from caesura.scheduler.policies.foresight import Foresight
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import Action, ActionCosts, ContextId
from caesura.scheduler.waste import preserve_token_s, triangular_token_s

STARVING_STEPS = 100


class Lamps(PausePolicy):
    """At a pause, the cheapest of three by the predicted duration T; the queue by the rank of what is to come.

    ::

        w_P = T * C
        w_D = InferCept's coded sum: f(S) c n (n+1) / 2 + a c n R + a l (R + l)
        w_S = f(S) n C + 2 T_swap(c) n R,          n = max(ceil(C / c) - 1, 1)

        MT(C) = f(S) c n (n+1) / 2 is the memory-time of building C tokens; with b tokens before the next pause
        preserve  MT(b) + b T + MT(after)
        discard   MT(b) + MT(b + after)
        swap      MT(b) + 2 T_swap(b) b / 2 + T / 10 + MT(after)

    R: tokens of the running batch; c: free part of S; a: seconds a token. Smallest rank first; who has not been served
    for 100 steps goes before all others until it next pauses. The paper's length and duration predictor (a trained
    model over the prompt) is replaced by means per tool, see ``foresight``; ``after`` is taken to be what is expected
    before the next pause. Contexts are ranked when they are queued and not again while they wait.
    """

    name = "lamps"
    estimator_name = "profiled"
    uses_host = True

    def __init__(self, estimator: Estimator | None = None) -> None:
        super().__init__(estimator)
        self._foresight = Foresight()
        self._ranks: dict[ContextId, float] = {}
        self._queued_at: dict[ContextId, int] = {}  # step
        self._boosted: set[ContextId] = set()

    def saw_queued(self, context: Context, now: float) -> None:
        self._foresight.saw_queued(context, now)
        self._ranks.pop(context.id, None)
        self._queued_at.pop(context.id, None)

    def saw_running(self, context: Context, now: float) -> None:
        self._queued_at.pop(context.id, None)

    def saw_paused(self, context: Context, now: float) -> None:
        self._foresight.saw_paused(context, now)
        self._boosted.discard(context.id)

    def saw_closed(self, context: Context) -> None:
        self._foresight.saw_closed(context)
        self._ranks.pop(context.id, None)
        self._queued_at.pop(context.id, None)
        self._boosted.discard(context.id)

    def order_key(self, context: Context) -> tuple[float, ...]:
        rank = -1.0 if context.id in self._boosted else self._ranks.get(context.id, 0.0)
        return (rank, context.arrival, context.id)

    def admit(self, queued: Sequence[Context], room: Room) -> Sequence[Context]:
        for context in queued:
            if context.id not in self._ranks:
                self._ranks[context.id] = self.rank(context, room.profile)
            if room.step - self._queued_at.setdefault(context.id, room.step) > STARVING_STEPS:
                self._boosted.add(context.id)
        return sorted(queued, key=self.order_key)

    def rank(self, context: Context, profile: CostProfile) -> float:
        """Predicted token-seconds from now to the end of the stretch after the next pause."""
        ahead, pause_s = self._foresight.tokens(context), self._foresight.seconds(context)
        before = context.num_tokens + ahead
        keep = before * pause_s + build_token_s(profile, ahead)
        drop = build_token_s(profile, before + ahead)
        swap = profile.copy_s(round(before)) * before + 0.1 * pause_s + build_token_s(profile, ahead)
        return build_token_s(profile, before) + min(keep, drop, swap)

    def review(self, view: View) -> list[Choice]:
        choices = []
        for paused in view.paused:
            if not paused.tool or paused.decided is not None:
                continue
            costs = strategy_costs(view, paused)
            best = min(costs.preserve_token_s, costs.discard_token_s, costs.swap_token_s)
            if costs.preserve_token_s == best:
                action = Action.PRESERVE
            else:
                action = Action.SWAP if view.has_host and costs.swap_token_s == best else Action.DISCARD
            choices.append(Choice(paused.id, action, costs, f"cheapest for a predicted {paused.remaining_s:.3g} s"))
        return choices


def build_token_s(profile: CostProfile, num_tokens: float) -> float:
    """MT(C): tokens resident while C of them are computed in chunks of S."""
    chunk = max(1, profile.saturation_tokens)
    chunks = ceil(num_tokens / chunk)
    return profile.forward_s(chunk) * chunk * chunks * (chunks + 1) / 2


def strategy_costs(view: View, paused: PausedContext) -> ActionCosts:
    """w_P, w_S and w_D for a context's own tokens."""
    profile, tokens = view.profile, paused.exclusive_tokens
    chunk = max(1, profile.saturation_tokens - view.running_rows)
    chunks = max(1, ceil(tokens / chunk) - 1)
    swap = profile.forward_s(profile.saturation_tokens) * chunks * tokens
    return ActionCosts(
        preserve_token_s=preserve_token_s(paused.remaining_s, tokens),
        swap_token_s=swap + 2 * profile.copy_s(chunk) * chunks * view.batch_tokens,
        discard_token_s=triangular_token_s(profile, tokens, view.batch_tokens, chunk),
    )
