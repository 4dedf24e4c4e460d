"""The seam between programs and whatever generates: values that cross it, and the two protocols.

A backend opens sessions; a session is one growing context that can generate, be scored, forked, rolled back, and
paused while a tool runs. All methods are called on the language's event loop.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

ConstraintKind = Literal["regex", "json_schema", "ebnf", "choices"]
FinishReason = Literal["stop", "length", "tool_calls", "abort"]
ToolSpec = Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}


@dataclass(frozen=True, slots=True)
class Piece:
    """Text to append. ``special``: markers of the chat template, in which control tokens are recognised.

    Everything else, tool results above all, is plain text and cannot forge a control token.
    """

    text: str
    special: bool = False


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids to append as they are (generated earlier), and the text they stand for."""

    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar the output must match; ``choices`` is a JSON list of strings."""

    kind: ConstraintKind
    source: str


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools a generation may call."""

    tools: tuple[ToolSpec, ...]
    choice: str = "auto"  # "auto", "none", "required" or a tool's name
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class GenRequest:
    """One generation. ``name`` is the variable it fills. ``logprobs``: alternatives per token, None for off."""

    name: str
    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_regex: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    constraint: Constraint | None = None
    tool_use: ToolUse | None = None
    stream: bool = False


@dataclass(frozen=True, slots=True)
class ToolCallRequest:
    """A call the model wrote: the tool's name and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Logprob of one token; ``top`` holds ``(logprob, token_id, text)`` of the alternatives."""

    logprob: float
    token_id: int
    text: str | None = None
    top: tuple[tuple[float, int, str | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """How a generation ended. ``content``: the text apart from tool calls (None: all of the text).

    ``kept_token_ids``: the tokens that stay in the context (without what a stop string cut off); None when only
    the kept text is known.
    """

    reason: FinishReason
    matched: str | int | None = None
    tool_calls: tuple[ToolCallRequest, ...] = ()
    content: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    kept_token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class GenChunk:
    """A piece of a generation, exactly as it entered the context; the last one carries ``finish``."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class OptionScore:
    """Token logprobs of one option, after the context and (when asked for) on its own."""

    conditional: tuple[TokenLogprob, ...]
    unconditional: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class PendingCall:
    """A tool call a paused session waits for. ``deadline_s`` counts from the pause."""

    tool: str
    call_id: str
    expected_s: float | None = None
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do; an expression that needs more fails with a clear error before anything runs."""

    chat: bool = True
    tools: bool = True
    score: bool = True
    fork: bool = True
    rollback: bool = True
    logprobs: bool = True
    prompt_logprobs: bool = False
    pause: bool = True  # contexts are paused while tools run; without it programs run all the same
    calls_beside_grammar: bool = True  # a generation that is held to a grammar may call tools instead of answering
    images: bool = False
    constraints: frozenset[ConstraintKind] = field(
        default_factory=lambda: frozenset(("regex", "json_schema", "ebnf", "choices"))
    )


class ChatFormat(Protocol):
    """How turns look as text. Markers are special text; content, and what tools say of themselves, is plain.

    Methods are awaited, because the template may live on a server.
    """

    @property
    def stop(self) -> tuple[str, ...]:
        """Stop strings of an assistant turn besides the end-of-turn token."""

    async def turn(
        self, role: str, *, first: bool, tools: Sequence[ToolSpec] | None = None
    ) -> tuple[Sequence[Piece], Sequence[Piece]]:
        """Opening and closing of a turn. ``first`` adds what starts a context; ``tools`` their declarations, which
        may lie in either."""

    async def tool_results(
        self, results: Sequence[tuple[str, str]], *, tools: Sequence[ToolSpec] | None = None
    ) -> Sequence[Piece]:
        """What follows the text of an assistant turn that called tools: its end, ``(tool name, content)`` results,
        and the opening of the next assistant turn."""


class Session(Protocol):
    """One context. Not reentrant: the interpreter calls one method at a time, except ``close``."""

    async def append(self, pieces: Sequence[Piece | Tokens]) -> None:
        """Append to the context."""

    def generate(self, request: GenRequest) -> AsyncGenerator[GenChunk, None]:
        """Generate; what is yielded is also appended to the context. Closing the generator aborts."""

    async def score(self, texts: Sequence[str], *, unconditional: bool = False) -> list[OptionScore]:
        """Logprobs of each text as continuation of the context; the context stays as it is."""

    async def prompt_logprobs(self, start: int) -> list[TokenLogprob]:
        """Logprobs of the context's own tokens from ``start`` (at least 1) on."""

    async def prefill(self) -> None:
        """Compute everything appended so far, so that it can be shared."""

    async def fork(self, n: int) -> Sequence[Session]:
        """``n`` sessions with the same context. They are closed on their own."""

    async def pause(self, calls: Sequence[PendingCall], *, wait: Literal["all", "any"] = "all") -> None:
        """The context now waits for ``calls``; signalled before the first of them starts."""

    async def report(self, fraction: float, call: int = 0) -> None:
        """Tool ``call`` of the pause has done this share of its work: advice about how long the pause will last."""

    async def resume(self) -> None:
        """The results are appended and the context goes on."""

    async def mark(self) -> int:
        """The current position in tokens."""

    async def rollback(self, mark: int) -> None:
        """Forget everything after ``mark``."""

    async def close(self) -> None:
        """Give the context back; aborts a running generation. May be called twice."""

    async def decisions(self) -> Sequence[Any]:
        """The pause decisions the backend took for this context, with their reasons (may be empty)."""


class Backend(Protocol):
    """Something that opens sessions."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def capabilities(self) -> Capabilities:
        """What the sessions can do."""

    @property
    def chat(self) -> ChatFormat | None:
        """The model's chat format, None when it has none."""

    async def open(self, *, namespace: str = "", deadline_s: float | None = None) -> Session:
        """A new, empty context. ``namespace`` keeps its cached prefix apart from others'."""

    async def flush_cache(self) -> None:
        """Forget cached prefixes."""

    async def server_info(self) -> Mapping[str, Any]:
        """Model name, limits and counters."""

    def close(self) -> None:
        """Stop the backend."""
