"""Two-stage order by value, and a step that breathes with the memory (AugServe, arXiv 2512.04013)."""

from __future__ import annotations

from collections.abc import Sequence

from caesura.scheduler.context import Context
from caesura.scheduler.estimate import Estimator
from caesura.scheduler.policies.base import Choice, PausedContext, PausePolicy, Room, View
from caesura.scheduler.policies.foresight import Foresight
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import Action, ActionCosts, ContextId, Phase
from caesura.scheduler.waste import preserve_token_s

STARVING_S = 10.0
LEAST_STEP_SHARE = 0.25  # of the step's limit


class AugServe(PausePolicy):
    """InferCept's three wastes without its chunks and hidden copies, and value as the order of service.

    ::

        W_P = T_int * C      W_D = T_fwd(C) * (C + C_other)      W_S = 2 * T_swap(C) * N_max
        V   = space-time of catching up + of decoding + of the pause under its strategy + of what follows

    N_max: the memory of the largest batch there has been. V orders the queue, smallest first. Stage one sets it at the
    arrival from predicted lengths, stage two again when a context is back and the length of the result is known. Who
    has waited for 10 s goes first. Step: free tokens plus those that paused contexts could give up, between a quarter
    of the limit and all of it. No code is public and the per-phase formulas, the boost and the bounds were not known;
    those here are ours. The paper's trained predictor is replaced by means per tool, see ``foresight``.
    """

    name = "augserve"
    estimator_name = "profiled"
    uses_host = True

    def __init__(self, estimator: Estimator | None = None) -> None:
        super().__init__(estimator)
        self._foresight = Foresight()
        self._values: dict[ContextId, float] = {}
        self._starving: set[ContextId] = set()
        self._largest_tokens = 0

    def saw_queued(self, context: Context, now: float) -> None:
        self._foresight.saw_queued(context, now)
        self._values.pop(context.id, None)

    def saw_paused(self, context: Context, now: float) -> None:
        self._foresight.saw_paused(context, now)
        self._starving.discard(context.id)

    def saw_closed(self, context: Context) -> None:
        self._foresight.saw_closed(context)
        self._values.pop(context.id, None)
        self._starving.discard(context.id)

    def order_key(self, context: Context) -> tuple[float, ...]:
        value = -1.0 if context.id in self._starving else self._values.get(context.id, 0.0)
        return (value, context.arrival, context.id)

    def admit(self, queued: Sequence[Context], room: Room) -> Sequence[Context]:
        for context in queued:
            if context.id not in self._values:
                missing = context.num_tokens - room.held_tokens(context.id)
                self._values[context.id] = self.value(context, missing, room.profile)
            if room.now - context.waiting_since > STARVING_S:
                self._starving.add(context.id)
        return sorted(queued, key=self.order_key)

    def value(self, context: Context, missing_tokens: int, profile: CostProfile) -> float:
        """V in token-seconds."""
        has, ahead = context.num_tokens, self._foresight.tokens(context)
        end = has + ahead
        catching_up = profile.recompute_s(has - missing_tokens, missing_tokens) * (has - missing_tokens / 2)
        decoding = ahead * profile.forward_s(1) * (has + ahead / 2)
        again_s = profile.recompute_s(0, round(end))
        waiting = min(self._foresight.seconds(context) * end, again_s * end, 2 * profile.copy_s(round(end)) * end)
        following = ahead * profile.forward_s(1) * (end + ahead / 2)
        return catching_up + decoding + waiting + following

    def step_tokens(self, limit: int, room: Room) -> int:
        paused = sum(room.held_tokens(context.id) for context in room.contexts.in_phase(Phase.PAUSED))
        return max(1, round(LEAST_STEP_SHARE * limit), min(limit, room.free_tokens + paused))

    def review(self, view: View) -> list[Choice]:
        self._largest_tokens = max(self._largest_tokens, view.batch_tokens)
        choices = []
        for paused in view.paused:
            if not paused.tool or paused.decided is not None:
                continue
            costs = self.strategy_costs(view, paused)
            best = min(costs.preserve_token_s, costs.discard_token_s, costs.swap_token_s)
            if costs.preserve_token_s == best:
                action = Action.PRESERVE
            else:
                action = Action.SWAP if view.has_host and costs.swap_token_s == best else Action.DISCARD
            choices.append(Choice(paused.id, action, costs, f"cheapest for a predicted {paused.remaining_s:.3g} s"))
        return choices

    def strategy_costs(self, view: View, paused: PausedContext) -> ActionCosts:
        """W_P, W_S and W_D for a context's own tokens."""
        profile, tokens = view.profile, paused.exclusive_tokens
        start = paused.held_tokens - tokens
        again_s = profile.forward_s(tokens, start + tokens / 2)
        return ActionCosts(
            preserve_token_s=preserve_token_s(paused.remaining_s, tokens),
            swap_token_s=2 * profile.copy_s(tokens) * max(self._largest_tokens, view.batch_tokens),
            discard_token_s=again_s * (tokens + view.batch_tokens),
        )
