"""OpenAI's own client: chat, streams, tools, typed answers, responses, and an answer that nobody waits for."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
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
    fresh_salt,
    main,
    paused,
    quiet,
    stats,
)
from pydantic import BaseModel

LONG_TOKENS = 1500
AGENT_ROUNDS = 5
CALCULATOR: Any = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
            "additionalProperties": False,
        },
    },
}


def client(**options: Any) -> openai.OpenAI:
    """A client that tries each request once, so that a failure shows."""
    return openai.OpenAI(base_url=f"{base_url()}/v1", api_key=api_key(), max_retries=0, timeout=60, **options)


def asked(question: str) -> list[Any]:
    """A conversation that begins."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def answered(message: Any) -> list[Any]:
    """The assistant's message as the client has it, and its calls' results."""
    results = []
    for call in message.tool_calls:
        value = calculate(json.loads(call.function.arguments)["expression"])
        results.append({"role": "tool", "tool_call_id": call.id, "content": str(value)})
    return [message, *results]


def model() -> str:
    """The name of the served model."""
    return client().models.list().data[0].id


@check
def models() -> None:
    """The list holds one model, and it can be asked for by name."""
    listed = client().models.list().data
    assert len(listed) == 1
    assert client().models.retrieve(listed[0].id).id == listed[0].id


