"""Programs on OpenAI-compatible endpoints and on SGLang's protocol, with this project's server as their peer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from caesura.lang import (
    Engine,
    OpenAIBackend,
    ProgramState,
    SGLangBackend,
    UnsupportedByBackend,
    assistant,
    call_tool,
    flush_cache,
    function,
    gen,
    get_server_info,
    greedy_token_selection,
    select,
    system,
    token_length_normalized,
    tool,
    unconditional_likelihood_normalized,
    user,
)
from caesura.lang.backends.engine import EngineBackend
from caesura.runtime.embedded.calculator import calculate
from caesura.runtime.errors import ContextTooLong, GrammarError

from tests.integration.live_server import Live, live_server


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineBackend]:
    with Engine(kv_tokens=1 << 14, deterministic=True, num_threads=1) as backend:
        yield backend


@pytest.fixture(scope="module")
def server(engine: EngineBackend) -> Iterator[Live]:
    with live_server(engine.service) as running:
        yield running


@pytest.fixture(scope="module")
def openai(server: Live) -> Iterator[OpenAIBackend]:
    """As this project's server understands it."""
    with OpenAIBackend(server.url, dialect="sglang", prefill=True) as backend:
        yield backend


@pytest.fixture(scope="module")
def bare(server: Live) -> Iterator[OpenAIBackend]:
    """As OpenAI's own endpoints are."""
    with OpenAIBackend(server.url) as backend:
        yield backend


@pytest.fixture(scope="module")
def sglang(server: Live) -> Iterator[SGLangBackend]:
    with SGLangBackend(server.url, chat="chatml") as backend:
        yield backend


