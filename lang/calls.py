"""Program-driven tool calls: the pause is signalled before the tool starts and ends when its result is appended."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Literal

from caesura.lang import ir
from caesura.lang.backend import PendingCall, Piece, Session
from caesura.lang.core import Core, Segment, Usage
from caesura.lang.spans import Span
from caesura.lang.toolrun import call_deadline_s, call_text, expected_s, raised, run_tool, run_tools
from caesura.lang.tools import ToolCall, ToolResult

Wait = Literal["all", "any"]

ENDED = "(ended: another call was first)"  # what a trace shows as the result of such a call


def pending(name: str, calls: Sequence[ir.ToolInvocation]) -> list[PendingCall]:
    """What the backend is told about calls that are about to start."""
    return [
        PendingCall(call.tool.name, f"{name}-{i}", expected_s(call), call_deadline_s(call))
        for i, call in enumerate(calls)
    ]


def note(core: Core, done: Sequence[tuple[ToolCall, ToolResult]]) -> None:
    """Add calls to the totals and to the pause that they were made in."""
    pause, now = core.spans.top, time.monotonic()
    for call, result in done:
        end_s = min(now, pause.start_s + result.elapsed_s)  # a replayed call took longer then than it does now
        told = {"arguments": call.arguments, "result": result.text, "ok": result.ok, "attempts": result.attempts}
        told |= {"elapsed_s": result.elapsed_s, "id": call.id}
        error = "" if result.ok else result.error or "failed"
        kind = "" if result.exception is None else type(result.exception).__name__
        pause.children.append(Span("tool", call.tool, pause.start_s, end_s, told, error=error, error_type=kind))
    results = [result for _, result in done]
    failed = sum(not result.ok for result in results)
    core.usage += Usage(
        tool_calls=len(results), tool_errors=failed, tool_s=sum((result.elapsed_s for result in results), 0.0)
    )


def check_raise(call: ir.ToolInvocation, result: ToolResult) -> None:
    """Raise for a failed call whose policy says so."""
    if not result.ok and (call.on_error or call.tool.on_error) == "raise":
        raise raised(call, result)


@contextlib.asynccontextmanager
async def paused(
    core: Core, session: Session, name: str, calls: Sequence[PendingCall], wait: Wait = "all"
) -> AsyncIterator[None]:
    """Signal the pause first; end it when the block ends, also by an error, but not when the program is cancelled:
    then the session is about to be closed."""
    with core.spans.within("pause", name, tools=[call.tool for call in calls]):
        if calls:
            await session.pause(calls, wait=wait)
        try:
            yield
        except asyncio.CancelledError:
            raise
        except BaseException:
            with contextlib.suppress(Exception):  # the block's own error is the one to tell
                await session.resume()
            raise
        await session.resume()


async def call_tool(core: Core, node: ir.CallTool) -> None:
    """Run a ``call_tool``."""
    name = node.name or core.auto_name("call")
    session = await core.flush()
    async with paused(core, session, name, pending(name, (node.call,))):
        result = await run_tool(node.call, session)
        core.values.tool_results[name] = [result]
        _append(core, name, [(_told(node.call, name, 0), result)])
        check_raise(node.call, result)
        await core.flush()
    core.set(name, result.text)


async def call_tools(core: Core, node: ir.CallTools) -> None:
    """Run a ``call_tools``. With ``wait="any"`` only finished calls have results, and only they are appended."""
    name = node.name or core.auto_name("calls")
    session = await core.flush()
    async with paused(core, session, name, pending(name, node.calls), node.wait):
        results = await run_tools(node.calls, session, node.wait)
        told = [_told(call, name, i) for i, call in enumerate(node.calls)]
        done = [(call, result) for call, result in zip(told, results, strict=True) if result is not None]
        core.values.tool_results[name] = [result for _, result in done]
        _append(core, name, done)
        _note_ended(core, [call for call, result in zip(told, results, strict=True) if result is None])
        for call, result in zip(node.calls, results, strict=True):
            if result is not None and (node.wait == "all" or not any(other.ok for _, other in done)):
                check_raise(call, result)
        await core.flush()
    texts = [result.text for _, result in done]
    core.set(name, texts, text="\n".join(texts))


def _append(core: Core, name: str, done: Sequence[tuple[ToolCall, ToolResult]]) -> None:
    """Append the results, one a line."""
    note(core, done)
    if text := "\n".join(result.text for _, result in done):
        core.add_segment(Segment((Piece(text),), source="tool", name=name, calls=tuple(done)))


def _note_ended(core: Core, calls: Sequence[ToolCall]) -> None:
    """Add calls that another one's success ended to the pause. They did not fail, and are in no total."""
    pause, now = core.spans.top, time.monotonic()
    for call in calls:
        told = {"arguments": call.arguments, "result": ENDED, "ok": False, "attempts": 1}
        told |= {"elapsed_s": now - pause.start_s, "id": call.id}
        pause.children.append(Span("tool", call.tool, pause.start_s, now, told))


def _told(call: ir.ToolInvocation, name: str, number: int) -> ToolCall:
    return ToolCall(call.tool.name, call_text(call), f"{name}-{number}")
