"""Sampling arguments as clients write them, and as the runtime takes them."""

from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec
from caesura.runtime.errors import InvalidRequest
from caesura.runtime.sampling import Constraint, ConstraintKind, SamplingParams
from caesura.runtime.server import limits
from caesura.runtime.server.errors import ApiError
from msgspec import Meta


class SamplingFields(msgspec.Struct, kw_only=True):
    """Fields that chat and text completions share, SGLang's extras among them."""

    model: limits.Id | None = None
    n: limits.Choices | None = None
    temperature: limits.Temperature | None = None
    top_p: limits.Share | None = None
    top_k: limits.TopK | None = None
    min_p: limits.Share | None = None
    frequency_penalty: limits.Penalty | None = None
    presence_penalty: limits.Penalty | None = None
    repetition_penalty: limits.Repetition | None = None
    seed: limits.Seed | None = None
    stop: limits.Stops | None = None
    stop_token_ids: limits.StopTokens | None = None
    stop_regex: limits.Stops | None = None
    ignore_eos: bool | None = None
    min_tokens: limits.NewTokens | None = None
    skip_special_tokens: bool | None = None
    logit_bias: limits.LogitBias | None = None
    regex: limits.Grammar | None = None
    ebnf: limits.Grammar | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: limits.Id | None = None
    rid: limits.Name | None = None
    user: limits.Id | None = None
    metadata: limits.Metadata | None = None

    def params(
        self, max_new_tokens: int, *, logprobs: int | None, constraint: Constraint | None, choice: int = 0
    ) -> SamplingParams:
        """The runtime's arguments for one choice; each choice of a seeded request has a seed of its own."""
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min(self.min_tokens or 0, max_new_tokens),
            temperature=_given(self.temperature, 1.0),
            top_p=_given(self.top_p, 1.0),
            top_k=self.top_k or -1,
            min_p=_given(self.min_p, 0.0),
            frequency_penalty=_given(self.frequency_penalty, 0.0),
            presence_penalty=_given(self.presence_penalty, 0.0),
            repetition_penalty=_given(self.repetition_penalty, 1.0),
            seed=None if self.seed is None else seed_of(self.seed, choice),
            stop=strings(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            stop_regex=strings(self.stop_regex),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            logit_bias=bias_of(self.logit_bias),
            constraint=constraint,
            skip_special_tokens=self.skip_special_tokens is not False,
        )


class StreamOptions(msgspec.Struct):
    """OpenAI's ``stream_options``."""

    include_usage: bool | None = None


class JsonSchemaSpec(msgspec.Struct, rename={"json_schema": "schema"}):
    """OpenAI's ``response_format.json_schema``."""

    name: limits.Id | None = None
    json_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """OpenAI's ``response_format``."""

    type: Annotated[str, Meta(pattern="^(text|json_object|json_schema)$")] = "text"
    json_schema: JsonSchemaSpec | None = None


def json_schema_of(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """The schema that a ``response_format`` asks for."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None or wanted.json_schema.json_schema is None:
        raise ApiError(400, "response_format.json_schema.schema is missing", param="response_format")
    return wanted.json_schema.json_schema


def constraint_of(*, regex: str | None, ebnf: str | None, schema: dict[str, Any] | str | None) -> Constraint | None:
    """The one grammar a request asks for. Raises ApiError for more than one."""
    given = [name for name, value in (("regex", regex), ("ebnf", ebnf), ("json_schema", schema)) if value is not None]
    if len(given) > 1:
        raise ApiError(400, f"{' and '.join(given)} are given; only one grammar can hold an answer", param=given[1])
    if regex is not None:
        return Constraint(ConstraintKind.REGEX, regex)
    if ebnf is not None:
        return Constraint(ConstraintKind.EBNF, lark_of(ebnf))
    if schema is None:
        return None
    return Constraint(ConstraintKind.JSON_SCHEMA, schema if isinstance(schema, str) else json.dumps(schema))


def lark_of(source: str) -> str:
    """Lark as llguidance reads it. GBNF, which SGLang's clients write, is known by its ``::=``."""
    if "::=" not in source:
        return source
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(gbnf_to_lark(source))
    except Exception as error:  # the converter raises whatever its parser stumbles over
        raise InvalidRequest(f"ebnf cannot be read: {error}") from error


def strings(value: str | list[str] | None) -> tuple[str, ...]:
    """One string or several; an empty one means none."""
    if isinstance(value, str):
        return (value,) if value else ()
    return tuple(value or ())


def seed_of(seed: int, choice: int) -> int:
    """A seed in the runtime's range."""
    return (seed + choice) & ((1 << 63) - 1)


def bias_of(bias: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    """``logit_bias`` with token ids as integers."""
    out = []
    for key, value in (bias or {}).items():
        if not (key.isdecimal() and key.isascii() and len(key) <= 10):
            raise ApiError(400, f"logit_bias: {key[:40]!r} is not a token id", param="logit_bias")
        out.append((int(key), value))
    return tuple(out)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
