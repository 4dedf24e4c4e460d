"""Responses that clients may ask for again or go on from: owned by a key, bounded, forgotten when nobody asks."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from caesura.runtime.server.chat_protocol import Message
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.kept import KeptContext
from caesura.runtime.server.responses_protocol import InputItem

MAX_STORED_BYTES = 256 << 20
BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response as it was answered, with the conversation it ends: ``messages`` without the instructions.

    ``answer`` holds the answer's tokens, None when it was cut short. ``num_bytes`` is what it takes, about, and
    ``message_bytes`` its messages' share, which the responses that go on from it have as well.
    """

    key_id: str
    body: dict[str, Any]
    items: Sequence[InputItem]
    messages: tuple[Message, ...]
    answer: KeptContext | None
    num_bytes: int
    message_bytes: int = 0

    @property
    def id(self) -> str:
        return str(self.body["id"])


class ResponseStore:
    """The store. All methods run on the server's event loop."""

    def __init__(
        self,
        max_responses: int,
        max_per_key: int,
        ttl_s: float,
        *,
        max_bytes: int = MAX_STORED_BYTES,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_responses = max_responses
        self._max_per_key = max_per_key
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._monotonic = monotonic
        self._stored: OrderedDict[str, tuple[StoredResponse, float]] = OrderedDict()  # with when it was last asked for
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def put(self, stored: StoredResponse) -> None:
        """Keep a response, unless it alone is too large. Those that nobody asked for the longest go first, a key's own
        before others'."""
        if stored.num_bytes > self._max_bytes:
            return
        self._stored[stored.id] = (stored, self._monotonic())
        self._num_bytes += stored.num_bytes
        self.expire()
        mine = [one.id for one, _ in self._stored.values() if one.key_id == stored.key_id]
        for number, response_id in enumerate(mine[:-1]):
            too_many = len(mine) - number > self._max_per_key or len(self._stored) > self._max_responses
            if too_many or self._num_bytes > self._max_bytes:
                self._drop(response_id)
        while len(self._stored) > self._max_responses or self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._stored)))

    def get(self, key_id: str, response_id: str) -> StoredResponse:
        """One's own response. Raises ApiError 404."""
        self.expire()
        found = self._stored.get(response_id)
        if found is None or found[0].key_id != key_id:
            message = f"Response with id {response_id!r} not found: it never was, was not stored, or has expired"
            raise ApiError(404, message, code="response_not_found")
        self._stored[response_id] = (found[0], self._monotonic())
        self._stored.move_to_end(response_id)
        return found[0]

    def delete(self, key_id: str, response_id: str) -> StoredResponse:
        """Forget one's own response. Raises ApiError 404."""
        found = self.get(key_id, response_id)
        self._drop(response_id)
        return found

    def expire(self) -> None:
        """Forget what nobody has asked for."""
        oldest = self._monotonic() - self._ttl_s
        while self._stored and next(iter(self._stored.values()))[1] <= oldest:
            self._drop(next(iter(self._stored)))

    def _drop(self, response_id: str) -> None:
        self._num_bytes -= self._stored.pop(response_id)[0].num_bytes
