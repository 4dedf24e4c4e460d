"""Running tools: timeout, retries, rendering. A failure is a ToolResult; only cancellation is raised."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol, runtime_checkable

from caesura.lang import ir
from caesura.lang.backend import Session
from caesura.lang.errors import ToolError, ToolTimeout
from caesura.lang.progress import reporting, work_begins
from caesura.lang.threads import tool_threads
from caesura.lang.tools import Tool, ToolOutput, ToolResult, clip, render

BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

_leftovers: set[asyncio.Task[Any]] = set()  # async tools that are still ending after their timeout


@runtime_checkable
class ToolTape(Protocol):
    """A session that records tool calls, or answers them. ``run`` really calls the tools."""

    async def on_tool(
        self, tool: str, arguments: str, number: int, run: Callable[[], Awaitable[ToolResult]]
    ) -> ToolResult:
        """The result of a call, which is the ``number``-th of those that are made at once."""

    async def on_race(
        self, calls: Sequence[tuple[str, str]], run: Callable[[], Awaitable[list[ToolResult | None]]]
    ) -> list[ToolResult | None]:
        """The results of calls of which the first success ends the others."""


def call_deadline_s(call: ir.ToolInvocation) -> float | None:
    """The longest a call may take, all attempts and the waits between them included; None for no limit."""
    timeout_s = call.timeout_s if call.timeout_s is not None else call.tool.timeout_s
    if timeout_s is None:
        return None
    retries = call.retries if call.retries is not None else call.tool.retries
    return float(timeout_s) * (retries + 1) + sum(_backoff_s(i) for i in range(retries))


def expected_s(call: ir.ToolInvocation) -> float | None:
    """How long the program expects the call to take, if it says."""
    found = call.expected_s if call.expected_s is not None else call.tool.expected_s
    return None if found is None else float(found)


async def run_tool(call: ir.ToolInvocation, session: Session, number: int = 0) -> ToolResult:
    """Call the tool, with retries. Never raises what the tool raised. A session that tapes tools stands around it.

    ``number``: which of the calls that its pause waits for.
    """
    if isinstance(session, ToolTape):
        return await session.on_tool(call.tool.name, call_text(call), number, lambda: _run(call, session, number))
    return await _run(call, session, number)


async def _run(call: ir.ToolInvocation, session: Session, number: int) -> ToolResult:
    timeout_s = call.timeout_s if call.timeout_s is not None else call.tool.timeout_s
    retries = call.retries if call.retries is not None else call.tool.retries
    started = time.monotonic()
    for attempt in range(retries + 1):
        if attempt:
            await asyncio.sleep(_backoff_s(attempt - 1))
        with reporting(lambda fraction: session.report(fraction, number), started):
            result = await _attempt(call.tool, call.args, call.kwargs, timeout_s)
        if result.ok:
            break
    return replace(result, attempts=attempt + 1, elapsed_s=time.monotonic() - started)


async def run_tools(calls: Sequence[ir.ToolInvocation], session: Session, wait: str = "all") -> list[ToolResult | None]:
    """Call several at once. ``wait="any"``: the first success ends the others, whose results are None."""
    if wait == "any" and isinstance(session, ToolTape):
        told = [(call.tool.name, call_text(call)) for call in calls]
        return await session.on_race(told, lambda: _at_once(calls, session, wait, _run))
    return await _at_once(calls, session, wait, run_tool)


async def _at_once(
    calls: Sequence[ir.ToolInvocation],
    session: Session,
    wait: str,
    run: Callable[[ir.ToolInvocation, Session, int], Coroutine[Any, Any, ToolResult]],
) -> list[ToolResult | None]:
    tasks = [asyncio.ensure_future(run(call, session, number)) for number, call in enumerate(calls)]
    try:
        if wait == "all":
            return list(await asyncio.gather(*tasks))
        pending = set(tasks)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if any(task.result().ok for task in done):
                break
        return [task.result() if task.done() else None for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


def raised(call: ir.ToolInvocation, result: ToolResult) -> ToolError:
    """The error for a failed call whose policy is to raise."""
    kind = ToolTimeout if isinstance(result.exception, ToolTimeout) else ToolError
    error = kind(f"tool {call.tool.name!r}: {result.error}", result)
    error.__cause__ = result.exception
    return error


def call_text(call: ir.ToolInvocation) -> str:
    """A program's call as JSON arguments, for messages and records: the same text in every process."""
    try:
        bound = inspect.signature(call.tool.function).bind(*call.args, **call.kwargs).arguments
    except (TypeError, ValueError):
        bound = {**{f"arg{i}": value for i, value in enumerate(call.args)}, **call.kwargs}
    try:
        return json.dumps(_plain(bound), ensure_ascii=False)
    except RecursionError:  # a value that holds itself
        return json.dumps({name: _shown(value) for name, value in bound.items()}, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """``value`` as JSON can say it: sets in order, dataclasses and models by their fields, other objects by repr."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else _shown(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value), key=repr)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if callable(dump := getattr(value, "model_dump", None)) and not isinstance(value, type):  # pydantic's
        return _plain(dump())
    return _shown(value)


def _shown(value: Any) -> str:
    """repr without the address that the default one ends with, which is another in every process."""
    return _ADDRESS.sub("", repr(value))


def failure(error: str, exception: BaseException | None = None) -> ToolResult:
    """A failed result with the text the model reads."""
    return ToolResult(ok=False, value=None, text=f"Error: {error}", error=error, exception=exception)


def _backoff_s(i: int) -> float:
    return float(min(BACKOFF_S * 2**i, MAX_BACKOFF_S))


async def _attempt(tool: Tool, args: Sequence[Any], kwargs: Mapping[str, Any], timeout_s: float | None) -> ToolResult:
    try:
        if tool.is_async:
            value, text = await _run_async(tool, lambda: tool.function(*args, **kwargs), timeout_s)
        else:
            value, text = await _run_sync(tool, lambda: tool.function(*args, **kwargs), timeout_s)
    except TimeoutError as error:
        if isinstance(error, ToolTimeout):
            return failure(str(error), error)
        return _failed(tool, error)
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # user code: even SystemExit must not end the loop
        return _failed(tool, error)
    return ToolResult(ok=True, value=value, text=text)


def _failed(tool: Tool, error: BaseException) -> ToolResult:
    if isinstance(error, ToolError) and str(error):  # raised by the tool to speak in its own words
        told = str(error)
    else:
        told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return failure(clip(told, tool.max_chars), error)


def _rendered(tool: Tool, value: Any) -> tuple[Any, str]:
    if isinstance(value, ToolOutput):
        return value.value, clip(value.text, tool.max_chars)
    return value, clip(render(value), tool.max_chars)


def _timed_out(tool: Tool, timeout_s: float) -> ToolTimeout:
    return ToolTimeout(f"tool {tool.name!r} gave no result within {timeout_s:g} s")


async def _run_sync(tool: Tool, work: Callable[[], Any], timeout_s: float | None) -> tuple[Any, str]:
    """In a thread. The timeout counts from the start of the function, not from when a thread was asked for."""

    def job_work() -> tuple[Any, str]:
        work_begins()
        return _rendered(tool, work())

    pool = tool_threads()
    job = pool.submit(job_work, asyncio.get_running_loop())
    try:
        await asyncio.wait((job.started, job.done), return_when=asyncio.FIRST_COMPLETED)
        done, _ = await asyncio.wait((job.done,), timeout=timeout_s)
        if not done:
            raise _timed_out(tool, timeout_s or 0.0)
        rendered: tuple[Any, str] = job.done.result()
        return rendered
    finally:
        if not job.done.done():
            pool.abandon(job)


async def _run_async(
    tool: Tool, work: Callable[[], Coroutine[Any, Any, Any]], timeout_s: float | None
) -> tuple[Any, str]:
    """On the loop. A tool that resists cancellation is left behind, not waited for."""

    async def body() -> tuple[Any, str] | BaseException:
        try:
            return _rendered(tool, await work())
        except BaseException as error:  # carried as a value: a raised SystemExit would end the loop
            return error

    task = asyncio.ensure_future(body())
    try:
        done, _ = await asyncio.wait((task,), timeout=timeout_s)
        if not done:
            raise _timed_out(tool, timeout_s or 0.0)
        outcome = task.result()
    finally:
        if not task.done():
            task.cancel()
            _leftovers.add(task)
            task.add_done_callback(_leftovers.discard)
    if isinstance(outcome, asyncio.CancelledError):
        raise RuntimeError("the tool cancelled itself")
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
