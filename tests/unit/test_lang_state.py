"""The state: forks, joins, scopes, roles, snapshots, messages, meta information, streams."""

from __future__ import annotations

import asyncio
import time

import pytest
from caesura.lang import (
    Capabilities,
    ProgramError,
    ScriptedBackend,
    StateError,
    UnsupportedByBackend,
    assistant,
    assistant_begin,
    assistant_end,
    function,
    gen,
    image,
    separate_reasoning,
    system,
    user,
    user_begin,
    user_end,
)


@pytest.fixture
def backend():
    counts: dict[str, int] = {}

    def reply(prompt, request):
        counts[request.name] = counts.get(request.name, 0) + 1
        return f"{request.name}{counts[request.name]}"

    backend = ScriptedBackend(reply)
    yield backend
    for _ in range(100):  # a variable may be read before its program has ended
        if backend.open_sessions:
            time.sleep(0.01)
    assert backend.open_sessions == 0


def test_fork_generates_in_parallel_and_join_gathers():
    running, most = 0, 0

    async def reply(prompt, request):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return f" {prompt.split()[-1]}!"

    @function
    def program(s):
        s += "start "
        s += gen("common")
        forks = s.fork(4)
        forks += lambda i: f" branch{i}" + gen("value")
        forks[2] += gen("only")
        forks.join()
        s += " joined " + "|".join(s["value"])
        return s["only"]

    backend = ScriptedBackend(reply)
    state = program.run(backend=backend)
    assert state["value"] == [f" branch{i}!" for i in range(4)]
    assert state.ret_value == [" branch2!!"]
    assert state["common"] == " start!"
    assert most == 4
    assert backend.open_sessions == 0


def test_fork_shares_the_prefix_without_sync(backend):
    """In SGLang the shared prefix is computed before a fork only if the worker happens to have caught up."""

    @function
    def program(s):
        s += "one two three four five"
        forks = s.fork(3)
        forks += gen("x")
        forks.join()

    for _ in range(20):
        backend.events.clear()
        program.run(backend=backend).sync()
        kinds = [event[0] for event in backend.events]
        assert kinds.index("prefill") < kinds.index("fork") < kinds.index("generate")
    assert all(record.prompt == "one two three four five" for record in backend.requests)


def test_group_takes_one_a_list_or_a_function(backend):
    @function
    def program(s):
        with s.fork(2) as forks:
            forks += "same "
            forks += ["zero", "one"]
            forks += lambda i: f" f{i} "
            forks += gen("x")
            with pytest.raises(StateError, match="3 expressions for 2 states"):
                forks += ["a", "b", "c"]
            texts = [fork.text() for fork in forks]
        with pytest.raises(StateError, match="joined"):
            forks[0].submit(gen("late"))
        return texts, len(forks)

    texts, size = program.run(backend=backend).ret_value
    assert [text.split()[:3] for text in texts] == [["same", "zero", "f0"], ["same", "one", "f1"]]
    assert size == 2


def test_join_concatenates_and_appends(backend):
    @function
    def program(s):
        s += "head:"
        forks = s.fork(2)
        forks += lambda i: f" [{i} " + gen("x") + "]"
        forks.join("concate_and_append")
        s += " tail " + gen("y")

    state = program.run(backend=backend)
    assert state.text() == "head: [0 x1] [1 x2] tail y1"
    assert backend.requests[-1].prompt == "head: [0 x1] [1 x2] tail "


def test_unknown_join_mode(backend):
    @function
    def program(s):
        forks = s.fork(2)
        with pytest.raises(StateError, match="join mode"):
            forks.join("sideways")

    program.run(backend=backend).sync()


def test_copy_is_a_fork_of_one(backend):
    @function
    def program(s):
        s += "a"
        with s.copy() as c:
            c += "b" + gen("x")
        s += "c"

    state = program.run(backend=backend)
    assert (state.text(), state["x"]) == ("ac", ["x1"])


def test_forks_that_nobody_joins_finish_and_fail_loudly():
    @function
    def program(s):
        forks = s.fork(2)
        forks += gen("missing")

    backend = ScriptedBackend({})
    with pytest.raises(ProgramError, match="missing"):
        program.run(backend=backend).sync()
    assert backend.open_sessions == 0


def test_var_scope(backend):
    @function
    def program(s):
        s += "out "
        with s.var_scope("inner"):
            s += "in " + gen("x") + " more"
        s += " out"

    assert program.run(backend=backend)["inner"] == "in x1 more"


def test_set_var_keeps_the_order(backend):
    @function
    def program(s):
        s.set_var("v", 1)
        s += gen("x")
        s.set_var("v", [2])
        return s["v"], s.get_var("x"), s.text_of("v")

    state = program.run(backend=backend)
    assert state.ret_value == ([2], "x1", "[2]")
    assert state["v"] == [2]


def test_a_read_gives_the_latest_value(backend):
    @function
    def program(s):
        seen = []
        for _ in range(3):
            s += gen("x") + " "
            seen.append(s["x"])
        return seen

    assert program.run(backend=backend).ret_value == ["x1", "x2", "x3"]


def test_roles_make_turns_and_messages(backend):
    @function
    def program(s):
        s += system("Be kind.")
        s += user_begin() + "  two blanks first" + user_end()
        s += assistant_begin() + gen("a") + assistant_end()
        s.user("second")
        with s.assistant():
            s += "I say " + gen("b")

    state = program.run(backend=backend)
    assert state.messages() == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "  two blanks first"},  # SGLang strips the blanks
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": "I say b1"},
    ]
    assert state.text().startswith("<|system|>Be kind.<|end|>\n<|user|>  two")


