"""``POST /v1/completions``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from caesura.runtime.generation import Finish
from caesura.runtime.sampling import Constraint
from caesura.runtime.server import limits
from caesura.runtime.server.answer import token_text_bytes, usage
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.http import DONE, event, read, reply, stream, until_disconnect
from caesura.runtime.server.params import ResponseFormat, SamplingFields, constraint_of, json_schema_of
from caesura.runtime.server.state import ServerState
from caesura.runtime.server.textgen import Scores, TextItem, TextJob, checked_ids, each, encode_text, run_jobs
from caesura.runtime.server.work import Work
from caesura.runtime.text.tokenizer import Tokenizer
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(SamplingFields, kw_only=True):
    """The body of ``POST /v1/completions``."""

    prompt: (
        limits.Text
        | Annotated[
            list[limits.Text | limits.TokenId | limits.TokenIds],
            Meta(min_length=1, max_length=limits.MAX_PROMPT_TOKENS),
        ]
    )
    max_tokens: limits.NewTokens | None = None
    logprobs: limits.TopLogprobs | None = None
    echo: bool | None = None
    best_of: limits.Choices | None = None
    suffix: limits.Text | None = None
    response_format: ResponseFormat | None = None

    def check(self) -> None:
        """What the types cannot say."""
        if self.suffix:
            raise ApiError(400, "suffix is not supported", param="suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "best_of other than n is not supported", param="best_of")

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of every prompt. May take long: call it on a thread."""
        if isinstance(self.prompt, str):
            return [encode_text(tokenizer, self.prompt)]
        if all(isinstance(item, int) for item in self.prompt):
            return [checked_ids(tokenizer, [item for item in self.prompt if isinstance(item, int)], "prompt")]
        if len(self.prompt) > limits.MAX_PROMPTS:
            raise ApiError(400, f"prompt: Expected `array` of length <= {limits.MAX_PROMPTS}", param="prompt")
        out = []
        for item in self.prompt:
            if isinstance(item, int):
                raise ApiError(400, "prompt mixes token ids with texts or lists", param="prompt")
            if isinstance(item, str):
                out.append(encode_text(tokenizer, item))
            else:
                out.append(checked_ids(tokenizer, item, "prompt"))
        return out


