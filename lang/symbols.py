"""What a symbolic run has in place of values: they can be put into a text, and whatever else asks for one ends it."""

from __future__ import annotations

import contextvars
from typing import NoReturn

from caesura.lang.errors import TraceStopped

tracing: contextvars.ContextVar[bool] = contextvars.ContextVar("caesura_tracing", default=False)


class Symbol:
    """A value that only a real run knows. In a symbolic run it is compared with nothing, not even with its like."""

    __slots__ = ()
    name: str

    def _ask(self, *_: object) -> NoReturn:
        raise TraceStopped(f"the value of {self.name!r} is known only when the program runs")

    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __iter__ = __len__ = __int__ = __float__ = _ask

    def __str__(self) -> str:
        if tracing.get():
            self._ask()
        return repr(self)

    def __eq__(self, other: object) -> bool:
        if tracing.get():
            self._ask()
        return type(self) is type(other) and self.name == getattr(other, "name", None)

    def __hash__(self) -> int:
        if tracing.get():
            self._ask()
        return hash((type(self), self.name))