@check
def chat() -> None:
    """A whole answer, its usage and its finish."""
    answer = client().chat.completions.create(
        model=model(), messages=asked("Hello!"), tools=[CALCULATOR], temperature=0
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop" and choice.message.role == "assistant"
    assert "Hello" in choice.message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer._request_id, "for asking about it later"


@check
def stream() -> None:
    """A streamed answer is the whole one, with its usage at the end."""
    options: Any = {"model": model(), "messages": asked("Who are you?"), "temperature": 0, "tools": [CALCULATOR]}
    whole = client().chat.completions.create(**options)
    chunks = list(client().chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and "tools" in text
    assert len([chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]) > 3
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


@check
def tools() -> None:
    """Two calls one after the other, each of which pauses the context; the answer comes from their results."""
    messages, rounds, before = asked(TWO_STEPS), 0, continued()
    for _ in range(4):
        answer = client().chat.completions.create(model="x", messages=messages, tools=[CALCULATOR], temperature=0)
        if answer.choices[0].finish_reason != "tool_calls":
            break
        rounds += 1
        assert answer.choices[0].message.tool_calls[0].function.name == "calculator"
        messages += answered(answer.choices[0].message)
    assert rounds == 2 == continued() - before
    assert TWO_STEPS_ANSWER in answer.choices[0].message.content


@check
def streamed_tools() -> None:
    """The client's own helper puts streamed calls together, and the conversation goes on from them."""
    with client().chat.completions.stream(
        model="x", messages=asked(SUM), tools=[CALCULATOR], temperature=0
    ) as streamed:
        kinds = {event.type for event in streamed}
        message = streamed.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds
    assert message.tool_calls[0].function.parsed_arguments == {"expression": "4827 * 396"}
    after = client().chat.completions.create(
        model="x", messages=[*asked(SUM), *answered(message)], tools=[CALCULATOR], temperature=0
    )
    assert SUM_ANSWER in after.choices[0].message.content


@check
def parallel_tools() -> None:
    """Two calls in one answer; their results come back in the other order."""
    answer = client().chat.completions.create(model="x", messages=asked(PARALLEL), tools=[CALCULATOR], temperature=0)
    message = answer.choices[0].message
    assert [call.type for call in message.tool_calls] == ["function", "function"]
    assert len({call.id for call in message.tool_calls}) == 2
    turn, *results = answered(message)
    after = client().chat.completions.create(
        model="x", messages=[*asked(PARALLEL), turn, *reversed(results)], tools=[CALCULATOR], temperature=0
    )
    assert all(value in after.choices[0].message.content for value in PARALLEL_ANSWERS)
    one = client().chat.completions.create(
        model="x", messages=asked(PARALLEL), tools=[CALCULATOR], temperature=0, parallel_tool_calls=False
    )
    assert len(one.choices[0].message.tool_calls) == 1


@check
def tool_choices() -> None:
    """none, required and a named function."""
    options: Any = {"model": "x", "messages": asked("Hello!"), "tools": [CALCULATOR], "temperature": 0}
    for choice, calls in (
        ("none", False),
        ("required", True),
        ({"type": "function", "function": {"name": "calculator"}}, True),
    ):
        answer = client().chat.completions.create(**options, tool_choice=choice, max_tokens=300)
        assert bool(answer.choices[0].message.tool_calls) == calls, choice


class Verdict(BaseModel):
    """What the typed answer must be."""

    sign: Literal["plus", "minus"]
    carry: bool


@check
def parse() -> None:
    """``.parse()`` gives an object of the asked type, and parsed arguments of strict tools."""
    answer = client().chat.completions.parse(model="x", messages=asked(SUM), response_format=Verdict, temperature=0)
    verdict = answer.choices[0].message.parsed
    assert isinstance(verdict, Verdict) and verdict.sign in ("plus", "minus")

    class calculator(BaseModel):
        """Evaluate an arithmetic expression."""

        expression: str

    answer = client().chat.completions.parse(
        model="x", messages=asked(SUM), tools=[openai.pydantic_function_tool(calculator)], temperature=0
    )
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == calculator(expression="4827 * 396")


@check
def logprobs_and_choices() -> None:
    """Several choices, a seed, log-probabilities."""
    options: Any = {"model": "x", "messages": asked("Hello!"), "n": 3, "seed": 11, "temperature": 1.0, "max_tokens": 8}
    first = client().chat.completions.create(**options, logprobs=True, top_logprobs=2)
    again = client().chat.completions.create(**options)
    assert [one.message.content for one in first.choices] == [one.message.content for one in again.choices]
    assert sorted(one.index for one in first.choices) == [0, 1, 2]
    for one in first.choices:
        assert "".join(token.token for token in one.logprobs.content).startswith(one.message.content)
        assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in one.logprobs.content)


@check
def completions() -> None:
    """The older route, whole and streamed."""
    options: Any = {"model": "x", "prompt": "The answer is", "max_tokens": 6, "temperature": 0}
    whole = client().completions.create(**options)
    streamed = "".join(chunk.choices[0].text for chunk in client().completions.create(**options, stream=True))
    assert streamed == whole.choices[0].text and streamed


@check
def extras() -> None:
    """SGLang's and Caesura's own fields pass through ``extra_body``."""
    answer = client().chat.completions.create(
        model="x", messages=asked("Hello!"), extra_body={"regex": "(yes|no)!", "top_k": 5, "cache_salt": "s"}
    )
    assert answer.choices[0].message.content in ("yes!", "no!")


@check
def errors() -> None:
    """Failures arrive as the client's own exceptions."""
    for wrong, expected in (
        (lambda: client().chat.completions.create(model="x", messages=[]), openai.BadRequestError),
        (lambda: client().with_options(api_key="not-the-key").models.list(), openai.AuthenticationError),
        (lambda: client().models.retrieve("unheard-of"), openai.NotFoundError),
    ):
        try:
            wrong()
        except expected as error:
            assert error.body and error.message
        else:
            raise AssertionError(f"no {expected.__name__}")


def is_cut_off(before: int) -> None:
    """The engine is idle again and has computed fewer tokens than were asked for."""
    quiet()
    assert 0 < stats()["tokens_computed"] - before < LONG_TOKENS


@check
def cancel() -> None:
    """A stream that is closed midway stops on the engine too."""
    before = stats()["tokens_computed"]
    endless: Any = {
        "model": "x", "messages": asked("Hello!"), "max_tokens": LONG_TOKENS,
        "extra_body": {"ignore_eos": True, "cache_salt": fresh_salt()}, "stream": True,
    }  # fmt: skip
    streamed = client().chat.completions.create(**endless)
    for _, _chunk in zip(range(5), streamed, strict=False):
        pass
    streamed.close()
    is_cut_off(before)


@check
def cancel_a_task() -> None:
    """A cancelled task of the asynchronous client, in the midst of an answer that is no stream."""
    before = stats()["tokens_computed"]

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{base_url()}/v1", api_key=api_key(), max_retries=0) as asking:
            task = asyncio.create_task(
                asking.chat.completions.create(
                    model="x", messages=asked("Hello!"), max_tokens=LONG_TOKENS,
                    extra_body={"ignore_eos": True, "cache_salt": fresh_salt()},
                )
            )  # fmt: skip
            while await asyncio.to_thread(stats_tokens) < before + 40:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled()

    asyncio.run(asyncio.wait_for(ask(), 30))
    is_cut_off(before)


def stats_tokens() -> int:
    """Tokens the engine has computed so far."""
    return int(stats()["tokens_computed"])


FLAT_CALCULATOR: Any = {"type": "function", **CALCULATOR["function"]}


def outputs(response: Any) -> list[Any]:
    """The results of a response's calls, as items."""
    return [
        {
            "type": "function_call_output",
            "call_id": item.call_id,
            "output": str(calculate(json.loads(item.arguments)["expression"])),
        }
        for item in response.output
        if item.type == "function_call"
    ]


@check
def responses() -> None:
    """A tool loop by ``previous_response_id``: the client sends the results alone, and they alone are computed."""
    options: Any = {"model": "x", "instructions": SYSTEM, "tools": [FLAT_CALCULATOR], "temperature": 0}
    salt = {"cache_salt": fresh_salt()}
    answer = client().responses.create(**options, input=TWO_STEPS, extra_body=salt)
    asked_for = []
    for _ in range(2):
        known = answer.usage.total_tokens
        asked_for += [json.loads(item.arguments)["expression"] for item in answer.output]
        answer = client().responses.create(
            **options, input=outputs(answer), previous_response_id=answer.id, extra_body=salt
        )
        assert known - answer.usage.input_tokens_details.cached_tokens in (0, 1)
    assert asked_for == ["1840 + 327", "2167 * 56"]
    assert TWO_STEPS_ANSWER in answer.output_text and answer.status == "completed"
    assert client().responses.retrieve(answer.id).output_text == answer.output_text
    client().responses.delete(answer.id)


@check
def responses_without_a_store() -> None:
    """The whole conversation as items, parallel calls among them."""
    items: list[Any] = [{"role": "user", "content": PARALLEL}]
    options: Any = {
        "model": "x", "instructions": SYSTEM, "tools": [FLAT_CALCULATOR], "temperature": 0, "store": False
    }  # fmt: skip
    answer = client().responses.create(**options, input=items)
    assert [item.type for item in answer.output] == ["function_call", "function_call"]
    items += [*answer.output, *outputs(answer)]
    answer = client().responses.create(**options, input=items)
    assert all(value in answer.output_text for value in PARALLEL_ANSWERS)


@check
def responses_stream() -> None:
    """The client's own helper takes the events in: texts and calls."""
    options: Any = {"model": "x", "instructions": SYSTEM, "tools": [FLAT_CALCULATOR], "temperature": 0}
    kinds, text = [], ""
    with client().responses.stream(**options, input="Who are you?") as streamed:
        for event in streamed:
            kinds.append(event.type)
            text += event.delta if event.type == "response.output_text.delta" else ""
        final = streamed.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert text == final.output_text and "tools" in text
    with client().responses.stream(**options, input=SUM) as streamed:
        arguments = "".join(e.delta for e in streamed if e.type == "response.function_call_arguments.delta")
        call = streamed.get_final_response().output[0]
    assert json.loads(arguments) == {"expression": "4827 * 396"} == call.parsed_arguments


@check
def responses_parse() -> None:
    """``.parse()`` of the newer route."""
    answer = client().responses.parse(model="x", input=SUM, text_format=Verdict, temperature=0)
    assert isinstance(answer.output_parsed, Verdict)


@check
def cancel_a_response() -> None:
    """A stream of the newer route that is closed midway stops on the engine too."""
    before = stats_tokens()
    streamed = client().responses.create(
        model="x", input="Hello!", stream=True, max_output_tokens=LONG_TOKENS,
        extra_body={"ignore_eos": True, "cache_salt": fresh_salt()},
    )  # fmt: skip
    for _, _event in zip(range(8), streamed, strict=False):
        pass
    streamed.close()
    is_cut_off(before)


@check
def agent_of_five_rounds() -> None:
    """Each later round computes the newest results alone.

    ``cached_tokens`` is everything else, without any page rounding: the context itself goes on. One token less where
    a grammar ended the call (here ``tool_choice="required"``), because the call's last token was never computed.
    """
    messages, known, calls, salt = asked(SUM), 0, [], fresh_salt()
    for round_number in range(AGENT_ROUNDS + 1):
        answer = client().chat.completions.create(
            model="x", messages=messages, tools=[CALCULATOR], temperature=0, parallel_tool_calls=False,
            tool_choice="required" if round_number < AGENT_ROUNDS else "none",
            extra_body={"cache_salt": salt}, max_tokens=200,
        )  # fmt: skip
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert known - cached in (0, 1), f"round {round_number}: {known} known, {cached} cached"
        assert round_number == 0 or 0 < answer.usage.prompt_tokens - known < 40, "the result and its marks are new"
        known = answer.usage.total_tokens
        if round_number == AGENT_ROUNDS:
            break
        assert answer.choices[0].finish_reason == "tool_calls"
        assert paused() >= 1
        calls.append(answer.choices[0].message.tool_calls[0].function.arguments)
        messages += answered(answer.choices[0].message)
    assert len(calls) == AGENT_ROUNDS and json.loads(calls[0]) == {"expression": "4827 * 396"}
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls


@check
def agent_of_three_questions() -> None:
    """Five tool rounds that the model asks for by itself, over three questions of one conversation.

    After a tool's result nothing is lost; after a person's question the conversation is rendered anew and found in
    the cache, up to the last full page.
    """
    page, salt = stats()["page_size"], fresh_salt()
    messages, known, rounds = [{"role": "system", "content": SYSTEM}], 0, 0
    for question, right in ((TWO_STEPS, TWO_STEPS_ANSWER), (SUM, SUM_ANSWER), ("What is (77 - 12) * 9?", "585")):
        messages.append({"role": "user", "content": question})
        fresh = True
        for _ in range(4):
            answer = client().chat.completions.create(
                model="x", messages=messages, tools=[CALCULATOR], temperature=0, extra_body={"cache_salt": salt}
            )
            cached = answer.usage.prompt_tokens_details.cached_tokens
            lost = known - cached
            assert (0 <= lost <= page) if fresh else lost == 0, f"{known} known, {cached} cached"
            known, fresh = answer.usage.total_tokens, False
            if answer.choices[0].finish_reason != "tool_calls":
                break
            rounds += 1
            messages += answered(answer.choices[0].message)
        assert right in answer.choices[0].message.content
        messages.append(answer.choices[0].message)
    assert rounds == AGENT_ROUNDS


if __name__ == "__main__":
    main()
