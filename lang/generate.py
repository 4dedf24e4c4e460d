"""Generation and selection: requests to the session, values and meta information back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from caesura.lang import ir
from caesura.lang.backend import Finish, GenChunk, GenRequest, Piece, Session, TokenLogprob, ToolUse
from caesura.lang.choices import mean
from caesura.lang.core import Core, Segment, Usage
from caesura.lang.errors import OutputError, StateError
from caesura.lang.sampling import Sampling
from caesura.lang.spans import Span

DEFAULTS = Sampling(max_tokens=128, min_tokens=0, n=1, temperature=1.0, top_p=1.0, top_k=-1, min_p=0.0)


@dataclass(frozen=True, slots=True)
class Output:
    """One finished generation."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: Finish


def request_of(core: Core, node: ir.Gen, name: str, tool_use: ToolUse | None = None) -> GenRequest:
    """The request for a node: its own arguments over the run's over the defaults, and the template's stop strings."""
    options = core.execution.options
    given = node.sampling.over(options.sampling).over(DEFAULTS)
    stop = tuple(given.stop or ())
    if core.values.turn is not None and core.values.turn.role == "assistant":
        stop += tuple(text for text in core.chat.stop if text not in stop)
    want_logprobs = given.return_logprob or (given.top_logprobs_num or 0) > 0
    return GenRequest(
        name=name,
        max_tokens=given.max_tokens if given.max_tokens is not None else 128,
        min_tokens=given.min_tokens or 0,
        temperature=given.temperature if given.temperature is not None else 1.0,
        top_p=given.top_p if given.top_p is not None else 1.0,
        top_k=given.top_k if given.top_k is not None else -1,
        min_p=given.min_p or 0.0,
        frequency_penalty=given.frequency_penalty or 0.0,
        presence_penalty=given.presence_penalty or 0.0,
        repetition_penalty=given.repetition_penalty if given.repetition_penalty is not None else 1.0,
        seed=given.seed,
        stop=stop,
        stop_token_ids=given.stop_token_ids or (),
        stop_regex=given.stop_regex or (),
        ignore_eos=bool(given.ignore_eos),
        logprobs=(given.top_logprobs_num or 0) if want_logprobs else None,
        logit_bias=given.logit_bias or (),
        constraint=node.constraint,
        tool_use=tool_use,
        stream=options.stream,
    )


async def generate(core: Core, node: ir.Gen) -> None:
    """Run a ``gen`` without tools."""
    name = node.name or core.auto_name("gen")
    session = await core.flush()
    request = request_of(core, node, name)
    given = node.sampling.over(core.execution.options.sampling)
    n = given.n or 1
    prompt = await _prompt_logprobs(session, given)
    others: list[Output] = []
    if n == 1:
        output = await stream(core, session, request)
    else:
        output, others = await _several(core, session, request, n)
    meta = [meta_of(one, request, given, prompt) for one in (output, *others)]
    values = [value_of(node, one.text, one.finish) for one in (output, *others)]
    value = values[0] if n == 1 else values
    core.set(name, value, text=output.text, meta=meta[0] if n == 1 else {**meta[0], "samples": meta})


async def stream(
    core: Core, session: Session, request: GenRequest, keep: Callable[[Output], bool] = lambda output: True
) -> Output:
    """Generate on the core's own session, telling streams as it goes. Of what is not to ``keep`` nothing is noted but
    its cost; whoever asks so does not stream, and rolls the session back."""
    num_told = 0

    def tell(chunk: GenChunk) -> None:
        nonlocal num_told
        num_told += len(chunk.token_ids)
        if request.stream:
            core.emit(request.name, chunk.text, _progress(request, num_told, chunk.finish))

    with core.spans.within("generate", request.name) as span:
        output = await _collect(core, session, request, span, tell)
    core.usage += _usage(output)
    if not keep(output):
        return output
    if not request.stream:
        core.emit(request.name, output.text, _progress(request, len(output.token_ids), output.finish))
    core.add_generated(output.text, request.name, output.finish, constrained=request.constraint is not None)
    return output


async def _several(core: Core, session: Session, request: GenRequest, n: int) -> tuple[Output, list[Output]]:
    """``n`` samples: the first on the state's own session, so that the state continues with it."""
    forks = await core.execution.fork_session(session, n - 1)
    requests = [
        replace(request, seed=None if request.seed is None else (request.seed + i) % (1 << 63), stream=False)
        for i in range(1, n)
    ]
    tasks = [asyncio.ensure_future(stream(core, session, request))]
    tasks += [asyncio.ensure_future(_aside(core, fork, one)) for fork, one in zip(forks, requests, strict=True)]
    try:
        first, *others = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for fork in forks:
            await core.execution.release(fork)
    for other in others:
        core.usage += _usage(other)
    return first, others


async def _aside(core: Core, session: Session, request: GenRequest) -> Output:
    span = core.spans.root.add("generate", request.name)
    try:
        return await _collect(core, session, request, span, lambda chunk: None)
    finally:
        span.end()


