"""What readers of a state wait for: a variable, the end, the next text. All of it runs on the language's loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from caesura.lang.errors import UnknownVariable

if TYPE_CHECKING:
    from caesura.lang.state import ProgramState


class Reading:
    """How code waits for one state. Whoever waits gets the state's failure raised."""

    def __init__(self, state: ProgramState) -> None:
        self.state = state

    def over(self) -> bool:
        """Whether nothing more will come: for the body itself when the queue is empty, else when the run is done."""
        state = self.state
        if state.drain.passed:
            return True
        if state.drain.holds_caller or not state.body_running:
            return state.idle
        return False

    def ready(self, name: str) -> bool:
        """Whether the variable has its latest value."""
        core = self.state.core_or_none
        return core is not None and name in core.values.variables and self.state.drain.latest(name)

    async def value(self, name: str) -> Any:
        """The latest value of a variable. Raises UnknownVariable when nothing will set it."""
        state = self.state
        while state.failure is None and not self.ready(name):
            if self.over():
                known = ", ".join(sorted(state.variables)) or "none"
                raise UnknownVariable(
                    f"no variable {name!r} in program {state.execution.program!r}; there are: {known}"
                )
            await state.change()
        state.check_failure()
        return state.core.values.variables[name]

    async def done(self) -> None:
        """All that was added has run, for the program's own code and for forks; for others, the run has ended."""
        state = self.state
        if state.drain.holds_caller or state is not state.execution.root:
            while state.failure is None and not self.over():
                await state.change()
        else:
            while not state.execution.done:
                await state.change()
        state.check_failure()


class Stream:
    """One reader's place in the text of a state: that of the variable ``name``, or (None) all of it."""

    def __init__(self, reading: Reading, name: str | None) -> None:
        self._reading = reading
        self._name = name
        self._at = 0
        self._told = False  # some text of the variable, and no rollback since

    async def next(self) -> tuple[str, dict[str, Any]] | None:
        """The next text and its metadata, None at the end. A variable whose text no event has told comes whole."""
        reading, state = self._reading, self._reading.state
        while True:
            if (found := self._next_event()) is not None:
                return found
            state.check_failure()
            if self._name is None and reading.over():
                return None
            if self._name is not None and (reading.ready(self._name) or reading.over()):
                await reading.value(self._name)  # raises when nothing has set it
                text = "" if self._told else state.core.values.texts[self._name]
                self._told = True
                return (text, {}) if text else None
            await state.change()

    def _next_event(self) -> tuple[str, dict[str, Any]] | None:
        core = self._reading.state.core_or_none
        events = core.events if core is not None else []
        while self._at < len(events):
            event = events[self._at]
            self._at += 1
            concerns = self._name is None or self._name == event.name or self._name in event.void
            if concerns and (event.text or event.meta):
                self._told = not event.meta.get("rollback")
                return event.text, event.meta
        return None
