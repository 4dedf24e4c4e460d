"""Stored responses: bounded in number and bytes, in all and per key, forgotten when nobody asks; items as messages."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.responses_items import messages_of
from caesura.runtime.server.responses_protocol import InputItem
from caesura.runtime.server.responses_store import ResponseStore, StoredResponse


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def stored(name: str, key: str = "ann", num_bytes: int = 1) -> StoredResponse:
    return StoredResponse(key, {"id": name}, [], (), None, num_bytes)


def names(store: ResponseStore) -> list[str]:
    return list(store._stored)


def test_the_store_is_bounded_and_forgets_what_nobody_asks_for() -> None:
    clock = Clock()
    store = ResponseStore(4, 2, 60.0, max_bytes=100, monotonic=clock)
    for name in ("a", "b"):
        store.put(stored(name))
    store.get("ann", "a")
    store.put(stored("c"))
    assert names(store) == ["a", "c"], "b was asked for the longest ago"
    for key in ("k1", "k2", "k3"):
        store.put(stored(f"of-{key}", key))
    assert names(store) == ["c", "of-k1", "of-k2", "of-k3"]
    store.put(stored("big", "k1", 98))
    assert names(store) == ["of-k2", "of-k3", "big"] and store._num_bytes == 100
    store.put(stored("too-big", "k2", 101))
    assert names(store) == ["of-k2", "of-k3", "big"], "it would have cost everybody's"
    store.put(stored("bigger", "k1", 98))
    assert names(store) == ["of-k2", "of-k3", "bigger"] and store._num_bytes == 100, "at its key's own cost"
    for name in names(store):
        store._drop(name)
    assert store._num_bytes == 0
    store.put(stored("d"))
    clock.now = 59.0
    store.get("ann", "d")
    clock.now = 118.0
    store.expire()
    assert names(store) == ["d"]
    clock.now = 120.0
    with pytest.raises(ApiError) as caught:
        store.get("ann", "d")
    assert caught.value.status == 404 and len(store) == 0


def test_only_the_owner_may_look() -> None:
    store = ResponseStore(4, 4, 60.0)
    store.put(stored("a"))
    for key, name in (("bob", "a"), ("ann", "b")):
        with pytest.raises(ApiError) as caught:
            store.delete(key, name)
        assert caught.value.status == 404
    assert store.delete("ann", "a").id == "a"


def said(*items: dict[str, Any]) -> list[dict[str, Any]]:
    messages = messages_of(msgspec.convert(list(items), list[InputItem]))
    plain = [{k: v for k, v in msgspec.to_builtins(message).items() if v is not None} for message in messages]
    for message in plain:
        if "tool_calls" in message:
            message["tool_calls"] = [call["id"] for call in message["tool_calls"]]
    return plain


def call(call_id: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}"}


def output(call_id: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": [{"type": "input_text", "text": "x"}]}


def test_everything_the_model_said_between_two_inputs_is_one_turn() -> None:
    thinking = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    text = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "So:"}]}
    ask = {"role": "user", "content": "hi"}
    assert said(ask, thinking, text, call("a"), call("b"), output("b"), output("a"), call("c"), output("c")) == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "So:", "tool_calls": ["a", "b"], "reasoning_content": "hm"},
        {"role": "tool", "content": "x", "tool_call_id": "b"},
        {"role": "tool", "content": "x", "tool_call_id": "a"},
        {"role": "assistant", "content": "", "tool_calls": ["c"]},
        {"role": "tool", "content": "x", "tool_call_id": "c"},
    ]
    assert said(ask, thinking, ask, text) == [
        {"role": "user", "content": "hi"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "So:"},
    ]
