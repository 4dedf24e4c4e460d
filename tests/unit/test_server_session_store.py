"""Sessions: trees and lines of requests, of one key, bounded, gone when nobody uses them."""

from __future__ import annotations

from typing import Any

import pytest
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.sessions import (
    MAX_SESSION_REQUESTS,
    MAX_SESSION_TOKENS,
    OpenSession,
    SessionParams,
    SessionStore,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ask(store: SessionStore, name: str, new: list[int], answer: list[int] | None, **params: Any) -> list[int]:
    """One request of session ``s`` of key ``ann``; with an answer it ends. Returns its whole prompt."""
    turn = store.begin("ann", SessionParams("s", **params), name)
    prompt = turn.prompt(new, 0)
    if answer is not None:
        store.commit(turn, prompt, answer)
    return prompt


def opened(**options: Any) -> SessionStore:
    store = SessionStore(8, 8, 60.0)
    assert store.open("ann", OpenSession(session_id="s", **options)) == "s"
    return store


def test_a_request_goes_on_from_any_earlier_one() -> None:
    store = opened()
    assert ask(store, "a", [0, 1, 2], [3, 4]) == [0, 1, 2]
    assert ask(store, "b", [0, 5], [6], rid="a") == [0, 1, 2, 3, 4, 5], "what is appended begins without BOS"
    assert ask(store, "c", [7], [8], rid="a") == [0, 1, 2, 3, 4, 7], "another branch"
    assert ask(store, "d", [9], [], rid="b") == [0, 1, 2, 3, 4, 5, 6, 9]
    assert ask(store, "e", [9], [], rid="b", drop_previous_output=True) == [0, 1, 2, 3, 4, 5, 9]
    assert ask(store, "f", [9], [], rid="b", offset=2) == [0, 1, 9]
    assert ask(store, "g", [9], [], rid="b", offset=-1) == [0, 1, 2, 3, 4, 5, 9]
    assert ask(store, "h", [9], [], rid="b", offset=0) == [0, 1, 2, 3, 4, 5, 6, 9]
    assert ask(store, "i", [0, 9], []) == [0, 9], "a root of its own"


def test_replacing_forgets_what_came_after_and_names_what_still_runs() -> None:
    store = opened()
    ask(store, "a", [1], [2])
    ask(store, "b", [3], [4], rid="a")
    ask(store, "c", [5], None, rid="b")
    turn = store.begin("ann", SessionParams("s", rid="a", replace=True), "d")
    assert turn.aborts == ["c"]
    with pytest.raises(ApiError, match="not part of session"):
        store.begin("ann", SessionParams("s", rid="b"), "e")
    again = store.begin("ann", SessionParams("s", replace=True), "f")
    assert again.aborts == ["d"]
    store.commit(turn, [1], [2])
    with pytest.raises(ApiError, match="not part of session"):
        store.begin("ann", SessionParams("s", rid="d"), "g")


def test_what_a_request_without_an_end_had_replaced_comes_back() -> None:
    store = opened()
    ask(store, "a", [1], [2])
    ask(store, "b", [3], [4], rid="a")
    ask(store, "c", [5], [6], rid="b")
    ask(store, "d", [7], None, rid="b")
    turn = store.begin("ann", SessionParams("s", rid="a", replace=True), "b")
    assert turn.aborts == ["d"]
    store.roll_back(turn)
    assert ask(store, "e", [9], [], rid="c") == [1, 2, 3, 4, 5, 6, 9]
    with pytest.raises(ApiError, match="not part of session"):
        store.begin("ann", SessionParams("s", rid="d"), "f")
    turn = store.begin("ann", SessionParams("s", rid="b", replace=True), "g")
    ask(store, "c", [8], [8], rid="b")
    store.roll_back(turn)
    assert ask(store, "h", [9], [], rid="c") == [1, 2, 3, 4, 8, 8, 9], "its name has another one by now"
    session = store._sessions["ann", "s"]
    assert session.num_tokens == sum(node.num_tokens for node in session.nodes.values())


def test_a_request_that_failed_leaves_nothing_and_one_that_runs_has_no_end() -> None:
    store = opened()
    turn = store.begin("ann", SessionParams("s"), "a")
    with pytest.raises(ApiError, match="has not ended"):
        store.begin("ann", SessionParams("s", rid="a"), "b")
    with pytest.raises(ApiError, match="already part"):
        store.begin("ann", SessionParams("s"), "a")
    store.roll_back(turn)
    with pytest.raises(ApiError, match="not part"):
        store.begin("ann", SessionParams("s", rid="a"), "b")


def test_a_streaming_session_is_a_line() -> None:
    store = opened(streaming=True)
    assert ask(store, "a", [0, 1], [2]) == [0, 1]
    turn = store.begin("ann", SessionParams("s"), "b")
    with pytest.raises(ApiError, match="one request at a time"):
        store.begin("ann", SessionParams("s"), "c")
    store.roll_back(turn)
    assert ask(store, "b", [0, 3], [4]) == [0, 1, 2, 3], "back to the last one that ended"
    assert ask(store, "c", [5], [6]) == [0, 1, 2, 3, 4, 5]
    for wrong in ({"replace": True}, {"offset": 1}, {"drop_previous_output": True}):
        with pytest.raises(ApiError, match="only appends"):
            store.begin("ann", SessionParams("s", **wrong), "d")


def test_a_session_lives_while_its_request_runs_and_its_time_after_that() -> None:
    clock = Clock()
    store = SessionStore(8, 8, 60.0, monotonic=clock)
    store.open("ann", OpenSession(session_id="s", timeout=5))
    turns = [store.begin("ann", SessionParams("s"), name) for name in ("a", "b")]
    clock.now = 6.0
    store.expire()
    store.commit(turns[0], [1], [2])
    store.roll_back(turns[1])
    clock.now = 10.0
    assert ask(store, "c", [3], [4], rid="a") == [1, 2, 3]
    clock.now = 15.0
    with pytest.raises(ApiError, match="expired"):
        ask(store, "d", [3], [4], rid="a")


def test_sessions_are_ones_own_bounded_and_expire() -> None:
    clock = Clock()
    store = SessionStore(3, 2, 60.0, monotonic=clock)
    first = store.open("ann", OpenSession())
    store.open("ann", OpenSession(session_id="s", timeout=10.0))
    with pytest.raises(ApiError) as caught:
        store.open("ann", OpenSession())
    assert caught.value.status == 429
    with pytest.raises(ApiError, match="does not exist"):
        store.begin("bob", SessionParams("s"), "a")
    assert store.open("bob", OpenSession(session_id="s")) == "s", "ids are a key's own"
    with pytest.raises(ApiError, match="open already"):
        store.open("ann", OpenSession(session_id="s"))
    clock.now = 9.0
    ask(store, "a", [1], [2])
    clock.now = 18.0
    ask(store, "b", [1], [2], rid="a")
    clock.now = 29.0
    with pytest.raises(ApiError, match="expired"):
        ask(store, "c", [1], [2], rid="b")
    assert store.close("ann", first) and not store.close("ann", first)
    assert len(store) == 1


def test_all_sessions_together_hold_so_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caesura.runtime.server.sessions.MAX_SESSION_TOKENS", 10)
    monkeypatch.setattr("caesura.runtime.server.sessions.MAX_SESSION_REQUESTS", 3)
    store = opened()
    ask(store, "a", [1] * 8, [])
    store.open("bob", OpenSession(session_id="t"))
    turn = store.begin("bob", SessionParams("t"), "b")
    store.commit(turn, [1] * 8, [])
    assert len(store) == 1, "the one unused the longest went"
    for rid in ("c", "d"):
        store.begin("bob", SessionParams("t"), rid)
    with pytest.raises(ApiError, match="holds 3 requests"):
        store.begin("bob", SessionParams("t"), "e")


def test_a_line_as_long_as_it_may_be_can_be_replaced_at_once() -> None:
    store = opened()
    for number in range(MAX_SESSION_REQUESTS):
        ask(store, str(number), [1], [], **({"rid": str(number - 1)} if number else {}))
    with pytest.raises(ApiError, match="1024 requests"):
        ask(store, "one more", [1], [])
    ask(store, "anew", [1], [], replace=True)


def test_a_session_holds_a_bounded_number_of_tokens() -> None:
    store = opened()
    ask(store, "long", [1] * MAX_SESSION_TOKENS, [])
    with pytest.raises(ApiError, match="8388608 tokens"):
        ask(store, "more", [1], [], rid="long")


def test_a_full_session_goes_on_by_replacing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caesura.runtime.server.sessions.MAX_SESSION_TOKENS", 12)
    store = opened()
    ask(store, "a", [1] * 4, [])
    ask(store, "b", [1] * 4, [], rid="a")
    with pytest.raises(ApiError, match="12 tokens"):
        ask(store, "c", [1], [], rid="b")
    assert ask(store, "c", [5], [6], rid="a", replace=True) == [1, 1, 1, 1, 5]
    assert ask(store, "d", [7], None, rid="c") == [1, 1, 1, 1, 5, 6, 7], "there is room again"


def test_what_may_come_back_keeps_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a session would grow without end: replaced, filled anew, given back."""
    monkeypatch.setattr("caesura.runtime.server.sessions.MAX_SESSION_TOKENS", 8)
    monkeypatch.setattr("caesura.runtime.server.sessions.MAX_SESSION_REQUESTS", 4)
    store = opened()
    ask(store, "a", [1] * 8, [])
    turn = store.begin("ann", SessionParams("s", replace=True), "b")
    with pytest.raises(ApiError, match="holds 8 tokens"):
        store.begin("ann", SessionParams("s"), "c")
    store.roll_back(turn)
    for name in "abc":
        ask(store, name, [1], [], replace=name == "a")
    turn = store.begin("ann", SessionParams("s", replace=True), "d")
    with pytest.raises(ApiError, match="holds 4 requests"):
        store.begin("ann", SessionParams("s"), "e")
    store.roll_back(turn)
    store.begin("ann", SessionParams("s"), "e")


def test_a_replacement_that_is_refused_replaces_nothing() -> None:
    store = opened()
    ask(store, "a", [1], [2])
    ask(store, "b", [3], [4], rid="a")
    ask(store, "c", [5], None, rid="b")
    with pytest.raises(ApiError, match="already part"):
        store.begin("ann", SessionParams("s", rid="a", replace=True), "a")
    with pytest.raises(ApiError, match="has not ended"):
        store.begin("ann", SessionParams("s", rid="c", replace=True), "d")
    ask(store, "d", [7], None, rid="a")
    turn = store.begin("ann", SessionParams("s", rid="a", replace=True), "b")
    assert sorted(turn.aborts) == ["c", "d"], "what still runs is told when it goes"
    assert list(turn.before) == [1, 2]
