"""LiteLLM as a library: the OpenAI provider, whole, streamed, with tools, typed and asynchronous."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it fetches a price list otherwise

import litellm
from harness import (
    PARALLEL,
    PARALLEL_ANSWERS,
    SUM,
    SUM_ANSWER,
    SYSTEM,
    api_key,
    base_url,
    calculate,
    check,
    continued,
    fresh_salt,
    main,
)

litellm.telemetry = False
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}


def options(messages: list[Any], **more: Any) -> dict[str, Any]:
    """The arguments of every call."""
    return {
        "model": "openai/embedded", "api_base": f"{base_url()}/v1", "api_key": api_key(), "messages": messages,
        "temperature": 0, "num_retries": 0, "timeout": 60, "tools": [CALCULATOR], **more,
    }  # fmt: skip


def asked(question: str) -> list[Any]:
    """A conversation that begins."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def results(message: Any) -> list[Any]:
    """The results of a message's calls."""
    return [
        {
            "role": "tool",
            "tool_call_id": call.id,
            "name": call.function.name,
            "content": str(calculate(json.loads(call.function.arguments)["expression"])),
        }
        for call in message.tool_calls
    ]


@check
def whole_and_streamed() -> None:
    """The same answer both ways, and put together by the library's own builder."""
    whole = litellm.completion(**options(asked("Who are you?")))
    chunks = list(litellm.completion(**options(asked("Who are you?"), stream=True)))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content and "tools" in text
    built = litellm.stream_chunk_builder(chunks, messages=asked("Who are you?"))
    assert built.choices[0].message.content == text


@check
def tool_loop() -> None:
    """Parallel calls, their results, the answer; and only the results are computed."""
    messages, salt = asked(PARALLEL), {"cache_salt": fresh_salt()}
    first = litellm.completion(**options(messages, extra_body=salt))
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls" and len(message.tool_calls) == 2
    before = continued()
    last = litellm.completion(**options([*messages, message, *results(message)], extra_body=salt))
    assert continued() - before == 1
    assert all(value in last.choices[0].message.content for value in PARALLEL_ANSWERS)
    assert last.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens


@check
def streamed_calls() -> None:
    """Streamed calls go on, too."""
    messages = asked(SUM)
    chunks = list(litellm.completion(**options(messages, stream=True)))
    message = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message
    last = litellm.completion(**options([*messages, message, *results(message)]))
    assert SUM_ANSWER in last.choices[0].message.content


@check
def asynchronous_and_typed() -> None:
    """Three at once by the asynchronous call, each an object by schema."""
    schema = {
        "type": "object",
        "properties": {"sign": {"enum": ["plus", "minus"]}},
        "required": ["sign"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}

    async def ask() -> list[Any]:
        calls = (litellm.acompletion(**options(asked(SUM), tools=None, response_format=form)) for _ in range(3))
        return list(await asyncio.gather(*calls))

    for answer in asyncio.run(ask()):
        assert json.loads(answer.choices[0].message.content)["sign"] in ("plus", "minus")


@check
def responses() -> None:
    """OpenAI's newer route through the library."""
    tool = {"type": "function", **CALCULATOR["function"]}
    more: dict[str, Any] = {
        "model": "openai/embedded", "api_base": f"{base_url()}/v1", "api_key": api_key(), "temperature": 0,
        "instructions": SYSTEM, "tools": [tool],
    }  # fmt: skip
    first = litellm.responses(**more, input=SUM)
    call = first.output[0]
    assert json.loads(call.arguments) == {"expression": "4827 * 396"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": SUM_ANSWER}
    before = continued()
    last = litellm.responses(**more, input=[result], previous_response_id=first.id)
    assert continued() - before == 1
    assert SUM_ANSWER in last.output[-1].content[0].text


@check
def text_completion() -> None:
    """The older route."""
    answer = litellm.text_completion(
        model="text-completion-openai/embedded", prompt="The answer is", max_tokens=6, temperature=0,
        api_base=f"{base_url()}/v1", api_key=api_key(),
    )  # fmt: skip
    assert answer.choices[0].text


@check
def errors() -> None:
    """Failures arrive as the library's exceptions."""
    for wrong, expected in (
        (options([]), litellm.BadRequestError),
        ({**options(asked(SUM)), "api_key": "not-the-key"}, litellm.AuthenticationError),
    ):
        try:
            litellm.completion(**wrong)
        except expected as error:
            assert error.status_code in (400, 401)
        else:
            raise AssertionError(f"no {expected.__name__}")


if __name__ == "__main__":
    main()
