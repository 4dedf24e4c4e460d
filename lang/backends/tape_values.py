"""What is on a tape, to and from JSON. Reading raises KeyError, TypeError or ValueError for what is damaged."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from caesura.lang.backend import (
    Capabilities,
    Finish,
    GenChunk,
    OptionScore,
    Piece,
    TokenLogprob,
    ToolCallRequest,
)
from caesura.lang.errors import ToolTimeout
from caesura.lang.tools import ToolResult


def result_value(result: ToolResult) -> dict[str, Any]:
    """A result as JSON; its value only where JSON gives back the same."""
    told = {
        "ok": result.ok,
        "text": result.text,
        "error": result.error,
        "elapsed_s": round(result.elapsed_s, 6),
        "attempts": result.attempts,
        "late": isinstance(result.exception, ToolTimeout),
    }
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        if result.ok and result.value != result.text and json.loads(json.dumps(result.value)) == result.value:
            told["value"] = result.value
    return told


def read_result(told: Mapping[str, Any]) -> ToolResult:
    """What `result_value` wrote; of exceptions only a timeout is kept."""
    error = told["error"]
    return ToolResult(
        ok=told["ok"],
        value=told.get("value", told["text"]) if told["ok"] else None,
        text=told["text"],
        error=error,
        elapsed_s=told["elapsed_s"],
        attempts=told["attempts"],
        exception=ToolTimeout(error) if told["late"] else None,
    )


def read_capabilities(told: Mapping[str, Any]) -> Capabilities:
    """What the recorded backend was able to do."""
    able = told["able"]
    return Capabilities(**{**able, "constraints": frozenset(able["constraints"])})


def read_race(told: Sequence[Any]) -> list[ToolResult | None]:
    """The results of calls of which the first success ended the others."""
    return [None if one is None else read_result(one) for one in told]


def read_pieces(told: Sequence[Any]) -> list[Piece]:
    """Text of a chat template."""
    return [Piece(**piece) for piece in told]


def read_turn(told: Sequence[Any]) -> tuple[list[Piece], list[Piece], tuple[str, ...]]:
    """A turn's opening and closing, and its stop strings."""
    opening, closing, stop = told
    return read_pieces(opening), read_pieces(closing), tuple(map(str, stop))


def read_chunks(told: Sequence[Any]) -> list[GenChunk]:
    """A generation."""
    return [_chunk(one) for one in told]


def read_logprobs(told: Sequence[Any]) -> list[TokenLogprob]:
    """Tokens with their logprobs."""
    return [_logprob(one) for one in told]


def read_scores(told: Sequence[Any]) -> list[OptionScore]:
    """The scores of choices."""
    return [_score(one) for one in told]


def _score(told: Mapping[str, Any]) -> OptionScore:
    alone = told["unconditional"]
    return OptionScore(
        tuple(read_logprobs(told["conditional"])), None if alone is None else tuple(read_logprobs(alone))
    )


def _logprob(told: Mapping[str, Any]) -> TokenLogprob:
    top = tuple((item[0], item[1], item[2]) for item in told["top"])
    return TokenLogprob(told["logprob"], told["token_id"], told["text"], top)


def _chunk(told: Mapping[str, Any]) -> GenChunk:
    finish = None
    if told["finish"] is not None:
        kept = told["finish"]["kept_token_ids"]
        calls = tuple(ToolCallRequest(**call) for call in told["finish"]["tool_calls"])
        finish = Finish(
            **{**told["finish"], "tool_calls": calls, "kept_token_ids": None if kept is None else tuple(kept)}
        )
    return GenChunk(told["text"], tuple(told["token_ids"]), tuple(_logprob(item) for item in told["logprobs"]), finish)
