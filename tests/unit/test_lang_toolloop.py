"""``gen(tools=)``: the model calls, reads the results and answers."""

from __future__ import annotations

import json

import pytest
from caesura.lang import (
    Capabilities,
    OutputError,
    ScriptedBackend,
    ScriptedReply,
    StateError,
    Tool,
    ToolError,
    assistant,
    function,
    gen,
    system,
    tool,
    user,
)

from tests.unit.test_lang_tools import search, weather


@function
def ask(s, question, tools, **options):
    s += user(question)
    s += assistant(gen("answer", tools=tools, **options))
    return s["answer"]


def asked(replies, tools=(search, weather), **options):
    backend = ScriptedBackend(replies)
    state = ask.run("cats?", list(tools), backend=backend, **options)
    state.error()
    assert backend.open_sessions == 0
    return state, backend


def test_the_model_calls_and_answers():
    state, backend = asked(
        [
            ScriptedReply("Let me see. ", [("search", {"query": "cats"}), ("weather", {"city": "Rome"})]),
            ScriptedReply("", [("search", {"query": "dogs", "limit": 1})]),
            "Cats are fine.",
        ]
    )
    assert state["answer"] == state.ret_value == "Cats are fine."
    calls = state.tool_calls("answer")
    assert [(call.tool, result.text) for call, result in calls] == [
        ("search", "3 pages on cats"),
        ("weather", '{"city":"Rome","degrees":21}'),
        ("search", "1 pages on dogs"),
    ]
    assert [message["role"] for message in state.messages()] == [
        "user", "assistant", "tool", "tool", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert state.messages()[1]["content"] == "Let me see. "
    assert state.messages()[1]["tool_calls"][0]["function"] == {"name": "search", "arguments": '{"query": "cats"}'}
    assert state.get_meta_info("answer")["tool_rounds"] == 2
    kinds = [event[0] for event in backend.events if event[0] in ("generate", "pause", "resume")]
    assert kinds == ["generate", "pause", "resume"] * 2 + ["generate"]
    assert ("pause", 1, "search", "weather") in backend.events


def test_tools_are_declared_in_the_first_turn_also_afterwards():
    def replies(prompt, request):
        return "fine"

    declared = ScriptedBackend(replies)

    @function(tools=[search])
    def up_front(s):
        s += system("Be brief.")
        s += user("q")
        s += assistant(gen("a", tools=[search]))

    up_front.run(backend=declared).sync()
    late = ScriptedBackend(replies)

    @function
    def afterwards(s):
        s += system("Be brief.")
        s += user("q") + assistant(gen("first")) + user("again")
        s.sync()
        s += assistant(gen("a", tools=[search]))

    state = afterwards.run(backend=late)
    state.sync()
    head = "<|tools|>" + json.dumps([search.spec["function"]]) + "<|end|>\n<|system|>Be brief.<|end|>\n"
    assert declared.requests[0].prompt.startswith(head)
    assert "rollback" not in [event[0] for event in declared.events]
    assert "tools" not in late.requests[0].prompt
    assert late.requests[1].prompt == head + (
        "<|user|>q<|end|>\n<|assistant|>fine<|end|>\n<|user|>again<|end|>\n<|assistant|>"
    )
    assert [event for event in late.events if event[0] == "rollback"] == [("rollback", 1, 0)]
    assert state.text().startswith(head)


def test_a_snapshot_survives_the_declaration_of_tools():
    backend = ScriptedBackend({"a": "A", "b": "B", "c": "C"})

    @function
    def program(s):
        s += user("q")
        point = s.snapshot()
        s += assistant(gen("a", tools=[search]))
        s.rollback(point)
        s += assistant(gen("b"))

    state = program.run(backend=backend)
    assert state.messages() == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "B"}]
    assert backend.requests[-1].prompt.startswith("<|tools|>")


def test_what_the_program_says_before_a_call_is_part_of_the_message():
    backend = ScriptedBackend(["think", ScriptedReply("Hm.", [("search", {"query": "cats"})]), "done"])

    @function
    def program(s):
        s += user("q") + assistant("Plan: " + gen("plan") + "\n" + gen("a", tools=[search]))

    _, calling, result, answer = program.run(backend=backend).messages()
    assert calling["content"] == "Plan: think\nHm."
    assert [call["function"]["name"] for call in calling["tool_calls"]] == ["search"]
    assert (result["role"], answer["content"]) == ("tool", "done")


def test_bad_calls_are_observations_for_the_model():
    state, backend = asked(
        [
            ScriptedReply(
                "", [("search", {"query": 5}), ("nothing", {}), ("search", "{broken"), ("search", "[" * 50_000)]
            ),
            "sorry",
        ]
    )
    texts = [result.text for _, result in state.tool_calls("answer")]
    assert texts[0].startswith("Error: invalid arguments for search: query: Input should be a valid string")
    assert texts[1] == "Error: there is no tool 'nothing'; there are: search, weather"
    assert all(text.startswith("Error: invalid arguments for search") for text in texts[2:4])
    assert "[[[" in state._repr_html_()
    assert state["answer"] == "sorry"
    assert texts[1] in backend.requests[1].prompt


