"""What the two processes say to each other: msgspec structs, strictly decoded. Data only, whatever arrives.

Every command but ``Ping``, ``Stop``, ``Report``, ``Close`` and ``Shutdown`` carries a request number; its answer,
exactly one (any number of chunks first), carries the same.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from caesura.runtime import errors
from caesura.runtime.api import PendingCall
from caesura.runtime.executors.base import SampledToken
from caesura.runtime.generation import TokenChunk, ToolCalling
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.snapshot import EngineSnapshot
from caesura.scheduler.types import ContextId, PauseDecision

PROTOCOL = 1
MAX_FRAME_BYTES = 16 << 20
MAX_MESSAGE_BYTES = MAX_FRAME_BYTES - 1024


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages: a positional list that begins with the class name."""


class Error(Message, frozen=True):
    """An exception as data: the name of a class in ``runtime.errors`` and its text."""

    kind: str
    message: str


# -- commands -------------------------------------------------------------------------------------------------


class Open(Message, frozen=True, tag=True):
    request: int
    namespace: str
    deadline_s: float | None


class Append(Message, frozen=True, tag=True):
    request: int
    context: ContextId
    token_ids: tuple[int, ...]


class Generate(Message, frozen=True, tag=True):
    request: int
    context: ContextId
    params: SamplingParams
    tools: ToolCalling | None


class Score(Message, frozen=True, tag=True):
    request: int
    context: ContextId
    start: int
    top: int = 0


class Prefill(Message, frozen=True, tag=True):
    request: int
    context: ContextId


class Fork(Message, frozen=True, tag=True):
    request: int
    context: ContextId
    count: int


class Truncate(Message, frozen=True, tag=True):
    request: int
    context: ContextId
    num_tokens: int


class Pause(Message, frozen=True, tag=True):
    request: int
    context: ContextId
    calls: tuple[PendingCall, ...]
    wait: str
    deadline_s: float | None = None


class Resume(Message, frozen=True, tag=True):
    request: int
    context: ContextId
    deadline_s: float | None


class Tokens(Message, frozen=True, tag=True):
    request: int
    context: ContextId


class Decisions(Message, frozen=True, tag=True):
    request: int
    context: ContextId


class FlushCache(Message, frozen=True, tag=True):
    request: int


class Hold(Message, frozen=True, tag=True):
    request: int
    retract: bool


class GoOn(Message, frozen=True, tag=True):
    request: int


class Stats(Message, frozen=True, tag=True):
    request: int


class Look(Message, frozen=True, tag=True):
    """Take a snapshot, with what happened after event ``since``."""

    request: int
    since: int


class Ping(Message, frozen=True, tag=True):
    """Answered with a heartbeat at once. The first one tells the engine process who its client is."""


class Stop(Message, frozen=True, tag=True):
    """Abort a request; its context stays open. Nothing happens when the request is unknown or done."""

    request: int


class Report(Message, frozen=True, tag=True):
    """A tool has done this share of its work. Nothing happens when the context is closed, or waits for no such call."""

    context: ContextId
    fraction: Annotated[float, msgspec.Meta(ge=0, le=1)]
    call: int


class Close(Message, frozen=True, tag=True):
    """Close a context, aborting what it does."""

    context: ContextId


class Shutdown(Message, frozen=True, tag=True):
    """Let running requests finish for up to ``drain_s``, then end the process."""

    drain_s: float


Command = (
    Open
    | Append
    | Generate
    | Score
    | Prefill
    | Fork
    | Truncate
    | Pause
    | Resume
    | Tokens
    | Decisions
    | FlushCache
    | Hold
    | GoOn
    | Stats
    | Look
    | Ping
    | Stop
    | Report
    | Close
    | Shutdown
)

# -- events ---------------------------------------------------------------------------------------------------


class Ready(Message, frozen=True, tag=True):
    """The engine takes commands. ``folder`` is where the model's tokenizer and template lie."""

    folder: str
    pid: int


