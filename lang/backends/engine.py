"""The in-process engine as a backend: text becomes tokens here, everything else is the runtime's.

The only module of the language that imports the runtime, and it does so when an engine is made.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from caesura.lang.backend import (
    Capabilities,
    Finish,
    GenChunk,
    GenRequest,
    OptionScore,
    PendingCall,
    Piece,
    TokenLogprob,
    Tokens,
    ToolCallRequest,
    ToolSpec,
)
from caesura.lang.errors import DefinitionError

if TYPE_CHECKING:
    from caesura.runtime.api import Handle, Service
    from caesura.runtime.executors.base import SampledToken
    from caesura.runtime.generation import TokenChunk
    from caesura.runtime.sampling import SamplingParams
    from caesura.runtime.scoring import TokenScore
    from caesura.runtime.text.template import ChatTemplate
    from caesura.runtime.text.template import Piece as RuntimePiece

# The language ends tools and programs itself and says so clearly. The engine's own deadlines lie this much later:
# they are for contexts whose program is gone.
DEADLINE_GRACE_S = 2.0
TOOL_GRACE_S = 600.0  # a sync tool may first have to wait for a thread


class EngineBackend:
    """Sessions on a running service, in this process or another. `Engine(...)` starts one here."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.name = f"engine({service.model_name})"
        self.capabilities = Capabilities(prompt_logprobs=True, calls_beside_grammar=False)
        self.chat = TemplateChat(service.template)

    @classmethod
    def start(cls, model: str | None = None, **options: Any) -> EngineBackend:
        """Load a model and start its engine. ``options`` are fields of `EngineConfig`; None for the embedded model."""
        from caesura.runtime.config import EngineConfig

        if model is not None:
            options["model"] = model
        try:
            config = EngineConfig(**options)
        except TypeError as error:
            known = ", ".join(EngineConfig.__dataclass_fields__)
            raise DefinitionError(f"Engine cannot be configured so: {error}; its options are {known}") from None
        from caesura.runtime.service import EngineService  # loads torch

        return cls(EngineService.start(config))

    async def open(self, *, namespace: str = "", deadline_s: float | None = None) -> EngineSession:
        """A new context on the engine."""
        late_s = None if deadline_s is None else deadline_s + DEADLINE_GRACE_S
        return EngineSession(self.service, await self.service.open(namespace, late_s))

    async def flush_cache(self) -> None:
        """Drop every cached prefix that no context holds."""
        await self.service.flush_cache()

    async def server_info(self) -> Mapping[str, Any]:
        """The model's name and the engine's account."""
        stats = await asyncio.to_thread(self.service.stats)
        return {"model": self.service.model_name, **stats}

    def close(self) -> None:
        """Stop the engine. Programs that still run fail with EngineStopped."""
        self.service.close()

    def __enter__(self) -> EngineBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TemplateChat:
    """The checkpoint's chat template as a chat format."""

    stop: tuple[str, ...] = ()  # turns end with an end-of-sequence token

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    async def turn(
        self, role: str, *, first: bool, tools: Sequence[ToolSpec] | None = None
    ) -> tuple[Sequence[Piece], Sequence[Piece]]:
        opening, closing = self._template.turn_pieces(role, first=first, tools=tools)
        return _pieces(opening), _pieces(closing)

    async def tool_results(
        self, results: Sequence[tuple[str, str]], *, tools: Sequence[ToolSpec] | None = None
    ) -> Sequence[Piece]:
        return _pieces(self._template.tool_results(results, tools=tools))


def _pieces(pieces: Sequence[RuntimePiece]) -> list[Piece]:
    return [Piece(piece.text, piece.special) for piece in pieces]


