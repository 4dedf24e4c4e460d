"""What is asked of an OpenAI-compatible endpoint, in its server's dialect: what differs from the defaults, and all that
the server would else take from the model's ``generation_config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from caesura.lang.backend import Constraint, GenRequest, ToolSpec, ToolUse
from caesura.lang.backends.http_text import choice_regex
from caesura.lang.backends.openai_messages import is_strict
from caesura.lang.errors import OutputError, UnsupportedByBackend
from caesura.lang.typed import plain_schema

Dialect = Literal["openai", "sglang", "vllm"]
WRAPPING_TOKENS = 32
MODEL_SETS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # on servers that are not OpenAI's


@dataclass(frozen=True, slots=True)
class Wrapped:
    """An answer that comes as ``{"choice": ...}``, because the endpoint knows no grammar but JSON schema."""

    options: tuple[str, ...]

    def unwrap(self, text: str) -> str:
        """The chosen option. Raises OutputError when the endpoint did not keep to the schema."""
        try:
            found = json.loads(text)["choice"]
        except (ValueError, KeyError, TypeError, RecursionError):
            found = None
        if found not in self.options:
            raise OutputError(f"the endpoint answered {text[:200]!r}, which is none of {list(self.options)}")
        return str(found)


def request_body(
    model: str, request: GenRequest, dialect: Dialect, tools: Sequence[ToolSpec], namespace: str, *, chat: bool = True
) -> tuple[dict[str, Any], Wrapped | None]:
    """The body without its prompt, and how the answer is to be unwrapped. Raises UnsupportedByBackend for what the
    dialect has no field for."""
    body: dict[str, Any] = {"model": model, "max_tokens": request.max_tokens}
    changed: dict[str, tuple[Any, Any]] = {
        "temperature": (request.temperature, 1.0),
        "top_p": (request.top_p, 1.0),
        "frequency_penalty": (request.frequency_penalty, 0.0),
        "presence_penalty": (request.presence_penalty, 0.0),
        "seed": (request.seed, None),
        "stop": (list(request.stop), []),
        "logit_bias": ({str(token_id): value for token_id, value in request.logit_bias}, {}),
    }
    body |= _told(changed, dialect)
    body |= _beyond(request, dialect)
    if request.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.logprobs} if chat else {"logprobs": request.logprobs}
    if namespace:
        body["cache_salt"] = namespace
    wrapped = None
    if request.constraint is not None:
        held, wrapped = _held(request.constraint, dialect)
        body |= held
        body["max_tokens"] += WRAPPING_TOKENS if wrapped is not None else 0
    if chat:
        body |= _tools(request.tool_use, tools)
    return body, wrapped


def _beyond(request: GenRequest, dialect: Dialect) -> dict[str, Any]:
    """Arguments that OpenAI's own API does not have."""
    wanted: dict[str, tuple[Any, Any]] = {
        "top_k": (request.top_k, -1),
        "min_p": (request.min_p, 0.0),
        "min_tokens": (request.min_tokens, 0),
        "repetition_penalty": (request.repetition_penalty, 1.0),
        "stop_token_ids": (list(request.stop_token_ids), []),
        "stop_regex": (list(request.stop_regex), []),
        "ignore_eos": (request.ignore_eos, False),
    }
    given = _told(wanted, dialect)
    unknown = set(given) if dialect == "openai" else {"stop_regex"} & set(given) if dialect == "vllm" else set()
    if unknown:
        raise UnsupportedByBackend(
            f"gen({request.name!r}) sets {', '.join(sorted(unknown))}, which an endpoint of dialect {dialect!r} does "
            "not know; leave it out, or give OpenAIBackend the dialect of the server"
        )
    return given


def _told(wanted: Mapping[str, tuple[Any, Any]], dialect: Dialect) -> dict[str, Any]:
    """Of values and their defaults, the values to send."""
    always = () if dialect == "openai" else MODEL_SETS
    return {name: value for name, (value, default) in wanted.items() if value != default or name in always}


def _held(constraint: Constraint, dialect: Dialect) -> tuple[dict[str, Any], Wrapped | None]:
    kind, source = constraint.kind, constraint.source
    if kind == "json_schema":
        return {"response_format": _format(plain_schema(source))}, None
    if dialect == "vllm":
        value = json.loads(source) if kind == "choices" else source
        name = {"regex": "regex", "ebnf": "grammar", "choices": "choice"}[kind]
        return {"structured_outputs": {name: value}}, None
    if dialect == "sglang":
        if kind == "choices":
            return {"regex": choice_regex(json.loads(source))}, None
        return {kind: source}, None
    options = tuple(json.loads(source))
    schema = {
        "type": "object",
        "properties": {"choice": {"type": "string", "enum": list(options)}},
        "required": ["choice"],
        "additionalProperties": False,
    }
    return {"response_format": _format(schema)}, Wrapped(options)


def _format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": schema, "strict": is_strict(schema)}}


def _tools(use: ToolUse | None, declared: Sequence[ToolSpec]) -> dict[str, Any]:
    """A gen without ``tools`` still tells of those the program declared; their calls are text to it."""
    specs = list(use.tools) if use is not None else list(declared)
    if not specs:
        return {}
    out: dict[str, Any] = {"tools": [dict(spec) for spec in specs]}
    if use is not None:
        named = {"type": "function", "function": {"name": use.choice}}
        out["tool_choice"] = use.choice if use.choice in ("auto", "none", "required") else named
        if not use.parallel:
            out["parallel_tool_calls"] = False
    return out
