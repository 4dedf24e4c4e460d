"""Record a program's run with a real backend, and replay it without one: tests that are fast, offline and strict.

A recording is a JSONL file: what was generated and scored (keyed by the exact context and request), how the chat
template wrote turns, and what tools returned. A replayed program that asks for anything else gets a ReplayError that
says what; tools are not run again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from caesura.lang.backend import (
    Backend,
    Capabilities,
    ChatFormat,
    Finish,
    GenChunk,
    GenRequest,
    OptionScore,
    PendingCall,
    Piece,
    Session,
    TokenLogprob,
    Tokens,
    ToolCallRequest,
    ToolSpec,
)
from caesura.lang.errors import ReplayError
from caesura.lang.tools import ToolResult


def record(backend: Backend, path: str | Path) -> RecordingBackend:
    """A backend that passes everything on and writes it to ``path`` (replaced if there is one)."""
    return RecordingBackend(backend, Path(path))


def replay(path: str | Path) -> ReplayBackend:
    """A backend that answers from a recording. Raises ReplayError when the file is none."""
    return ReplayBackend(Path(path))


def _key(kind: str, *parts: Any) -> str:
    return kind + ":" + hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()


def _request_key(context: str, request: GenRequest) -> str:
    return _key("generate", context, asdict(replace(request, stream=False)))


class RecordingBackend:
    """See `record`. Lines are written as things happen, so a crash keeps what came before it."""

    def __init__(self, backend: Backend, path: Path) -> None:
        self.backend = backend
        self.name = f"record({backend.name})"
        self.capabilities = backend.capabilities
        self._file = path.open("w", encoding="utf-8")
        self._written: set[str] = set()
        self.chat: ChatFormat | None = None if backend.chat is None else _RecordingChat(self, backend.chat)
        stop = list(backend.chat.stop) if backend.chat is not None else []
        able = {**asdict(backend.capabilities), "constraints": sorted(backend.capabilities.constraints)}
        self.write("backend", {"name": backend.name, "chat": backend.chat is not None, "stop": stop, "able": able})

    def write(self, key: str, value: Any) -> None:
        """One line."""
        self._file.write(json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n")
        self._file.flush()

    def write_once(self, key: str, value: Any) -> None:
        """One line for something that never changes."""
        if key not in self._written:
            self._written.add(key)
            self.write(key, value)

    async def open(self, *, namespace: str = "", deadline_s: float | None = None) -> _RecordingSession:
        return _RecordingSession(self, await self.backend.open(namespace=namespace, deadline_s=deadline_s), "")

    async def on_tool(self, tool: str, arguments: str, run: Callable[[], Awaitable[ToolResult]]) -> ToolResult:
        """Run a tool and record what it returned."""
        result = await run()
        self.write(_key("tool", tool, arguments), {"ok": result.ok, "text": result.text, "error": result.error})
        return result

    async def flush_cache(self) -> None:
        await self.backend.flush_cache()

    async def server_info(self) -> Mapping[str, Any]:
        return await self.backend.server_info()

    def close(self) -> None:
        """Close the file and the backend."""
        self._file.close()
        self.backend.close()


class _RecordingChat:
    def __init__(self, owner: RecordingBackend, chat: ChatFormat) -> None:
        self._owner = owner
        self._chat = chat
        self.stop = chat.stop

    async def turn(
        self, role: str, *, first: bool, tools: Sequence[ToolSpec] | None = None
    ) -> tuple[Sequence[Piece], Sequence[Piece]]:
        opening, closing = await self._chat.turn(role, first=first, tools=tools)
        pieces = [[asdict(piece) for piece in side] for side in (opening, closing)]
        self._owner.write_once(_key("turn", role, first, tools), pieces)
        return opening, closing

    async def tool_results(
        self, results: Sequence[tuple[str, str]], *, tools: Sequence[ToolSpec] | None = None
    ) -> Sequence[Piece]:
        pieces = await self._chat.tool_results(results, tools=tools)
        self._owner.write_once(_key("results", results, tools), [asdict(piece) for piece in pieces])
        return pieces


class _Context:
    """A session's text, and where its marks lie in it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.places: dict[int, int] = {0: 0}

    def add(self, pieces: Sequence[Piece | Tokens]) -> None:
        self.text += "".join(piece.text for piece in pieces)


