"""The client's thread: it starts the engine process, talks to it, notices its death and starts another one.

Other threads hand over commands and get answers through sinks, which are called on this thread.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum

import zmq
from caesura.runtime.config import EngineConfig
from caesura.runtime.errors import CaesuraError, EngineStopped
from caesura.runtime.ipc import messages as m
from caesura.runtime.ipc.channel import LinkBroken
from caesura.runtime.ipc.launch import EngineChild
from caesura.runtime.logs import note
from caesura.scheduler.types import ContextId

log = logging.getLogger("caesura.engine")
Sink = Callable[[m.Answer | CaesuraError], None]


class State(StrEnum):
    """Where the engine process is in its life, as the client sees it."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Supervision:
    """When an engine process counts as dead, and how often it is replaced.

    A process that ended is noticed at once. One that hangs is noticed after ``missed_heartbeats`` intervals without a
    sign of life, or when its engine has been in one step for ``max_step_s``. One that is starting may be silent for
    ``start_silence_s``: loading libraries holds the interpreter, for long on a busy machine.
    """

    heartbeat_s: float = 2.0
    missed_heartbeats: int = 3
    start_silence_s: float = 60.0
    max_step_s: float = 300.0
    max_restarts: int = 5
    restart_window_s: float = 60.0
    exit_grace_s: float = 10.0


