"""Contexts that clients hold by name: owned by a key, bounded, deleted when nobody asks for them any more."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from caesura.runtime.api import Handle
from caesura.runtime.errors import ContextClosed, DeadlineExceeded, EngineStopped
from caesura.runtime.server.errors import ApiError

MAX_SNAPSHOTS = 256


@dataclass(slots=True, eq=False)
class NamedContext:
    """A context with a name nobody can guess. One request at a time uses it."""

    id: str
    key_id: str
    handle: Handle
    ttl_s: float
    expires_at: float
    deleted: bool = False
    snapshots: dict[str, int] = field(default_factory=dict)  # name -> number of tokens
    cut_off: bool = False  # a generation that has not told its end: how long the context is now has to be asked for
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def snapshot(self, name: str) -> None:
        """Name the present length. Raises ApiError 400 when there are too many names."""
        if name not in self.snapshots and len(self.snapshots) >= MAX_SNAPSHOTS:
            raise ApiError(
                400, f"the context has {MAX_SNAPSHOTS} snapshots; use one of their names again", param="name"
            )
        self.snapshots[name] = self.handle.num_tokens

    async def measure(self) -> None:
        """Have the handle tell the right length, also after a generation that was cut off."""
        if self.cut_off:
            await self.handle.append([])
            self.cut_off = False

    async def roll_back(self, num_tokens: int) -> None:
        """Cut to the first tokens. Snapshots of what is cut off are gone: other tokens may come in its place."""
        await self.handle.truncate(num_tokens)
        self.snapshots = {name: size for name, size in self.snapshots.items() if size <= num_tokens}


class ContextRegistry:
    """The store. All methods run on the server's event loop."""

    def __init__(self, max_contexts: int, max_per_key: int, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._max_contexts = max_contexts
        self._max_per_key = max_per_key
        self._monotonic = monotonic
        self._named: dict[str, NamedContext] = {}
        self._coming: Counter[str] = Counter()  # contexts being made, by key

    def __len__(self) -> int:
        return len(self._named)

    @asynccontextmanager
    async def room(self, key_id: str, count: int = 1) -> AsyncIterator[None]:
        """Room for contexts that are made and added meanwhile. Raises ApiError 429 when a key would hold too many. What
        the engine has ended no longer counts."""
        await self.expire()
        for context in [c for c in self._named.values() if not (c.handle.is_open or c.lock.locked())]:
            await self.delete(context)
        mine = sum(context.key_id == key_id for context in self._named.values()) + self._coming[key_id]
        if mine + count > self._max_per_key or len(self._named) + self._coming.total() + count > self._max_contexts:
            raise ApiError(429, f"there are {mine} contexts of this key; delete some", retry_after_s=5)
        self._coming[key_id] += count
        try:
            yield
        finally:
            self._coming -= Counter({key_id: count})

    def add(self, key_id: str, handle: Handle, ttl_s: float) -> NamedContext:
        """Name a context."""
        context = NamedContext(f"ctx_{secrets.token_hex(16)}", key_id, handle, ttl_s, self._monotonic() + ttl_s)
        self._named[context.id] = context
        return context

    @asynccontextmanager
    async def using(self, key_id: str, context_id: str) -> AsyncIterator[NamedContext]:
        """One's own context, for one request. Raises ApiError 404, 409 while another request uses it, 410 when its
        deadline or the engine has ended it."""
        await self.expire()
        context = self._named.get(context_id)
        if context is None or context.key_id != key_id:
            raise ApiError(404, "there is no context of this id", code="context_not_found")
        if context.lock.locked():
            raise ApiError(409, "another request is using this context", code="context_busy")
        async with context.lock:
            try:
                if not context.handle.is_open:
                    await context.handle.token_ids()  # raises why
                await context.measure()
                yield context
            except EngineStopped:
                await self.delete(context)
                raise ApiError(410, "the engine was restarted: the context is lost", code="context_lost") from None
            except (ContextClosed, DeadlineExceeded):
                if context.deleted:
                    raise ApiError(410, "the context was deleted", code="context_gone") from None
                await self.delete(context)
                raise ApiError(410, "the context has ended: its deadline passed", code="context_gone") from None
            finally:
                context.expires_at = self._monotonic() + context.ttl_s

    def get(self, key_id: str, context_id: str) -> NamedContext | None:
        """One's own context, whoever uses it."""
        context = self._named.get(context_id)
        return context if context is not None and context.key_id == key_id else None

    def touch(self, context: NamedContext) -> None:
        """Somebody has asked for it, beside whoever uses it."""
        context.expires_at = self._monotonic() + context.ttl_s

    async def delete(self, context: NamedContext) -> None:
        """Forget a context and close it, whatever it does. Idempotent."""
        context.deleted = True
        self._named.pop(context.id, None)
        with contextlib.suppress(Exception):  # an engine that died has closed it
            await context.handle.close()

    async def expire(self) -> None:
        """Delete what nobody has asked for."""
        now = self._monotonic()
        for context in [c for c in self._named.values() if now >= c.expires_at and not c.lock.locked()]:
            await self.delete(context)

    async def clear(self) -> None:
        """Delete everything."""
        for context in list(self._named.values()):
            await self.delete(context)