class EngineSession:
    """One context of the engine."""

    def __init__(self, service: Service, handle: Handle) -> None:
        self._service = service
        self._handle = handle

    async def append(self, pieces: Sequence[Piece | Tokens]) -> None:
        ids = self._encode(pieces, self._handle.num_tokens)
        if ids:
            await self._handle.append(ids)

    def _encode(self, pieces: Sequence[Piece | Tokens], num_before: int) -> list[int]:
        """Token ids of ``pieces``. A context that begins with plain text begins with BOS; a chat template writes
        its own."""
        tokenizer = self._service.tokenizer
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, Tokens):
                ids.extend(piece.token_ids)
                continue
            begins = num_before == 0 and not ids
            if begins and not piece.special and tokenizer.bos_id is not None:
                ids.append(tokenizer.bos_id)
            ids += tokenizer.encode(piece.text, allow_special=piece.special, continuation=not begins)
        return ids

    async def generate(self, request: GenRequest) -> AsyncGenerator[GenChunk, None]:
        from caesura.runtime.generation import ToolCalling

        use = request.tool_use
        tools = None
        if use is not None and use.choice != "none":
            tools = ToolCalling(tuple(dict(spec["function"]) for spec in use.tools), use.choice, use.parallel)
        params = sampling_params(request)
        start = self._handle.num_tokens
        ids: list[int] = []
        text: list[str] = []
        chunks = cast("AsyncGenerator[TokenChunk, None]", self._handle.generate(params, tools))
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                ids.extend(chunk.token_ids)
                text.append(chunk.text)
                logprobs = tuple(self._logprob(item) for item in chunk.logprobs)
                finish = None
                if chunk.finish is not None:
                    finish = await self._finish(chunk, start, tuple(ids), "".join(text), request)
                yield GenChunk(chunk.text, chunk.token_ids, logprobs, finish)

    async def _finish(
        self, chunk: TokenChunk, start: int, ids: tuple[int, ...], text: str, request: GenRequest
    ) -> Finish:
        ended = chunk.finish
        assert ended is not None
        kept = ids
        if isinstance(ended.matched, str):  # the stop string was cut off: ask what stayed
            kept = tuple((await self._handle.token_ids())[start:])
        content = None
        if ended.tool_calls and request.tool_use is not None:
            from caesura.runtime.text.tool_parser import parse

            names = [str(spec["function"]["name"]) for spec in request.tool_use.tools]
            content, _ = parse(text, self._service.tool_format, names, cut_off=ended.cut_off)
        return Finish(
            reason=ended.reason,
            matched=ended.matched,
            tool_calls=tuple(ToolCallRequest(call.name, call.arguments) for call in ended.tool_calls),
            content=content,
            prompt_tokens=ended.prompt_tokens,
            completion_tokens=ended.completion_tokens,
            cached_tokens=ended.cached_tokens,
            kept_token_ids=kept,
        )

    def _logprob(self, token: SampledToken) -> TokenLogprob:
        from caesura.runtime.scoring import token_text

        tokenizer = self._service.tokenizer
        top = tuple((logprob, token_id, token_text(tokenizer, token_id)) for token_id, logprob in token.top_logprobs)
        logprob = token.logprob if token.logprob is not None else 0.0
        return TokenLogprob(logprob, token.token_id, token_text(tokenizer, token.token_id), top)

    async def score(self, texts: Sequence[str], *, unconditional: bool = False) -> list[OptionScore]:
        from caesura.runtime.scoring import score_texts

        scores = await score_texts(self._service, self._handle, texts, unconditional=unconditional)
        return [
            OptionScore(_scored(one.conditional), None if one.unconditional is None else _scored(one.unconditional))
            for one in scores
        ]

    async def prompt_logprobs(self, start: int) -> list[TokenLogprob]:
        from caesura.runtime.scoring import score_own

        return list(_scored(await score_own(self._service, self._handle, start)))

    async def prefill(self) -> None:
        if self._handle.num_tokens:
            await self._handle.prefill()

    async def fork(self, n: int) -> list[EngineSession]:
        return [EngineSession(self._service, handle) for handle in await self._handle.fork(n)]

    async def pause(self, calls: Sequence[PendingCall], *, wait: Literal["all", "any"] = "all") -> None:
        from caesura.runtime.api import PendingCall as EngineCall

        pending = [
            EngineCall(call.tool, call.expected_s, None if call.deadline_s is None else call.deadline_s + TOOL_GRACE_S)
            for call in calls
        ]
        await self._handle.pause(pending, wait)

    async def report(self, fraction: float, call: int = 0) -> None:
        self._handle.report(fraction, call)

    async def resume(self) -> None:
        await self._handle.resume()

    async def mark(self) -> int:
        return self._handle.num_tokens

    async def rollback(self, mark: int) -> None:
        await self._handle.truncate(mark)

    async def close(self) -> None:
        await self._handle.close()

    async def decisions(self) -> Sequence[Any]:
        return await self._handle.read_decisions()


def _scored(scores: Sequence[TokenScore]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(score.logprob, score.token_id, score.text) for score in scores)


def sampling_params(request: GenRequest) -> SamplingParams:
    """The runtime's sampling arguments of a request. Raises InvalidRequest out of range."""
    from caesura.runtime.sampling import Constraint, ConstraintKind, SamplingParams

    held = request.constraint
    return SamplingParams(
        max_new_tokens=request.max_tokens,
        min_new_tokens=request.min_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        repetition_penalty=request.repetition_penalty,
        seed=request.seed,
        stop=request.stop,
        stop_token_ids=request.stop_token_ids,
        stop_regex=request.stop_regex,
        ignore_eos=request.ignore_eos,
        logprobs=request.logprobs,
        logit_bias=request.logit_bias,
        constraint=None if held is None else Constraint(ConstraintKind(held.kind), held.source),
    )