class Connection:
    """One engine at a time, and the requests it has been given."""

    def __init__(self, config: EngineConfig, supervision: Supervision) -> None:
        self._config = config
        self._rules = supervision
        self._lock = threading.Lock()
        self._state = State.STARTING
        self._reason = EngineStopped("the engine is starting")
        self._life = 0  # counts engine processes: contexts of an earlier one are gone
        self._pending: dict[int, Sink] = {}
        self._outbox: deque[bytes] = deque()
        self._numbers = itertools.count(1)
        self._drain_until: float | None = None
        self._ring, self._bell = socket.socketpair()
        self._ring.setblocking(False)
        self._bell.setblocking(False)
        self._deaths: deque[float] = deque()
        self.restarts = 0
        self.pid: int | None = None
        self.folder: str | None = None
        self.on_context_closed: Callable[[int, ContextId, CaesuraError], None] = lambda *_: None
        self.started: Future[m.Ready] = Future()
        self._thread = threading.Thread(target=self._run, name="caesura-engine-client", daemon=True)
        self._thread.start()

    # -- any thread -------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self._state

    @property
    def given_up(self) -> EngineStopped | None:
        """Why no other engine process will be started; None for one that was told to end."""
        with self._lock:
            return self._reason if self._state is State.STOPPED and self._drain_until is None else None

    @property
    def life(self) -> int:
        """Counts engine processes: the contexts of an earlier one are lost."""
        return self._life

    def request(self, make: Callable[[int], m.Command], sink: Sink, life: int | None = None) -> tuple[int, int]:
        """Send a command; ``sink`` hears its answer. Returns the request's number and the engine's.

        ``life`` names the engine process that the command is about. Raises EngineStopped when that one is gone or
        none is ready, InvalidRequest when the command cannot be sent.
        """
        number = next(self._numbers)
        data = m.encode(make(number))
        with self._lock:
            if life is not None and life != self._life:
                raise EngineStopped("the context was lost when its engine process ended")
            if self._state is not State.READY and not (self._state is State.DRAINING and life is not None):
                raise EngineStopped(str(self._reason))
            self._pending[number] = sink
            self._outbox.append(data)
            life = self._life
        self._wake()
        return number, life

    def post(self, command: m.Command, life: int) -> None:
        """Send a command that has no answer; dropped when its engine process is gone."""
        data = m.encode(command)
        with self._lock:
            if life != self._life or self._state not in (State.READY, State.DRAINING):
                return
            self._outbox.append(data)
        self._wake()

    def close(self, drain_s: float) -> None:
        """Let requests finish for up to ``drain_s``, then end the process. Blocks. Idempotent."""
        with self._lock:
            if self._drain_until is None:
                self._drain_until = time.monotonic() + drain_s
                if self._state is State.READY:
                    self._outbox.append(m.encode(m.Shutdown(drain_s)))
                    self._state = State.DRAINING
                self._reason = EngineStopped("the engine was closed")
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake(self) -> None:
        try:
            self._ring.send(b"!")
        except OSError:  # full: it has been rung; closed: nobody is there
            return

    # -- the thread: lives ------------------------------------------------------------------------------------

    def _run(self) -> None:
        reason: CaesuraError = EngineStopped("the engine was closed")
        try:
            while self._drain_until is None:
                died = self._live()
                if self._drain_until is not None:
                    break
                if not self.started.done():
                    reason = died
                    break
                if not self._may_restart(died):
                    reason = self._reason
                    break
        except BaseException as error:
            reason = EngineStopped(f"the engine's client failed: {type(error).__name__}: {error}")
            raise
        finally:
            self._lose(State.STOPPED, reason)
            if not self.started.done():
                self.started.set_exception(reason)
            self._ring.close()
            self._bell.close()

    def _live(self) -> CaesuraError:
        """One engine process from its start to its end; returns why it ended."""
        try:
            child = EngineChild(self._config, self._rules.heartbeat_s)
        except EngineStopped as error:
            return error
        self.pid, self.folder = child.pid, str(child.folder)
        note(log, logging.INFO, "engine_started", pid=child.pid)
        try:
            reason = _Conversation(self, child, self._rules).run()
        finally:
            child.close()
            self.pid = self.folder = None
        asked = self._drain_until is not None
        level, event = (logging.INFO, "engine_stopped") if asked else (logging.ERROR, "engine_died")
        note(log, level, event, pid=child.pid, reason=str(reason))
        return reason

    def _may_restart(self, died: CaesuraError) -> bool:
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - self._rules.restart_window_s:
            self._deaths.popleft()
        count = len(self._deaths)
        if count > self._rules.max_restarts:
            text = f"the engine ended {count} times in {self._rules.restart_window_s:.0f} s; given up. Last: {died}"
            self._lose(State.STOPPED, EngineStopped(text))
            note(log, logging.CRITICAL, "engine_given_up", deaths=count)
            return False
        self._lose(State.RESTARTING, EngineStopped(f"the engine is being restarted: {died}"))
        self.restarts += 1
        note(log, logging.WARNING, "engine_restarting", restarts=self.restarts)
        return True

    def _lose(self, state: State, reason: CaesuraError) -> None:
        """The engine is gone: everyone who waits for it hears so now."""
        with self._lock:
            self._state, self._life = state, self._life + 1
            self._reason = EngineStopped(str(reason))
            pending, self._pending = self._pending, {}
            self._outbox.clear()
        for sink in pending.values():
            sink(EngineStopped(str(self._reason)))

    # -- the thread: what a conversation reports --------------------------------------------------------------

    def _ready(self, event: m.Ready) -> None:
        with self._lock:
            if self._drain_until is None:
                self._state = State.READY
        note(log, logging.INFO, "engine_ready", pid=self.pid)
        if not self.started.done():
            self.started.set_result(event)

    def _answered(self, event: m.Answer) -> None:
        last = not isinstance(event, m.Chunk) or event.chunk.finish is not None
        with self._lock:
            sink = self._pending.pop(event.request, None) if last else self._pending.get(event.request)
        if sink is not None:
            sink(event)

    def _context_closed(self, event: m.Closed) -> None:
        self.on_context_closed(self._life, event.context, m.revive(event.error))
        self.post(m.Close(event.context), self._life)

    def _take_outbox(self, room_bytes: int) -> list[bytes]:
        """What there is room for; the rest waits until some of it is acknowledged."""
        taken: list[bytes] = []
        with self._lock:
            while self._outbox and len(self._outbox[0]) <= room_bytes:
                taken.append(self._outbox.popleft())
                room_bytes -= len(taken[-1])
        return taken


