"""Logprobs of texts that could follow a context: each on a fork of its own, all at once, the context unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from caesura.runtime.api import Handle, Service
from caesura.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token with its logprob (natural log, of the model's own distribution) and its text."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True, slots=True)
class TextScore:
    """The tokens of one text: after the context, and on its own when that was asked for."""

    conditional: tuple[TokenScore, ...]
    unconditional: tuple[TokenScore, ...] | None = None


async def score_texts(
    service: Service, handle: Handle, texts: Sequence[str], *, unconditional: bool = False, namespace: str = ""
) -> list[TextScore]:
    """Scores of each text as continuation of ``handle``'s context; an empty context first gets its start token.

    Alone, a text follows BOS (or an end token, without BOS), in a context of ``namespace``. Raises what the
    handle raises; whatever happens, no context is left behind.
    """
    if handle.num_tokens == 0:
        await handle.append(start_tokens(service.tokenizer))
    await handle.prefill()
    forks = await _kept(handle.fork(len(texts)))
    try:
        work = [_score(service.tokenizer, fork, text) for fork, text in zip(forks, texts, strict=True)]
        given = await _gather(work)
    finally:
        for fork in forks:
            await fork.close()
    if not unconditional:
        return [TextScore(scores) for scores in given]
    alone = await _gather([_score_alone(service, text, namespace) for text in texts])
    return [TextScore(scores, other) for scores, other in zip(given, alone, strict=True)]


async def score_own(service: Service, handle: Handle, start: int) -> list[TokenScore]:
    """Scores of the context's own tokens from ``start`` (at least 1) on."""
    ids = (await handle.token_ids())[start:]
    values = await handle.score(start) if ids else []
    return [TokenScore(i, value, token_text(service.tokenizer, i)) for i, value in zip(ids, values, strict=True)]


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The text of one token inside a text."""
    return tokenizer.decode([token_id], skip_special=False, continuation=True)


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """What an otherwise empty context begins with."""
    if tokenizer.bos_id is not None:
        return [tokenizer.bos_id]
    return [min(tokenizer.eos_ids)] if tokenizer.eos_ids else [0]


async def _score(tokenizer: Tokenizer, handle: Handle, text: str) -> tuple[TokenScore, ...]:
    """Append ``text`` to a context that is of no other use, and score it."""
    start = handle.num_tokens
    ids = await asyncio.to_thread(tokenizer.encode, text, continuation=True)
    await handle.append(ids)
    values = await handle.score(start)
    return tuple(TokenScore(i, value, token_text(tokenizer, i)) for i, value in zip(ids, values, strict=True))


async def _score_alone(service: Service, text: str, namespace: str) -> tuple[TokenScore, ...]:
    async def open_one() -> Sequence[Handle]:
        return [await service.open(namespace)]

    (handle,) = await _kept(open_one())
    try:
        await handle.append(start_tokens(service.tokenizer))
        return await _score(service.tokenizer, handle, text)
    finally:
        await handle.close()


async def _gather(work: Sequence[Any]) -> list[tuple[TokenScore, ...]]:
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _kept(work: Coroutine[Any, Any, Sequence[Handle]]) -> Sequence[Handle]:
    """Wait for contexts that are being made; if the caller is cancelled meanwhile, they are closed when they are."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        for handle in await task:
            await handle.close()
        raise