async def _collect(
    core: Core, session: Session, request: GenRequest, span: Span, tell: Callable[[GenChunk], None]
) -> Output:
    """A whole generation, piece by piece, noted in its span."""
    texts: list[str] = []
    ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    finish: Finish | None = None
    async with contextlib.aclosing(session.generate(request)) as chunks:
        async for chunk in chunks:
            if not texts:
                span.attributes["first_token_s"] = span.duration_s
            texts.append(chunk.text)
            ids.extend(chunk.token_ids)
            logprobs.extend(chunk.logprobs)
            finish = chunk.finish or finish
            tell(chunk)
    if finish is None:
        raise StateError(f"backend {core.execution.backend.name!r} ended {request.name!r} without a finish reason")
    text = "".join(texts)
    span.attributes.update(
        prompt_tokens=finish.prompt_tokens,
        cached_tokens=finish.cached_tokens,
        completion_tokens=finish.completion_tokens,
        finish=finish.reason,
        constrained=request.constraint is not None,
        temperature=request.temperature,
        max_tokens=request.max_tokens,
        text=text,
    )
    return Output(text, tuple(ids), tuple(logprobs), finish)


def _usage(output: Output) -> Usage:
    finish = output.finish
    return Usage(1, finish.prompt_tokens, finish.completion_tokens, finish.cached_tokens)


def value_of(node: ir.Gen, text: str, finish: Finish) -> Any:
    """The parsed value of a typed generation, else the text. One that was cut off has none, even if it reads well."""
    kind = node.output
    if kind is None:
        return text
    try:
        value = kind.parse(text)
        if finish.reason == "length" and kind.may_go_on(text):
            raise OutputError(f"the generated text may be no whole {kind.name}: {text!r}")
    except OutputError as error:
        if finish.reason == "length":
            raise OutputError(f"{error}; it was cut off at max_tokens, so give more") from error
        raise
    return value


def _progress(request: GenRequest, completion_tokens: int, finish: Finish | None) -> dict[str, Any]:
    meta: dict[str, Any] = {"id": request.name, "completion_tokens": completion_tokens, "finish_reason": None}
    if finish is not None:
        meta.update(_finish_meta(finish))
    return meta


def _finish_meta(finish: Finish) -> dict[str, Any]:
    reason: dict[str, Any] = {"type": finish.reason}
    if finish.matched is not None:
        reason["matched"] = finish.matched
    return {
        "finish_reason": reason,
        "prompt_tokens": finish.prompt_tokens,
        "completion_tokens": finish.completion_tokens,
        "cached_tokens": finish.cached_tokens,
    }


Triple = tuple[float, int, str | None]


def meta_of(output: Output, request: GenRequest, given: Sampling, prompt: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Meta information under SGLang's keys; logprobs are ``(logprob, token_id, text)``."""
    meta: dict[str, Any] = {"id": request.name, **_finish_meta(output.finish)}
    if request.logprobs is not None:
        with_text = bool(given.return_text_in_logprobs)
        meta["output_token_logprobs"] = [triple(item, with_text) for item in output.logprobs]
        meta["output_top_logprobs"] = [
            [(value, token_id, text if with_text else None) for value, token_id, text in item.top]
            for item in output.logprobs
        ]
        meta["input_token_logprobs"] = [triple(item, with_text) for item in prompt]
    return meta


def triple(item: TokenLogprob, with_text: bool = True) -> Triple:
    """A logprob as SGLang's clients know it."""
    return (item.logprob, item.token_id, item.text if with_text else None)


async def _prompt_logprobs(session: Session, given: Sampling) -> list[TokenLogprob]:
    start = given.logprob_start_len
    if not given.return_logprob or start is None or start < 0:
        return []
    return await session.prompt_logprobs(max(start, 1))


async def select(core: Core, node: ir.Select) -> None:
    """Score the choices, choose, and append the winner."""
    name = node.name or core.auto_name("select")
    session = await core.flush()
    alone = node.method.requires_unconditional_logprobs
    with core.spans.within("select", name, choices=list(node.choices)) as span:
        scores = await session.score(node.choices, unconditional=alone)
    given = [[triple(item) for item in score.conditional] for score in scores]
    unconditional = [[triple(item) for item in score.unconditional or ()] for score in scores] if alone else None
    decision = node.method(
        choices=list(node.choices),
        normalized_prompt_logprobs=[mean(tokens) for tokens in given],
        input_token_logprobs=list(given),
        output_token_logprobs=[[] for _ in given],
        unconditional_token_logprobs=list(unconditional) if unconditional is not None else None,
    )
    if decision.decision not in node.choices:
        raise StateError(f"the choices method chose {decision.decision!r}, which is none of {json.dumps(node.choices)}")
    span.attributes["choice"] = decision.decision
    core.log.append(Segment((Piece(decision.decision),), source="choice", name=name))
    core.emit(name, decision.decision, dict(decision.meta_info or {}))
    core.set(name, decision.decision, meta=dict(decision.meta_info or {}))
