"""smolagents: its model class, a tool-calling agent, an agent that writes code.

It writes earlier tool calls into the conversation as prose, so a context does not go on after a call; the prefix cache
serves it instead. Its own system prompts are longer than the embedded model's window, so the checks bring short ones.
"""

from __future__ import annotations

from typing import Any

from harness import PARALLEL, PARALLEL_ANSWERS, SUM, SUM_ANSWER, SYSTEM, api_key, base_url, calculate, check, main
from smolagents import CodeAgent, LogLevel, OpenAIModel, ToolCallingAgent, tool
from smolagents.models import ChatMessage, MessageRole

asked_for: list[str] = []


@tool
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression.

    Args:
        expression: what to evaluate
    """
    asked_for.append(expression)
    return str(calculate(expression))


def model(**options: Any) -> OpenAIModel:
    """The library's model on the server."""
    asked_for.clear()
    return OpenAIModel(
        model_id="embedded", api_base=f"{base_url()}/v1", api_key=api_key(), temperature=0,
        client_kwargs={"max_retries": 0, "timeout": 60}, **options,
    )  # fmt: skip


def said(text: str) -> list[ChatMessage]:
    """A conversation that begins."""
    return [
        ChatMessage(role=MessageRole.SYSTEM, content=[{"type": "text", "text": SYSTEM}]),
        ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": text}]),
    ]


def agent(of: type, **options: Any) -> Any:
    """A quiet agent with a short system prompt."""
    options = {"tools": [calculator], "verbosity_level": LogLevel.OFF, "max_steps": 1, **options}
    built = of(**options)
    built.prompt_templates["system_prompt"] = SYSTEM
    return built


@check
def model_class() -> None:
    """Whole and streamed answers with tools, and the tokens of both."""
    answer = model().generate(said(PARALLEL), tools_to_call_from=[calculator], tool_choice="auto")
    assert [call.function.name for call in answer.tool_calls] == ["calculator", "calculator"]
    whole = model().generate(said("Who are you?"))
    deltas = list(model().generate_stream(said("Who are you?")))
    assert "".join(delta.content or "" for delta in deltas) == whole.content and whole.content
    assert deltas[-1].token_usage.output_tokens == whole.token_usage.output_tokens


@check
def tool_calling_agent() -> None:
    """A required call with the library's own final_answer tool beside it; the tool runs, its result is observed."""
    built = agent(ToolCallingAgent, model=model())
    built.run(SUM)
    step = built.memory.steps[1]
    assert [call.arguments for call in step.tool_calls] == [{"expression": "4827 * 396"}]
    assert asked_for == ["4827 * 396"] and SUM_ANSWER in step.observations


@check
def parallel_tool_calls() -> None:
    """Two calls in one step, run by the library on threads; streamed."""
    built = agent(ToolCallingAgent, model=model(), stream_outputs=True)
    built.run(PARALLEL)
    assert sorted(asked_for) == ["48 * 39", "56 * 31"]
    assert all(value in built.memory.steps[1].observations for value in PARALLEL_ANSWERS)


@check
def code_agent() -> None:
    """A regex makes the embedded model write code; the library runs it, and its value is the answer."""
    form = r'Thought: I compute\.\n<code>\nfinal_answer\(calculator\("[1-9][0-9]{0,5} [-+*] [1-9][0-9]{0,5}"\)\)\n'
    built = agent(CodeAgent, model=model(extra_body={"regex": form}, max_tokens=120))
    answer = built.run(SUM)
    assert len(asked_for) == 1
    assert str(answer) == str(calculate(asked_for[0]))


if __name__ == "__main__":
    main()
