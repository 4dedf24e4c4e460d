"""Model-driven tool calls: generate, run what the model called, append the results, generate again."""

from __future__ import annotations

import json
from dataclasses import replace

from caesura.lang import ir
from caesura.lang.backend import GenRequest, Session, ToolCallRequest, ToolUse
from caesura.lang.calls import check_raise, note, paused, pending
from caesura.lang.core import Core
from caesura.lang.errors import OutputError, StateError
from caesura.lang.generate import Output, meta_of, request_of, stream, value_of
from caesura.lang.toolrun import failure, run_tools
from caesura.lang.tools import Tool, ToolCall, ToolResult


async def generate_with_tools(core: Core, node: ir.Gen) -> None:
    """Run a ``gen(tools=...)``: at most ``max_tool_rounds`` rounds of calls, then an answer without tools."""
    name = node.name or core.auto_name("gen")
    turn = core.values.turn
    if turn is None or turn.role != "assistant":
        where = "outside of any turn" if turn is None else f"in a turn of {turn.role}"
        raise StateError(f"gen({name!r}, tools=...) stands {where}; write s += assistant(gen({name!r}, tools=...))")
    await core.declare_tools(node.tools)
    tools = {tool.name: tool for tool in node.tools}
    history: list[tuple[ToolCall, ToolResult]] = []
    for number in range(node.max_tool_rounds + 1):
        choice = node.tool_choice if number == 0 else "auto"
        if number == node.max_tool_rounds:
            choice = "none"
        use = ToolUse(tuple(tool.spec for tool in node.tools), choice, node.parallel_tool_calls)
        session = await core.flush()
        request = request_of(core, node, name, use)
        output = await _said(core, session, request)
        if not _has_calls(output) or choice == "none":
            break
        history += await _round(core, session, tools, node, output, f"{name}-{number}")
    content = output.finish.content
    text = output.text if content is None else content
    core.values.tool_calls[name] = history
    value = value_of(node, text, output.finish)
    given = node.sampling.over(core.execution.options.sampling)
    core.set(name, value, text=text, meta={**meta_of(output, request, given, ()), "tool_rounds": number})


async def _said(core: Core, session: Session, request: GenRequest) -> Output:
    """Calls, or an answer. Where a grammar would rule calls out, the model is free of it, and of the answer's stop
    strings, until it answers; what it says then is taken back, and said once more under the grammar."""
    use = request.tool_use
    assert use is not None
    able = core.execution.backend.capabilities
    if request.constraint is not None and use.choice != "none" and not able.calls_beside_grammar:
        mark = await session.mark()
        free = replace(request, constraint=None, stop=tuple(core.chat.stop), stream=False)
        output = await stream(core, session, free, keep=_has_calls)
        if _has_calls(output):
            return output
        await session.rollback(mark)
        if use.choice != "auto":  # an answer would hide that the call was cut off
            told = f"gen({request.name!r}) was to call a tool first, and no whole call came: {output.text[:80]!r}"
            raise OutputError(f"{told}; give more max_tokens")
        request = replace(request, tool_use=replace(use, choice="none"))
    return await stream(core, session, request)


def _has_calls(output: Output) -> bool:
    return output.finish.reason == "tool_calls" and bool(output.finish.tool_calls)


async def _round(
    core: Core, session: Session, tools: dict[str, Tool], node: ir.Gen, output: Output, label: str
) -> list[tuple[ToolCall, ToolResult]]:
    """One round: run the calls at once, append the results, open the next turn."""
    wanted = output.finish.tool_calls
    if not node.parallel_tool_calls:
        wanted = wanted[:1]
    calls = [ToolCall(call.name, call.arguments, f"{label}-{i}") for i, call in enumerate(wanted)]
    prepared = [_prepare(tools, call) for call in wanted]
    runnable = [call for call in prepared if isinstance(call, ir.ToolInvocation)]
    async with paused(core, session, label, pending(label, runnable)):
        ran = iter(await run_tools(runnable, session))
        results = [next(ran) if isinstance(call, ir.ToolInvocation) else call for call in prepared]
        done = [result for result in results if result is not None]
        note(core, list(zip(calls, done, strict=True)))
        for call, result in zip(prepared, done, strict=True):
            if isinstance(call, ir.ToolInvocation):
                check_raise(call, result)
        content = output.finish.content
        message = {"role": "assistant", "content": output.text if content is None else content}
        await core.answer_calls({**message, "tool_calls": _shown(calls)}, list(zip(calls, done, strict=True)))
        await core.flush()
    return list(zip(calls, done, strict=True))


def _prepare(tools: dict[str, Tool], call: ToolCallRequest) -> ir.ToolInvocation | ToolResult:
    """The call with checked arguments, or what to tell the model instead."""
    tool = tools.get(call.name)
    if tool is None:
        return failure(f"there is no tool {call.name!r}; there are: {', '.join(sorted(tools))}")
    try:
        return ir.ToolInvocation(tool, kwargs=tool.parse_arguments(call.arguments))
    except ValueError as error:
        return failure(f"invalid arguments for {call.name}: {error}")


def _shown(calls: list[ToolCall]) -> list[dict[str, object]]:
    return [
        {"id": call.id, "type": "function", "function": {"name": call.tool, "arguments": _compact(call.arguments)}}
        for call in calls
    ]


def _compact(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False)
    except (ValueError, RecursionError):
        return arguments
