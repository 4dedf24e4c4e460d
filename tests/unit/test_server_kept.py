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
        self.lives_s: float | None = None

    @property
    def is_open(self) -> bool:
        return not self.closed

    async def token_ids(self) -> list[int]:
        return [1, 2, 3]

    async def pause(self, calls: Sequence[PendingCall], wait: str = "all", deadline_s: float | None = None) -> None:
        self.paused, self.lives_s = list(calls), deadline_s

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
        assert handle.lives_s == 60.0, "whatever the request had left"
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


@pytest.mark.parametrize(("max_contexts", "max_tokens"), [(4, 99), (99, 12)])
def test_what_has_gone_on_leaves_before_what_still_waits(
    max_contexts: int, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr("caesura.runtime.server.kept.MAX_KEPT_TOKENS", max_tokens)
        store = KeptContexts(max_contexts, 3, 60.0)

        async def spent(name: str, key: str = "ann") -> None:
            await keep(store, name, key)
            kept = store.find(namespace_of(key, None), frozenset({name}))
            assert kept is not None and store.take_handle(kept) is not None

        def names() -> list[str]:
            return [kept.calls[0].id for kept in store._kept.values()]

        waiting = [await keep(store, "w0")]
        await spent("s0")
        await spent("s1")
        waiting.append(await keep(store, "w1"))
        assert names() == ["w0", "s1", "w1"], "a key's bound: the oldest that has gone on"
        waiting.append(await keep(store, "b0", "bob"))
        await spent("b1", "bob")
        assert names() == ["w0", "w1", "b0", "b1"], "the bound of all"
        waiting.append(await keep(store, "c0", "cleo"))
        assert names() == ["w0", "w1", "b0", "c0"]
        assert not any(handle.closed for handle in waiting)
        await keep(store, "c1", "cleo")
        assert names() == ["w1", "b0", "c0", "c1"], "the oldest of those that wait, when there are no others"

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


async def room(registry: ContextRegistry, key_id: str, count: int = 1) -> None:
    async with registry.room(key_id, count):
        pass


def test_named_contexts_belong_to_a_key_and_to_one_request() -> None:
    async def main() -> None:
        clock = Clock()
        registry = ContextRegistry(3, 2, monotonic=clock)
        first = registry.add("ann", cast(Handle, FakeHandle()), 10.0)
        registry.add("ann", cast(Handle, FakeHandle()), 10.0)
        with pytest.raises(ApiError, match="contexts of this key"):
            await room(registry, "ann")
        await room(registry, "bob")
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
        await room(registry, "ann")
        assert len(registry) == 1
        with pytest.raises(ApiError, match="contexts of this key"):
            await room(registry, "ann", 2)

    asyncio.run(main())


def test_room_for_a_context_that_is_being_made_is_not_given_away() -> None:
    async def main() -> None:
        registry = ContextRegistry(3, 2, monotonic=Clock())
        async with registry.room("ann", 2):
            with pytest.raises(ApiError, match="contexts of this key"):
                await room(registry, "ann")
            async with registry.room("bob"):
                with pytest.raises(ApiError) as caught:
                    await room(registry, "carl")
                assert caught.value.status == 429, "all keys together"
        await room(registry, "ann", 2)
        registry.add("ann", cast(Handle, FakeHandle()), 10.0)
        with pytest.raises(ValueError, match="not made"):
            async with registry.room("ann"):
                raise ValueError("not made")
        await room(registry, "ann")

    asyncio.run(main())
