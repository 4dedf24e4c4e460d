"""Caesura's language: programs that generate, choose, fork, and pause at tool calls.

Light to import: no torch, no pydantic; the engine is loaded when an `Engine` is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from caesura.lang.backend import Backend, Capabilities, ChatFormat, Session
from caesura.lang.backends.connect import connect
from caesura.lang.backends.http import HTTPBackend
from caesura.lang.backends.openai import OpenAIBackend
from caesura.lang.backends.scripted import ScriptedBackend, ScriptedReply
from caesura.lang.backends.sglang import SGLangBackend
from caesura.lang.choices import (
    ChoicesDecision,
    ChoicesSamplingMethod,
    greedy_token_selection,
    token_length_normalized,
    unconditional_likelihood_normalized,
)
from caesura.lang.core import Usage
from caesura.lang.dsl import (
    assistant,
    assistant_begin,
    assistant_end,
    call_tool,
    call_tools,
    gen,
    gen_int,
    gen_string,
    image,
    select,
    separate_reasoning,
    system,
    system_begin,
    system_end,
    user,
    user_begin,
    user_end,
    video,
)
from caesura.lang.errors import (
    BatchError,
    BlockingCall,
    DeadlineExceeded,
    DefinitionError,
    LangError,
    NoBackend,
    NoRecording,
    OutputError,
    ProgramCancelled,
    ProgramError,
    RemoteError,
    ReplayError,
    ScriptError,
    ServerUnavailable,
    StateError,
    ToolError,
    ToolTimeout,
    UnknownVariable,
    UnsupportedByBackend,
)
from caesura.lang.group import ProgramStateGroup
from caesura.lang.program import Program, flush_cache, function, get_server_info, set_default_backend
from caesura.lang.progress import progress_reporter, report_progress
from caesura.lang.state import ProgramState, Snapshot
from caesura.lang.tools import Tool, ToolCall, ToolOutput, ToolResult, tool

if TYPE_CHECKING:
    from pathlib import Path

    from caesura.lang.backends.engine import EngineBackend
    from caesura.lang.backends.taped import TapedBackend
    from caesura.lang.mcp import McpServer, McpTools, mcp_servers, mcp_tools

_FROM_MCP = ("McpServer", "McpTools", "mcp_servers", "mcp_tools")


def __getattr__(name: str) -> Any:
    """What few programs need is loaded when it is first asked for."""
    if name not in _FROM_MCP:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from caesura.lang import mcp

    return getattr(mcp, name)


def Engine(model: str | None = None, **options: Any) -> EngineBackend:
    """The in-process engine as a backend. ``model``: a checkpoint folder or hub id; None for the embedded one.

    ``options`` are fields of the engine's config (``policy=``, ...). Loads torch.
    """
    from caesura.lang.backends.engine import EngineBackend

    return EngineBackend.start(model, **options)


def record(backend: Backend, path: str | Path) -> TapedBackend:
    """``backend``, with everything programs get from it and from their tools written to a JSONL file."""
    from caesura.lang.backends.taped import record as make

    return make(backend, path)


def replay(path: str | Path, *, strict: bool = False) -> TapedBackend:
    """A recording as a backend: no model and no tool runs. A program that has changed gets a ReplayError; with
    ``strict`` also one that asks for less, when the backend is closed."""
    from caesura.lang.backends.taped import replay as make

    return make(path, strict=strict)


def durable(backend: Backend, path: str | Path) -> TapedBackend:
    """``backend`` behind a recording: a program that was stopped, run again, gets from the file what it had (no model
    and no finished tool runs again), goes on from there, and adds to the file."""
    from caesura.lang.backends.taped import durable as make

    return make(backend, path)


__all__ = [
    "Backend",
    "BatchError",
    "BlockingCall",
    "Capabilities",
    "ChatFormat",
    "ChoicesDecision",
    "ChoicesSamplingMethod",
    "DeadlineExceeded",
    "DefinitionError",
    "Engine",
    "HTTPBackend",
    "LangError",
    "McpServer",
    "McpTools",
    "NoBackend",
    "NoRecording",
    "OpenAIBackend",
    "OutputError",
    "Program",
    "ProgramCancelled",
    "ProgramError",
    "ProgramState",
    "ProgramStateGroup",
    "RemoteError",
    "ReplayError",
    "SGLangBackend",
    "ScriptError",
    "ScriptedBackend",
    "ScriptedReply",
    "ServerUnavailable",
    "Session",
    "Snapshot",
    "StateError",
    "Tool",
    "ToolCall",
    "ToolError",
    "ToolOutput",
    "ToolResult",
    "ToolTimeout",
    "UnknownVariable",
    "UnsupportedByBackend",
    "Usage",
    "assistant",
    "assistant_begin",
    "assistant_end",
    "call_tool",
    "call_tools",
    "connect",
    "durable",
    "flush_cache",
    "function",
    "gen",
    "gen_int",
    "gen_string",
    "get_server_info",
    "greedy_token_selection",
    "image",
    "mcp_servers",
    "mcp_tools",
    "progress_reporter",
    "record",
    "replay",
    "report_progress",
    "select",
    "separate_reasoning",
    "set_default_backend",
    "system",
    "system_begin",
    "system_end",
    "token_length_normalized",
    "tool",
    "unconditional_likelihood_normalized",
    "user",
    "user_begin",
    "user_end",
    "video",
]
