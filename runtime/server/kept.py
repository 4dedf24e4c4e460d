"""Contexts that wait for their tool results, by tool-call id.

A client sends the conversation back as text, which seldom tokenizes to what the model wrote. So the tokens are kept,
and with them the paused context itself: the next request goes on exactly there. Bounded, per key, with a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from caesura.runtime.api import Handle, PendingCall
from caesura.runtime.server.conversation import plain_arguments

MAX_KEPT_TOKENS = 1 << 23  # ids of all kept contexts together


@dataclass(frozen=True, slots=True)
class KeptCall:
    """One call of a kept answer."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True, eq=False)
class KeptContext:
    """An answer whose tokens are kept: one that called tools, or one that the client may name as the previous one.
    ``handle`` can go on once; after that the tokens still can. ``thought``: the answer began with thinking."""

    namespace: str
    fingerprint: bytes
    content: str
    calls: tuple[KeptCall, ...]
    token_ids: array[int]
    expires_at: float
    handle: Handle | None = field(default=None)
    thought: bool = False

    def wrote(self, message: dict[str, Any]) -> bool:
        """Whether a client's assistant message is this answer, unchanged."""
        calls = message.get("tool_calls", ())
        said = [(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in calls]
        mine = [(call.id, call.name, plain_arguments(call.arguments)) for call in self.calls]
        return message["content"].strip() == self.content.strip() and sorted(said, key=_first) == sorted(
            mine, key=_first
        )


def _first(row: tuple[str, str, Any]) -> str:
    return row[0]


def namespace_of(key_id: str, salt: str | None) -> str:
    """Where the prefix cache of a key lies, apart from every other key's; a salt splits it further."""
    return f"{key_id}|{salt or ''}"


def owner_of(namespace: str) -> str:
    """The key id of a namespace."""
    return namespace.partition("|")[0]


def new_call_id() -> str:
    """An id that nobody can guess."""
    return f"call_{secrets.token_hex(12)}"


class KeptContexts:
    """The store. All methods run on the server's event loop."""

    def __init__(
        self,
        max_contexts: int,
        max_per_key: int,
        wait_s: float,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_contexts = max_contexts
        self._max_per_key = max_per_key
        self._wait_s = wait_s
        self._monotonic = monotonic
        self._kept: OrderedDict[int, KeptContext] = OrderedDict()
        self._by_call: dict[str, KeptContext] = {}
        self._num_tokens = 0
        self.continued = 0
        self.rebuilt = 0

    def __len__(self) -> int:
        return len(self._kept)

    async def keep(
        self,
        handle: Handle,
        namespace: str,
        fingerprint: bytes,
        content: str,
        calls: Sequence[KeptCall],
        *,
        thought: bool = False,
    ) -> KeptContext:
        """Take a context over. It is paused under its tools' names, with a deadline, until its results come."""
        token_ids = array("i", await handle.token_ids())
        pending = [PendingCall(call.name, None, self._wait_s) for call in calls]
        await handle.pause(pending, deadline_s=self._wait_s)  # in place of the request's, which may be shorter
        expires_at = self._monotonic() + self._wait_s
        kept = KeptContext(namespace, fingerprint, content, tuple(calls), token_ids, expires_at, handle, thought)
        self._kept[id(kept)] = kept
        self._num_tokens += len(token_ids)
        self._by_call.update((call.id, kept) for call in calls)
        await self._shrink(namespace)
        return kept

    def find(self, namespace: str, ids: frozenset[str]) -> KeptContext | None:
        """The context whose calls are exactly these."""
        if not ids:
            return None
        kept = self._by_call.get(next(iter(ids)))
        if kept is None or kept.namespace != namespace or self._monotonic() >= kept.expires_at:
            return None
        return kept if frozenset(call.id for call in kept.calls) == ids else None

    def take_handle(self, kept: KeptContext) -> Handle | None:
        """The live context, once. The tokens stay, for a client that sends the same request again."""
        handle, kept.handle = kept.handle, None
        if id(kept) in self._kept:
            self._kept.move_to_end(id(kept))
        return handle

    async def expire(self) -> None:
        """Drop what outlasted its deadline."""
        now = self._monotonic()
        for kept in [kept for kept in self._kept.values() if now >= kept.expires_at]:
            await self.drop(kept)

    async def clear(self) -> None:
        """Drop everything."""
        await asyncio.gather(*(self.drop(kept) for kept in list(self._kept.values())))

    async def _shrink(self, namespace: str) -> None:
        await self.expire()
        owner = owner_of(namespace)
        mine = [kept for kept in self._in_order() if owner_of(kept.namespace) == owner]
        for kept in mine[: max(0, len(mine) - self._max_per_key)]:
            await self.drop(kept)
        for kept in self._in_order():
            if len(self._kept) <= self._max_contexts and (self._num_tokens <= MAX_KEPT_TOKENS or len(self._kept) == 1):
                break
            await self.drop(kept)

    def _in_order(self) -> list[KeptContext]:
        """Who goes first: those that have gone on, of which only tokens are left, then those that still wait."""
        return sorted(self._kept.values(), key=lambda kept: kept.handle is not None)

    async def drop(self, kept: KeptContext) -> None:
        """Forget an answer and close its context. Idempotent."""
        if self._kept.pop(id(kept), None) is None:
            return
        self._num_tokens -= len(kept.token_ids)
        for call in kept.calls:
            self._by_call.pop(call.id, None)
        handle, kept.handle = kept.handle, None
        if handle is not None:
            with contextlib.suppress(Exception):  # an engine that died has closed it
                await handle.close()
