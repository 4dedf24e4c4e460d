"""Program-driven tool calls: the pause is signalled before the tool starts and ends when its result is appended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Literal

from caesura.lang import ir
from caesura.lang.backend import PendingCall, Session
from caesura.lang.core import Core, Usage
from caesura.lang.toolrun import call_deadline_s, expected_s, raised, run_tool, run_tools
from caesura.lang.tools import ToolResult

Wait = Literal["all", "any"]


def pending(name: str, calls: Sequence[ir.ToolInvocation]) -> list[PendingCall]:
    """What the backend is told about calls that are about to start."""
    return [
        PendingCall(call.tool.name, f"{name}-{i}", expected_s(call), call_deadline_s(call))
        for i, call in enumerate(calls)
    ]


def count(core: Core, results: Sequence[ToolResult | None]) -> None:
    """Add calls to the totals."""
    done = [result for result in results if result is not None]
    failed = sum(not result.ok for result in done)
    core.usage += Usage(
        tool_calls=len(done), tool_errors=failed, tool_s=sum((result.elapsed_s for result in done), 0.0)
    )


def check_raise(call: ir.ToolInvocation, result: ToolResult) -> None:
    """Raise for a failed call whose policy says so."""
    if not result.ok and (call.on_error or call.tool.on_error) == "raise":
        raise raised(call, result)


@contextlib.asynccontextmanager
async def paused(session: Session, calls: Sequence[PendingCall], wait: Wait = "all") -> AsyncIterator[None]:
    """Signal the pause first; end it when the block ends, also by an error, but not when the program is cancelled:
    then the session is about to be closed."""
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
    async with paused(session, pending(name, (node.call,))):
        result = await run_tool(node.call, session)
        count(core, (result,))
        core.values.tool_results[name] = [result]
        check_raise(node.call, result)
        core.add(result.text)
        await core.flush()
    core.set(name, result.text)


async def call_tools(core: Core, node: ir.CallTools) -> None:
    """Run a ``call_tools``. With ``wait="any"`` only finished calls have results, and only they are appended."""
    name = node.name or core.auto_name("calls")
    session = await core.flush()
    async with paused(session, pending(name, node.calls), node.wait):
        results = await run_tools(node.calls, node.wait, session)
        count(core, results)
        done = [(call, result) for call, result in zip(node.calls, results, strict=True) if result is not None]
        texts = [result.text for _, result in done]
        core.values.tool_results[name] = [result for _, result in done]
        for call, result in done:
            if node.wait == "all" or not any(other.ok for _, other in done):
                check_raise(call, result)
        core.add("\n".join(texts))
        await core.flush()
    core.set(name, texts, text="\n".join(texts))
