"""Plain text generation for the endpoints without a chat: prompts in, items out, several of each at once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from caesura.runtime.api import Handle
from caesura.runtime.errors import ContextClosed
from caesura.runtime.executors.base import SampledToken
from caesura.runtime.generation import Finish
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.state import ServerState
from caesura.runtime.server.work import Aborted, Work, merged
from caesura.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextJob:
    """One prompt with its choices. ``score_from``: logprobs of the prompt's tokens from there on are wanted, and of the
    ``score_top`` likeliest tokens in their places."""

    prompt_ids: Sequence[int]
    params: Sequence[SamplingParams]
    score_from: int | None = None
    score_top: int = 0


@dataclass(frozen=True, slots=True)
class Scores:
    """Logprobs of a prompt's tokens; ``values[i]`` belongs to token ``start + i``, the very first has none."""

    job: int
    start: int
    values: tuple[float | None, ...]
    tops: tuple[tuple[tuple[int, float], ...], ...] = ()  # (token id, logprob) in place of each, if asked for


@dataclass(frozen=True, slots=True)
class TextItem:
    """More of one choice. ``finish.cached_tokens`` is what the prompt found cached, the same for all choices."""

    job: int
    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[SampledToken, ...]
    finish: Finish | None


async def run_jobs(state: ServerState, work: Work, jobs: Sequence[TextJob]) -> AsyncGenerator[TextItem | Scores, None]:
    """All jobs at once, items as they come."""
    sources = [_run_job(state, work.part(number), number, job) for number, job in enumerate(jobs)]
    async with contextlib.aclosing(merged(sources)) as items:
        async for item in items:
            yield item


async def _run_job(
    state: ServerState, work: Work, number: int, job: TextJob
) -> AsyncGenerator[TextItem | Scores, None]:
    cached: int | None = None
    try:
        handle = await work.open(state.config.request_deadline_s)
        if job.score_from is None:
            await handle.append(job.prompt_ids)
        else:  # first what is not scored, to learn how much of it was cached
            first = min(max(job.score_from, 1), len(job.prompt_ids))
            await handle.append(job.prompt_ids[:first])
            cached = await _prefill(work, handle)
            await handle.append(job.prompt_ids[first:])
            yield await _score(number, job, handle, first)
        handles = [handle]
        if len(job.params) > 1:
            found = await _prefill(work, handle)
            cached = found if cached is None else cached
            handles += await work.fork(handle, len(job.params) - 1)
    except (Aborted, ContextClosed) as error:  # an abort is an end like any other, also of what has not begun
        if not work.was_aborted(error):
            raise
        for choice in range(len(job.params)):
            yield TextItem(number, choice, "", (), (), Finish("abort", None, (), len(job.prompt_ids), 0, 0))
        return

    async def choose(choice: int) -> AsyncGenerator[TextItem, None]:
        params = job.params[choice]
        num_sent = 0
        try:
            async with contextlib.aclosing(work.generate(handles[choice], params)) as chunks:
                async for chunk in chunks:
                    finish = chunk.finish
                    if finish is not None and cached is not None:
                        finish = dataclasses.replace(finish, cached_tokens=cached)
                    num_sent += len(chunk.token_ids)
                    yield TextItem(number, choice, chunk.text, chunk.token_ids, chunk.logprobs, finish)
        except Aborted:
            finish = Finish("abort", None, (), len(job.prompt_ids), num_sent, 0)
            yield TextItem(number, choice, "", (), (), finish)

    async with contextlib.aclosing(merged([choose(choice) for choice in range(len(handles))])) as items:
        async for item in items:
            yield item


async def _score(number: int, job: TextJob, handle: Handle, first: int) -> Scores:
    """Scores of the prompt's tokens; the very first one has none."""
    assert job.score_from is not None
    values: Sequence[float | None] = []
    tops: list[tuple[tuple[int, float], ...]] = []
    if first < len(job.prompt_ids) and job.score_top:
        scored = await handle.score_top(first, job.score_top)
        values, tops = [token.logprob for token in scored], [token.top_logprobs for token in scored]
    elif first < len(job.prompt_ids):
        values = await handle.score(first)
    if job.score_from == 0:
        values, tops = [None, *values], [(), *tops] if job.score_top else []
    return Scores(number, job.score_from, tuple(values), tuple(tops))


async def _prefill(work: Work, handle: Handle) -> int:
    """Compute what was appended; how much of it was cached."""
    cached = 0
    async with contextlib.aclosing(work.generate(handle, SamplingParams(max_new_tokens=0))) as chunks:
        async for chunk in chunks:
            cached = chunk.finish.cached_tokens if chunk.finish is not None else cached
    return cached


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """A whole prompt as its author wrote it: control tokens in it are meant. Begins with BOS if the model has one."""
    ids = tokenizer.encode(text, allow_special=True)
    return begun(tokenizer, ids)


def begun(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """With BOS in front if the model has one; never empty."""
    if tokenizer.bos_id is not None and (not ids or ids[0] != tokenizer.bos_id):
        return [tokenizer.bos_id, *ids]
    return ids or [min(tokenizer.eos_ids, default=0)]


def checked_ids(tokenizer: Tokenizer, ids: Sequence[int], field: str) -> list[int]:
    """Token ids of a request. Raises ApiError for an empty list or one beyond the vocabulary."""
    if not ids:
        raise ApiError(400, f"{field} must not be empty", param=field)
    worst = max(ids)
    if worst >= tokenizer.vocab_size:
        raise ApiError(400, f"{field} holds {worst}; the vocabulary has {tokenizer.vocab_size} tokens", param=field)
    return list(ids)


def each(make: Callable[[int], SamplingParams], count: int) -> list[SamplingParams]:
    """Sampling arguments of every choice."""
    return [make(choice) for choice in range(count)]
