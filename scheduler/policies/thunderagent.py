"""Whole programs are paused and restored past the thrash point (ThunderAgent, arXiv 2602.13692)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from caesura.scheduler.context import Context
from caesura.scheduler.estimate import Estimator
from caesura.scheduler.policies.base import Choice, PausePolicy, Room, View
from caesura.scheduler.types import Action, ContextId

CHECK_EVERY_S = 5.0
SLACK_TOKENS = 100  # of growth, for each program


@dataclass(slots=True)
class _Program:
    """A program in memory: its contexts, and those of them that want the engine."""

    tokens: dict[ContextId, int] = field(default_factory=dict)
    reasoning: set[ContextId] = field(default_factory=set)
    acting_since: float = 0.0

    @property
    def size(self) -> int:
        return sum(self.tokens.values()) + SLACK_TOKENS

    def count(self, context: Context) -> None:
        """It wants the engine."""
        self.reasoning.add(context.id)
        self.tokens[context.id] = context.num_tokens


class ThunderAgent(PausePolicy):
    """A program is in memory or set aside; those set aside wait in one queue, shortest first.

    ::

        thrash when  capacity < sum over reasoning of c_p + sum over acting of c_q * 2 ** -t_q
        pause score   1/c + I(acting),   restore score  1/c + I(reasoning)

    Every 5 s, while it thrashes, programs are set aside: acting ones by smallest size, then reasoning ones, which leave
    at the end of their request. Theirs is left to the cache (LRU, write-through host tier, as in ``lru_host``). A new
    program or one set aside enters when it fits; we look at every step and not every 5 s. Shared tokens count for every
    program that has them: the paper adds one aggregate number to the capacity, which a program's proxy can read off
    an engine and a policy cannot. Collecting and preparing tool environments is not a scheduler's business.
    """

    name = "thunderagent"
    uses_host = True
    writes_through = True
    review_every_s = CHECK_EVERY_S

    def __init__(self, estimator: Estimator | None = None) -> None:
        super().__init__(estimator)
        self._inside: dict[ContextId, _Program] = {}
        self._leaving: set[ContextId] = set()  # set aside while reasoning: they go at the end of the request
        self._next_at = 0.0

    def saw_queued(self, context: Context, now: float) -> None:
        program = self._inside.get(context.program)
        if program is not None:
            program.count(context)

    def saw_paused(self, context: Context, now: float) -> None:
        program = self._inside.get(context.program)
        if program is None or context.id not in program.reasoning:
            return
        program.tokens[context.id] = context.num_tokens
        program.reasoning.remove(context.id)
        program.acting_since = now
        if not program.reasoning and context.program in self._leaving:
            self._set_aside(context.program)

    def saw_closed(self, context: Context) -> None:
        program = self._inside.get(context.program)
        if program is not None:
            program.tokens.pop(context.id, None)
            program.reasoning.discard(context.id)
            if not program.tokens or (not program.reasoning and context.program in self._leaving):
                self._set_aside(context.program)

    def _set_aside(self, program: ContextId) -> None:
        self._inside.pop(program, None)
        self._leaving.discard(program)

    def used_tokens(self, now: float) -> float:
        """Of programs in memory, those that act counting less the longer they do."""
        return sum(
            program.size if program.reasoning else program.size * 2.0 ** -(now - program.acting_since)
            for program in self._inside.values()
        )

    def admit(self, queued: Sequence[Context], room: Room) -> Sequence[Context]:
        allowed = [context for context in queued if context.program in self._inside]
        outside = [context for context in queued if context.program not in self._inside]
        for context in allowed:
            inside = self._inside[context.program]
            if context.id not in inside.reasoning:  # it was queued before its program was let in
                inside.count(context)
        if not outside:
            return allowed
        left = room.capacity_tokens - self.used_tokens(room.now)
        for context in sorted(outside, key=lambda context: (context.num_tokens, context.id)):
            program = self._inside.get(context.program)
            size = context.num_tokens + SLACK_TOKENS
            if program is None and size > left:
                break
            left -= size
            if program is None:
                program = self._inside[context.program] = _Program()
            program.count(context)
            allowed.append(context)
        return allowed

    def review(self, view: View) -> list[Choice]:
        if view.now >= self._next_at:
            self._next_at = view.now + CHECK_EVERY_S
            self._relieve(view.now, view.num_pages * view.page_size)
        return [
            Choice(paused.id, Action.RELEASE, view.costs(paused), "its program is set aside: memory thrashes")
            if paused.program not in self._inside
            else Choice(paused.id, Action.PRESERVE, view.costs(paused), "its program is in memory")
            for paused in view.paused
            if paused.tool and (paused.program not in self._inside or paused.decided is None)
        ]

    def _relieve(self, now: float, capacity_tokens: int) -> None:
        """Set programs aside until the rest fits."""
        over = self.used_tokens(now) - capacity_tokens
        by_score = sorted(self._inside.items(), key=lambda item: (bool(item[1].reasoning), item[1].size, item[0]))
        for name, program in by_score:
            if over <= 0:
                break
            if program.reasoning:
                self._leaving.add(name)
                over -= program.size
            else:
                over -= program.size * 2.0 ** -(now - program.acting_since)
                self._set_aside(name)
