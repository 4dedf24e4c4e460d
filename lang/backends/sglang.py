"""A stock SGLang server, router or cluster as a backend, over its native ``/generate``.

The context is sent as text with every request, and the server's prefix cache makes that cheap; a fork is a copy.
Grammars, logprobs and choices go by SGLang's own protocol. What its frontend cannot do either stays undone: nothing is
paused, and nobody tells which template the model has.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from caesura.lang.backend import (
    Capabilities,
    ChatFormat,
    Finish,
    GenChunk,
    GenRequest,
    OptionScore,
    Piece,
    TokenLogprob,
    ToolCallRequest,
    ToolSpec,
)
from caesura.lang.backends.http_client import HttpClient, HttpOptions, failure_of, refusal_of, status_of
from caesura.lang.backends.http_text import (
    Notices,
    TextSession,
    aligned,
    calls_in_text,
    choice_regex,
    last_tokens,
    without_control,
)
from caesura.lang.backends.sglang_formats import ALL_CONTROL, PLAIN, NamedFormat, format_named, format_of_model
from caesura.lang.errors import RemoteError, ServerUnavailable, UnsupportedByBackend
from caesura.lang.typed import plain_schema

MAX_AT_ONCE = 64  # texts to score in one request


class SGLangBackend:
    """Sessions on an SGLang server at ``url``.

    ``chat``: the name of a chat format (chatml, llama-3, gemma, plain), a ChatFormat of your own, None for no roles,
    or ``"auto"``, which goes by the model's name.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        chat: str | ChatFormat | None = "auto",
        timeout_s: float = 3600.0,
        retry_s: float = 60.0,
        max_connections: int = 512,
    ) -> None:
        self.client = HttpClient(url, HttpOptions(api_key, timeout_s, retry_s, max_connections), failure_of)
        self.url = self.client.url
        self.name = f"sglang({self.url})"
        self.notices = Notices(self.name)
        self.chat: ChatFormat | None
        if isinstance(chat, str):
            self.chat = AutoFormat(self) if chat == "auto" else format_named(chat)
        else:
            self.chat = chat
        self.capabilities = Capabilities(
            chat=chat is not None,
            tools=chat is not None,
            pause=False,
            prompt_logprobs=True,
            calls_beside_grammar=False,
        )

    @property
    def control(self) -> tuple[str, ...]:
        """What content must not contain, as far as the chat format is known."""
        return getattr(self.chat, "control", ())

    async def model_path(self) -> str:
        """The model's name as the server gives it, empty where it gives none (some routers)."""
        for path in ("/model_info", "/get_model_info"):
            with contextlib.suppress(RemoteError):
                info = await self.client.get(path)
                if isinstance(info, dict) and info.get("model_path"):
                    return str(info["model_path"])
        return ""

    async def open(self, *, namespace: str = "", deadline_s: float | None = None) -> SGLangSession:
        """A new context, here. ``namespace`` becomes the server's ``cache_salt``."""
        session = SGLangSession(self)
        session.namespace = namespace
        return session

    async def flush_cache(self) -> None:
        """Drop the server's cached prefixes; refused while requests run."""
        await self.client.post("/flush_cache")

    async def server_info(self) -> Mapping[str, Any]:
        """What the server says of itself, and the model's name under ``model``."""
        try:
            info = await self.client.get("/server_info")
        except RemoteError:
            info = await self.client.get("/get_server_info")
        return {"model": info.get("model_path") or await self.model_path(), **info}

    def close(self) -> None:
        """Close the connections; the server goes on."""
        self.client.close()

    def __enter__(self) -> SGLangBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AutoFormat:
    """The chat format that the served model's name suggests, looked up at the first turn."""

    def __init__(self, owner: SGLangBackend) -> None:
        self._owner = owner
        self._found: NamedFormat | None = None

    @property
    def stop(self) -> tuple[str, ...]:
        return self._found.stop if self._found is not None else ()

    @property
    def control(self) -> tuple[str, ...]:
        """While the model's own marks are not known, those of all formats."""
        return (self._found.control if self._found is not None else ()) or ALL_CONTROL

    async def _format(self) -> NamedFormat:
        if self._found is None:
            path = await self._owner.model_path()
            found = format_of_model(path)
            if found is None:
                named = f"the name {path!r}" if path else "a server that does not name its model"
                self._owner.notices.tell("format", f"no chat format is known for {named}; give chat=. Taken: plain")
            self._found = found or PLAIN
        return self._found

    async def turn(
        self, role: str, *, first: bool, tools: Sequence[ToolSpec] | None = None
    ) -> tuple[Sequence[Piece], Sequence[Piece]]:
        return await (await self._format()).turn(role, first=first, tools=tools)

    async def tool_results(
        self, results: Sequence[tuple[str, str]], *, tools: Sequence[ToolSpec] | None = None
    ) -> Sequence[Piece]:
        return await (await self._format()).tool_results(results, tools=tools)


