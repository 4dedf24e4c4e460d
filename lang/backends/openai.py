"""Any OpenAI-compatible endpoint as a backend: programs run as they are, without pauses.

Turns become messages of ``/chat/completions``, plain text a prompt of ``/completions``; the conversation is sent again
with every request. What an endpoint cannot do is refused with the reason, before or as it is asked for.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from caesura.lang.backend import (
    Capabilities,
    ChatFormat,
    Constraint,
    ConstraintKind,
    Finish,
    FinishReason,
    GenChunk,
    GenRequest,
    OptionScore,
    Piece,
    TokenLogprob,
)
from caesura.lang.backends.http_client import HttpClient, HttpOptions, NotServed, failure_of, refusal_of, status_of
from caesura.lang.backends.http_text import (
    LOWEST_LOGPROB,
    Notices,
    TextSession,
    aligned,
    calls_as_text,
    last_tokens,
)
from caesura.lang.backends.openai_messages import (
    CallParts,
    MessageChat,
    chat_logprobs,
    messages_of,
    open_answer,
    read_pieces,
    text_logprobs,
)
from caesura.lang.backends.openai_request import Dialect, request_body
from caesura.lang.errors import OutputError, RemoteError, UnsupportedByBackend

_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}

_NO_ECHO = (ValueError, NotServed)  # the answers to what an endpoint does not do; InvalidRequest is a ValueError


class OpenAIBackend:
    """Sessions on an OpenAI-compatible endpoint.

    ``url`` is its base (``/v1`` is added when there is no path). ``model`` None takes the first one listed.
    ``dialect`` says which fields beyond OpenAI's the server knows: SGLang's (``caesura serve`` knows them too) or
    vLLM's; with ``"openai"`` an argument or grammar that needs one is refused. ``prefill``: the server can go on in
    an assistant turn that has text already (``continue_final_message``). ``chat=False`` for endpoints without chat
    completions.
    """

    def __init__(
        self,
        url: str = "https://api.openai.com/v1",
        model: str | None = None,
        api_key: str | None = None,
        *,
        dialect: Dialect = "openai",
        prefill: bool = False,
        chat: bool = True,
        timeout_s: float = 600.0,
        retry_s: float = 60.0,
        max_connections: int = 256,
    ) -> None:
        base = url.rstrip("/")
        if base.count("/") == 2:
            base += "/v1"
        self.client = HttpClient(base, HttpOptions(api_key, timeout_s, retry_s, max_connections), failure_of)
        self.url = base
        self.name = f"openai({base})"
        self.dialect: Dialect = dialect
        self.prefill = prefill
        self.notices = Notices(self.name)
        constraints: tuple[ConstraintKind, ...] = ("json_schema", "choices")
        if dialect != "openai":
            constraints += ("regex", "ebnf")
        self.capabilities = Capabilities(
            chat=chat,
            tools=chat,
            pause=False,
            prompt_logprobs=False,
            calls_beside_grammar=dialect == "openai",
            constraints=frozenset(constraints),
        )
        self.chat: ChatFormat | None = MessageChat() if chat else None
        self.can_echo: bool | None = None  # not known yet
        self.max_tokens_field = "max_tokens"
        self._model = model

    async def model(self) -> str:
        """The model's name. Raises RemoteError when none was given and the endpoint lists none."""
        if self._model is None:
            listed = (await self.client.get("/models")).get("data") or ()
            if not listed:
                raise RemoteError(f"{self.name} lists no models; give model=")
            self._model = str(listed[0]["id"])
        return self._model

    async def open(self, *, namespace: str = "", deadline_s: float | None = None) -> OpenAISession:
        """A new context, here."""
        if namespace and self.dialect == "openai":
            raise UnsupportedByBackend(
                f"backend {self.name!r} cannot keep the cache of a namespace apart; dialect='sglang' or 'vllm' can"
            )
        session = OpenAISession(self)
        session.namespace = namespace
        return session

    async def flush_cache(self) -> None:
        """Raises UnsupportedByBackend: the cache is the endpoint's own."""
        raise UnsupportedByBackend(f"backend {self.name!r} cannot flush its server's cache")

    async def server_info(self) -> Mapping[str, Any]:
        """The model, and the models there are."""
        listed = (await self.client.get("/models")).get("data") or ()
        return {"model": await self.model(), "models": [item["id"] for item in listed]}

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def __enter__(self) -> OpenAIBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def send(self, path: str, body: Mapping[str, Any]) -> Any:
        """A whole answer. A model that insists on the newer name of ``max_tokens`` is given it."""
        sent = self._named(path, body)
        try:
            return await self.client.post(path, sent, computes=True)
        except ValueError as error:  # InvalidRequest is one
            self._rename(error, path, sent)
            return await self.client.post(path, self._named(path, body), computes=True)

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The objects of a streamed answer."""
        wanted = {**body, "stream": True, "stream_options": {"include_usage": True}}
        for attempt in (0, 1):
            sent = self._named(path, wanted)
            try:
                async with contextlib.aclosing(self.client.events(path, sent)) as events:
                    async for event in events:
                        attempt = 1  # something came: too late to try again
                        if event.data == "[DONE]":
                            return
                        told = json.loads(event.data)
                        if told.get("error"):
                            raise failure_of(refusal_of(status_of(told["error"]), event.data.encode()))
                        yield told
                return
            except ValueError as error:
                if attempt:
                    raise
                self._rename(error, path, sent)

    def _named(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        out = dict(body)
        if path.startswith("/chat") and self.max_tokens_field != "max_tokens":
            out[self.max_tokens_field] = out.pop("max_tokens")
        return out

    def _rename(self, error: ValueError, path: str, sent: Mapping[str, Any]) -> None:
        """Raise the error again unless it asks for the newer name and this request had the older one."""
        if not (path.startswith("/chat") and "max_tokens" in sent and "max_completion_tokens" in str(error)):
            raise error
        self.max_tokens_field = "max_completion_tokens"

    async def echoes(self) -> bool:
        """Whether the endpoint gives logprobs of a prompt, by a prompt that nothing can be wrong with."""
        if self.can_echo is None:
            try:
                await self.echoed(["a"])
            except _NO_ECHO as error:
                self.can_echo = False
                self.notices.tell("echo", f"the endpoint gives no logprobs of a prompt ({error})")
        return bool(self.can_echo)

    async def echoed(self, prompts: Sequence[str]) -> list[tuple[TokenLogprob, ...]]:
        """The tokens of each prompt with their logprobs."""
        body = {"model": await self.model(), "prompt": list(prompts), "max_tokens": 0, "echo": True, "logprobs": 1}
        choices = (await self.send("/completions", {**body, "temperature": 0})).get("choices") or ()
        found = {choice["index"]: text_logprobs(choice.get("logprobs")) for choice in choices}
        if len(found) != len(prompts) or not all(found.values()):
            raise NotServed("its answer holds none")
        self.can_echo = True
        return [found[number] for number in range(len(prompts))]


class OpenAISession(TextSession):
    """A conversation, or a plain text."""

    namespace = ""

    def __init__(self, owner: OpenAIBackend, pieces: Sequence[Piece] = ()) -> None:
        super().__init__(owner, pieces)
        self._backend = owner
        self._ids: dict[str, list[str]] = {}  # the ids of calls, by the text they stand for

    def copy(self) -> OpenAISession:
        other = OpenAISession(self._backend, self.pieces)
        other.namespace, other._ids = self.namespace, dict(self._ids)
        return other

    async def generate(self, request: GenRequest) -> AsyncGenerator[GenChunk, None]:
        self._alive()
        found = read_pieces(self.pieces)
        chunks = self._chat(request) if found.turns else self._complete(request)
        texts: list[str] = []
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                texts.append(chunk.text)
                if chunk.finish is not None:
                    self.pieces.append(Piece("".join(texts)))
                yield chunk

    # -- chat -----------------------------------------------------------------------------------------------------

    async def _chat(self, request: GenRequest) -> AsyncGenerator[GenChunk, None]:
        backend = self._backend
        found = read_pieces(self.pieces)
        begun = open_answer(found)
        if begun and not backend.prefill:
            raise UnsupportedByBackend(
                f"backend {backend.name!r} cannot go on in an assistant turn that begins with {begun[:40]!r}: let the "
                "gen stand first in its turn, or give prefill=True if the server knows continue_final_message"
            )
        body, wrapped = request_body(await backend.model(), request, backend.dialect, found.tools, self.namespace)
        body["messages"] = messages_of(found.turns if begun else found.turns[:-1], self._ids)
        if begun:
            body.update(continue_final_message=True, add_generation_prompt=False)
        calls = CallParts()
        answers = self._answers("/chat/completions", body, request.stream and wrapped is None)
        texts: list[str] = []
        usage: Mapping[str, Any] = {}
        last: Mapping[str, Any] = {}
        async with contextlib.aclosing(answers):
            async for told in answers:
                usage = told.get("usage") or usage
                for choice in told.get("choices") or ():
                    part = choice.get("delta") or choice.get("message") or {}
                    calls.add(part.get("tool_calls"))
                    text = part.get("content") or ""
                    texts.append(text)
                    last = choice if choice.get("finish_reason") else last
                    if wrapped is None:
                        yield GenChunk(text, logprobs=chat_logprobs(choice.get("logprobs")))
        content = "".join(texts)
        if wrapped is not None:
            content = content if calls.calls else wrapped.unwrap(content)
            yield GenChunk(content)
        if calls.calls:
            shown = calls_as_text(calls.calls)
            shown = f"\n{shown}" if content else shown
            self._ids[begun + content + shown] = calls.ids
            yield GenChunk(shown)
        yield GenChunk(finish=self._finish(last, usage, content, calls if request.tool_use else CallParts()))

    # -- plain text -----------------------------------------------------------------------------------------------

    async def _complete(self, request: GenRequest) -> AsyncGenerator[GenChunk, None]:
        backend = self._backend
        if request.constraint is not None and backend.dialect == "openai":
            raise UnsupportedByBackend(
                f"backend {backend.name!r} holds plain text to no grammar; write the gen into an assistant turn"
            )
        body, _ = request_body(await backend.model(), request, backend.dialect, (), self.namespace, chat=False)
        answers = self._answers("/completions", {**body, "prompt": self.text}, request.stream)
        usage: Mapping[str, Any] = {}
        last: Mapping[str, Any] = {}
        async with contextlib.aclosing(answers):
            async for told in answers:
                usage = told.get("usage") or usage
                for choice in told.get("choices") or ():
                    last = choice if choice.get("finish_reason") else last
                    yield GenChunk(choice.get("text") or "", logprobs=text_logprobs(choice.get("logprobs")))
        yield GenChunk(finish=self._finish(last, usage, None, CallParts()))

    async def _answers(self, path: str, body: Mapping[str, Any], stream: bool) -> AsyncGenerator[dict[str, Any], None]:
        if not stream:
            yield await self._backend.send(path, body)
            return
        async with contextlib.aclosing(self._backend.stream(path, body)) as answers:
            async for told in answers:
                yield told

    def _finish(
        self, choice: Mapping[str, Any], usage: Mapping[str, Any], content: str | None, calls: CallParts
    ) -> Finish:
        reason = choice.get("finish_reason")
        if reason == "content_filter":
            raise RemoteError(f"the content filter of {self._backend.name} ended the answer")
        if reason == "abort":
            raise RemoteError(f"{self._backend.name} aborted the answer; run the program again")
        if reason is None:
            raise RemoteError(f"{self._backend.name} ended an answer without saying why")
        known = _REASONS.get(str(reason), "stop")
        if calls.calls:
            known = "tool_calls"
        elif known == "tool_calls":
            known = "stop"
        return Finish(
            reason=known,
            matched=choice.get("matched_stop") or choice.get("stop_reason"),
            tool_calls=calls.calls,
            content=content,
            prompt_tokens=usage.get("prompt_tokens") or 0,
            completion_tokens=usage.get("completion_tokens") or 0,
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        )

    # -- choosing -------------------------------------------------------------------------------------------------

    async def score(self, texts: Sequence[str], *, unconditional: bool = False) -> list[OptionScore]:
        """By the echoed logprobs of a text completion. A chat, and an endpoint that echoes nothing, is asked to choose:
        its choice scores 0, every other option a very low number."""
        if not read_pieces(self.pieces).turns and self._backend.can_echo is not False:
            try:
                return await self._echoed(texts, unconditional)
            except _NO_ECHO:
                if await self._backend.echoes():  # so it is this prompt that is refused
                    raise
        self._backend.notices.tell(
            "select", "select cannot compare logprobs here; the model is asked which option it takes"
        )
        chosen = await self._asked(texts)
        return [_choice_score(text, text == chosen, unconditional) for text in texts]

    async def _echoed(self, texts: Sequence[str], unconditional: bool) -> list[OptionScore]:
        prompts = [self.text + text for text in texts]
        if unconditional:
            prompts += ["\n" + text for text in texts]
        found = await self._backend.echoed(prompts)
        scored = [last_tokens(tokens, texts[number % len(texts)]) for number, tokens in enumerate(found)]
        if not unconditional:
            return [OptionScore(tokens) for tokens in scored]
        pairs = zip(scored[: len(texts)], scored[len(texts) :], strict=True)
        return [OptionScore(*aligned(given, alone)) for given, alone in pairs]

    async def _asked(self, texts: Sequence[str]) -> str:
        """The option that the model names when it is asked, on a copy of the conversation."""
        kinds = self._backend.capabilities.constraints
        aside = self.copy()
        is_chat = bool(read_pieces(aside.pieces).turns)
        held = "choices" in kinds and (is_chat or self._backend.dialect != "openai")
        if is_chat:
            question = "Answer with exactly one of these options and nothing else: " + json.dumps(list(texts))
            aside.pieces += [
                Piece("<|end|>\n<|user|>", special=True),
                Piece(question),
                Piece("<|end|>\n<|assistant|>", special=True),
            ]
        request = GenRequest(name="select", max_tokens=max(16, max(len(text) for text in texts)), temperature=0.0)
        constraint = Constraint("choices", json.dumps(list(texts)))
        try:
            answer = await aside.say(replace(request, constraint=constraint) if held else request)
        except OutputError:  # the endpoint does not keep to schemas
            answer = await aside.say(request)
        return closest(answer, texts)

    async def say(self, request: GenRequest) -> str:
        """The text of one generation."""
        return "".join([chunk.text async for chunk in self.generate(request)])


def closest(answer: str, options: Sequence[str]) -> str:
    """The option an answer means: equal, else the one it shares the longest beginning with, else the first."""

    def shared(option: str) -> tuple[bool, int]:
        one, other = answer.strip().lower(), option.strip().lower()
        count = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        return one == other, count

    return max(options, key=shared)


def _choice_score(text: str, chosen: bool, unconditional: bool) -> OptionScore:
    scored = (TokenLogprob(0.0 if chosen else LOWEST_LOGPROB, -1, text),)
    return OptionScore(scored, (TokenLogprob(0.0, -1, text),) if unconditional else None)