@pytest.fixture(params=["openai", "bare", "sglang"])
def remote(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@tool
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    return calculate(expression)


@function
def plain(s: ProgramState) -> None:
    s += "Numbers: 1 2 3 " + gen("x", max_tokens=8, temperature=0, return_logprob=True, top_logprobs_num=2) + "\n"
    point = s.snapshot()
    s += gen("y", max_tokens=4, temperature=0)
    s.sync()
    s.rollback(point)
    s += gen("z", max_tokens=6, temperature=0, stop=["8", "1"])
    forks = s.fork(2)
    forks += lambda i: f" {i}" + gen("fork", max_tokens=3, temperature=0)
    forks.join()
    s += gen("n", n=2, max_tokens=3, temperature=0)


@pytest.mark.parametrize("stream", [False, True])
def test_plain_programs_give_the_engines_text(engine: EngineBackend, remote: Any, stream: bool) -> None:
    expected, state = plain.run(backend=engine), plain.run(backend=remote, stream=stream)
    assert "".join(state.text_iter("x")) == state["x"]
    assert state.text() == expected.text() and state.variables == expected.variables
    ours, theirs = expected.get_meta_info("x"), state.get_meta_info("x")
    assert [one[0] for one in theirs["output_token_logprobs"]] == [one[0] for one in ours["output_token_logprobs"]]
    assert [len(top) for top in theirs["output_top_logprobs"]] == [2] * len(ours["output_top_logprobs"])
    assert theirs["prompt_tokens"] == ours["prompt_tokens"]
    assert theirs["completion_tokens"] == ours["completion_tokens"]


def test_contexts_of_the_other_programs_are_found_in_the_servers_cache(remote: Any) -> None:
    @function
    def program(s: ProgramState, end: str) -> None:
        s += "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4 + end + gen("x", max_tokens=2, temperature=0)

    program.run("1", backend=remote).sync()
    meta = program.run("2", backend=remote).get_meta_info("x")
    assert meta["cached_tokens"] >= meta["prompt_tokens"] // 2


@pytest.mark.parametrize("stream", [False, True])
def test_chats_and_their_tools_give_the_engines_answers(engine: EngineBackend, bare: Any, stream: bool) -> None:
    @function
    def program(s: ProgramState) -> None:
        s += system("You calculate.") + user("What is 4827 * 396?")
        s += assistant(gen("first", tools=[calculator], max_tokens=96, temperature=0))
        s += user("What is 12 + 30?") + assistant(gen("second", tools=[calculator], max_tokens=96, temperature=0))

    expected, state = program.run(backend=engine), program.run(backend=bare, stream=stream)
    assert state["first"] == expected["first"] and "1911492" in state["first"]
    assert state["second"] == expected["second"]
    told = [(call.tool, json.loads(call.arguments), result.text) for call, result in state.tool_calls("first")]
    assert told == [("calculator", {"expression": "4827 * 396"}, "1911492")]
    assert [m["role"] for m in state.messages()] == [m["role"] for m in expected.messages()]


@function
def shown(s: ProgramState) -> None:
    """One call, for a model that does not know the words in which a chat format that is not its own offers tools."""
    s += user("What is 12 + 30?")
    s += assistant('<tool_call>\n{"name": "calculator", "arguments": {"expression": "12 + 30"}}\n</tool_call>')
    s += user("<tool_response>\n42\n</tool_response>") + assistant("The answer is 42.")


@pytest.mark.parametrize("where", ["engine", "openai", "sglang"])
def test_an_answer_under_a_grammar_comes_after_calls(where: str, request: pytest.FixtureRequest) -> None:
    @function
    def program(s: ProgramState) -> None:
        if where == "sglang":
            shown(s)
        s += user("What is 4827 * 396?")
        s += assistant(gen("x", regex=r"The answer is \d+\.", tools=[calculator], max_tokens=96, temperature=0))

    state = program.run(backend=request.getfixturevalue(where))
    assert [result.text for _, result in state.tool_calls("x")] == ["1911492"]
    assert state["x"] == state.messages()[-1]["content"] == "The answer is 1911492."


def test_a_required_call_and_declared_tools(bare: OpenAIBackend) -> None:
    @function
    def required(s: ProgramState) -> None:
        s += user("Hello there.")
        s += assistant(gen("x", tools=[calculator], tool_choice="required", max_tool_rounds=1, max_tokens=96))

    assert [call.tool for call, _ in required.run(backend=bare).tool_calls("x")] == ["calculator"]

    @function(tools=[calculator])
    def react(s: ProgramState) -> None:
        s += user("What is 4827 * 396?") + assistant(gen("thought", max_tokens=96, temperature=0))
        s.role(
            "tool", call_tool("value", calculator, json.loads(s["thought"].split("\n")[1])["arguments"]["expression"])
        )
        s += assistant(gen("answer", max_tokens=40, temperature=0))

    assert "1911492" in react.run(backend=bare)["answer"], "a native call is text to a program that reads text"


def test_a_turn_that_has_begun(openai: OpenAIBackend, bare: OpenAIBackend, engine: EngineBackend) -> None:
    @function
    def program(s: ProgramState) -> None:
        s += user("What is 3 + 4?") + assistant("The answer is" + gen("x", max_tokens=5, temperature=0))

    assert program.run(backend=openai)["x"] == program.run(backend=engine)["x"]
    error = program.run(backend=bare).error()
    assert error is not None and isinstance(error.root, UnsupportedByBackend) and "prefill=True" in str(error)


@pytest.mark.parametrize("method", [token_length_normalized, greedy_token_selection])
def test_select_compares_the_same_logprobs(engine: EngineBackend, remote: Any, method: Any) -> None:
    @function
    def program(s: ProgramState) -> None:
        s += "3 + 4 =" + select("x", [" 7", " carrot", " the the"], choices_method=method)

    states = [program.run(backend=backend) for backend in (engine, remote)]
    scores = [state.get_meta_info("x")["normalized_prompt_logprobs"] for state in states]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5) and states[0]["x"] == states[1]["x"]


def test_select_without_context(remote: Any) -> None:
    @function
    def program(s: ProgramState) -> None:
        s += "3 + 4 =" + select("x", [" 7", " carrot"], choices_method=unconditional_likelihood_normalized)

    gains = program.run(backend=remote).get_meta_info("x")["normalized_unconditional_prompt_logprobs"]
    assert len(gains) == 2 and all(-100 < gain < 100 for gain in gains)


def test_select_in_a_chat_asks_the_model(
    openai: OpenAIBackend, sglang: SGLangBackend, caplog: pytest.LogCaptureFixture
) -> None:
    @function
    def program(s: ProgramState) -> None:
        s += user("What is 3 + 4?") + assistant("The answer is " + select("x", ["7", "carrot"]))

    with caplog.at_level(logging.WARNING, "caesura.lang"):
        for _ in range(2):
            state = program.run(backend=openai)
            assert state["x"] in ("7", "carrot") and state.text().endswith(state["x"] + "<|end|>\n")
    assert sum("asked which option" in record.message for record in caplog.records) <= 1
    state = program.run(backend=sglang)
    scores = state.get_meta_info("x")["normalized_prompt_logprobs"]  # text has them
    assert state["x"] == ["7", "carrot"][scores.index(max(scores))]


