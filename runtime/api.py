"""What asyncio code may ask of an engine, wherever it runs: in this process or in one of its own.

``EngineService`` (a thread) and ``EngineClient`` (a process) both satisfy this. Programs, server and tests are written
against it alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from caesura.runtime.errors import EngineStopped, InvalidRequest
from caesura.runtime.executors.base import SampledToken
from caesura.runtime.generation import TokenChunk, ToolCalling
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.snapshot import EngineSnapshot
from caesura.runtime.text.template import ChatTemplate
from caesura.runtime.text.tokenizer import Tokenizer
from caesura.runtime.text.tool_parser import ToolFormat
from caesura.scheduler.types import ContextId, PauseDecision


@dataclass(frozen=True, slots=True)
class PendingCall:
    """A tool call about to start. ``expected_s`` is a hint; the context is closed after ``deadline_s``."""

    tool: str
    expected_s: float | None = None
    deadline_s: float | None = None


def checked_share(fraction: float) -> float:
    """A share as a plain float. Raises InvalidRequest when it is none."""
    share = float(fraction)
    if not 0.0 <= share <= 1.0:
        raise InvalidRequest(f"fraction is {fraction}; it must lie between 0 and 1")
    return share


class Handle(Protocol):
    """One context. Every call raises ContextClosed, DeadlineExceeded or EngineStopped once that has happened."""

    @property
    def id(self) -> ContextId:
        """Unique while the engine lives; a restarted engine counts anew."""

    @property
    def is_open(self) -> bool:
        """Neither closed nor lost with its engine, as far as is known here."""

    @property
    def num_tokens(self) -> int:
        """The context's length as of the last call."""

    async def append(self, token_ids: Sequence[int]) -> int:
        """Add tokens; returns the context's new length. Computed with the next request."""

    def generate(self, params: SamplingParams, tools: ToolCalling | None = None) -> AsyncIterator[TokenChunk]:
        """Generate from the end of the context; the last chunk has ``finish``. Leaving early aborts."""

    async def score(self, start: int) -> list[float]:
        """Logprobs of the context's tokens from ``start`` (>= 1) on."""

    async def score_top(self, start: int, top: int) -> Sequence[SampledToken]:
        """As ``score``, with the ``top`` likeliest tokens in each place."""

    async def prefill(self) -> int:
        """Compute everything appended so far, so that others can share it; returns the number of tokens."""

    async def fork(self, count: int) -> Sequence[Handle]:
        """``count`` copies that share this context's KV."""

    async def truncate(self, num_tokens: int) -> None:
        """Roll back to the first ``num_tokens`` tokens."""

    async def pause(self, calls: Sequence[PendingCall], wait: str = "all", deadline_s: float | None = None) -> None:
        """These tools are about to start; the runtime may take the KV for something better. ``deadline_s``
        from now takes the place of the context's deadline."""

    def report(self, fraction: float, call: int = 0) -> None:
        """Tool ``call`` of the pause has done this share of its work. Nobody waits for it, and it never fails but for a
        fraction that is none: the context may have ended meanwhile, or wait for no such call."""

    async def resume(self, deadline_s: float | None = None) -> None:
        """The tools have answered. Idempotent. ``deadline_s`` from now takes the place of the context's deadline."""

    async def token_ids(self) -> list[int]:
        """The context's tokens."""

    async def read_decisions(self) -> list[PauseDecision]:
        """The latest pause decisions, oldest first."""

    def decisions(self) -> list[PauseDecision]:
        """As ``read_decisions``, blocking the calling thread."""

    async def close(self) -> None:
        """Close the context, aborting what it does. Idempotent."""


class Service(Protocol):
    """A running engine with the text layer of its model."""

    @property
    def ready(self) -> bool:
        """The engine takes requests."""

    @property
    def lost(self) -> EngineStopped | None:
        """Why no engine will ever take requests again; None while one does or may, and once the service is closed."""

    @property
    def life(self) -> int:
        """Counts engines: what was said to an earlier one, or learned of it, holds no more."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the served model."""

    @property
    def template(self) -> ChatTemplate:
        """Of the served model."""

    @property
    def tool_format(self) -> ToolFormat:
        """How the served model writes tool calls."""

    @property
    def model_name(self) -> str:
        """As configured."""

    async def open(self, namespace: str = "", deadline_s: float | None = None) -> Handle:
        """A new, empty context; closed with DeadlineExceeded after ``deadline_s`` seconds."""

    async def flush_cache(self) -> None:
        """Forget every cached prefix no context holds."""

    async def hold(self, *, retract: bool) -> None:
        """No steps until ``go_on``: contexts stay as they are and wait. ``retract`` gives up their KV and the cache."""

    async def go_on(self) -> None:
        """Take steps again. Idempotent."""

    async def read_stats(self) -> dict[str, Any]:
        """The running account and the pools, as of now."""

    async def read_snapshot(self, since: int = 0) -> EngineSnapshot:
        """The engine as it is, and what happened after event ``since``."""

    def stats(self) -> dict[str, Any]:
        """As ``read_stats``, blocking the calling thread."""

    def close(self) -> None:
        """Stop the engine and free its memory. Requests still running fail with EngineStopped. Idempotent."""
