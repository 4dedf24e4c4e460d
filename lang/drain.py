"""A state's queue of nodes and the task that executes them in order."""

from __future__ import annotations

import asyncio
import bisect
import collections
import contextvars
import itertools
import math
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence

from caesura.lang import ir
from caesura.lang.runner import runner

# The states whose bodies, and whose drains, the running code is part of: they must not be waited for to end.
_INSIDE: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar("caesura_inside", default=frozenset())
_DRAINED_BY: contextvars.ContextVar[frozenset[Drain]] = contextvars.ContextVar(
    "caesura_drained_by", default=frozenset()
)
_keys = itertools.count()


class Drain:
    """Executes what is added, one node after the other. Adding is safe from any thread, the rest is the loop's.

    ``execute`` runs one node; ``failed`` is told what it raised, and the queue stops; ``changed`` is called whenever
    something is done. The task exists only while there is work.
    """

    def __init__(
        self,
        execute: Callable[[ir.Expr, contextvars.Context], Awaitable[None]],
        failed: Callable[[BaseException], None],
        changed: Callable[[], None],
    ) -> None:
        self._key = next(_keys)
        self._execute = execute
        self._failed = failed
        self._changed = changed
        self._queue: collections.deque[tuple[int, ir.Expr, contextvars.Context]] = collections.deque()
        self._lock = threading.Lock()
        self._sealed = False
        self._task: asyncio.Task[None] | None = None
        self._num_added = 0
        self._num_done = 0
        self._writers: dict[str, list[int]] = {}  # variable -> numbers of the nodes that set it
        self._writers_of_any: list[int] = []
        self.parent: Drain | None = None  # of a fork: the queue that it was forked from,
        self.joined_at = math.inf  # and the number of the node there that waits for this queue
        self.open = False  # whether there is a context to work on

    def add(self, node: ir.Expr) -> bool:
        """Enqueue a node, unless the queue is sealed; gives whether it was. Sequences are taken apart, so that each
        part's variable is there as soon as it has run."""
        context = contextvars.copy_context()
        with self._lock:  # numbers in the queue must rise, whoever adds
            if self._sealed:
                return False
            for part in ir.flat(node):
                self._num_added += 1
                for inner in ir.walk(part):
                    self._announce(inner)
                self._queue.append((self._num_added, part, context))
        runner().call(self.kick)
        return True

    def seal(self) -> None:
        """Take no more nodes."""
        with self._lock:
            self._sealed = True

    def _announce(self, node: ir.Expr) -> None:
        """Note which variable a node will set, so that a read waits for the latest value, not an older one."""
        name = getattr(node, "name", None)
        names = list(node.thinking().values()) if isinstance(node, ir.Reasoning) else [name]
        for name in names:
            if isinstance(name, str):
                self._writers.setdefault(name, []).append(self._num_added)
        if isinstance(node, (ir.ProgramCall, ir.JoinFrom, ir.RollbackTo)):  # these may set any
            self._writers_of_any.append(self._num_added)
        if isinstance(node, ir.JoinFrom):
            for child in node.children:
                child.drain.joined_at = self._num_added

    def announced(self, name: str) -> bool:
        """Whether a node that sets ``name`` is still to run."""
        return self._writers.get(name, [0])[-1] > self._num_done

    def latest(self, name: str) -> bool:
        """Whether no node that sets ``name``, and that the running code can wait for, is still to run. Nodes that may
        set it count for the program's own code, which has added them; others have early values early."""
        bound = self._bound
        last = _last_below(bound, self._writers.get(name, ()))
        if self.holds_caller:
            last = max(last, _last_below(bound, self._writers_of_any))
        return last <= self._num_done

    @property
    def idle(self) -> bool:
        """Nothing is enqueued and nothing runs."""
        return self.open and not self._queue and self._task is None

    # -- who is asking -------------------------------------------------------------------------------------------

    @property
    def _bound(self) -> float:
        """The number of the first node that waits for the running code, and so cannot be waited for: a node that this
        code is part of, or the join of a fork whose node it is part of."""
        inner = _DRAINED_BY.get()
        if self in inner:
            return 0
        line = (drain for one in inner for drain in one.line)
        return min((drain.joined_at for drain in line if drain.parent is self), default=math.inf)

    @property
    def line(self) -> Iterator[Drain]:
        """This queue, the one it was forked from, and so on."""
        drain: Drain | None = self
        while drain is not None:
            yield drain
            drain = drain.parent

    @property
    def passed(self) -> bool:
        """All has run that the running code can wait for; the rest waits for that code."""
        return self._num_done >= self._bound - 1

    @property
    def holds_caller(self) -> bool:
        """The running code is part of the body that fills this queue or has forked it, or of a node of it or of its
        forks; it cannot wait for the body. A node of another fork is none of these: it may be waited for here."""
        inside, above = _INSIDE.get(), {drain for inner in _DRAINED_BY.get() for drain in inner.line}
        return self in above or any(drain._key in inside and drain not in above for drain in self.line)

    def mark_drained(self) -> None:
        """Mark the current context as part of a node of this queue."""
        _DRAINED_BY.set(_DRAINED_BY.get() | {self})

    def mark_body(self) -> contextvars.Token[frozenset[int]]:
        """Mark the current context as the body's, until `unmark_body`."""
        return _INSIDE.set(_INSIDE.get() | {self._key})

    @staticmethod
    def unmark_body(token: contextvars.Token[frozenset[int]]) -> None:
        """End of `mark_body`."""
        _INSIDE.reset(token)

    # -- working -------------------------------------------------------------------------------------------------

    def kick(self) -> None:
        """Start working when there is work."""
        if self.open and self._task is None and self._queue:
            self._task = runner().spawn(self._work(), context=contextvars.copy_context())
            self._task.add_done_callback(self._ended)  # also of one that is stopped before it has begun

    async def _work(self) -> None:
        try:
            self.mark_drained()
            while self._queue:
                number, node, context = self._queue.popleft()
                await self._execute(node, context)
                self._num_done = number
                self._changed()
        except asyncio.CancelledError:
            if self._task is not None and self._task.cancelling():
                raise
            self._failed(RuntimeError("the program was cancelled from within: something it awaited was cancelled"))
        except BaseException as error:  # user code may raise anything
            self._failed(error)

    def _ended(self, _: asyncio.Task[None]) -> None:
        self._task = None
        self._changed()
        self.kick()

    def clear(self) -> list[ir.Expr]:
        """Drop what has not begun; returns it."""
        with self._lock:
            dropped = [node for _, node, _ in self._queue]
            self._queue.clear()
            self._num_done = self._num_added
        return dropped

    @property
    def waiting(self) -> list[ir.Expr]:
        """What has not begun."""
        with self._lock:
            return [node for _, node, _ in self._queue]

    def stop(self) -> asyncio.Task[None] | None:
        """Drop everything; returns the task that is ending."""
        with self._lock:
            self._queue.clear()
        if self._task is not None and not self._task.cancelling():  # twice would cut its cleaning up short
            self._task.cancel()
        return self._task


def _last_below(bound: float, numbers: Sequence[int]) -> int:
    """The last of rising numbers that is below ``bound``, 0 when none is."""
    at = bisect.bisect_left(numbers, bound)
    return numbers[at - 1] if at else 0