def test_grammars_and_types(openai: OpenAIBackend, sglang: SGLangBackend, bare: OpenAIBackend) -> None:
    @function
    def program(s: ProgramState, full: bool) -> None:
        s += user("Left or right?") + assistant(gen("side", type=Literal["left", "right"], temperature=0))
        s += user("Yes or no?") + assistant(gen("flag", type=bool, temperature=0))
        schema = {"type": "string", "enum": ["ab", "cd"]}
        s += user("A word.") + assistant(gen("word", json_schema=schema, temperature=0, max_tokens=30))
        if full:
            s += user("A number.") + assistant(gen("number", type=int, max_tokens=8, temperature=0))
            s += user("A grammar.") + assistant(gen("grammar", ebnf='root ::= "ab" | "cd"', temperature=0))

    for backend in (openai, sglang):
        state = program.run(True, backend=backend)
        assert state["side"] in ("left", "right") and state["flag"] in (True, False)
        assert json.loads(state["word"]) in ("ab", "cd") and isinstance(state["number"], int)
        assert state["grammar"] in ("ab", "cd")
    error = program.run(True, backend=bare).error()
    assert error is not None and "does not support the constraint regex" in str(error)


def test_what_cannot_be_done_is_said_where_it_is_asked_for(
    bare: OpenAIBackend, openai: OpenAIBackend, sglang: SGLangBackend, caplog: pytest.LogCaptureFixture
) -> None:
    @function
    def odd(s: ProgramState) -> None:
        s += "a" + gen("x", top_k=3, max_tokens=1)

    @function
    def held(s: ProgramState) -> None:
        s += "a" + gen("x", json_schema={"type": "object"}, max_tokens=1)

    @function
    def scored(s: ProgramState) -> None:
        s += "a b" + gen("x", return_logprob=True, logprob_start_len=0, max_tokens=1)

    @function
    def forced(s: ProgramState) -> None:
        s += user("x") + assistant(gen("x", tools=[calculator], tool_choice="required"))

    @function
    def mixed(s: ProgramState) -> None:
        s += "loose text"
        s += user("x") + assistant(gen("x"))

    cases: list[tuple[Any, Any, str]] = [
        (odd, bare, "sets top_k"),
        (held, bare, "no grammar"),
        (scored, bare, "logprob_start_len"),
        (forced, sglang, "demands the tool call"),
        (mixed, openai, "stands outside of any"),
    ]
    for program, backend, words in cases:
        error = program.run(backend=backend).error()
        assert error is not None and isinstance(error.root, UnsupportedByBackend) and words in str(error), words
    with pytest.raises(UnsupportedByBackend, match="flush"):
        flush_cache(bare)
    error = odd.run(backend=bare, namespace="mine").error()
    assert error is not None and "namespace" in str(error)
    assert odd.run(backend=openai).error() is None and scored.run(backend=sglang).error() is None


def test_no_pauses_are_mentioned_once(server: Live, caplog: pytest.LogCaptureFixture) -> None:
    @function
    def program(s: ProgramState) -> None:
        s += "a" + call_tool("x", lambda: "b") + call_tool("y", lambda: "c")

    with OpenAIBackend(server.url) as backend, caplog.at_level(logging.WARNING, "caesura.lang"):
        assert not backend.capabilities.pause
        for _ in range(3):
            assert program.run(backend=backend).text() == "abc"
    assert [record.message for record in caplog.records if "knows no pauses" in record.message][1:] == []
    assert any("knows no pauses" in record.message for record in caplog.records)


def test_errors_of_the_server_keep_their_kinds(openai: OpenAIBackend, sglang: SGLangBackend) -> None:
    @function
    def long(s: ProgramState) -> None:
        s += "word " * 20_000 + gen("x", max_tokens=4)

    @function
    def broken(s: ProgramState) -> None:
        s += "a" + gen("x", ebnf="this is no grammar(", max_tokens=4)

    for backend in (openai, sglang):
        assert isinstance(long.run(backend=backend).error(), ContextTooLong)
        assert isinstance(broken.run(backend=backend).error(), GrammarError)


def test_servers_say_what_they_are(openai: OpenAIBackend, sglang: SGLangBackend, server: Live) -> None:
    assert get_server_info(openai)["model"] == "embedded" == get_server_info(sglang)["model"]
    flush_cache(sglang)

    @function
    def program(s: ProgramState) -> None:
        s += user("hi") + assistant(gen("x", max_tokens=2, temperature=0))

    with SGLangBackend(server.url) as guessed:  # the model's name tells nothing
        assert program.run(backend=guessed).text().startswith("USER: hi\nASSISTANT: ")
