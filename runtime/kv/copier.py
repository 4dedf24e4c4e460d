"""Threads that carry out copies beside compute, a chunk of each in turn."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from caesura.runtime.errors import BrokenInvariant
from caesura.scheduler.types import Move, MoveId

Chunks = Callable[[Move], Iterator[None]]  # copies a chunk at each ``next``, the last one before it stops


class Ended:
    """Moves that have ended, from all threads to the engine's."""

    def __init__(self) -> None:
        self.pending = 0  # begun and not taken yet; the engine thread's alone
        self._changed = threading.Condition()
        self._done: list[MoveId] = []
        self._faulty: set[MoveId] = set()
        self._broken: BaseException | None = None

    def add(self, move: MoveId, *, faulty: bool) -> None:
        """A move has ended. ``faulty``: it brought nothing."""
        with self._changed:
            self._done.append(move)
            if faulty:
                self._faulty.add(move)
            self._changed.notify_all()

    def give_up(self, error: BaseException) -> None:
        """A thread cannot go on; the engine thread must not wait for ever."""
        with self._changed:
            self._broken = error
            self._changed.notify_all()

    def take(self, wait_s: float) -> list[MoveId]:
        """Those that ended since the last call, oldest first; waits up to ``wait_s`` for the first one."""
        deadline = time.monotonic() + wait_s
        with self._changed:
            while not self._done and self._broken is None and self.pending:
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0 or not self._changed.wait(remaining_s):
                    break
            if self._broken is not None:
                raise BrokenInvariant(f"the page copy thread failed: {self._broken!r}") from self._broken
            done, self._done = self._done, []
        self.pending -= len(done)
        return done

    def take_faulty(self) -> frozenset[MoveId]:
        """The faulty ones among those taken since the last call."""
        with self._changed:
            faulty = frozenset(self._faulty.difference(self._done))
            self._faulty -= faulty
        return faulty


class Copier:
    """One thread, started by its first move. ``begin`` and ``close`` belong to the engine thread.

    An OSError (a disk's) ends its own move; any other error ends the thread. ``mode`` is entered in the thread.
    """

    def __init__(
        self,
        name: str,
        chunks: Chunks,
        ended: Ended,
        mode: Callable[[], AbstractContextManager[object]],
        on_fault: Callable[[Move, OSError], None] = lambda *_: None,
    ) -> None:
        self._name = name
        self._chunks = chunks
        self._ended = ended
        self._mode = mode
        self._on_fault = on_fault
        self._moves: queue.SimpleQueue[Move | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self, move: Move) -> None:
        """Queue a move."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._ended.pending += 1
        self._moves.put(move)

    def close(self) -> None:
        """Finish the moves in flight and stop the thread. May be called twice."""
        if self._thread is not None:
            self._moves.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        active: deque[tuple[Move, Iterator[None]]] = deque()
        closing = False
        with self._mode():
            while active or not closing:
                while not closing and (not active or not self._moves.empty()):
                    move = self._moves.get()
                    if move is None:
                        closing = True
                    else:
                        active.append((move, self._chunks(move)))
                if active and not self._advance(active):
                    return

    def _advance(self, active: deque[tuple[Move, Iterator[None]]]) -> bool:
        """Copy one chunk of the move whose turn it is; False when the thread cannot go on."""
        move, chunks = active.popleft()
        try:
            next(chunks)
        except StopIteration:
            self._ended.add(move.id, faulty=False)
        except OSError as error:
            self._on_fault(move, error)
            self._ended.add(move.id, faulty=True)
        except BaseException as error:
            self._ended.give_up(error)
            return False
        else:
            active.append((move, chunks))
        return True