class _RecordingSession(_Context):
    def __init__(self, owner: RecordingBackend, session: Session, text: str) -> None:
        super().__init__(text)
        self._owner = owner
        self._session = session

    async def append(self, pieces: Sequence[Piece | Tokens]) -> None:
        await self._session.append(pieces)
        self.add(pieces)

    async def generate(self, request: GenRequest) -> AsyncGenerator[GenChunk, None]:
        key, taken = _request_key(self.text, request), []
        async with aclosing(self._session.generate(request)) as chunks:
            async for chunk in chunks:
                taken.append(asdict(chunk))
                self.text += chunk.text
                if chunk.finish is not None:
                    self._owner.write(key, taken)
                yield chunk

    async def score(self, texts: Sequence[str], *, unconditional: bool = False) -> list[OptionScore]:
        scores = await self._session.score(texts, unconditional=unconditional)
        key = _key("score", self.text, list(texts), unconditional)
        self._owner.write(key, [asdict(score) for score in scores])
        return scores

    async def prompt_logprobs(self, start: int) -> list[TokenLogprob]:
        found = await self._session.prompt_logprobs(start)
        self._owner.write(_key("prompt", self.text, start), [asdict(item) for item in found])
        return found

    async def prefill(self) -> None:
        await self._session.prefill()

    async def fork(self, n: int) -> list[_RecordingSession]:
        return [_RecordingSession(self._owner, copy, self.text) for copy in await self._session.fork(n)]

    async def pause(self, calls: Sequence[PendingCall], *, wait: Literal["all", "any"] = "all") -> None:
        await self._session.pause(calls, wait=wait)

    async def resume(self) -> None:
        await self._session.resume()

    async def mark(self) -> int:
        mark = await self._session.mark()
        self.places[mark] = len(self.text)
        return mark

    async def rollback(self, mark: int) -> None:
        await self._session.rollback(mark)
        self.text = self.text[: self.places[mark]]

    async def close(self) -> None:
        await self._session.close()

    async def decisions(self) -> Sequence[Any]:
        return await self._session.decisions()


class ReplayBackend:
    """See `replay`. Equal requests are answered in the order they were recorded in."""

    def __init__(self, path: Path) -> None:
        self._answers: defaultdict[str, deque[Any]] = defaultdict(deque)
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self._answers[entry["key"]].append(entry["value"])
            about = self._answers["backend"][0]
            able = {**about["able"], "constraints": frozenset(about["able"]["constraints"])}
            self.capabilities = Capabilities(**able)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ReplayError(f"{path} is no recording: {error}") from error
        self.name = f"replay({about['name']})"
        self.chat: ChatFormat | None = _ReplayChat(self, tuple(about["stop"])) if about["chat"] else None

    def take(self, key: str, what: str, *, keep: bool = False) -> Any:
        """The recorded answer. Raises ReplayError with what was asked when there is none (left)."""
        answers = self._answers.get(key)
        if not answers:
            raise ReplayError(f"the program has changed since the recording: it has no (further) {what}")
        return answers[0] if keep else answers.popleft()

    async def open(self, *, namespace: str = "", deadline_s: float | None = None) -> _ReplaySession:
        return _ReplaySession(self, "")

    async def on_tool(self, tool: str, arguments: str, run: Callable[[], Awaitable[ToolResult]]) -> ToolResult:
        """The recorded result; the tool does not run."""
        told = self.take(_key("tool", tool, arguments), f"call {tool}({arguments[:200]})")
        return ToolResult(ok=told["ok"], value=told["text"], text=told["text"], error=told["error"])

    async def flush_cache(self) -> None:
        """Nothing is cached."""

    async def server_info(self) -> Mapping[str, Any]:
        return {"model": self.name}

    def close(self) -> None:
        """Nothing to stop."""


