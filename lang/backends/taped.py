"""A backend with a tape: what is on it is answered from it, everything else by a live backend, and written down.

Three uses: `record` (an empty tape), `replay` (no live backend: no model and no tool runs, and a program that has
changed gets a ReplayError), and `durable` (both: a program that was stopped is run again, and goes on where it was).

An answer is found by the whole context that the question stands in, and by the fork that asks. A session opens a live
context only when the tape has no answer: it then holds everything from before, token for token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from caesura.lang.backend import (
    Backend,
    ChatFormat,
    GenChunk,
    GenRequest,
    OptionScore,
    PendingCall,
    Piece,
    Session,
    TokenLogprob,
    Tokens,
    ToolSpec,
)
from caesura.lang.backends.tape import ContextKeys, Tape, key
from caesura.lang.backends.tape_values import (
    read_capabilities,
    read_chunks,
    read_logprobs,
    read_pieces,
    read_race,
    read_result,
    read_scores,
    read_turn,
    result_value,
)
from caesura.lang.errors import NoRecording, ReplayError
from caesura.lang.tools import ToolResult

log = logging.getLogger("caesura.lang")

SHOWN_CHARS = 60


def record(backend: Backend, path: str | Path) -> TapedBackend:
    """``backend``, with everything written to ``path`` (a recording that is there is replaced; another file is not, it
    raises NoRecording, a ReplayError)."""
    return TapedBackend(Tape.open(Path(path), anew=True), backend)


def replay(path: str | Path, *, strict: bool = False) -> TapedBackend:
    """A backend that answers from a recording. ``strict``: closing it raises ReplayError, too, when the program has
    asked for less than was recorded. Raises ReplayError when the file is no recording."""
    return TapedBackend(Tape.read(Path(path)), None, strict=strict)


def durable(backend: Backend, path: str | Path) -> TapedBackend:
    """``backend`` behind the recording in ``path``, which is begun when there is none.

    What is recorded is answered from the file: the model does not generate it, and finished tools do not run again.
    Then ``backend`` goes on, and the file grows. Raises ReplayError when the file is no recording or is in use.
    """
    return TapedBackend(Tape.open(Path(path), anew=False), backend)


class TapedBackend:
    """See `record`, `replay` and `durable`."""

    def __init__(self, tape: Tape, live: Backend | None, *, strict: bool = False) -> None:
        self.tape = tape
        self.live = live
        self._strict = strict
        self._same_model: bool | None = None
        try:
            about = self._about()
        except BaseException:
            tape.close()
            raise
        kind = "record" if live is not None else "replay"
        self.name = f"{kind}({about['name']})"
        self.capabilities = live.capabilities if live is not None else tape.take("backend:", read_capabilities)
        chat = None if live is None else live.chat
        self.chat: ChatFormat | None = _TapedChat(tape, chat) if about["chat"] else None

    def _about(self) -> dict[str, Any]:
        """The tape's first line; written when the tape is empty."""
        about = self.tape.take("backend:")
        live = self.live
        if about is None and live is not None:
            able = {**asdict(live.capabilities), "constraints": sorted(live.capabilities.constraints)}
            about = {"name": live.name, "chat": live.chat is not None, "able": able}
            self.tape.write("backend:", live.name, about)
        if not isinstance(about, dict) or {"name", "chat", "able"} - set(about):
            raise NoRecording(f"{self.tape.path} is no recording: it does not begin with a backend")
        if live is not None and about["chat"] != (live.chat is not None):
            raise ReplayError(f"the recording was made with {about['name']}, and does not fit {live.name}")
        return about

    async def open(self, *, namespace: str = "", deadline_s: float | None = None) -> TapedSession:
        """A context; the live one comes when it is needed."""

        async def make() -> Session:
            assert self.live is not None
            return await self.live.open(namespace=namespace, deadline_s=deadline_s)

        return TapedSession(self, make)

    async def same_model(self) -> bool:
        """Whether the live model is the one that was recorded, so that token ids mean the same."""
        if self._same_model is None:
            assert self.live is not None
            model: Any = None
            with contextlib.suppress(Exception):  # not every server says
                model = (await self.live.server_info()).get("model")
            now = [self.live.name, model] if model is None else [model]
            if self.tape.take("model:") is None:
                self.tape.write("model:", f"model {model}", now)
            self._same_model = self.tape.take("model:") == now
            if not self._same_model:
                log.warning("the recording was made with %s; going on with %s", self.tape.take("model:"), now)
        return self._same_model

    async def flush_cache(self) -> None:
        if self.live is not None:
            await self.live.flush_cache()

    async def server_info(self) -> Mapping[str, Any]:
        return {"model": self.name} if self.live is None else await self.live.server_info()

    def close(self) -> None:
        """Close the file; the live backend is closed by whoever started it. Raises ReplayError for a strict replay with
        answers left over."""
        self.tape.close()
        unused = self.tape.unused()
        if not unused:
            return
        told = f"{len(unused)} recorded answers were not asked for; the first: {unused[0]}"
        if self._strict:
            raise ReplayError(f"the program has changed since the recording: {told}")
        if self.live is not None:
            log.warning("the program may have changed since the recording: %s", told)

    def __enter__(self) -> TapedBackend:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self._strict = False  # the error itself is the one to tell
        self.close()