@dataclass(slots=True)
class _Logprobs:
    """OpenAI's older logprobs object, as it grows."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, text: str, logprob: float | None, top: dict[str, float], offset: int) -> int:
        """One token, which is always among the likeliest; returns where the next one begins."""
        self.tokens.append(text)
        self.token_logprobs.append(logprob)
        self.top_logprobs.append(None if logprob is None else {**top, text: logprob})
        self.text_offset.append(offset)
        return offset + len(text)

    def body(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }


@dataclass(slots=True)
class _Choice:
    """One choice of the answer."""

    index: int
    text: list[str] = field(default_factory=list)
    logprobs: _Logprobs = field(default_factory=_Logprobs)
    offset: int = 0
    finish: Finish | None = None


class Completions:
    """The route."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._tokenizer = state.service.tokenizer

    async def __call__(self, request: Request) -> Response:
        body = await read(request, CompletionRequest)
        body.check()
        work = self._state.work(request, rid=body.rid, cache_salt=body.cache_salt)
        head = {"id": f"cmpl-{work.request_id}", "object": "text_completion", "created": int(time.time())}
        head["model"] = self._state.model_name
        if body.stream:
            events = self._stream(body, work, head)
            return await stream(request, events, send_deadline_s=self._state.config.send_deadline_s)
        return reply(await until_disconnect(request, self._whole(body, work, head)))

    async def _whole(self, body: CompletionRequest, work: Work, head: dict[str, Any]) -> dict[str, Any]:
        choices: dict[int, _Choice] = {}
        async with work, contextlib.aclosing(self._parts(body, work, choices)) as parts:
            async for _ in parts:
                pass
        out = [
            {
                "index": choice.index,
                "text": "".join(choice.text),
                "logprobs": choice.logprobs.body() if body.logprobs is not None else None,
                "finish_reason": choice.finish.reason if choice.finish else None,
                "matched_stop": choice.finish.matched if choice.finish else None,
            }
            for _, choice in sorted(choices.items())
        ]
        return {**head, "choices": out, "usage": _usage(choices, body.n or 1)}

    async def _stream(self, body: CompletionRequest, work: Work, head: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        extra = {"usage": None} if wants_usage else {}
        choices: dict[int, _Choice] = {}
        async with work, contextlib.aclosing(self._parts(body, work, choices)) as parts:
            async for index, text, logprobs in parts:
                finish = choices[index].finish
                one = {
                    "index": index,
                    "text": text,
                    "logprobs": logprobs.body() if body.logprobs is not None else None,
                    "finish_reason": finish.reason if finish else None,
                    "matched_stop": finish.matched if finish else None,
                }
                yield event({**head, "choices": [one], **extra})
        if wants_usage:
            yield event({**head, "choices": [], "usage": _usage(choices, body.n or 1)})
        yield DONE

    async def _parts(
        self, body: CompletionRequest, work: Work, choices: dict[int, _Choice]
    ) -> AsyncGenerator[tuple[int, str, _Logprobs], None]:
        """(choice, text, logprobs) as they come; ``choices`` gathers them."""
        prompts, constraint = await self._state.on_text_thread(lambda: self._prepare(body))
        num_choices = body.n or 1
        if len(prompts) * num_choices > limits.MAX_PROMPTS:
            raise ApiError(400, f"prompts times n is {len(prompts) * num_choices}; the limit is {limits.MAX_PROMPTS}")
        jobs = [self._job(body, prompt, constraint) for prompt in prompts]
        heads: dict[int, _Logprobs] = {}
        async with contextlib.aclosing(run_jobs(self._state, work, jobs)) as items:
            async for item in items:
                if isinstance(item, Scores):
                    heads[item.job] = self._echoed(prompts[item.job], item)
                    continue
                index = item.job * num_choices + item.choice
                if index not in choices:
                    choice = choices[index] = _Choice(index)
                    if body.echo:
                        head = heads.get(item.job) or _Logprobs()  # none, where an abort came before the scores
                        text = self._tokenizer.decode(prompts[item.job], skip_special=False)
                        choice.text.append(text)
                        choice.offset = len(text)
                        _extend(choice.logprobs, head)
                        yield index, text, head
                yield index, item.text, self._take(choices[index], item)

    def _prepare(self, body: CompletionRequest) -> tuple[list[list[int]], Constraint | None]:
        schema = json_schema_of(body.response_format)
        return body.prompts(self._tokenizer), constraint_of(regex=body.regex, ebnf=body.ebnf, schema=schema)

    @staticmethod
    def _job(body: CompletionRequest, prompt: Sequence[int], constraint: Constraint | None) -> TextJob:
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens

        def make(choice: int) -> Any:
            return body.params(max_tokens, logprobs=body.logprobs, constraint=constraint, choice=choice)

        start = 0 if body.echo and body.logprobs is not None else None
        return TextJob(prompt, each(make, body.n or 1), start, body.logprobs or 0)

    def _take(self, choice: _Choice, item: TextItem) -> _Logprobs:
        choice.text.append(item.text)
        new = _Logprobs()
        for token in item.logprobs:
            top = {self._text(other): logprob for other, logprob in token.top_logprobs}
            choice.offset = new.add(self._text(token.token_id), token.logprob, top, choice.offset)
        _extend(choice.logprobs, new)
        choice.finish = item.finish
        return new

    def _echoed(self, prompt: Sequence[int], scores: Scores) -> _Logprobs:
        out, offset = _Logprobs(), 0
        tops = scores.tops or [()] * len(prompt)
        for token_id, value, likeliest in zip(prompt, scores.values, tops, strict=True):
            top = {self._text(other): logprob for other, logprob in likeliest}
            offset = out.add(self._text(token_id), value, top, offset)
        return out

    def _text(self, token_id: int) -> str:
        return token_text_bytes(token_id, self._tokenizer).decode("utf-8", "replace")


def _extend(all_of_it: _Logprobs, new: _Logprobs) -> None:
    all_of_it.tokens += new.tokens
    all_of_it.token_logprobs += new.token_logprobs
    all_of_it.top_logprobs += new.top_logprobs
    all_of_it.text_offset += new.text_offset


def _usage(choices: dict[int, _Choice], num_choices: int) -> dict[str, Any]:
    """Prompts count once, however many choices they have."""
    out: dict[str, Any] = usage([])
    for index, choice in choices.items():
        if choice.finish is None:
            continue
        if index % num_choices == 0:
            out["prompt_tokens"] += choice.finish.prompt_tokens
            out["prompt_tokens_details"]["cached_tokens"] += choice.finish.cached_tokens
        out["completion_tokens"] += choice.finish.completion_tokens
    out["total_tokens"] = out["prompt_tokens"] + out["completion_tokens"]
    return out
