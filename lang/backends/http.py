"""A Caesura server as a backend: every program runs as it does on the engine in this process.

A session is a context of ``/v1/contexts``; text becomes tokens on the server, where model, tokenizer and template are.
Errors are the runtime's own, by their kinds and with their texts. Only light parts of the runtime are imported.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal

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
from caesura.lang.backends.engine import DEADLINE_GRACE_S, TOOL_GRACE_S, sampling_params
from caesura.lang.backends.http_client import HttpClient, HttpOptions, Refusal, failure_of, refusal_of
from caesura.lang.errors import RemoteError, ServerUnavailable

MAX_AT_ONCE = 64  # forks, and options to score, in one request
MAX_UNSENT = 1024  # pieces that wait for the next request
MAX_TURNS = 256  # remembered turns of the chat template
CLOSE_RETRY_S = 3.0  # a refused deletion would leave the context to the server for long; a run waits little for it
CLOSE_S = 10.0  # and no longer than this for a server that does not answer

Pieces = tuple[tuple[Piece, ...], tuple[Piece, ...]]


class HTTPBackend:
    """Sessions on a ``caesura serve`` at ``url``, one connection pool for all of them.

    ``timeout_s`` bounds one computing request, ``retry_s`` how long refusals for lack of room (429, 503) are tried
    again; a program's ``deadline_s`` ends both earlier. Needs the package httpx.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = 3600.0,
        retry_s: float = 60.0,
        max_connections: int = 512,
    ) -> None:
        options = HttpOptions(api_key, timeout_s, retry_s, max_connections)
        self._client = HttpClient(url, options, _failure)
        self.url = self._client.url
        self.name = f"http({self.url})"
        self.capabilities = Capabilities(prompt_logprobs=True, calls_beside_grammar=False)
        self.chat = RemoteChat(self._client)

    async def open(self, *, namespace: str = "", deadline_s: float | None = None) -> HTTPSession:
        """A new context on the server."""
        body: dict[str, Any] = {"cache_salt": namespace} if namespace else {}
        if deadline_s is not None:
            body["deadline_s"] = deadline_s + DEADLINE_GRACE_S
        return HTTPSession(self._client, await self._client.post("/v1/contexts", body))

    async def flush_cache(self) -> None:
        """Drop every cached prefix that no context holds. Needs an admin key where there are any."""
        await self._client.post("/flush_cache")

    async def server_info(self) -> Mapping[str, Any]:
        """The model's name, the engine's account, and under ``server`` the server's own."""
        info = await self._client.get("/server_info")
        (stats,) = info.pop("internal_states")
        return {"model": info["served_model_name"], **stats, "server": info}

    async def model_info(self) -> Mapping[str, Any]:
        """What the server says of its model, under SGLang's names."""
        info: Mapping[str, Any] = await self._client.get("/model_info")
        return info

    def close(self) -> None:
        """Close the connections; the server goes on."""
        self._client.close()

    def __enter__(self) -> HTTPBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RemoteChat:
    """The served model's chat template. What it writes around a turn depends on the turn's kind alone, so each kind is
    asked for once."""

    stop: tuple[str, ...] = ()  # turns end with an end-of-sequence token

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._turns: dict[str, Pieces] = {}

    async def turn(
        self, role: str, *, first: bool, tools: Sequence[ToolSpec] | None = None
    ) -> tuple[Sequence[Piece], Sequence[Piece]]:
        body = {"role": role, "first": first, "tools": list(tools or ())}
        key = json.dumps(body)
        if key not in self._turns:
            answer = await self._client.post("/v1/template/turn", body)
            while len(self._turns) >= MAX_TURNS:
                self._turns.pop(next(iter(self._turns)))
            self._turns[key] = _pieces(answer["opening"]), _pieces(answer["closing"])
        return self._turns[key]

    async def tool_results(
        self, results: Sequence[tuple[str, str]], *, tools: Sequence[ToolSpec] | None = None
    ) -> Sequence[Piece]:
        told = [{"name": name, "content": content} for name, content in results]
        answer = await self._client.post("/v1/template/tool_results", {"results": told, "tools": list(tools or ())})
        return _pieces(answer["pieces"])


