"""``POST /generate``, SGLang's own protocol. Its streams repeat the whole text so far in every event."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from caesura.runtime.executors.base import SampledToken
from caesura.runtime.generation import Finish
from caesura.runtime.server import limits
from caesura.runtime.server.answer import token_text_bytes
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.http import DONE, event, read, reply, stream, until_disconnect
from caesura.runtime.server.kept import owner_of
from caesura.runtime.server.native_protocol import GenerateRequest, NativeSampling, per_prompt
from caesura.runtime.server.sessions import SessionTurn
from caesura.runtime.server.state import ServerState
from caesura.runtime.server.textgen import Scores, TextItem, TextJob, checked_ids, each, encode_text, run_jobs
from caesura.runtime.server.work import Work
from starlette.requests import Request
from starlette.responses import Response

_Entry = tuple[float | None, int, str | None]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one prompt of a request asks for."""

    ids: list[int]
    sampling: NativeSampling
    logprobs: bool
    start: int  # first prompt token whose logprob is wanted; the prompt's length for none
    top: int
    peek: bool  # no token is to be generated, but the distribution of the next one is wanted

    @property
    def choices(self) -> int:
        return self.sampling.n or 1


@dataclass(slots=True)
class _Result:
    """One entry of the answer, as it grows."""

    id: str
    asked: _Asked
    text: str = ""
    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[SampledToken] = field(default_factory=list)
    finish: Finish | None = None


