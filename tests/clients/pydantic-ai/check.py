"""Pydantic AI: an agent with tools, streamed answers, typed outputs by tool and by schema."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from harness import (
    PARALLEL,
    PARALLEL_ANSWERS,
    SUM,
    SUM_ANSWER,
    SYSTEM,
    TWO_STEPS,
    TWO_STEPS_ANSWER,
    api_key,
    base_url,
    calculate,
    check,
    continued,
    main,
    paused,
)
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.messages import ToolCallPart, ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

waiting: list[int] = []


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    waiting.append(paused())
    return str(calculate(expression))


def connect() -> AsyncOpenAI:
    """A client for one event loop."""
    waiting.clear()
    return AsyncOpenAI(base_url=f"{base_url()}/v1", api_key=api_key(), max_retries=0, timeout=60)


def agent(client: AsyncOpenAI, **options: Any) -> Agent[None, Any]:
    """An agent on the server."""
    model = OpenAIChatModel("embedded", provider=OpenAIProvider(openai_client=client))
    settings: dict[str, Any] = {
        "instructions": SYSTEM,
        "tools": [calculator],
        "model_settings": {"temperature": 0, "max_tokens": 300},
    }
    return Agent(model, **{**settings, **options})


def run(question: str, **options: Any) -> Any:
    """One run to its end."""

    async def running() -> Any:
        async with connect() as client:
            return await agent(client, **options).run(question)

    return asyncio.run(running())


def parts(result: Any, kind: type) -> list[Any]:
    """The message parts of one kind."""
    return [part for message in result.all_messages() for part in message.parts if isinstance(part, kind)]


@check
def tool_loop() -> None:
    """Two calls one after the other; while a tool runs, its context is paused."""
    before = continued()
    result = run(TWO_STEPS)
    assert continued() - before == 2
    assert TWO_STEPS_ANSWER in result.output
    assert [part.args_as_dict() for part in parts(result, ToolCallPart)] == [
        {"expression": "1840 + 327"},
        {"expression": "2167 * 56"},
    ]
    assert all(count >= 1 for count in waiting) and len(waiting) == 2


@check
def usage_is_told() -> None:
    """Requests and cached tokens of a run."""
    usage = run(TWO_STEPS).usage
    assert usage.requests == 3
    assert usage.cache_read_tokens > usage.input_tokens // 2


@check
def parallel_calls() -> None:
    """Two calls in one turn."""
    result = run(PARALLEL)
    assert all(value in result.output for value in PARALLEL_ANSWERS)
    assert sorted(part.content for part in parts(result, ToolReturnPart)) == sorted(PARALLEL_ANSWERS)


@check
def streamed() -> None:
    """A run whose answer is streamed, after a tool."""

    async def deltas() -> list[str]:
        async with connect() as client, agent(client).run_stream(SUM) as result:
            return [text async for text in result.stream_text(delta=True, debounce_by=None)]

    pieces = asyncio.run(deltas())
    assert len(pieces) > 1 and SUM_ANSWER in "".join(pieces)


class Verdict(BaseModel):
    """What the output must be."""

    sign: Literal["plus", "minus"]
    carry: bool


@check
def typed_outputs() -> None:
    """An output type as a required tool, and as a JSON schema."""
    for wanted in (Verdict, NativeOutput(Verdict)):
        result = run(SUM, tools=[], output_type=wanted)
        assert isinstance(result.output, Verdict), wanted


@check
def a_conversation() -> None:
    """A second question on the first one's history."""

    async def both() -> Any:
        async with connect() as client:
            first = await agent(client).run(TWO_STEPS)
            return await agent(client).run(SUM, message_history=first.all_messages())

    assert SUM_ANSWER in asyncio.run(both()).output


@check
def by_responses() -> None:
    """The same agent over OpenAI's newer route: whole and streamed."""

    async def both() -> tuple[str, str]:
        async with connect() as client:
            model = OpenAIResponsesModel("embedded", provider=OpenAIProvider(openai_client=client))
            whole = await agent(client).run(TWO_STEPS, model=model)
            async with agent(client).run_stream(SUM, model=model) as result:
                return whole.output, "".join([text async for text in result.stream_text(delta=True)])

    before = continued()
    whole, streamed_text = asyncio.run(both())
    assert continued() - before == 3
    assert TWO_STEPS_ANSWER in whole and SUM_ANSWER in streamed_text


if __name__ == "__main__":
    main()