def test_an_exception_in_a_role_block_closes_the_turn(backend):
    @function
    def program(s):
        try:
            with s.user():
                s += "unfinished"
                raise ValueError("oops")
        except ValueError:
            pass
        s += assistant(gen("x"))

    state = program.run(backend=backend)
    assert [message["role"] for message in state.messages()] == ["user", "assistant"]


def test_roles_do_not_nest(backend):
    @function
    def program(s):
        s += user_begin() + assistant("x")

    with pytest.raises(ProgramError, match="assistant opens inside the turn of user") as raised:
        program.run(backend=backend).sync()
    assert isinstance(raised.value, StateError)


def test_roles_need_a_chat_format():
    @function
    def program(s):
        s += user("x")

    with pytest.raises(UnsupportedByBackend, match="no chat template"):
        program.run(backend=ScriptedBackend([], chat=None)).sync()


def test_snapshot_and_rollback(backend):
    @function
    def program(s):
        s += user("q")
        s += "head " + gen("keep")
        point = s.snapshot()
        s += " wrong " + gen("drop")
        first = s.text()
        s.rollback(point)
        s += " right " + gen("again")
        return first

    state = program.run(backend=backend)
    assert state.ret_value.endswith("head keep1 wrong drop1")
    assert state.text().endswith("head keep1 right again1")
    assert "drop" not in state.variables
    assert backend.requests[-1].prompt.endswith("head keep1 right ")


def test_rollback_recovers_from_a_failure():
    backend = ScriptedBackend({"ok": "fine"})

    @function
    def program(s):
        s += "a "
        point = s.snapshot()
        s += gen("missing")
        with pytest.raises(ProgramError, match="missing"):
            s.sync()
        s.rollback(point)
        s += gen("ok")

    assert program.run(backend=backend).text() == "a fine"
    assert backend.open_sessions == 0


def test_a_snapshot_belongs_to_its_state(backend):
    @function
    def program(s):
        point = s.snapshot()
        s.sync()
        with s.copy() as c:
            c.rollback(point)

    with pytest.raises(ProgramError, match="belongs to another state"):
        program.run(backend=backend).sync()


def test_a_snapshot_that_a_rollback_has_cut_off_is_gone(backend):
    @function
    def program(s):
        first = s.snapshot()
        s += gen("a")
        second = s.snapshot()
        s.rollback(second)
        s.rollback(first)
        s.rollback(first)
        s += gen("b")
        s.rollback(second)

    state = program.run(backend=backend)
    assert "cut it off" in str(state.error())
    assert (state.core.text(), state.variables) == ("b1", {"b": "b1"})


def test_meta_info_has_sglangs_keys(backend):
    @function
    def program(s):
        s += "some words " + gen("x", return_logprob=True, top_logprobs_num=1, return_text_in_logprobs=True)

    meta = program.run(backend=backend).get_meta_info("x")
    assert meta["finish_reason"] == {"type": "stop"}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (3, 1, 0)
    assert meta["output_token_logprobs"] == [(-0.5, meta["output_token_logprobs"][0][1], "x1")]
    assert meta["output_top_logprobs"][0][0][2] == "x1"


def test_usage_counts_forks_too(backend):
    @function
    def program(s):
        s += gen("a")
        forks = s.fork(2)
        forks += gen("b")
        forks.join()

    state = program.run(backend=backend)
    state.sync()
    assert state.usage().generations == 3
    assert state.usage().completion_tokens == 3


def test_media_are_refused_clearly(backend):
    @function
    def program(s):
        s += image("cat.png")

    with pytest.raises(UnsupportedByBackend, match="does not support image input"):
        program.run(backend=backend).sync()


def test_capabilities_are_checked_where_the_expression_is_added():
    backend = ScriptedBackend(["x"], capabilities=Capabilities(fork=False, constraints=frozenset()))

    @function
    def program(s):
        with pytest.raises(UnsupportedByBackend, match="fork"):
            s.fork(2)
        with pytest.raises(UnsupportedByBackend, match="constraint regex"):
            s += gen("x", regex="a")
        s += gen("y")

    assert program.run(backend=backend).text() == "x"


def test_separate_reasoning():
    backend = ScriptedBackend({"a": "<think>\nhm, 6*7\n</think>\n\n42", "b": "plain"})

    @function
    def program(s):
        s += separate_reasoning(gen("a") + gen("b"), model_type="qwen3")

    state = program.run(backend=backend)
    assert state["a"] == "42"
    assert state["a_reasoning_content"] == "hm, 6*7"
    assert (state["b"], state["b_reasoning_content"]) == ("plain", "")
    with pytest.raises(Exception, match="qwen3"):
        separate_reasoning(gen("a"), model_type="nope")


def test_thinking_is_that_of_the_latest_answer():
    thought = []

    @function
    def program(s):
        for _ in range(2):
            s += separate_reasoning(gen("a"), model_type="qwen3")
            thought.append(s["a_reasoning_content"])

    replies = [f"<think>\n{number}\n</think>\n\nyes" for number in ("one", "two")]
    program.run(backend=ScriptedBackend(replies, latency_s=0.05)).sync()
    assert thought == ["one", "two"]


def test_states_show_themselves_in_notebooks(backend):
    @function
    def program(s):
        s += "<b>" + gen("x")

    state = program.run(backend=backend)
    state.sync()
    assert "&lt;b&gt;" in state._repr_html_()
    assert "done" in repr(state)