class Generate:
    """The route."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._tokenizer = state.service.tokenizer

    async def __call__(self, request: Request) -> Response:
        body = await read(request, GenerateRequest)
        body.check()
        salt = "/".join(part for part in (body.cache_salt, body.extra_key) if part)
        work = self._state.work(request, rid=body.rid if isinstance(body.rid, str) else None, cache_salt=salt)
        if isinstance(body.rid, list):
            work.divide(body.rid)
        if body.stream:
            events = self._stream(body, work)
            return await stream(request, events, send_deadline_s=self._state.config.send_deadline_s)
        return reply(await until_disconnect(request, self._whole(body, work)))

    async def _whole(self, body: GenerateRequest, work: Work) -> Any:
        started = time.perf_counter()
        results: list[_Result] = []
        scores: dict[int, Scores] = {}
        async with work, contextlib.aclosing(self._produce(body, work, results, scores)) as items:
            async for _ in items:
                pass
        out = [self._body(result, body, scores, started) for result in results]
        return out if _is_list(body, results) else out[0]

    async def _stream(self, body: GenerateRequest, work: Work) -> AsyncGenerator[bytes, None]:
        started = time.perf_counter()
        results: list[_Result] = []
        scores: dict[int, Scores] = {}
        async with work, contextlib.aclosing(self._produce(body, work, results, scores)) as items:
            async for index in items:
                out = self._body(results[index], body, scores, started)
                if _is_list(body, results):
                    out["index"] = index
                yield event(out)
        yield DONE

    async def _produce(
        self, body: GenerateRequest, work: Work, results: list[_Result], scores: dict[int, Scores]
    ) -> AsyncGenerator[int, None]:
        """Indices of results that have grown."""
        turn = await self._turn(body, work)
        try:
            asked, jobs = await self._state.on_text_thread(lambda: self._prepare(body, turn))
            async with contextlib.aclosing(self._run(body, work, asked, jobs, results, scores)) as indices:
                async for index in indices:
                    finish = results[index].finish
                    if turn is not None and finish is not None and finish.reason != "abort":
                        self._state.sessions.commit(turn, asked[0].ids, results[index].output_ids)
                    yield index
        finally:
            if turn is not None:
                self._state.sessions.roll_back(turn)

    async def _turn(self, body: GenerateRequest, work: Work) -> SessionTurn | None:
        """The request's place in its session, if it has one."""
        if body.session_params is None:
            return None
        key_id = owner_of(work.namespace)
        turn = self._state.sessions.begin(key_id, body.session_params, work.request_id)
        for rid in turn.aborts:
            await self._state.board.abort(key_id, rid)
        return turn

    async def _run(
        self,
        body: GenerateRequest,
        work: Work,
        asked: list[_Asked],
        jobs: list[TextJob],
        results: list[_Result],
        scores: dict[int, Scores],
    ) -> AsyncGenerator[int, None]:
        firsts = []
        for number, one in enumerate(asked):
            firsts.append(len(results))
            name = work.part(number).request_id
            for choice in range(one.choices):
                several = len(asked) * one.choices > 1 and not isinstance(body.rid, list)
                results.append(_Result(f"{name}_{firsts[-1] + choice}" if several else name, one))
        async with contextlib.aclosing(run_jobs(self._state, work, jobs)) as items:
            async for item in items:
                if isinstance(item, Scores):
                    scores[id(asked[item.job])] = item
                    continue
                index = firsts[item.job] + item.choice
                self._take(results[index], item)
                yield index

    def _prepare(self, body: GenerateRequest, turn: SessionTurn | None) -> tuple[list[_Asked], list[TextJob]]:
        prompts = self._prompts(body)
        per_prompt(body.rid, 0, len(prompts), "rid")
        if turn is not None:
            prompts = [turn.prompt(ids, self._tokenizer.bos_id) for ids in prompts]
        asked = [self._asked(body, ids, index, len(prompts)) for index, ids in enumerate(prompts)]
        if sum(one.choices for one in asked) > limits.MAX_PROMPTS:
            raise ApiError(400, f"prompts times n is more than {limits.MAX_PROMPTS}")
        jobs = []
        for one in asked:
            constraint = one.sampling.constraint()
            new_tokens = 1 if one.peek else one.sampling.new_tokens

            def make(choice: int, one: _Asked = one, constraint: Any = constraint, new_tokens: int = new_tokens) -> Any:
                logprobs = one.top if one.logprobs else None
                made = one.sampling.params(
                    new_tokens=new_tokens, logprobs=logprobs, constraint=constraint, choice=choice
                )
                return dataclasses.replace(made, ignore_eos=True, stop_token_ids=()) if one.peek else made

            wants_scores = one.logprobs and one.start < len(one.ids)
            score_from = one.start if wants_scores else None
            jobs.append(TextJob(one.ids, each(make, one.choices), score_from, one.top if wants_scores else 0))
        return asked, jobs

    def _prompts(self, body: GenerateRequest) -> list[list[int]]:
        if isinstance(body.text, str):
            return [encode_text(self._tokenizer, body.text)]
        if body.text is not None:
            return [encode_text(self._tokenizer, text) for text in body.text]
        assert body.input_ids is not None
        flat = [item for item in body.input_ids if isinstance(item, int)]
        if len(flat) == len(body.input_ids):
            return [checked_ids(self._tokenizer, flat, "input_ids")]
        if flat:
            raise ApiError(400, "input_ids mixes ids with lists of ids", param="input_ids")
        if len(body.input_ids) > limits.MAX_PROMPTS:
            raise ApiError(400, f"input_ids: Expected `array` of length <= {limits.MAX_PROMPTS}", param="input_ids")
        lists = [item for item in body.input_ids if isinstance(item, list)]
        return [checked_ids(self._tokenizer, item, "input_ids") for item in lists]

    def _asked(self, body: GenerateRequest, ids: list[int], index: int, count: int) -> _Asked:
        sampling = per_prompt(body.sampling_params, index, count, "sampling_params") or NativeSampling()
        logprobs = bool(per_prompt(body.return_logprob, index, count, "return_logprob"))
        start = per_prompt(body.logprob_start_len, index, count, "logprob_start_len")
        top = per_prompt(body.top_logprobs_num, index, count, "top_logprobs_num") or 0
        zero = sampling.new_tokens == 0
        if start is None:  # a client that only wants a token list scored does not say from where
            start = 0 if zero and body.input_ids is not None else -1
        if start > len(ids):
            raise ApiError(400, f"logprob_start_len is {start}; the prompt has {len(ids)} tokens")
        start = len(ids) if start < 0 else start
        return _Asked(ids, sampling, logprobs, start, top, zero and logprobs and top > 0)

    def _take(self, result: _Result, item: TextItem) -> None:
        result.output_logprobs += item.logprobs
        result.finish = item.finish
        if result.asked.peek:
            return
        result.text += item.text
        result.output_ids += item.token_ids
        sampling = result.asked.sampling
        if item.finish is not None and sampling.no_stop_trim and isinstance(item.finish.matched, str):
            if item.finish.matched in (sampling.stop_regex or ()):  # a pattern; what matched it is in the tokens
                skip_special = sampling.skip_special_tokens is not False
                whole = self._tokenizer.decode(result.output_ids, skip_special=skip_special, continuation=True)
                result.text = whole if whole.startswith(result.text) else result.text
            else:
                result.text += item.finish.matched

    # -- the answer -------------------------------------------------------------------------------------------

    def _body(
        self, result: _Result, body: GenerateRequest, scores: dict[int, Scores], started: float
    ) -> dict[str, Any]:
        asked, finish = result.asked, result.finish
        num_prompt = len(asked.ids)
        meta: dict[str, Any] = {
            "id": result.id,
            "finish_reason": _reason(finish, 0 if asked.peek else None),
            "prompt_tokens": num_prompt,
            "completion_tokens": len(result.output_ids) if finish is None or asked.peek else finish.completion_tokens,
            "cached_tokens": min(finish.cached_tokens, num_prompt - 1) if finish else 0,
            "reasoning_tokens": 0,
            "weight_version": "default",
            "num_retractions": 0,
            "e2e_latency": time.perf_counter() - started,
        }
        if asked.logprobs:
            self._add_logprobs(meta, result, scores.get(id(asked)), bool(body.return_text_in_logprobs))
        return {"text": result.text, "output_ids": result.output_ids, "meta_info": meta}

    def _add_logprobs(self, meta: dict[str, Any], result: _Result, scores: Scores | None, with_text: bool) -> None:
        asked = result.asked

        def entry(logprob: float | None, token_id: int) -> _Entry:
            text = token_text_bytes(token_id, self._tokenizer).decode("utf-8", "replace") if with_text else None
            return (None if logprob is None else max(logprob, -9999.0), token_id, text)

        values = scores.values if scores is not None else ()
        meta["input_token_logprobs"] = [
            entry(value, token_id)
            for value, token_id in zip(values, asked.ids[asked.start :], strict=scores is not None)
        ]
        outputs = result.output_logprobs
        meta["output_token_logprobs"] = [entry(token.logprob, token.token_id) for token in outputs]
        meta["output_token_logprobs_length"] = len(outputs)
        if asked.top:
            tops = scores.tops if scores is not None else ()
            meta["input_top_logprobs"] = [[entry(lp, i) for i, lp in top] if top else None for top in tops]
            meta["output_top_logprobs"] = [[entry(lp, i) for i, lp in token.top_logprobs] for token in outputs]


def _is_list(body: GenerateRequest, results: list[_Result]) -> bool:
    """Whether the answer is a list: for a list of prompts, and for several choices."""
    nested = body.input_ids is not None and isinstance(body.input_ids[0], list)
    return isinstance(body.text, list) or nested or len(results) > 1


def _reason(finish: Finish | None, length: int | None) -> dict[str, Any] | None:
    if finish is None:
        return None
    if finish.reason == "abort":
        return {"type": "abort", "message": "Aborted by request", "status_code": None, "err_type": None}
    if length is not None or finish.reason == "length":
        return {"type": "length", "length": finish.completion_tokens if length is None else length}
    return {"type": "stop", "matched": finish.matched}