class _TapedChat:
    """A chat format whose turns are recorded, each with the stop strings that hold in it: a format that is looked up at
    the first turn has none before."""

    def __init__(self, tape: Tape, live: ChatFormat | None) -> None:
        self._tape = tape
        self._live = live
        self.stop: tuple[str, ...] = ()

    async def turn(
        self, role: str, *, first: bool, tools: Sequence[ToolSpec] | None = None
    ) -> tuple[Sequence[Piece], Sequence[Piece]]:
        asked, what = key("turn", role, first, tools), f"turn of {role}"
        told: tuple[Sequence[Piece], Sequence[Piece], tuple[str, ...]] | None = self._tape.take(asked, read_turn)
        if told is None:
            if self._live is None:
                raise self._tape.missing(what)
            opening, closing = await self._live.turn(role, first=first, tools=tools)
            told = opening, closing, tuple(self._live.stop)
            sides = [[asdict(piece) for piece in side] for side in (opening, closing)]
            self._tape.write(asked, what, [*sides, list(self._live.stop)])
        opening, closing, self.stop = told
        return opening, closing

    async def tool_results(
        self, results: Sequence[tuple[str, str]], *, tools: Sequence[ToolSpec] | None = None
    ) -> Sequence[Piece]:
        asked, what = key("results", results, tools), f"turn with the tool results {_shown(str(list(results)))}"
        pieces: Sequence[Piece] | None = self._tape.take(asked, read_pieces)
        if pieces is None:
            if self._live is None:
                raise self._tape.missing(what)
            pieces = await self._live.tool_results(results, tools=tools)
            self._tape.write(asked, what, [asdict(piece) for piece in pieces])
        return pieces


