"""OpenAI's Agents SDK over both of its routes: tool loops, streams, parallel calls, typed output, a handoff."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
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

set_tracing_disabled(True)
asked_for: list[str] = []
waiting: list[int] = []


@function_tool
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    asked_for.append(expression)
    waiting.append(paused())
    return str(calculate(expression))


def agent(client: AsyncOpenAI, **options: Any) -> Agent[Any]:
    """An agent on the server, with the calculator unless told otherwise."""
    settings: dict[str, Any] = {
        "name": "reckoner",
        "instructions": SYSTEM,
        "model": OpenAIChatCompletionsModel(model="embedded", openai_client=client),
        "model_settings": ModelSettings(temperature=0, include_usage=True),
        "tools": [calculator],
    }
    return Agent(**{**settings, **options})


def run(question: str, **options: Any) -> Any:
    """One run to its end."""

    async def running() -> Any:
        async with connect() as client:
            return await Runner.run(agent(client, **options), question, max_turns=6)

    return asyncio.run(running())


def connect() -> AsyncOpenAI:
    """A client for one event loop; what earlier runs left is forgotten."""
    asked_for.clear()
    waiting.clear()
    return AsyncOpenAI(base_url=f"{base_url()}/v1", api_key=api_key(), max_retries=0, timeout=60)


@check
def tool_loop() -> None:
    """Two calls one after the other; while a tool runs, its context is paused."""
    before = continued()
    result = run(TWO_STEPS)
    assert continued() - before == 2
    assert TWO_STEPS_ANSWER in result.final_output
    assert asked_for == ["1840 + 327", "2167 * 56"]
    assert all(count >= 1 for count in waiting)
    usage = result.context_wrapper.usage
    assert usage.requests == 3
    assert usage.input_tokens_details.cached_tokens > usage.input_tokens // 2


@check
def parallel_calls() -> None:
    """Two calls in one turn."""
    result = run(PARALLEL)
    assert sorted(asked_for) == ["48 * 39", "56 * 31"]
    assert all(value in result.final_output for value in PARALLEL_ANSWERS)
    assert result.context_wrapper.usage.requests == 2


@check
def streamed() -> None:
    """Events of a streamed run: text deltas, a call, its output."""

    async def events() -> tuple[list[str], str, str]:
        kinds, text = [], ""
        async with connect() as client:
            result = Runner.run_streamed(agent(client), SUM)
            async for event in result.stream_events():
                kinds.append(getattr(event, "name", event.type))
                if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                    text += event.data.delta
        return kinds, text, result.final_output

    kinds, text, final = asyncio.run(events())
    assert "tool_called" in kinds and "tool_output" in kinds
    assert SUM_ANSWER in final and text == final


class Verdict(BaseModel):
    """What the typed output must be."""

    sign: Literal["plus", "minus"]


@check
def typed_output() -> None:
    """An output type is a schema that the server enforces."""
    result = run(SUM, tools=[], output_type=Verdict)
    assert isinstance(result.final_output, Verdict)


@check
def required_tool() -> None:
    """A tool use that the settings demand; the run ends with the tool's output."""
    wanted = ModelSettings(temperature=0, tool_choice="required", parallel_tool_calls=False)
    result = run(SUM, model_settings=wanted, tool_use_behavior="stop_on_first_tool")
    assert result.final_output == SUM_ANSWER


@check
def tool_loop_by_responses() -> None:
    """The SDK's default route, with the conversation kept by the server."""

    async def running() -> Any:
        async with connect() as client:
            model = OpenAIResponsesModel(model="embedded", openai_client=client)
            return await Runner.run(agent(client, model=model), TWO_STEPS, max_turns=6, auto_previous_response_id=True)

    before = continued()
    result = asyncio.run(running())
    assert continued() - before == 2
    assert TWO_STEPS_ANSWER in result.final_output
    assert asked_for == ["1840 + 327", "2167 * 56"] and all(count >= 1 for count in waiting)
    usage = result.context_wrapper.usage
    assert usage.input_tokens_details.cached_tokens > usage.input_tokens // 2


@check
def streamed_by_responses() -> None:
    """The SDK's default route, streamed."""

    async def running() -> tuple[str, str]:
        text = ""
        async with connect() as client:
            model = OpenAIResponsesModel(model="embedded", openai_client=client)
            result = Runner.run_streamed(agent(client, model=model), PARALLEL)
            async for event in result.stream_events():
                if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                    text += event.data.delta
        return text, result.final_output

    text, final = asyncio.run(running())
    assert text == final and all(value in final for value in PARALLEL_ANSWERS)


@check
def handoff() -> None:
    """One agent hands the conversation to another, which answers it."""
    wanted = ModelSettings(temperature=0, tool_choice="required", parallel_tool_calls=False)

    async def handed_over() -> Any:
        async with connect() as client:
            expert = agent(client, name="expert")
            first = agent(client, name="porter", tools=[], handoffs=[expert], model_settings=wanted)
            return await Runner.run(first, SUM, max_turns=6)

    result = asyncio.run(handed_over())
    assert result.last_agent.name == "expert"
    assert result.final_output


if __name__ == "__main__":
    main()
