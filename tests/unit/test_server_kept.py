"""The stores of contexts: bounded, per key, with deadlines; an answer is recognized only unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest
from caesura.runtime.api import Handle, PendingCall
from caesura.runtime.errors import ContextClosed
from caesura.runtime.server.conversation import Conversation, open_calls
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.kept import KeptCall, KeptContexts, namespace_of
from caesura.runtime.server.registry import ContextRegistry


class FakeHandle:
    """A context that notes what is done with it."""

    num_tokens = 3

    def __init__(self) -> None:
        self.closed = False
        self.paused: list[PendingCall] = []

    @property
    def is_open(self) -> bool:
        return not self.closed

    async def token_ids(self) -> list[int]:
        return [1, 2, 3]

    async def pause(self, calls: Sequence[PendingCall], wait: str = "all") -> None:
        self.paused = list(calls)

    async def close(self) -> None:
        self.closed = True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def keep(store: KeptContexts, name: str, key: str = "ann", salt: str | None = None) -> FakeHandle:
    handle = FakeHandle()
    call = KeptCall(name, "f", '{"a": 1}')
    await store.keep(cast(Handle, handle), namespace_of(key, salt), b"print", "", [call])
    return handle


def test_a_kept_context_is_paused_with_a_deadline_and_goes_on_once() -> None:
    async def main() -> None:
        store = KeptContexts(8, 8, 60.0, monotonic=Clock())
        handle = await keep(store, "call_1")
        assert handle.paused == [PendingCall("f", None, 60.0)]
        kept = store.find(namespace_of("ann", None), frozenset({"call_1"}))
        assert kept is not None and list(kept.token_ids) == [1, 2, 3]
        assert cast(Any, store.take_handle(kept)) is handle
        assert store.take_handle(kept) is None, "once; the tokens stay"
        assert store.find(namespace_of("bob", None), frozenset({"call_1"})) is None
        assert store.find(namespace_of("ann", "salt"), frozenset({"call_1"})) is None
        assert store.find(namespace_of("ann", None), frozenset({"call_1", "call_2"})) is None
        assert store.find(namespace_of("ann", None), frozenset()) is None

    asyncio.run(main())


def test_the_store_is_bounded_in_all_and_per_key_and_forgets() -> None:
    async def main() -> None:
        clock = Clock()
        store = KeptContexts(4, 2, 60.0, monotonic=clock)
        mine = [await keep(store, f"a{i}", salt=str(i)) for i in range(3)]
        assert [handle.closed for handle in mine] == [True, False, False], "a salt makes no new owner"
        for i in range(3):
            await keep(store, f"b{i}", key=f"key{i}")
        assert len(store) == 4 and mine[1].closed
        clock.now = 61.0
        await store.expire()
        assert len(store) == 0 and mine[2].closed and not store._by_call and store._num_tokens == 0

    asyncio.run(main())


def test_an_answer_is_recognized_only_unchanged() -> None:
    async def main() -> None:
        store = KeptContexts(8, 8, 60.0)
        await keep(store, "call_1")
        kept = store.find(namespace_of("ann", None), frozenset({"call_1"}))
        assert kept is not None
        message = {"content": "", "tool_calls": [{"id": "call_1", "function": {"name": "f", "arguments": {"a": 1}}}]}
        assert kept.wrote(message)
        assert not kept.wrote({**message, "content": "other"})
        for function in ({"name": "g", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": 2}}):
            assert not kept.wrote({**message, "tool_calls": [{"id": "call_1", "function": function}]})

    asyncio.run(main())


def turn(*ids: str) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"id": i, "function": {"name": "f"}} for i in ids]}


def result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "x", "name": "f"}


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("messages", "ids"),
    [
        ([USER, turn("a", "b"), result("b"), result("a")], {"a", "b"}),
        ([USER, turn("a"), result("a"), turn("b"), result("b")], {"b"}),
        ([USER, turn("a", "b"), result("a")], set()),
        ([USER, turn("a"), result("a"), result("a")], set()),
        ([USER, turn("a", "a"), result("a"), result("a")], set()),
        ([USER, turn("a"), result("a"), USER], set()),
        ([USER, turn("a")], set()),
        ([result("a")], set()),
        ([USER, result("a")], set()),
    ],
)
def test_which_conversations_answer_open_calls(messages: list[dict[str, Any]], ids: set[str]) -> None:
    assert open_calls(Conversation(tuple(messages), (), {}))[1] == ids


def test_named_contexts_belong_to_a_key_and_to_one_request() -> None:
    async def main() -> None:
        clock = Clock()
        registry = ContextRegistry(3, 2, monotonic=clock)
        first = registry.add("ann", cast(Handle, FakeHandle()), 10.0)
        registry.add("ann", cast(Handle, FakeHandle()), 10.0)
        with pytest.raises(ApiError, match="contexts of this key"):
            await registry.check_room("ann")
        await registry.check_room("bob")
        with pytest.raises(ApiError) as caught:
            async with registry.using("bob", first.id):
                pass
        assert caught.value.status == 404
        async with registry.using("ann", first.id):
            with pytest.raises(ApiError) as caught:
                async with registry.using("ann", first.id):
                    pass
            assert caught.value.status == 409
            clock.now = 100.0
            await registry.expire()
            assert not cast(FakeHandle, first.handle).closed, "not while it is being used"
        with pytest.raises(ApiError) as caught:
            async with registry.using("ann", first.id):
                raise ContextClosed("gone")
        assert caught.value.status == 410 and cast(FakeHandle, first.handle).closed
        assert len(registry) == 0

    asyncio.run(main())


def test_named_contexts_that_the_engine_ended_leave_room_for_others() -> None:
    async def main() -> None:
        registry = ContextRegistry(3, 2, monotonic=Clock())
        lost = [registry.add("ann", cast(Handle, FakeHandle()), 10.0) for _ in range(2)]
        cast(FakeHandle, lost[0].handle).closed = True
        await registry.check_room("ann")
        assert len(registry) == 1
        with pytest.raises(ApiError, match="contexts of this key"):
            await registry.check_room("ann", 2)

    asyncio.run(main())