class TapedSession:
    """A context: everything in it as a list, how much of that a live session has, and where the fork tree it is."""

    def __init__(self, owner: TapedBackend, make: Callable[[], Awaitable[Session]], path: str = "") -> None:
        self._owner = owner
        self._tape = owner.tape
        self._make = make
        self._path = path
        self._num_forks = 0
        self._pieces: list[Piece | Tokens] = []
        self._live: Session | None = None
        self._opening: asyncio.Task[Session] | None = None
        self._num_sent = 0
        self._marks: dict[int, int] = {0: 0}  # pieces -> the live session's mark
        self._paused = False
        self._keys, self._num_keyed = ContextKeys(path), 0

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self._pieces)

    def _key(self, kind: str, *parts: Any) -> str:
        for piece in self._pieces[self._num_keyed :]:
            self._keys.add(piece.text)
        self._num_keyed = len(self._pieces)
        return self._keys.key(kind, *parts)

    async def _session(self, what: str) -> Session:
        """The live session with all of the context in it. Raises ReplayError without a live backend."""
        self._need_live(what)
        if self._live is None:
            if self._opening is None:  # else one that was stopped waiting for it left it
                self._opening = asyncio.ensure_future(self._make())
            try:
                self._live = await asyncio.shield(self._opening)
            finally:
                if self._opening.done():
                    self._opening = None
        await self._send()
        return self._live

    def _need_live(self, what: str) -> None:
        if self._owner.live is None:
            raise self._tape.missing(f"{what} after {self.text[-SHOWN_CHARS:]!r}")

    async def _send(self) -> None:
        if self._live is None or self._num_sent == len(self._pieces):
            return
        pieces = self._pieces[self._num_sent :]
        if any(isinstance(piece, Tokens) for piece in pieces) and not await self._owner.same_model():
            pieces = [Piece(piece.text) if isinstance(piece, Tokens) else piece for piece in pieces]
        await self._live.append(pieces)
        self._num_sent = len(self._pieces)

    async def append(self, pieces: Sequence[Piece | Tokens]) -> None:
        self._pieces += pieces
        await self._send()

    async def generate(self, request: GenRequest) -> AsyncGenerator[GenChunk, None]:
        asked = self._key("generate", asdict(replace(request, stream=False)))
        told: list[GenChunk] | None = self._tape.take(asked, read_chunks)
        if told is None:
            async with aclosing(self._generate(request, asked)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        taken: list[GenChunk] = []
        try:
            for chunk in told:
                taken.append(chunk)
                yield chunk
                await asyncio.sleep(0)
        finally:
            self._pieces.append(_generated(taken))
        await self._send()

    async def _generate(self, request: GenRequest, asked: str) -> AsyncGenerator[GenChunk, None]:
        what = f"generation of {request.name!r}"
        session = await self._session(f"{what} with these arguments")
        await self._owner.same_model()  # the tape says whose tokens these are
        taken: list[GenChunk] = []
        try:
            async with aclosing(session.generate(request)) as chunks:
                async for chunk in chunks:
                    taken.append(chunk)
                    if chunk.finish is not None:
                        self._tape.write(asked, what, [asdict(one) for one in taken])
                    yield chunk
        finally:
            if taken:  # the live session has it already
                self._pieces.append(_generated(taken))
                self._num_sent = len(self._pieces)

    async def score(self, texts: Sequence[str], *, unconditional: bool = False) -> list[OptionScore]:
        asked, what = self._key("score", list(texts), unconditional), f"choice among {list(texts)}"
        scores: list[OptionScore] | None = self._tape.take(asked, read_scores)
        if scores is None:
            session = await self._session(what)
            scores = list(await session.score(texts, unconditional=unconditional))
            self._tape.write(asked, what, [asdict(score) for score in scores])
        return scores

    async def prompt_logprobs(self, start: int) -> list[TokenLogprob]:
        asked, what = self._key("prompt", start), f"prompt logprobs from {start}"
        logprobs: list[TokenLogprob] | None = self._tape.take(asked, read_logprobs)
        if logprobs is None:
            logprobs = list(await (await self._session(what)).prompt_logprobs(start))
            self._tape.write(asked, what, [asdict(item) for item in logprobs])
        return logprobs

    async def prefill(self) -> None:
        if self._live is not None or self._begins_live:
            await (await self._session("prefill")).prefill()

    @property
    def _begins_live(self) -> bool:
        """Nothing is left to replay, so what comes next is live: the shared part of forks is worth computing once."""
        return self._owner.live is not None and self._tape.num_left == 0

    async def fork(self, n: int) -> list[TapedSession]:
        paths = [f"{self._path}/{self._num_forks}.{i}" for i in range(n)]
        self._num_forks += 1
        children = [TapedSession(self._owner, self._make, path) for path in paths]
        if self._live is not None or self._begins_live:
            copies = await (await self._session("fork")).fork(n)
            for child, copy in zip(children, copies, strict=True):
                child._live, child._num_sent = copy, self._num_sent
        for child in children:
            child._pieces = list(self._pieces)
        return children

    async def pause(self, calls: Sequence[PendingCall], *, wait: Literal["all", "any"] = "all") -> None:
        if self._live is not None:
            await self._live.pause(calls, wait=wait)
            self._paused = True

    async def report(self, fraction: float, call: int = 0) -> None:
        if self._live is not None and self._paused:
            await self._live.report(fraction, call)

    async def resume(self) -> None:
        if self._live is not None and self._paused:
            self._paused = False
            await self._live.resume()

    async def mark(self) -> int:
        mark = len(self._pieces)
        if self._live is not None:
            await self._send()
            self._marks[mark] = await self._live.mark()
        return mark

    async def rollback(self, mark: int) -> None:
        del self._pieces[mark:]
        self._keys, self._num_keyed = ContextKeys(self._path), 0
        if self._live is not None:
            sent = mark if mark in self._marks and mark <= self._num_sent else 0
            await self._live.rollback(self._marks[sent])
            self._num_sent = sent
        self._marks = {at: live for at, live in self._marks.items() if at <= mark}

    async def on_tool(
        self, tool: str, arguments: str, number: int, run: Callable[[], Awaitable[ToolResult]]
    ) -> ToolResult:
        """The recorded result, or the tool's own, which is on the disk before the program goes on."""
        asked, what = self._key("tool", tool, arguments, number), f"call {tool}({_shown(arguments)})"
        told: ToolResult | None = self._tape.take(asked, read_result)
        if told is not None:
            return told
        self._need_live(what)
        with self._tape.calling() as call:
            result = await run()
        self._tape.write(asked, what, result_value(result), call)
        await self._tape.sync(what)
        return result

    async def on_race(
        self, calls: Sequence[tuple[str, str]], run: Callable[[], Awaitable[list[ToolResult | None]]]
    ) -> list[ToolResult | None]:
        """As `on_tool`, for calls of which the first success ends the others: they are recorded together."""
        asked, what = self._key("race", list(calls)), f"race of {', '.join(tool for tool, _ in calls)}"
        told: list[ToolResult | None] | None = self._tape.take(asked, read_race)
        if told is not None:
            return told
        self._need_live(what)
        with self._tape.calling() as call:
            results = await run()
        self._tape.write(asked, what, [None if one is None else result_value(one) for one in results], call)
        await self._tape.sync(what)
        return results

    async def close(self) -> None:
        if self._opening is not None:  # cancelled while it was being opened
            with contextlib.suppress(Exception):
                self._live = await self._opening
            self._opening = None
        if self._live is not None:
            await self._live.close()

    async def decisions(self) -> Sequence[Any]:
        return () if self._live is None else await self._live.decisions()


def _shown(text: str) -> str:
    return text[: 3 * SHOWN_CHARS]


def _generated(chunks: Sequence[GenChunk]) -> Piece | Tokens:
    """What a generation left in the context."""
    text = "".join(chunk.text for chunk in chunks)
    finish = next((chunk.finish for chunk in chunks if chunk.finish is not None), None)
    if finish is not None:
        return Piece(text) if finish.kept_token_ids is None else Tokens(finish.kept_token_ids, text)
    ids = tuple(token for chunk in chunks for token in chunk.token_ids)  # it was interrupted
    return Tokens(ids, text) if ids else Piece(text)
