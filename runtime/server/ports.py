"""What the server needs of an engine: the in-process service has it, and so has a client of an engine process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from caesura.runtime.generation import TokenChunk, ToolCalling
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.service import PendingCall
from caesura.runtime.text.template import ChatTemplate
from caesura.runtime.text.tokenizer import Tokenizer
from caesura.runtime.text.tool_parser import ToolFormat
from caesura.scheduler.types import PauseDecision


class Handle(Protocol):
    """One context. See ``caesura.runtime.service.ContextHandle`` for what each method promises."""

    @property
    def num_tokens(self) -> int: ...

    async def append(self, token_ids: Sequence[int]) -> int: ...

    def generate(self, params: SamplingParams, tools: ToolCalling | None = None) -> AsyncIterator[TokenChunk]: ...

    async def score(self, start: int) -> list[float]: ...

    async def prefill(self) -> int: ...

    async def fork(self, count: int) -> Sequence[Handle]: ...

    async def truncate(self, num_tokens: int) -> None: ...

    async def pause(self, calls: Sequence[PendingCall], wait: str = "all") -> None: ...

    async def resume(self) -> None: ...

    async def token_ids(self) -> list[int]: ...

    def decisions(self) -> list[PauseDecision]: ...

    async def close(self) -> None: ...


class Service(Protocol):
    """An engine. ``stats`` and ``Handle.decisions`` may block, so the server calls them on a thread."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def template(self) -> ChatTemplate: ...

    @property
    def tool_format(self) -> ToolFormat: ...

    @property
    def model_name(self) -> str: ...

    async def open(self, namespace: str = "", deadline_s: float | None = None) -> Handle: ...

    async def flush_cache(self) -> None: ...

    def stats(self) -> dict[str, Any]: ...

    def close(self) -> None: ...