class SGLangSession(TextSession):
    """A context as text."""

    namespace = ""

    def __init__(self, owner: SGLangBackend, pieces: Sequence[Piece] = ()) -> None:
        super().__init__(owner, pieces)
        self._backend = owner

    def copy(self) -> SGLangSession:
        other = SGLangSession(self._backend, self.pieces)
        other.namespace = self.namespace
        return other

    @property
    def text(self) -> str:
        """The context as the server reads it: control tokens stand in the chat format's marks alone."""
        control = self._backend.control
        runs = itertools.groupby(self.pieces, lambda piece: piece.special)  # two pieces may hold half a mark each
        texts = ((special, "".join(piece.text for piece in run)) for special, run in runs)
        return "".join(text if special else without_control(text, control) for special, text in texts)

    def _body(self, text: str | Sequence[str], sampling: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        body = {"text": text, "sampling_params": dict(sampling), **more}
        if self.namespace:
            body["cache_salt"] = self.namespace
        return body

    async def generate(self, request: GenRequest) -> AsyncGenerator[GenChunk, None]:
        self._alive()
        body = self._body(self.text, _sampling(request))
        if request.logprobs is not None:
            body |= {"return_logprob": True, "top_logprobs_num": request.logprobs, "return_text_in_logprobs": True}
        pieces: list[str] = []
        answers = self._answers(body, request.stream)
        seen = _Seen()
        async with contextlib.aclosing(answers):
            async for told in answers:
                chunk = seen.take(told)
                pieces.append(chunk.text)
                if chunk.text or chunk.token_ids:
                    yield chunk
        text = "".join(pieces)
        finish = _finish(self._backend.name, seen.meta, text, request)
        self.pieces.append(Piece(text))
        yield GenChunk(finish=finish)

    async def _answers(self, body: dict[str, Any], stream: bool) -> AsyncGenerator[dict[str, Any], None]:
        if not stream:
            yield await self._backend.client.post("/generate", body, computes=True)
            return
        async with contextlib.aclosing(self._backend.client.events("/generate", {**body, "stream": True})) as events:
            async for event in events:
                if event.data == "[DONE]":
                    return
                told = json.loads(event.data)
                if told.get("error"):
                    raise failure_of(refusal_of(status_of(told["error"]), event.data.encode()))
                yield told

    async def prefill(self) -> None:
        """A request for no token at all puts the context into the server's cache."""
        if self.pieces:
            await self._zero(self.text)

    async def _zero(self, text: str | Sequence[str], **more: Any) -> Any:
        body = self._body(text, {"max_new_tokens": 0, "temperature": 0.0}, **more)
        return await self._backend.client.post("/generate", body, computes=True)

    async def score(self, texts: Sequence[str], *, unconditional: bool = False) -> list[OptionScore]:
        """Logprobs of each text behind the context. Alone, a text follows a line break."""
        context = self.text
        start = 0
        if context:
            start = (await self._zero(context))["meta_info"]["prompt_tokens"]
        given = await self._scored([context + text for text in texts], texts, max(start - 2, 0))
        if not unconditional:
            return [OptionScore(scores) for scores in given]
        alone = await self._scored(["\n" + text for text in texts], texts, 0)
        return [OptionScore(*aligned(one, other)) for one, other in zip(given, alone, strict=True)]

    async def _scored(self, prompts: Sequence[str], texts: Sequence[str], start: int) -> list[tuple[TokenLogprob, ...]]:
        answers: list[Any] = []
        for at in range(0, len(prompts), MAX_AT_ONCE):
            some = list(prompts[at : at + MAX_AT_ONCE])
            more = {"return_logprob": True, "logprob_start_len": start, "return_text_in_logprobs": True}
            answers += await self._zero(some, **more)
        out = []
        for told, text in zip(answers, texts, strict=True):
            entries = _logprobs(told["meta_info"]["input_token_logprobs"])
            tokens = last_tokens(entries, text)
            if not tokens:
                raise RemoteError(f"{self._backend.name} gave no logprobs of {text[:60]!r}; select needs them")
            out.append(tokens)
        return out

    async def prompt_logprobs(self, start: int) -> list[TokenLogprob]:
        more = {"return_logprob": True, "logprob_start_len": max(start - 1, 0), "return_text_in_logprobs": True}
        told = await self._zero(self.text, **more)
        entries = told["meta_info"]["input_token_logprobs"]
        return list(_logprobs(entries[1:] if start > 0 else entries))  # the first may be null


class _Seen:
    """Turns a server's cumulative answers into pieces. Servers told to stream pieces are recognised."""

    def __init__(self) -> None:
        self._text = ""
        self._num_ids = self._num_logprobs = 0
        self._pieces = False
        self.meta: Mapping[str, Any] = {}

    def take(self, told: Mapping[str, Any]) -> GenChunk:
        if isinstance(told, list):
            raise RemoteError("the server answered one prompt with a list")
        self.meta = told["meta_info"]
        text, ids = told["text"], list(told.get("output_ids") or ())
        logprobs = self.meta.get("output_token_logprobs") or ()
        tops = self.meta.get("output_top_logprobs") or ()
        count = self.meta.get("completion_tokens") or 0
        self._pieces = self._pieces or self._is_piece(text, len(ids), count)
        skip_ids, skip_logprobs = (0, 0) if self._pieces else (self._num_ids, self._num_logprobs)
        new = text if self._pieces else text[len(self._text) :]
        new_ids, new_logprobs = ids[skip_ids:], logprobs[skip_logprobs:]
        self._text = self._text + text if self._pieces else text
        self._num_ids += len(new_ids)
        self._num_logprobs += len(new_logprobs)
        return GenChunk(new, tuple(new_ids), _logprobs(new_logprobs, tops[skip_logprobs:]))

    def _is_piece(self, text: str, num_ids: int, count: int) -> bool:
        """Whether an answer goes on where the last one ended, instead of repeating it. A stop string that was already
        on its way is cut off at the end, so a repeated text may also be shorter, and so may its one token."""
        repeats = text.startswith(self._text) or self._text.startswith(text)
        told_apart = self._num_ids > 1 or (self._num_ids == 1 and not self.meta.get("finish_reason"))
        return not repeats or (told_apart and num_ids < count == self._num_ids + num_ids)


def _sampling(request: GenRequest) -> dict[str, Any]:
    """``sampling_params``: servers refuse names they do not know, so only what differs from the defaults is sent."""
    if request.tool_use is not None and request.tool_use.choice not in ("auto", "none"):
        raise UnsupportedByBackend(
            f"gen({request.name!r}) demands the tool call {request.tool_use.choice!r}, but /generate takes no tools; "
            "use OpenAIBackend for that server, or leave tool_choice at 'auto'"
        )
    wanted: dict[str, tuple[Any, Any]] = {
        "min_new_tokens": (request.min_tokens, 0),
        "top_p": (request.top_p, 1.0),
        "top_k": (request.top_k, -1),
        "min_p": (request.min_p, 0.0),
        "frequency_penalty": (request.frequency_penalty, 0.0),
        "presence_penalty": (request.presence_penalty, 0.0),
        "repetition_penalty": (request.repetition_penalty, 1.0),
        "stop": (list(request.stop), []),
        "stop_token_ids": (list(request.stop_token_ids), []),
        "stop_regex": (list(request.stop_regex), []),
        "ignore_eos": (request.ignore_eos, False),
        "sampling_seed": (request.seed, None),
        "logit_bias": ({str(token_id): value for token_id, value in request.logit_bias}, {}),
    }
    params: dict[str, Any] = {"max_new_tokens": request.max_tokens, "temperature": request.temperature}
    params |= {name: value for name, (value, default) in wanted.items() if value != default}
    held = request.constraint
    if held is not None:
        kind, source = held.kind, held.source
        if kind == "choices":
            params["regex"] = choice_regex(json.loads(source))
        else:
            params[kind] = json.dumps(plain_schema(source)) if kind == "json_schema" else source
    return params


def _finish(backend: str, meta: Mapping[str, Any], text: str, request: GenRequest) -> Finish:
    reason = meta.get("finish_reason")
    if not isinstance(reason, dict):
        raise ServerUnavailable(f"{backend} ended a generation in its middle; run the program again")
    if reason["type"] == "abort":
        raise RemoteError(f"{backend} aborted {request.name!r}: {reason.get('message') or 'it does not say why'}")
    calls: tuple[ToolCallRequest, ...] = ()
    content = None
    if request.tool_use is not None and request.tool_use.choice != "none":
        found = calls_in_text(text)
        if found is not None:
            content, calls = found[0], tuple(found[1])
    return Finish(
        reason="tool_calls" if calls else "length" if reason["type"] == "length" else "stop",
        matched=reason.get("matched"),
        tool_calls=calls,
        content=content,
        prompt_tokens=meta.get("prompt_tokens") or 0,
        completion_tokens=meta.get("completion_tokens") or 0,
        cached_tokens=meta.get("cached_tokens") or 0,
    )


def _logprobs(entries: Sequence[Any], tops: Sequence[Any] = ()) -> tuple[TokenLogprob, ...]:
    """SGLang's ``[logprob, token id, text]``; entries without a number are left out."""
    out = []
    for number, (logprob, token_id, text) in enumerate(entries):
        if logprob is not None:
            top = tops[number] if number < len(tops) else None
            out.append(TokenLogprob(logprob, token_id, text, tuple((lp, i, t) for lp, i, t in top or ())))
    return tuple(out)