class HTTPSession:
    """One context of the server."""

    def __init__(self, client: HttpClient, described: Mapping[str, Any]) -> None:
        self._client = client
        self._path = f"/v1/contexts/{described['id']}"
        self._num_tokens: int | None = described["num_tokens"]  # None: something was interrupted, the server knows
        self._unsent: list[dict[str, Any]] = []  # goes with the next request that needs it
        self._deletion: asyncio.Task[None] | None = None

    async def _post(self, verb: str, body: Mapping[str, Any] | None = None, *, computes: bool = False) -> Any:
        """A request to the context. If it is interrupted, only the server knows what became of it."""
        length, self._num_tokens = self._num_tokens, None
        answer = await self._client.post(f"{self._path}/{verb}", body, computes=computes)
        self._num_tokens = answer.get("num_tokens", length)
        _check_aborted(answer)
        return answer

    async def append(self, pieces: Sequence[Piece | Tokens]) -> None:
        for piece in pieces:
            if isinstance(piece, Tokens):
                self._unsent.append({"token_ids": list(piece.token_ids)})
            else:
                self._unsent.append({"text": piece.text, "special": piece.special})
        if len(self._unsent) > MAX_UNSENT:
            await self._flush()

    def _take_unsent(self) -> list[dict[str, Any]]:
        unsent, self._unsent = self._unsent, []
        return unsent

    async def _flush(self) -> None:
        """Send what was appended."""
        for at in range(0, len(self._unsent), MAX_UNSENT):
            await self._post("append", {"pieces": self._unsent[at : at + MAX_UNSENT]})
        self._unsent = []

    async def generate(self, request: GenRequest) -> AsyncGenerator[GenChunk, None]:
        sampling_params(request)  # the runtime's own checks, so that a bad value is told of in the same words
        body = {**_generate_body(request), "pieces": self._take_unsent()}
        self._num_tokens = None
        if request.stream:
            chunks = self._stream(body)
        else:
            chunks = self._whole(body)
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    async def _whole(self, body: dict[str, Any]) -> AsyncGenerator[GenChunk, None]:
        answer = await self._client.post(f"{self._path}/generate", {**body, "stream": False}, computes=True)
        yield self._chunk(answer, answer["token_ids"], answer)

    async def _stream(self, body: dict[str, Any]) -> AsyncGenerator[GenChunk, None]:
        ids: list[int] = []
        async with contextlib.aclosing(self._client.events(f"{self._path}/generate", body)) as events:
            async for event in events:
                told = json.loads(event.data)
                if event.name == "error" or "error" in told:
                    raise _failure(refusal_of(_status(told["error"]), event.data.encode()))
                if event.name == "finish":
                    yield self._chunk({"text": ""}, ids, told)
                    return
                ids += told["token_ids"]
                yield self._chunk(told, ids, None)
        raise ServerUnavailable(f"{self._client.url} ended a generation in its middle; run the program again")

    def _chunk(self, told: Mapping[str, Any], all_ids: Sequence[int], finished: Mapping[str, Any] | None) -> GenChunk:
        logprobs = tuple(_logprob(item) for item in told.get("logprobs", ()))
        finish = None
        if finished is not None:
            self._num_tokens = finished["num_tokens"]
            _check_aborted(finished)
            finish = _finish(finished, all_ids)
        return GenChunk(told["text"], tuple(told.get("token_ids", ())), logprobs, finish)

    async def score(self, texts: Sequence[str], *, unconditional: bool = False) -> list[OptionScore]:
        await self._flush()
        scores: list[OptionScore] = []
        for at in range(0, len(texts), MAX_AT_ONCE):
            body = {"texts": list(texts[at : at + MAX_AT_ONCE]), "unconditional": unconditional}
            answer = await self._post("score", body, computes=True)
            scores += [
                OptionScore(
                    _scored(one["conditional"]), _scored(one["unconditional"]) if one["unconditional"] else None
                )
                for one in answer["options"]
            ]
        return scores

    async def prompt_logprobs(self, start: int) -> list[TokenLogprob]:
        await self._flush()
        answer = await self._post("score", {"start": start}, computes=True)
        return list(_scored(answer["tokens"]))

    async def prefill(self) -> None:
        if await self.mark():
            await self._post("prefill", computes=True)

    async def fork(self, n: int) -> list[HTTPSession]:
        """Made 64 at a time; all or none."""
        await self._flush()
        copies: list[HTTPSession] = []
        try:
            while len(copies) < n:
                count = min(MAX_AT_ONCE, n - len(copies))
                answer = await self._client.post(f"{self._path}/fork", {"count": count})
                copies += [HTTPSession(self._client, described) for described in answer["contexts"]]
        except BaseException:
            for copy in copies:
                with contextlib.suppress(Exception):
                    await copy.close()
            raise
        return copies

    async def pause(self, calls: Sequence[PendingCall], *, wait: Literal["all", "any"] = "all") -> None:
        await self._flush()
        pending = [
            {
                "tool": call.tool[:64],
                "expected_s": call.expected_s,
                "deadline_s": None if call.deadline_s is None else call.deadline_s + TOOL_GRACE_S,
            }
            for call in calls
        ]
        await self._post("pause", {"calls": pending, "wait": wait})

    async def report(self, fraction: float, call: int = 0) -> None:
        body = {"fraction": fraction, "call": call}
        await self._client.request("POST", f"{self._path}/progress", body, retry_s=0.0)  # the next word will do

    async def resume(self) -> None:
        await self._post("resume", {"pieces": self._take_unsent()})

    async def mark(self) -> int:
        await self._flush()
        if self._num_tokens is None:
            self._num_tokens = (await self._client.get(self._path))["num_tokens"]
        return self._num_tokens or 0

    async def rollback(self, mark: int) -> None:
        self._unsent = []  # marks are taken of what was sent
        await self._post("rollback", {"num_tokens": mark})

    async def close(self) -> None:
        """Delete the context, whatever it does. A server that has no room for that now is asked again. Who waits may
        go; the deletion goes on, for it may stand behind all that waits for a connection."""
        if self._deletion is None:
            self._deletion = asyncio.ensure_future(self._delete())
        done, _ = await asyncio.wait((self._deletion,), timeout=CLOSE_S)
        for deletion in done:
            deletion.result()

    async def _delete(self) -> None:
        with contextlib.suppress(RemoteError):  # gone with its server, or about to expire there
            await self._client.request("DELETE", self._path, None, retry_s=CLOSE_RETRY_S)

    async def decisions(self) -> Sequence[Any]:
        """The runtime's decisions, as the same objects that the engine in this process gives."""
        if self._deletion is not None:
            return ()
        import msgspec
        from caesura.scheduler.types import PauseDecision

        answer = await self._client.request("GET", f"{self._path}/decisions", None, retry_s=0.0)
        return msgspec.convert(answer["decisions"], list[PauseDecision], strict=False)


