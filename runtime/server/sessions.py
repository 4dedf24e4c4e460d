"""SGLang's sessions: the server keeps the tokens, a request sends only what is new and says which one it goes on from.

Tokens alone are kept; their KV is the prefix cache's. Sessions belong to a key, are bounded, and end when unused.
"""

from __future__ import annotations

import secrets
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
from caesura.runtime.server import limits
from caesura.runtime.server.errors import ApiError
from msgspec import Meta

MAX_SESSION_REQUESTS = 1024
MAX_SESSION_TOKENS = 1 << 23  # of all sessions together
Offset = Annotated[int, Meta(ge=-limits.MAX_PROMPT_TOKENS, le=limits.MAX_PROMPT_TOKENS)]


class SessionParams(msgspec.Struct):
    """``session_params`` of ``/generate``: go on from the request ``rid``, after its first ``offset`` tokens or all.

    ``replace`` forgets what came after ``rid`` (everything, without one); ``drop_previous_output`` leaves out what the
    model answered there.
    """

    id: limits.Name
    rid: limits.Id | None = None
    offset: Offset | None = None
    replace: bool | None = None
    drop_previous_output: bool | None = None


class OpenSession(msgspec.Struct):
    """The body of ``/open_session``. A ``streaming`` session is a line of requests, one at a time; any other a tree.

    ``timeout`` is in seconds without a request. ``capacity_of_str_len`` is accepted and, as in SGLang, bounds nothing.
    """

    capacity_of_str_len: Annotated[int, Meta(ge=0, le=1 << 40)] = 0
    session_id: limits.Name | None = None
    streaming: bool | None = None
    timeout: limits.WaitSeconds | None = None


class CloseSession(msgspec.Struct):
    """The body of ``/close_session``."""

    session_id: limits.Name


@dataclass(slots=True)
class _Node:
    """One request. ``output`` is None while it runs; until it has ended, ``replaced`` may come back."""

    rid: str
    parent: str | None
    prompt: array[int]
    output: array[int] | None = None
    replaced: Sequence[_Node] = ()

    @property
    def num_tokens(self) -> int:
        """Its own, and of what it replaced: the session has to have room for it."""
        return len(self.prompt) + len(self.output or ()) + sum(node.num_tokens for node in self.replaced)

    @property
    def num_requests(self) -> int:
        return 1 + len(self.replaced)


@dataclass(slots=True)
class _Session:
    key_id: str
    id: str
    streaming: bool
    ttl_s: float
    expires_at: float
    nodes: dict[str, _Node] = field(default_factory=dict)
    num_tokens: int = 0  # of requests that have ended, or may come back

    @property
    def num_requests(self) -> int:
        return sum(node.num_requests for node in self.nodes.values())

    def after(self, rid: str | None) -> dict[str, _Node]:
        """All requests that came after this one; all there are, without one."""
        children: dict[str | None, list[_Node]] = {}
        for node in self.nodes.values():
            children.setdefault(node.parent, []).append(node)
        found: dict[str, _Node] = {}
        pending = list(children.get(rid, ()))
        while pending:  # a line of requests is as deep as it is long
            node = pending.pop()
            found[node.rid] = node
            pending += children.get(node.rid, ())
        return found

    def drop(self, nodes: dict[str, _Node]) -> None:
        """Forget requests."""
        for rid, node in nodes.items():
            del self.nodes[rid]
            self.num_tokens -= node.num_tokens

    def add(self, nodes: Sequence[_Node]) -> None:
        """Remember requests."""
        self.nodes.update((node.rid, node) for node in nodes)
        self.num_tokens += sum(node.num_tokens for node in nodes)


@dataclass(frozen=True, slots=True)
class SessionTurn:
    """A request of a session, about to run after ``before``. ``aborts`` are requests that it replaces."""

    session: _Session
    rid: str
    parent: str | None
    before: array[int]
    aborts: Sequence[str]

    def prompt(self, new: Sequence[int], bos_id: int | None) -> list[int]:
        """The whole prompt; what is appended begins without BOS."""
        if self.parent is not None and new and new[0] == bos_id:
            new = new[1:]
        return [*self.before, *new]