class Done(Message, frozen=True, tag=True):
    """Answer without a value."""

    request: int


class Opened(Message, frozen=True, tag=True):
    request: int
    context: ContextId


class Length(Message, frozen=True, tag=True):
    """Answer to Append and Prefill."""

    request: int
    num_tokens: int


class Scores(Message, frozen=True, tag=True):
    request: int
    logprobs: list[float]


class ScoredTokens(Message, frozen=True, tag=True):
    """Answer to a Score with ``top``."""

    request: int
    tokens: list[SampledToken]


class Forked(Message, frozen=True, tag=True):
    request: int
    contexts: tuple[ContextId, ...]
    num_tokens: int


class TokenIds(Message, frozen=True, tag=True):
    request: int
    token_ids: list[int]


class Decided(Message, frozen=True, tag=True):
    request: int
    decisions: list[PauseDecision]


class Account(Message, frozen=True, tag=True):
    request: int
    values: dict[str, Any]


class Seen(Message, frozen=True, tag=True):
    request: int
    snapshot: EngineSnapshot


class Chunk(Message, frozen=True, tag=True):
    """A piece of output; the last one has ``finish`` and ``num_tokens``, the context's length."""

    request: int
    chunk: TokenChunk
    num_tokens: int | None


class Failed(Message, frozen=True, tag=True):
    """A request ended without its answer."""

    request: int
    error: Error


class Closed(Message, frozen=True, tag=True):
    """A context ended without being asked to: deadline, failed step, end of the engine."""

    context: ContextId
    error: Error


class Heartbeat(Message, frozen=True, tag=True):
    """The process lives. ``engine_lag_s`` is how long its engine thread has not looked at its commands."""

    engine_lag_s: float


class Fatal(Message, frozen=True, tag=True):
    """The process ends: the engine could not be built, or stopped by itself."""

    error: Error


Event = (
    Ready
    | Done
    | Opened
    | Length
    | Scores
    | ScoredTokens
    | Forked
    | TokenIds
    | Decided
    | Account
    | Seen
    | Chunk
    | Failed
    | Closed
    | Heartbeat
    | Fatal
)
Answer = Done | Opened | Length | Scores | ScoredTokens | Forked | TokenIds | Decided | Account | Seen | Chunk | Failed

# -- bytes ----------------------------------------------------------------------------------------------------

UNREADABLE = (msgspec.MsgspecError, ValueError, OverflowError, RecursionError)  # what decoding may raise
_encoder = msgspec.msgpack.Encoder()


def encode(message: Command | Event) -> bytes:
    """One message as bytes. Raises InvalidRequest when it is too large or holds what is no data."""
    try:
        data = _encoder.encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise errors.InvalidRequest(
            f"{type(message).__name__} cannot be sent to the engine process: {error}"
        ) from error
    if len(data) > MAX_MESSAGE_BYTES:
        raise errors.InvalidRequest(
            f"{type(message).__name__} takes {len(data)} bytes; the limit between server and engine is "
            f"{MAX_MESSAGE_BYTES}: send less at once"
        )
    return data


_KINDS: dict[str, type[errors.CaesuraError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.CaesuraError)
}
_MAX_ERROR_CHARS = 4096


def describe(error: BaseException) -> Error:
    """An exception as data. What is none of ours becomes a CaesuraError that names it."""
    for kind in type(error).__mro__:
        if _KINDS.get(kind.__name__) is kind and kind is not errors.CaesuraError:
            return Error(kind.__name__, _clean(str(error)))
    text = str(error) if type(error) is errors.CaesuraError else f"{type(error).__name__}: {error}"
    return Error("CaesuraError", _clean(text))


def _clean(text: str) -> str:
    return text[:_MAX_ERROR_CHARS].encode("utf-8", "replace").decode("utf-8")


def revive(error: Error) -> errors.CaesuraError:
    """The exception that ``describe`` wrote down; an unknown kind becomes a CaesuraError."""
    return _KINDS.get(error.kind, errors.CaesuraError)(error.message)
