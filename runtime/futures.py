"""Waiting on an event loop for what a thread brings."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def shielded(future: Future[T]) -> T:
    """The result of ``future``, which goes on when the caller is cancelled; how it then ends is nobody's concern."""
    waiting = asyncio.wrap_future(future)
    waiting.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio logs it as unheard
    return await asyncio.shield(waiting)