def test_rounds_are_bounded():
    def forever(prompt, request):
        if request.tool_use.choice == "none":
            return "enough"
        return ScriptedReply("", [("search", {"query": "more"})])

    state, backend = asked(forever, max_tool_rounds=3)
    assert state["answer"] == "enough"
    assert len(state.tool_calls("answer")) == 3
    assert [record.request.tool_use.choice for record in backend.requests] == ["auto", "auto", "auto", "none"]


def test_a_required_call_is_required_once():
    _, backend = asked([ScriptedReply("", [("search", {"query": "x"})]), "ok"], tool_choice="required")
    assert [record.request.tool_use.choice for record in backend.requests] == ["required", "auto"]
    _, backend = asked(["ok"], tool_choice="none")
    assert backend.requests[0].request.tool_use.choice == "none"


def test_one_call_at_a_time():
    reply = ScriptedReply("", [("search", {"query": "a"}), ("search", {"query": "b"})])
    state, _ = asked([reply, "ok"], parallel_tool_calls=False)
    assert len(state.tool_calls("answer")) == 1


def test_a_failing_tool_in_the_loop():
    @tool
    def broken(x: int) -> str:
        raise RuntimeError("down")

    reply = ScriptedReply("", [("broken", {"x": 1})])
    state, _ = asked([reply, "it is down"], tools=[broken])
    assert state.tool_calls("answer")[0][1].text == "Error: RuntimeError: down"

    strict = Tool(broken.function, on_error="raise")
    state, _ = asked([reply, "it is down"], tools=[strict])
    assert isinstance(state.error(), ToolError)


def test_typed_answers_after_tools():
    state, _ = asked([ScriptedReply("", [("search", {"query": "x"})]), "42"], type=int)
    assert state["answer"] == 42


def test_a_typed_answer_that_is_cut_off_after_tools_is_an_error():
    state, _ = asked(["2.50"], type=float, max_tokens=1)
    with pytest.raises(OutputError, match="cut off at max_tokens"):
        state["answer"]


def test_tools_need_an_assistant_turn():
    @function
    def program(s):
        s += gen("x", tools=[search])

    state = program.run(backend=ScriptedBackend(["x"]))
    with pytest.raises(StateError, match="outside of any turn; write s \\+= assistant"):
        state.sync()


def test_scripted_calls_need_tools():
    @function
    def program(s):
        s += gen("x")

    state = program.run(backend=ScriptedBackend([ScriptedReply("", [("search", {})])]))
    assert "allows none" in str(state.error())


def test_a_grammar_that_would_rule_calls_out_holds_only_the_answer():
    backend = ScriptedBackend(
        [ScriptedReply("", [("search", {"query": "x"})]), "It is 42, I think.", "42"],
        capabilities=Capabilities(calls_beside_grammar=False),
    )
    state = ask.run("how many?", [search], type=int, backend=backend, stream=True)
    assert "".join(state.text_iter("answer")).endswith("</tool_call>42")
    assert state["answer"] == 42
    assert [call.tool for call, _ in state.tool_calls("answer")] == ["search"]
    assert "I think" not in state.text()
    assert state.text() == backend.requests[-1].prompt + "42<|end|>\n"
    assert state.usage().generations == 3
    asked = [record.request for record in backend.requests]
    assert [request.constraint is not None for request in asked] == [False, False, True]
    assert [request.tool_use.choice for request in asked] == ["auto", "auto", "none"]
    assert asked[1] == asked[0]
    assert backend.requests[1].prompt == backend.requests[2].prompt
    assert backend.open_sessions == 0


def test_the_stop_strings_of_a_typed_answer_do_not_cut_its_calls_off():
    called = [ScriptedReply("", [("search", {"query": "x"})]), "It is 42.", "42"]
    backend = ScriptedBackend(called, capabilities=Capabilities(calls_beside_grammar=False))
    assert ask.run("how many?", [search], dtype=int, backend=backend)["answer"] == "42"
    assert [record.request.stop for record in backend.requests] == [(), (), (" ", "\n")]


@pytest.mark.parametrize("choice", ["required", search])
def test_a_demanded_call_that_is_cut_off_is_no_typed_answer(choice):
    backend = ScriptedBackend(["<tool_call>{", "42"], capabilities=Capabilities(calls_beside_grammar=False))
    state = ask.run("how many?", [search], type=int, tool_choice=choice, backend=backend)
    told = r"gen\('answer'\) was to call a tool first, and no whole call came: '<tool_call>\{'; give more max_tokens"
    with pytest.raises(OutputError, match=told):
        state["answer"]
    assert state.error() is not None
    assert (len(backend.requests), backend.open_sessions) == (1, 0)