class SessionStore:
    """The store. All methods run on the server's event loop."""

    def __init__(
        self, max_sessions: int, max_per_key: int, ttl_s: float, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_sessions = max_sessions
        self._max_per_key = max_per_key
        self._ttl_s = ttl_s
        self._monotonic = monotonic
        self._sessions: OrderedDict[tuple[str, str], _Session] = OrderedDict()  # the one used last at the end

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, key_id: str, body: OpenSession) -> str:
        """A new session's id. Raises ApiError 400 for an id in use, 429 when there are too many."""
        self.expire()
        session_id = body.session_id or secrets.token_hex(16)
        if (key_id, session_id) in self._sessions:
            raise ApiError(400, f"session {session_id!r} is open already; close it first", param="session_id")
        mine = sum(session.key_id == key_id for session in self._sessions.values())
        if mine >= self._max_per_key or len(self._sessions) >= self._max_sessions:
            raise ApiError(429, f"there are {mine} sessions of this key; close some", retry_after_s=5)
        ttl_s = min(body.timeout or self._ttl_s, self._ttl_s)
        session = _Session(key_id, session_id, bool(body.streaming), ttl_s, self._monotonic() + ttl_s)
        self._sessions[key_id, session_id] = session
        return session_id

    def close(self, key_id: str, session_id: str) -> bool:
        """Forget a session; requests of it that run are not stopped. Whether there was one."""
        return self._sessions.pop((key_id, session_id), None) is not None

    def begin(self, key_id: str, asked: SessionParams, rid: str) -> SessionTurn:
        """A request's place in its session. Raises ApiError 400."""
        self.expire()
        session = self._sessions.get((key_id, asked.id))
        if session is None:
            raise _refused(f"session {asked.id!r} does not exist or has expired", "id")
        self._sessions.move_to_end((key_id, asked.id))
        session.expires_at = self._monotonic() + session.ttl_s
        replaced: dict[str, _Node] = {}  # dropped only when nothing is refused any more
        if session.streaming:
            parent = self._line(session, asked)
        else:
            if asked.rid is not None and asked.rid not in session.nodes:
                raise _refused(f"request {asked.rid!r} is not part of session {asked.id!r}", "rid")
            parent = session.nodes[asked.rid] if asked.rid is not None else None
            if asked.replace:
                replaced = session.after(asked.rid)
        if parent is not None and parent.output is None:
            raise _refused(f"request {parent.rid!r} has not ended", "rid")
        if rid in session.nodes and rid not in replaced:
            raise _refused(f"request {rid!r} is already part of session {asked.id!r}", "rid")
        num_requests = session.num_requests - sum(node.num_requests for node in replaced.values())
        if num_requests >= MAX_SESSION_REQUESTS:
            raise _refused(f"the session holds {num_requests} requests; replace some, or close it", "id")
        num_tokens = session.num_tokens - sum(node.num_tokens for node in replaced.values())
        if num_tokens >= MAX_SESSION_TOKENS:
            raise _refused(f"the session holds {num_tokens} tokens; replace requests, or close it", "id")
        session.drop(replaced)
        before = array("i")
        if parent is not None:
            before = parent.prompt[:] if asked.drop_previous_output else parent.prompt + (parent.output or array("i"))
            before = before[: asked.offset] if asked.offset else before
        name = parent.rid if parent is not None else None
        ended = [node for node in replaced.values() if node.output is not None]
        session.add([_Node(rid, name, array("i"), replaced=ended)])
        return SessionTurn(session, rid, name, before, [node.rid for node in replaced.values() if node.output is None])

    @staticmethod
    def _line(session: _Session, asked: SessionParams) -> _Node | None:
        """The one request that a streaming session's next one goes on from."""
        for name in ("replace", "drop_previous_output", "offset"):
            if getattr(asked, name):
                raise _refused(f"a streaming session only appends; {name} is not possible", name)
        if any(node.output is None for node in session.nodes.values()):
            raise _refused("a streaming session has one request at a time, and one is running", "id")
        return next(reversed(session.nodes.values()), None)

    def commit(self, turn: SessionTurn, prompt: Sequence[int], output: Sequence[int]) -> None:
        """The request has ended: others may go on from it."""
        turn.session.expires_at = self._monotonic() + turn.session.ttl_s
        node = turn.session.nodes.get(turn.rid)
        if node is None:  # replaced meanwhile
            return
        node.prompt, node.output, node.replaced = array("i", prompt), array("i", output), ()
        if turn.session.streaming and turn.parent is not None:
            del turn.session.nodes[turn.parent]
            node.parent = None
        turn.session.num_tokens = sum(one.num_tokens for one in turn.session.nodes.values())
        total = sum(session.num_tokens for session in self._sessions.values())
        while total > MAX_SESSION_TOKENS and len(self._sessions) > 1:
            total -= self._sessions.popitem(last=False)[1].num_tokens

    def roll_back(self, turn: SessionTurn) -> None:
        """The request has no end to go on from: as if it had not been. What it replaced is back, unless names of it are
        in use by now. Nothing happens after ``commit``."""
        turn.session.expires_at = self._monotonic() + turn.session.ttl_s
        node = turn.session.nodes.get(turn.rid)
        if node is not None and node.output is None:
            turn.session.drop({turn.rid: node})
            if not any(one.rid in turn.session.nodes for one in node.replaced):
                turn.session.add(node.replaced)

    def expire(self) -> None:
        """Forget what nobody uses: no request of it runs, and none has for its time."""
        now = self._monotonic()
        late = [place for place, session in self._sessions.items() if now >= session.expires_at]
        for place in late:
            if all(node.output is not None for node in self._sessions[place].nodes.values()):
                del self._sessions[place]


def _refused(message: str, name: str) -> ApiError:
    return ApiError(400, message, param=f"session_params.{name}")
