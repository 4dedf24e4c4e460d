"""Several states forked from one, and how they come together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from caesura.lang import ir
from caesura.lang.errors import StateError

if TYPE_CHECKING:
    from caesura.lang.state import ProgramState

MODES = ("gather_variable", "concate_and_append")


class ProgramStateGroup:
    """The children of a fork. ``group += x`` adds to all: an expression, a list with one each, or ``f(i)``."""

    def __init__(self, states: Sequence[ProgramState], source: ProgramState) -> None:
        self.states = list(states)
        self.source = source

    def join(self, mode: str = "gather_variable") -> None:
        """Bring the children together in the state they were forked from, and close them.

        ``gather_variable`` makes each variable that children have set a list in the parent, in order of the
        children; ``concate_and_append`` appends their texts. Enqueued as everything else; reads wait for it.
        """
        if mode not in MODES:
            raise StateError(f"join mode is {mode!r}; it must be one of {', '.join(MODES)}")
        for state in self.states:
            if state.closed is not None:
                raise StateError(f"a fork cannot be joined: {state.closed}")
            state.close("it was joined already")
            state.failure_seen = True  # the join will raise it
        self.source.submit(ir.JoinFrom(tuple(self.states), mode))

    def __getitem__(self, i: int) -> ProgramState:
        return self.states[i]

    def __setitem__(self, i: int, state: ProgramState) -> None:
        """So that ``group[i] += x`` works; a state cannot be exchanged for another."""
        if state is not self.states[i]:
            raise StateError("the states of a fork cannot be exchanged; add to them with +=")

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[ProgramState]:
        return iter(self.states)

    def __iadd__(self, other: Any) -> ProgramStateGroup:
        if callable(other) and not isinstance(other, ir.Expr):
            make: Callable[[int], Any] = other
            others = [make(i) for i in range(len(self.states))]
        elif isinstance(other, (list, tuple)):
            if len(other) != len(self.states):
                raise StateError(f"{len(other)} expressions for {len(self.states)} states; give one for each")
            others = list(other)
        else:
            others = [other] * len(self.states)
        for state, expr in zip(self.states, others, strict=True):
            state += expr
        return self

    def __enter__(self) -> ProgramStateGroup:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.join()
