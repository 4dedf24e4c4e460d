"""Caesura's own requests: contexts that outlive requests, with every bound in the types."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from caesura.runtime.generation import ToolCalling
from caesura.runtime.sampling import Constraint, ConstraintKind, SamplingParams
from caesura.runtime.server import limits
from caesura.runtime.server.chat_protocol import Tool
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.params import bias_of, seed_of, strings
from msgspec import Meta


class ContextPiece(msgspec.Struct, forbid_unknown_fields=True):
    """Either text, in which control tokens are read as such only when ``special``, or token ids."""

    text: limits.Text | None = None
    special: bool = False
    token_ids: limits.TokenIds | None = None


class NamedResult(msgspec.Struct):
    """The result of one tool call."""

    name: limits.Name
    content: limits.Text


Pieces = Annotated[list[ContextPiece], Meta(max_length=limits.MAX_MESSAGES)]
Results = Annotated[list[NamedResult], Meta(max_length=limits.MAX_CALLS)]


class ContextRequest(msgspec.Struct):
    """The body of ``POST /v1/contexts``. The context is deleted after ``ttl_s`` seconds without a request, and
    ``deadline_s`` seconds after it was made."""

    pieces: Pieces = []
    cache_salt: limits.Id | None = None
    ttl_s: Annotated[float, Meta(gt=0, le=limits.MAX_WAIT_S)] | None = None
    deadline_s: Annotated[float, Meta(gt=0, le=limits.MAX_WAIT_S)] | None = None


class AppendRequest(msgspec.Struct):
    """The body of ``.../append``: pieces, or the results of tools, which the chat template wraps."""

    pieces: Pieces = []
    tool_results: Results = []
    tools: Annotated[list[Tool], Meta(max_length=limits.MAX_TOOLS)] = []


class ConstraintSpec(msgspec.Struct):
    """A grammar: its language and its text (for ``choices`` a JSON list)."""

    kind: Literal["regex", "json_schema", "ebnf", "choices"]
    source: limits.Grammar


class GenerateSpec(msgspec.Struct, kw_only=True):
    """The body of ``.../generate``: what is appended first, the runtime's own sampling arguments, and tools the model
    may call."""

    pieces: Pieces = []
    max_new_tokens: limits.NewTokens = 128
    min_new_tokens: limits.NewTokens = 0
    temperature: limits.Temperature = 1.0
    top_p: limits.Share = 1.0
    top_k: limits.TopK = -1
    min_p: limits.Share = 0.0
    frequency_penalty: limits.Penalty = 0.0
    presence_penalty: limits.Penalty = 0.0
    repetition_penalty: limits.Repetition = 1.0
    seed: limits.Seed | None = None
    stop: limits.NativeStops = []
    stop_token_ids: limits.StopTokens = []
    stop_regex: limits.NativeStops = []
    ignore_eos: bool = False
    logprobs: limits.TopLogprobs | None = None
    logit_bias: limits.LogitBias = {}
    constraint: ConstraintSpec | None = None
    skip_special_tokens: bool = True
    tools: Annotated[list[Tool], Meta(max_length=limits.MAX_TOOLS)] = []
    tool_choice: limits.Name = "auto"
    parallel_tool_calls: bool = True
    stream: bool = True

    def params(self) -> SamplingParams:
        """The runtime's arguments."""
        held = self.constraint
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or -1,
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=None if self.seed is None else seed_of(self.seed, 0),
            stop=strings(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            stop_regex=strings(self.stop_regex),
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            logit_bias=bias_of(self.logit_bias),
            constraint=None if held is None else Constraint(ConstraintKind(held.kind), held.source),
            skip_special_tokens=self.skip_special_tokens,
        )

    def calling(self) -> ToolCalling | None:
        """The tools, if the model may call any."""
        if not self.tools or self.tool_choice == "none":
            if self.tool_choice not in ("auto", "none"):
                raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
            return None
        return ToolCalling(tuple(tool.spec() for tool in self.tools), self.tool_choice, self.parallel_tool_calls)


class ForkRequest(msgspec.Struct):
    """The body of ``.../fork``."""

    count: Annotated[int, Meta(ge=1, le=limits.MAX_FORKS)] = 1


class SnapshotRequest(msgspec.Struct):
    """The body of ``.../snapshot``: a name for the context as it is. The same name again replaces the first."""

    name: limits.Name


class RollbackRequest(msgspec.Struct):
    """The body of ``.../rollback``: to a snapshot, or to the first ``num_tokens`` tokens."""

    snapshot: limits.Name | None = None
    num_tokens: Annotated[int, Meta(ge=0, le=limits.MAX_PROMPT_TOKENS)] | None = None


class TruncateRequest(msgspec.Struct):
    """The body of ``.../truncate``."""

    num_tokens: Annotated[int, Meta(ge=0, le=limits.MAX_PROMPT_TOKENS)]


class ScoreRequest(msgspec.Struct):
    """The body of ``.../score``: either ``start``, for logprobs of the context's own tokens from there on, or
    ``texts``, each scored as if it followed (and on its own, with ``unconditional``)."""

    start: Annotated[int, Meta(ge=1, le=limits.MAX_PROMPT_TOKENS)] | None = None
    texts: Annotated[list[limits.Text], Meta(max_length=limits.MAX_PROMPTS)] = []
    unconditional: bool = False

    def check(self) -> None:
        """What the types cannot say."""
        if (self.start is None) == (not self.texts):
            raise ApiError(400, "exactly one of start and texts must be given", param="start")


class TurnRequest(msgspec.Struct):
    """The body of ``/v1/template/turn``: what the chat template writes around the content of one turn."""

    role: limits.Name
    first: bool = False
    tools: Annotated[list[Tool], Meta(max_length=limits.MAX_TOOLS)] = []


class ResultsRequest(msgspec.Struct):
    """The body of ``/v1/template/tool_results``: how the chat template writes the results of tools."""

    results: Annotated[list[NamedResult], Meta(min_length=1, max_length=limits.MAX_CALLS)]
    tools: Annotated[list[Tool], Meta(max_length=limits.MAX_TOOLS)] = []


class CallSpec(msgspec.Struct):
    """A tool that is about to run, and for how long it may."""

    tool: Annotated[str, Meta(min_length=1, max_length=64)]
    expected_s: limits.WaitSeconds | None = None
    deadline_s: limits.WaitSeconds | None = None


class PauseRequest(msgspec.Struct):
    """The body of ``.../pause``."""

    calls: Annotated[list[CallSpec], Meta(min_length=1, max_length=limits.MAX_CALLS)]
    wait: Literal["all", "any"] = "all"


class ProgressRequest(msgspec.Struct):
    """The body of ``.../progress``: tool ``call`` of the pause has done this share of its work."""

    fraction: Annotated[float, Meta(ge=0, le=1)]
    call: Annotated[int, Meta(ge=0, lt=limits.MAX_CALLS)] = 0