class _ReplayChat:
    def __init__(self, owner: ReplayBackend, stop: tuple[str, ...]) -> None:
        self._owner = owner
        self.stop = stop

    async def turn(
        self, role: str, *, first: bool, tools: Sequence[ToolSpec] | None = None
    ) -> tuple[Sequence[Piece], Sequence[Piece]]:
        opening, closing = self._owner.take(_key("turn", role, first, tools), f"turn of {role}", keep=True)
        return [Piece(**piece) for piece in opening], [Piece(**piece) for piece in closing]

    async def tool_results(
        self, results: Sequence[tuple[str, str]], *, tools: Sequence[ToolSpec] | None = None
    ) -> Sequence[Piece]:
        told = self._owner.take(_key("results", results, tools), f"tool results {results!r:.200}", keep=True)
        return [Piece(**piece) for piece in told]


class _ReplaySession(_Context):
    def __init__(self, owner: ReplayBackend, text: str) -> None:
        super().__init__(text)
        self._owner = owner

    async def append(self, pieces: Sequence[Piece | Tokens]) -> None:
        self.add(pieces)

    async def generate(self, request: GenRequest) -> AsyncGenerator[GenChunk, None]:
        what = f"generation of {request.name!r} with these arguments after {self.text[-60:]!r}"
        for told in self._owner.take(_request_key(self.text, request), what):
            chunk = _chunk(told)
            self.text += chunk.text
            yield chunk
            await asyncio.sleep(0)

    async def score(self, texts: Sequence[str], *, unconditional: bool = False) -> list[OptionScore]:
        what = f"choice among {list(texts)} after {self.text[-60:]!r}"
        told = self._owner.take(_key("score", self.text, list(texts), unconditional), what)
        return [
            OptionScore(
                tuple(_logprob(item) for item in one["conditional"]),
                None if one["unconditional"] is None else tuple(_logprob(item) for item in one["unconditional"]),
            )
            for one in told
        ]

    async def prompt_logprobs(self, start: int) -> list[TokenLogprob]:
        told = self._owner.take(_key("prompt", self.text, start), f"prompt logprobs from {start}")
        return [_logprob(item) for item in told]

    async def prefill(self) -> None:
        """Nothing to compute."""

    async def fork(self, n: int) -> list[_ReplaySession]:
        return [_ReplaySession(self._owner, self.text) for _ in range(n)]

    async def pause(self, calls: Sequence[PendingCall], *, wait: Literal["all", "any"] = "all") -> None:
        """Nothing to hold."""

    async def resume(self) -> None:
        """Nothing to hold."""

    async def mark(self) -> int:
        return len(self.text)

    async def rollback(self, mark: int) -> None:
        self.text = self.text[:mark]

    async def close(self) -> None:
        """Nothing to give back."""

    async def decisions(self) -> Sequence[Any]:
        return ()


def _logprob(told: Mapping[str, Any]) -> TokenLogprob:
    top = tuple((item[0], item[1], item[2]) for item in told["top"])
    return TokenLogprob(told["logprob"], told["token_id"], told["text"], top)


def _chunk(told: Mapping[str, Any]) -> GenChunk:
    finish = None
    if told["finish"] is not None:
        kept = told["finish"]["kept_token_ids"]
        calls = tuple(ToolCallRequest(**call) for call in told["finish"]["tool_calls"])
        finish = Finish(
            **{**told["finish"], "tool_calls": calls, "kept_token_ids": None if kept is None else tuple(kept)}
        )
    return GenChunk(told["text"], tuple(told["token_ids"]), tuple(_logprob(item) for item in told["logprobs"]), finish)
