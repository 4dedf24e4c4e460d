"""SGLang's smaller routes: what the server is, its cache, its tokenizer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Annotated, Any, cast

import msgspec
from caesura.runtime.generation import TokenChunk
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.server import limits
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.http import principal_of, read, reply, settled, until_disconnect
from caesura.runtime.server.info import Info, package_version
from caesura.runtime.server.state import ServerState, engine_answers
from caesura.runtime.server.textgen import begun, checked_ids, encode_text
from caesura.runtime.text.reasoning import detect_marks, marks_name
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

HEALTH_DEADLINE_S = 20.0
HEALTH_POLL_S = 0.1
_Many = Meta(min_length=1, max_length=limits.MAX_PROMPTS)


class AbortRequest(msgspec.Struct):
    """The body of ``/abort_request``."""

    rid: limits.Id | None = None
    abort_all: bool = False


class TokenizeRequest(msgspec.Struct):
    """The body of ``/tokenize``. ``text`` is another name of ``prompt``."""

    prompt: limits.Text | Annotated[list[limits.Text], _Many] | None = None
    text: limits.Text | Annotated[list[limits.Text], _Many] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(msgspec.Struct):
    """The body of ``/detokenize``."""

    tokens: Annotated[list[limits.TokenId | limits.TokenIds], Meta(max_length=limits.MAX_PROMPT_TOKENS)]
    skip_special_tokens: bool = True


class NativeInfo:
    """The routes."""

    def __init__(self, state: ServerState, info: Info) -> None:
        self._state = state
        self._service = state.service
        self._info = info

    async def model_info(self, _: Request) -> Response:
        """What SGLang's client asks for first; ``model_path`` decides its chat template."""
        name = self._state.model_name
        return reply(
            {
                "model_path": name,
                "served_model_name": name,
                "tokenizer_path": name,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": "default",
                "load_format": "auto",
                "reasoning_parser": marks_name(detect_marks(self._service.template.source)),
                "tool_call_parser": str(self._service.tool_format),
                "disaggregation_mode": "null",
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": None,
                "architectures": None,
            }
        )

    async def server_info(self, _: Request) -> Response:
        """The engine's account and this server's settings; no secrets."""
        stats = await self._info.stats()
        stats.pop("telemetry", None)  # has other keys' tool names
        config = self._state.config
        return reply(
            {
                "version": package_version(),
                "model_path": self._state.model_name,
                "served_model_name": self._state.model_name,
                "page_size": stats.get("page_size"),
                "context_length": stats.get("max_context_tokens"),
                "max_total_num_tokens": stats.get("device_pages", 0) * stats.get("page_size", 0),
                "generation_paused": self._state.paused,
                "policy": stats.get("policy"),
                "max_requests": config.max_requests,
                "tool_wait_s": config.tool_wait_s,
                "requests": len(self._state.board),
                "kept_contexts": len(self._state.kept),
                "sessions": len(self._state.sessions),
                "responses": len(self._state.responses),
                "internal_states": [stats],
            }
        )

    async def flush_cache(self, _: Request) -> Response:
        """Forget every cached prefix. Refused while requests run, unless they hold nothing (paused by ``retract``);
        contexts that wait for tools keep theirs."""
        if len(self._state.board) and self._state.paused != "retract":
            raise ApiError(400, f"the cache cannot be flushed while {len(self._state.board)} requests run")
        await self._service.flush_cache()
        return PlainTextResponse("Cache flushed.\n")

    async def health_generate(self, request: Request) -> Response:
        """The engine computes: a token for this request, or meanwhile a step for those before it."""

        async def check() -> None:
            async with engine_answers(HEALTH_DEADLINE_S):
                steps = (await self._service.read_stats())["steps"]
                token = asyncio.ensure_future(self._make_token())
                try:
                    while not token.done() and (await self._service.read_stats())["steps"] == steps:
                        await asyncio.wait((token,), timeout=HEALTH_POLL_S)
                    if token.done():
                        token.result()
                finally:
                    token.cancel()
                    await settled(asyncio.gather(token, return_exceptions=True))

        await until_disconnect(request, check())
        return reply({"status": "ok"})

    async def _make_token(self) -> None:
        """Outside of the queue of requests: a server that is full is healthy."""
        handle = await self._service.open("health", HEALTH_DEADLINE_S)
        try:
            await handle.append(begun(self._service.tokenizer, []))
            params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
            chunks = cast("AsyncGenerator[TokenChunk, None]", handle.generate(params))
            async with contextlib.aclosing(chunks):
                async for _ in chunks:
                    pass
        finally:
            await settled(handle.close())

    async def concate_and_append(self, request: Request) -> Response:
        """Nothing to do: SGLang's client joins the branches' texts itself, and sends them with the next prompt."""
        await request.body()
        return reply({"success": True})

    async def abort(self, request: Request) -> Response:
        """End the caller's request of this id, or all of the caller's requests."""
        body = await read(request, AbortRequest)
        if not (body.rid or body.abort_all):
            raise ApiError(400, "rid or abort_all must be given", param="rid")
        count = await self._state.board.abort(principal_of(request).key_id, None if body.abort_all else body.rid)
        return reply({"success": True, "aborted": count})

    async def tokenize(self, request: Request) -> Response:
        """Text to token ids. A prompt is the caller's own text, so control tokens in it are read as such."""
        body = await read(request, TokenizeRequest)
        prompt = body.prompt if body.prompt is not None else body.text
        if prompt is None:
            raise ApiError(400, "prompt is missing", param="prompt")
        texts = [prompt] if isinstance(prompt, str) else prompt
        tokenizer = self._service.tokenizer

        def encode(text: str) -> list[int]:
            if body.add_special_tokens and text:
                return encode_text(tokenizer, text)
            return tokenizer.encode(text, allow_special=True)

        lists = await self._state.on_text_thread(lambda: [encode(text) for text in texts])
        out: dict[str, Any] = {"tokens": lists, "count": [len(ids) for ids in lists]}
        if isinstance(prompt, str):
            out = {"tokens": lists[0], "count": len(lists[0])}
        return reply(out)

    async def detokenize(self, request: Request) -> Response:
        """Token ids to text."""
        body = await read(request, DetokenizeRequest)
        tokenizer = self._service.tokenizer
        flat = [item for item in body.tokens if isinstance(item, int)]
        if flat and len(flat) != len(body.tokens):
            raise ApiError(400, "tokens mixes ids with lists of ids", param="tokens")
        nested = [item for item in body.tokens if isinstance(item, list)]
        if len(nested) > limits.MAX_PROMPTS:
            raise ApiError(400, f"tokens: Expected `array` of length <= {limits.MAX_PROMPTS}", param="tokens")

        def decode(ids: list[int]) -> str:
            if not ids:
                return ""
            return tokenizer.decode(checked_ids(tokenizer, ids, "tokens"), skip_special=body.skip_special_tokens)

        texts = await self._state.on_text_thread(lambda: [decode(ids) for ids in nested or [flat]])
        text = texts if nested else texts[0]
        return reply({"text": text, "prompt": text})
