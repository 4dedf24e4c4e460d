"""The limits table, and the one place where request bodies are read. Every limit acts while parsing."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from caesura.runtime.server.errors import ApiError
from msgspec import Meta

MAX_BODY_BYTES = 4 << 20
MAX_JSON_DEPTH = 64
MAX_N = 8
MAX_PROMPTS = 64
MAX_STOPS = 4
MAX_NATIVE_STOPS = 16
MAX_STOP_CHARS = 256
MAX_TOOLS = 128
MAX_MESSAGES = 2048
MAX_TOP_LOGPROBS = 20
MAX_METADATA = 16
MAX_TEXT_CHARS = MAX_BODY_BYTES
MAX_PROMPT_TOKENS = 1 << 20
MAX_NEW_TOKENS = 1_000_000
MAX_ID_CHARS = 256
MAX_GRAMMAR_CHARS = 64 << 10
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKENS = 64
MAX_FORKS = 64
MAX_CALLS = 128
MAX_WAIT_S = 7 * 24 * 3600.0

# Field types, named after what they hold. `None` stands for "not given" wherever clients send nulls.
Text = Annotated[str, Meta(max_length=MAX_TEXT_CHARS)]
Id = Annotated[str, Meta(max_length=MAX_ID_CHARS)]
Name = Annotated[str, Meta(min_length=1, max_length=MAX_ID_CHARS)]
Grammar = Annotated[str, Meta(max_length=MAX_GRAMMAR_CHARS)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Meta(max_length=MAX_PROMPT_TOKENS)]
NewTokens = Annotated[int, Meta(ge=0, le=MAX_NEW_TOKENS)]
Choices = Annotated[int, Meta(ge=1, le=MAX_N)]
Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[str, Meta(max_length=MAX_STOP_CHARS)] | Annotated[list[Stop], Meta(max_length=MAX_STOPS)]
NativeStops = Annotated[str, Meta(max_length=MAX_STOP_CHARS)] | Annotated[list[Stop], Meta(max_length=MAX_NATIVE_STOPS)]
StopTokens = Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)]
Temperature = Annotated[float, Meta(ge=0, le=100)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Repetition = Annotated[float, Meta(ge=0.01, le=100)]
TopK = Annotated[int, Meta(ge=-1, le=1 << 31)]
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
LogitBias = Annotated[dict[Id, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_LOGIT_BIAS)]
Metadata = Annotated[dict[Id, Any], Meta(max_length=MAX_METADATA)]
WaitSeconds = Annotated[float, Meta(ge=0, le=MAX_WAIT_S)]

T = TypeVar("T")
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)  # an open one to the end: linear
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ALL_ALIKE = bytes.maketrans(b"{}", b"[]")
_WHERE = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")


def decode(body: bytes, kind: type[T]) -> T:
    """A request body as ``kind``. Raises ApiError 400 that names the field and its limit."""
    if too_deep(body):
        raise ApiError(400, f"the body is nested deeper than {MAX_JSON_DEPTH} levels", code="too_deep")
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        found = _WHERE.search(text)
        param = found.group(1)[:MAX_ID_CHARS] if found else None
        message = text[: found.start()] if found else text
        raise ApiError(400, f"{param}: {message}" if param else message, param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def too_deep(body: bytes) -> bool:
    """Whether JSON nests deeper than the limit. Linear, and no deeper than the limit itself."""
    if body.count(b"[") + body.count(b"{") <= MAX_JSON_DEPTH:
        return False
    brackets = _STRING.sub(b"", body).translate(_ALL_ALIKE, _NOT_BRACKETS)
    for _ in range(MAX_JSON_DEPTH):  # each round takes the innermost level away
        inner = brackets.replace(b"[]", b"")
        if len(inner) in (0, len(brackets)):
            return len(inner) > 0
        brackets = inner
    return True
