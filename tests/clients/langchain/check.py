"""LangChain's OpenAI model and LangGraph's prebuilt and hand-made agents with tools."""

from __future__ import annotations

import warnings
from typing import Annotated, Any, Literal, TypedDict

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
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.prebuilt import ToolNode, create_react_agent, tools_condition
from pydantic import BaseModel

warnings.filterwarnings("ignore", message=".*create_react_agent.*")
waiting: list[int] = []


@tool
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    waiting.append(paused())
    return str(calculate(expression))


def model(**options: Any) -> ChatOpenAI:
    """A chat model on the server."""
    return ChatOpenAI(
        model="embedded", base_url=f"{base_url()}/v1", api_key=api_key(), temperature=0, max_retries=0, timeout=60,
        **options,
    )  # fmt: skip


@check
def invoke_and_stream() -> None:
    """An answer whole and streamed, with the usage in both."""
    whole = model().bind_tools([calculator]).invoke([SystemMessage(SYSTEM), HumanMessage("Who are you?")])
    assert "tools" in whole.content and whole.response_metadata["finish_reason"] == "stop"
    chunks = list(
        model(stream_usage=True).bind_tools([calculator]).stream([SystemMessage(SYSTEM), HumanMessage("Who are you?")])
    )
    assert "".join(chunk.content for chunk in chunks) == whole.content
    usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata][-1]
    assert usage["output_tokens"] == whole.usage_metadata["output_tokens"]


@check
def tool_messages() -> None:
    """The loop by hand: bound tools, parallel calls, tool messages, and the context goes on."""
    bound = model().bind_tools([calculator], strict=True)
    messages: list[Any] = [SystemMessage(SYSTEM), HumanMessage(PARALLEL)]
    first = bound.invoke(messages)
    assert [call["args"]["expression"] for call in first.tool_calls] == ["48 * 39", "56 * 31"]
    results = [ToolMessage(str(calculate(c["args"]["expression"])), tool_call_id=c["id"]) for c in first.tool_calls]
    before = continued()
    last = bound.invoke([*messages, first, *results])
    assert continued() - before == 1
    assert all(value in last.content for value in PARALLEL_ANSWERS)
    cached = last.usage_metadata["input_token_details"]["cache_read"]
    assert cached >= first.usage_metadata["total_tokens"] - 1, "only the results are new"


@check
def streamed_calls() -> None:
    """Chunks of a streamed call add up to the call."""
    total: Any = None
    for chunk in model().bind_tools([calculator]).stream([SystemMessage(SYSTEM), HumanMessage(SUM)]):
        total = chunk if total is None else total + chunk
    assert [(call["name"], call["args"]) for call in total.tool_calls] == [("calculator", {"expression": "4827 * 396"})]


class Verdict(BaseModel):
    """A verdict about a sum."""

    sign: Literal["plus", "minus"]
    carry: bool


@check
def structured_output() -> None:
    """All three ways to a typed answer."""
    for method in ("json_schema", "function_calling"):
        typed = model(max_tokens=200).with_structured_output(Verdict, method=method)
        assert isinstance(typed.invoke(SUM), Verdict), method
    loose = model(max_tokens=400).with_structured_output(None, method="json_mode", include_raw=True)
    assert isinstance(loose.invoke("Give JSON.")["raw"].content, str)


@check
def prebuilt_agent() -> None:
    """LangGraph's ReAct agent with a memory: two calls, an answer, and a second question in the same thread."""
    waiting.clear()
    before = continued()
    agent = create_react_agent(model(), [calculator], prompt=SYSTEM, checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "one"}}
    state = agent.invoke({"messages": [("user", TWO_STEPS)]}, config)
    assert TWO_STEPS_ANSWER in state["messages"][-1].content
    assert [m.content for m in state["messages"] if isinstance(m, ToolMessage)] == ["2167", TWO_STEPS_ANSWER]
    state = agent.invoke({"messages": [("user", SUM)]}, config)
    assert SUM_ANSWER in state["messages"][-1].content
    assert len(waiting) == 3 and all(count >= 1 for count in waiting), "while a tool runs its context is paused"
    assert continued() - before == 3


@check
def by_responses() -> None:
    """The same agent over OpenAI's newer route, sending back ids in place of the conversation."""
    for keeps in (False, True):
        through = model(use_responses_api=True, use_previous_response_id=keeps)
        agent = create_react_agent(through, [calculator], prompt=SYSTEM)
        before = continued()
        state = agent.invoke({"messages": [("user", TWO_STEPS)]})
        assert TWO_STEPS_ANSWER in state["messages"][-1].text, keeps
        assert continued() - before == 2, keeps
    text = "".join(chunk.text for chunk in model(use_responses_api=True).stream("Who are you?"))
    assert text


class State(TypedDict):
    """The hand-made graph's."""

    messages: Annotated[list[Any], add_messages]


@check
def hand_made_graph() -> None:
    """A state graph with a tool node, streamed token by token."""
    bound = model().bind_tools([calculator])

    def think(state: State) -> dict[str, Any]:
        return {"messages": [bound.invoke([SystemMessage(SYSTEM), *state["messages"]])]}

    graph = StateGraph(State)
    graph.add_node("think", think)
    graph.add_node("tools", ToolNode([calculator]))
    graph.add_edge(START, "think")
    graph.add_conditional_edges("think", tools_condition)
    graph.add_edge("tools", "think")
    text = ""
    for message, _ in graph.compile().stream({"messages": [HumanMessage(SUM)]}, stream_mode="messages"):
        if isinstance(message, AIMessage):
            text += str(message.content)
    assert SUM_ANSWER in text


if __name__ == "__main__":
    main()