class _Conversation:
    """The poll loop with one engine process."""

    def __init__(self, owner: Connection, child: EngineChild, rules: Supervision) -> None:
        self._owner = owner
        self._child = child
        self._rules = rules
        self._fatal: CaesuraError | None = None
        self._heard_at = self._looked_at = time.monotonic()
        self._noted_at = 0.0
        self._allowed_s = rules.start_silence_s
        self._poller = zmq.Poller()
        self._poller.register(child.socket, zmq.POLLIN)
        self._poller.register(child.lifeline, zmq.POLLIN)
        self._poller.register(owner._bell, zmq.POLLIN)

    def run(self) -> CaesuraError:
        """Until the process is gone or has to go; returns the reason."""
        try:
            self._transmit(self._child.channel.pack([m.encode(m.Ping())]))
            while True:
                ready = dict(self._poller.poll(max(1, int(self._rules.heartbeat_s * 500))))
                if self._owner._bell.fileno() in ready:
                    self._hush()
                self._receive()
                if self._child.lifeline.fileno() in ready:
                    return self._gone()
                self._flush()
                reason = self._fatal or self._silence() or self._overdue()
                if reason is not None:
                    return reason
        except LinkBroken as error:
            return EngineStopped(f"the engine process was ended: {error}")

    def _gone(self) -> CaesuraError:
        """The process has ended; what it said last may still be on the way."""
        while self._child.socket.poll(20):
            self._receive()
        return self._fatal or EngineStopped(f"the engine process {self._child.describe_exit()}")

    def _hush(self) -> None:
        try:
            while self._owner._bell.recv(4096):
                pass
        except BlockingIOError:
            return

    def _silence(self) -> CaesuraError | None:
        """Too long without a sign of life. Time in which this thread itself did not run does not count."""
        now = time.monotonic()
        asleep_s = now - self._looked_at
        self._looked_at = now
        if asleep_s > self._rules.heartbeat_s:
            self._heard_at += asleep_s
        if now - self._noted_at >= self._rules.heartbeat_s:
            self._noted_at = now
            self._transmit([self._child.channel.note()])
        silent_s = now - self._heard_at
        if silent_s <= self._allowed_s:
            return None
        return EngineStopped(f"the engine process hung: no sign of life for {silent_s:.1f} s, so it was ended")

    def _overdue(self) -> CaesuraError | None:
        """The client wants to close: at once when nothing can run, else when the process had its time."""
        until = self._owner._drain_until
        if until is None:
            return None
        draining = self._owner.state is State.DRAINING
        if draining and time.monotonic() < until + self._rules.exit_grace_s:
            return None
        return EngineStopped("the engine was closed")

    # -- frames -----------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        while True:
            try:
                parts = self._child.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            received = self._child.channel.take(parts[0])
            self._transmit(received.replies)
            for event in received.messages:
                self._handle(event)

    def _handle(self, event: m.Event) -> None:
        self._heard_at = time.monotonic()
        match event:
            case m.Heartbeat():
                if event.engine_lag_s > self._rules.max_step_s:
                    self._fatal = EngineStopped(
                        f"the engine hung: one step has taken {event.engine_lag_s:.0f} s, so it was ended"
                    )
            case m.Ready():
                self._allowed_s = self._rules.heartbeat_s * self._rules.missed_heartbeats
                self._owner._ready(event)
            case m.Fatal():
                self._fatal = m.revive(event.error)
            case m.Closed():
                self._owner._context_closed(event)
            case m.Account():
                self._owner._answered(self._with_counts(event))
            case _:
                self._owner._answered(event)

    def _with_counts(self, event: m.Account) -> m.Account:
        ours = {
            "restarts": self._owner.restarts,
            "engine": event.values.get("ipc"),
            "client": dataclasses.asdict(self._child.channel.counts),
        }
        return m.Account(event.request, {**event.values, "ipc": ours})

    def _flush(self) -> None:
        outbox = self._owner._take_outbox(self._child.channel.room_bytes)
        if outbox:
            self._transmit(self._child.channel.pack(outbox))

    def _transmit(self, frames: list[bytes]) -> None:
        for frame in frames:
            self._child.socket.send(frame, zmq.NOBLOCK)