def _check_aborted(answer: Mapping[str, Any]) -> None:
    if answer.get("reason") == "abort":
        from caesura.runtime.errors import ContextClosed

        raise ContextClosed("the request was aborted")


def _generate_body(request: GenRequest) -> dict[str, Any]:
    held, use = request.constraint, request.tool_use
    body: dict[str, Any] = {
        "max_new_tokens": request.max_tokens,
        "min_new_tokens": request.min_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "repetition_penalty": request.repetition_penalty,
        "seed": request.seed,
        "stop": list(request.stop),
        "stop_token_ids": list(request.stop_token_ids),
        "stop_regex": list(request.stop_regex),
        "ignore_eos": request.ignore_eos,
        "logprobs": request.logprobs,
        "logit_bias": {str(token_id): value for token_id, value in request.logit_bias},
        "constraint": None if held is None else {"kind": held.kind, "source": held.source},
    }
    if use is not None and use.choice != "none":
        body["tools"] = [dict(spec) for spec in use.tools]
        body["tool_choice"] = use.choice
        body["parallel_tool_calls"] = use.parallel
    return body


def _finish(told: Mapping[str, Any], ids: Sequence[int]) -> Finish:
    kept = told["kept_token_ids"]
    return Finish(
        reason=told["reason"],
        matched=told["matched"],
        tool_calls=tuple(ToolCallRequest(call["name"], call["arguments"]) for call in told["tool_calls"]),
        content=told["content"],
        kept_token_ids=tuple(ids if kept is None else kept),
        **told["usage"],
    )


def _logprob(told: Mapping[str, Any]) -> TokenLogprob:
    top = tuple((logprob, token_id, text) for token_id, logprob, text in told["top_logprobs"])
    return TokenLogprob(told["logprob"] or 0.0, told["token_id"], told["text"], top)


def _scored(told: Sequence[Mapping[str, Any]]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(item["logprob"], item["token_id"], item["text"]) for item in told)


def _pieces(told: Sequence[Mapping[str, Any]]) -> tuple[Piece, ...]:
    return tuple(Piece(item["text"], item["special"]) for item in told)


def _status(error: Mapping[str, Any]) -> int:
    """The HTTP status that an error in the middle of a stream would have had."""
    if error.get("code") in ("context_gone", "context_lost"):
        return 410
    kinds = {"invalid_request_error": 400, "not_found_error": 404, "timeout_error": 408, "service_unavailable": 503}
    return kinds.get(str(error.get("type")), 500)


def _failure(refusal: Refusal) -> Exception:
    """The exception that the engine in this process would have raised, or one that says what the server lacks."""
    from caesura.runtime.errors import ContextClosed, DeadlineExceeded, EngineStopped

    message = refusal.message
    match refusal.status, refusal.code:
        case 404, "context_not_found":
            return ServerUnavailable(
                "the server no longer has this program's context: it was restarted, or the context was not used "
                "for too long; run the program again"
            )
        case 404, _:
            return RemoteError(f"{message}: this is no Caesura server; for others use OpenAIBackend or SGLangBackend")
        case 410, "context_lost":
            return EngineStopped(message)
        case 410, "context_gone" if "deadline" in message:
            return DeadlineExceeded(message)
        case 410, _:
            return ContextClosed(message)
    return failure_of(refusal)
