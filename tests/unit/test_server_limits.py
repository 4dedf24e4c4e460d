"""SEC-19: the limits table acts while parsing; and the boundary table for every field."""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
import pytest
from caesura.runtime.errors import InvalidRequest
from caesura.runtime.server import limits
from caesura.runtime.server.chat_protocol import ChatRequest
from caesura.runtime.server.completions import CompletionRequest
from caesura.runtime.server.contexts_protocol import (
    AppendRequest,
    ContextRequest,
    ForkRequest,
    GenerateSpec,
    PauseRequest,
    ScoreRequest,
    TruncateRequest,
)
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.limits import decode, too_deep
from caesura.runtime.server.native_info import AbortRequest, DetokenizeRequest, TokenizeRequest
from caesura.runtime.server.native_protocol import GenerateRequest

HELLO = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}


def chat(**fields: Any) -> ChatRequest:
    body = decode(json.dumps({"messages": [HELLO], **fields}).encode(), ChatRequest)
    body.check()
    return body


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


TABLE = {
    "n": lambda k: {"n": k},
    "stop": lambda k: {"stop": ["x"] * k},
    "stop chars": lambda k: {"stop": ["x" * k]},
    "tools": lambda k: {"tools": [TOOL] * k},
    "messages": lambda k: {"messages": [HELLO] * k},
    "top_logprobs": lambda k: {"logprobs": True, "top_logprobs": k},
    "metadata": lambda k: {"metadata": {str(i): "x" for i in range(k)}},
    "depth": lambda k: {"anything": nested(k - 1)},
}
LIMITS = {
    "n": 8, "stop": 4, "stop chars": 256, "tools": 128, "messages": 2048, "top_logprobs": 20, "metadata": 16,
    "depth": 64,
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_sec_19_at_the_limit_and_one_beyond(name: str) -> None:
    chat(**TABLE[name](LIMITS[name]))
    raw = json.dumps({"messages": [HELLO], **TABLE[name](LIMITS[name] + 1)}).encode()
    started = time.thread_time()
    with pytest.raises(ApiError) as caught:
        decode(raw, ChatRequest).check()
    assert caught.value.status == 400
    assert time.thread_time() - started < 0.1


def test_sec_19_prompts() -> None:
    class Letters:
        bos_id = None
        eos_ids = frozenset({0})
        vocab_size = 300

        def encode(self, text: str, **_: Any) -> list[int]:
            return list(text.encode())

    for count, fits in ((64, True), (65, False)):
        body = decode(json.dumps({"prompt": ["x"] * count}).encode(), CompletionRequest)
        if fits:
            assert len(body.prompts(Letters())) == count  # type: ignore[arg-type]
        else:
            with pytest.raises(ApiError, match="64"):
                body.prompts(Letters())  # type: ignore[arg-type]
        text = json.dumps({"text": ["x"] * count}).encode()
        if fits:
            decode(text, GenerateRequest)
        else:
            with pytest.raises(ApiError, match="64"):
                decode(text, GenerateRequest)


@pytest.mark.parametrize(
    "raw",
    [
        *(b"[" * 4_000_000, b'{"a":' * 100_000, b"[" * 65 + b"]" * 65, b"[[]" * 1_000_000, b"]" * 1000 + b"[" * 1000),
        b"[" * 65 + b'"' + b'\\"' * 1_000_000,
    ],
    ids=["open", "objects", "one too many", "mixed", "closed first", "an open string of quotes"],
)  # fmt: skip
def test_deep_json_is_refused_in_linear_time(raw: bytes) -> None:
    started = time.thread_time()
    with pytest.raises(ApiError):
        decode(raw, ChatRequest)
    assert time.thread_time() - started < 3


def test_brackets_in_strings_do_not_count() -> None:
    assert not too_deep(json.dumps({"a": "[" * 1000 + '\\"{' * 100}).encode())
    assert not too_deep(json.dumps([[]] * 1000).encode())
    assert too_deep(json.dumps(nested(65)).encode())


def test_errors_name_the_field_and_the_limit() -> None:
    with pytest.raises(ApiError) as caught:
        chat(messages=[HELLO, {"role": "user", "content": 3}])
    assert caught.value.param == "messages[1].content"
    with pytest.raises(ApiError, match="n: Expected `int` <= 8"):
        chat(n=9)


BOUNDARY = [
    "-1", "0", "1", str(1 << 31), str(1 << 63), str(1 << 70), "-" + str(1 << 63), "1e999", "-1e999", "NaN", "Infinity",
    "0.5", "null", "true", '""', '"x"', json.dumps("x" * 100_000), "[]", "[null]", "[-1]", '["x"]', "{}", '{"a":1}',
    json.dumps(nested(80)), '"\\ud800"', '"\\u0000"',
]  # fmt: skip
KINDS = [
    ChatRequest, CompletionRequest, GenerateRequest, GenerateSpec, ContextRequest, AppendRequest, ForkRequest,
    PauseRequest, ScoreRequest, TruncateRequest, AbortRequest, TokenizeRequest, DetokenizeRequest,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_boundary_table_for_every_field(kind: type[Any]) -> None:
    """Whatever stands in a field, the body is taken or refused; nothing else ever happens."""
    base = {"ChatRequest": '"messages":[{"role":"user"}],', "CompletionRequest": '"prompt":"x",'}.get(kind.__name__, "")
    for field in msgspec.structs.fields(kind):
        for value in BOUNDARY:
            raw = f'{{{base}"{field.encode_name}":{value}}}'.encode()
            try:
                body = decode(raw, kind)
                if isinstance(body, ChatRequest | GenerateRequest | CompletionRequest):
                    body.check()
                if isinstance(body, GenerateSpec):
                    body.params(), body.calling()
                if isinstance(body, ChatRequest | CompletionRequest):
                    body.params(16, logprobs=None, constraint=None)
            except (ApiError, InvalidRequest):
                continue


def test_unknown_fields_are_accepted_but_not_in_sampling_params() -> None:
    chat(frobnicate=1, store=True, service_tier="auto", prediction=None)
    with pytest.raises(ApiError, match="unknown field `typo`"):
        decode(b'{"text":"x","sampling_params":{"typo":1}}', GenerateRequest)


def test_sec_23_a_request_brings_no_template() -> None:
    chat(chat_template_kwargs={"enable_thinking": False})
    for name in ("chat_template", "tokenize", "return_dict", "messages", "__class__"):
        with pytest.raises(ApiError, match="chat_template_kwargs"):
            chat(chat_template_kwargs={name: "x"})


def test_limits_are_those_of_the_table() -> None:
    table = (limits.MAX_N, limits.MAX_PROMPTS, limits.MAX_STOPS, limits.MAX_STOP_CHARS, limits.MAX_TOOLS)
    assert table == (8, 64, 4, 256, 128)
    more = (
        limits.MAX_MESSAGES,
        limits.MAX_TOP_LOGPROBS,
        limits.MAX_BODY_BYTES,
        limits.MAX_JSON_DEPTH,
        limits.MAX_METADATA,
    )
    assert more == (2048, 20, 4 << 20, 64, 16)
