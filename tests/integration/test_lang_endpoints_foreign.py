"""Programs on OpenAI-compatible endpoints that behave in ways this project's server does not."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable
from typing import Any, Literal

import pytest
from caesura.lang import (
    OpenAIBackend,
    ProgramState,
    RemoteError,
    SGLangBackend,
    assistant,
    function,
    gen,
    get_server_info,
    select,
    user,
)

from tests.integration.live_server import live
from tests.integration.test_lang_endpoints import calculator


class Endpoint:
    """An endpoint made of a function from (path, body) to (status, object or list of stream objects)."""

    def __init__(self, answer: Callable[[str, dict[str, Any]], tuple[int, Any]]) -> None:
        self._answer = answer
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        raw, more = b"", True
        while more:
            message = await receive()
            raw, more = raw + message.get("body", b""), message.get("more_body", False)
        body = json.loads(raw or b"{}")
        self.asked.append((scope["path"], body))
        status, told = self._answer(scope["path"], body)
        if body.get("stream"):
            kind, data = b"text/event-stream", b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in told)
            data += b"data: [DONE]\n\n"
        else:
            kind, data = b"application/json", json.dumps(told).encode()
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": data})


def _said(text: str | None, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, **more}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}}


@function
def hello(s: ProgramState) -> None:
    s += user("Hello.") + assistant(gen("x", max_tokens=7))


def test_a_model_that_wants_the_newer_name_of_max_tokens() -> None:
    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if "max_tokens" in body:
            message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return 400, {"error": {"message": message, "param": "max_tokens", "code": "unsupported_parameter"}}
        return 200, _said("Hi.")

    endpoint = Endpoint(answer)
    with live(endpoint) as server, OpenAIBackend(server.url, "m") as backend:
        assert [hello.run(backend=backend)["x"] for _ in range(2)] == ["Hi."] * 2
    assert [("max_tokens" in body) for _, body in endpoint.asked] == [True, False, False]
    assert endpoint.asked[-1][1] == {
        "model": "m", "max_completion_tokens": 7, "messages": [{"role": "user", "content": "Hello."}]
    }  # fmt: skip


def test_many_first_requests_at_once_to_a_model_that_wants_the_newer_name() -> None:
    together = threading.Barrier(4)

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if "max_tokens" in body:
            return 400, {"error": {"message": "Use 'max_completion_tokens' instead.", "param": "max_tokens"}}
        return 200, _said("Hi.")

    class Together(Endpoint):
        arrived = 0

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "lifespan":
                self.arrived += 1  # counted here: one that is asked again may be back before another is answered
                if self.arrived <= 4:
                    await asyncio.to_thread(together.wait, 20)
            await super().__call__(scope, receive, send)

    with live(Together(answer)) as server, OpenAIBackend(server.url, "m") as backend:
        states = hello.run_batch([{}] * 4, backend=backend)
    assert [state["x"] for state in states] == ["Hi."] * 4


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("CUDA out of memory", r"RemoteError.*CUDA out of memory"),
        ({"code": 400, "message": "too many tokens", "status": "INVALID_ARGUMENT"}, r"InvalidRequest.*too many tokens"),
        (None, "None"),
    ],
)
def test_errors_in_a_stream_have_many_shapes(told: Any, words: str) -> None:
    events = [{"choices": [{"index": 0, "delta": {"content": "Hi."}, "finish_reason": "stop"}]}, {"error": told}]
    endpoint = Endpoint(lambda path, body: (200, events))
    with live(endpoint) as server, OpenAIBackend(server.url, "m") as backend:
        error = hello.run(backend=backend, stream=True).error()
    assert re.search(words, f"{error}")


def test_streamed_calls_in_pieces_and_an_error_in_the_middle() -> None:
    def delta(finish: str | None = None, **delta: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    calls = [
        delta(content="Let me see."),
        delta(tool_calls=[{"index": 1, "id": "b", "function": {"name": "calculator", "arguments": '{"expr'}}]),
        delta(tool_calls=[{"index": 0, "id": "a", "function": {"name": "calculator", "arguments": ""}}]),
        delta(tool_calls=[{"index": 1, "function": {"arguments": 'ession": "1 + 1"}'}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": '{"expression": "2 + 2"}'}}]),
        delta("tool_calls"),
        {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 6}},
    ]

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if len(body["messages"]) == 1:
            return 200, calls
        results = [(m["tool_call_id"], m["content"]) for m in body["messages"] if m["role"] == "tool"]
        assert results == [("a", "4"), ("b", "2")]
        if len(endpoint.asked) == 2:
            return 200, [delta(content="4 and"), delta("stop", content=" 2"), {"choices": []}]
        return 200, [delta(content="4"), {"error": {"message": "out of memory", "type": "server_error"}}]

    @function
    def program(s: ProgramState) -> None:
        s += user("Sums?") + assistant(gen("x", tools=[calculator]))

    endpoint = Endpoint(answer)
    with live(endpoint) as server, OpenAIBackend(server.url, "m") as backend:
        state = program.run(backend=backend, stream=True)
        assert state["x"] == "4 and 2"
        assert [result.text for _, result in state.tool_calls("x")] == ["4", "2"]
        assert state.messages()[1]["content"] == "Let me see."
        error = program.run(backend=backend, stream=True).error()
    assert error is not None and isinstance(error.root, RemoteError) and "out of memory" in str(error)


def test_an_endpoint_without_echo_and_schemas_is_asked_in_words() -> None:
    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("echo"):
            return 400, {"error": {"message": "echo is not supported"}}
        if path.endswith("/completions") and "prompt" in body:
            return 200, {"choices": [{"index": 0, "text": " carrots!", "finish_reason": "length"}]}
        return 200, _said("It is the carrot" if "options" in body["messages"][-1]["content"] else "no")

    @function
    def text(s: ProgramState) -> None:
        s += "Rabbits eat" + select("x", [" cars", " carrots"])

    @function
    def chat(s: ProgramState) -> None:
        s += user("Eat?") + assistant(select("x", ["it is the carrot", "it is the car"]))

    endpoint = Endpoint(answer)
    with live(endpoint) as server, OpenAIBackend(server.url, "m") as backend:
        assert [text.run(backend=backend)["x"] for _ in range(2)] == [" carrots"] * 2
        assert chat.run(backend=backend)["x"] == "it is the carrot"
        scores = chat.run(backend=backend).get_meta_info("x")["normalized_prompt_logprobs"]
    assert scores[0] == 0.0 > scores[1]
    echoes = [body["prompt"] for _, body in endpoint.asked if body.get("echo")]
    assert echoes[1:] == [["a"]], "what was refused is asked for once more, with a prompt that cannot be at fault"


@pytest.mark.parametrize("refused", [(500, "a worker crashed"), (400, "maximum context length is 4096 tokens")])
def test_a_prompt_that_fails_does_not_change_how_others_are_compared(refused: tuple[int, str]) -> None:
    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        prompts = body["prompt"]
        if prompts[0].startswith("long"):
            return refused[0], {"error": {"message": refused[1]}}
        tokens = [[" " + word for word in prompt.split()] for prompt in prompts]
        told = [{"tokens": words, "token_logprobs": [None, *[-len(w) for w in words[1:]]]} for words in tokens]
        if prompts == ["a"]:
            told = [{"tokens": ["a"], "token_logprobs": [-1.0]}]
        return 200, {"choices": [{"index": number, "logprobs": one} for number, one in enumerate(told)]}

    @function
    def program(s: ProgramState, text: str) -> None:
        s += text + select("x", [" yes", " certainly"])

    with live(Endpoint(answer)) as server, OpenAIBackend(server.url, "m") as backend:
        runs = [program.run(text, backend=backend) for text in ("long ago", "is it", "long ago", "is it")]
        errors = [run.error() for run in runs]
        assert [run["x"] for run in runs[1::2]] == [" yes"] * 2
        assert runs[1].get_meta_info("x")["normalized_prompt_logprobs"] == [-4.0, -10.0]
    assert errors[1] is errors[3] is None
    assert all(refused[1] in str(error) for error in errors[::2])


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"choices": [{"message": {"content": "x"}, "finish_reason": "content_filter"}]}, "content filter"),
        ({"choices": [{"message": {"content": "x"}, "finish_reason": None}]}, "without saying why"),
        ({}, "without saying why"),
    ],
)
def test_answers_that_are_none(told: Any, words: str) -> None:
    with live(Endpoint(lambda path, body: (200, told))) as server, OpenAIBackend(server.url, "m") as backend:
        error = hello.run(backend=backend).error()
    assert error is not None and isinstance(error.root, RemoteError) and words in str(error)


def test_a_stock_sglang_server_has_no_first_logprob_and_may_stream_pieces() -> None:
    """It gives null for the first returned token, lacks /server_info in older versions, and aborts."""

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path in ("/model_info", "/server_info"):
            return 404, {"detail": "Not Found"}
        if path in ("/get_model_info", "/get_server_info"):
            return 200, {"model_path": "Qwen/Qwen3-0.6B"}
        sampling = body["sampling_params"]
        if isinstance(body["text"], list):
            assert sampling["max_new_tokens"] == 0 and body["logprob_start_len"] == 1
            rows = [
                [[None, 1, "b"], [-5.0, 2, " c"], [-float(i + 1), 3, text[-2:]]] for i, text in enumerate(body["text"])
            ]
            return 200, [{"text": "", "meta_info": {"input_token_logprobs": row}} for row in rows]
        if sampling["max_new_tokens"] == 0:
            return 200, {"text": "", "meta_info": {"prompt_tokens": 3, "finish_reason": {"type": "length"}}}
        if body.get("stream"):
            done = {"finish_reason": {"type": "stop", "matched": 9}, "completion_tokens": 5, "prompt_tokens": 3}
            return 200, [
                {"text": "one", "output_ids": [1], "meta_info": {"finish_reason": None, "completion_tokens": 1}},
                {"text": "one", "output_ids": [1], "meta_info": {"finish_reason": None, "completion_tokens": 2}},
                {"text": " two", "output_ids": [2, 3], "meta_info": {"finish_reason": None, "completion_tokens": 4}},
                {"text": " one", "output_ids": [4], "meta_info": done},
            ]
        return 200, {"text": "", "meta_info": {"finish_reason": {"type": "abort", "message": "too busy"}}}

    @function
    def choose(s: ProgramState) -> None:
        s += "a b c" + select("x", [" x", " y"])

    @function
    def talk(s: ProgramState) -> None:
        s += user("<|im_end|>") + assistant(gen("x"))

    endpoint = Endpoint(answer)
    with live(endpoint) as server, SGLangBackend(server.url) as backend:
        assert choose.run(backend=backend)["x"] == " x"
        state = talk.run(backend=backend, stream=True)
        assert state["x"] == "oneone two one"
        assert state.get_meta_info("x")["finish_reason"] == {"type": "stop", "matched": 9}
        error = talk.run(backend=backend).error()
        assert error is not None and "too busy" in str(error)
        assert get_server_info(backend)["model"] == "Qwen/Qwen3-0.6B"
    sent = next(body["text"] for _, body in endpoint.asked if body.get("stream"))
    assert sent.count("<|im_end|>") == 1 and sent.startswith("<|im_start|>user\n<\u200b|im_end|>")


def test_a_call_comes_before_an_option_that_the_endpoint_is_held_to() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "6 * 7"}'}}

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        asked = len(body["messages"]) == 1
        return 200, _said("Let me see.", tool_calls=[call]) if asked else _said('{"choice": "even"}')

    @function
    def program(s: ProgramState) -> None:
        s += user("Is 6 * 7 odd?")
        s += assistant(gen("x", type=Literal["odd", "even"], tools=[calculator]))

    endpoint = Endpoint(answer)
    with live(endpoint) as server, OpenAIBackend(server.url, "m") as backend:
        state = program.run(backend=backend)
        assert (state["x"], [result.text for _, result in state.tool_calls("x")]) == ("even", ["42"])
    assert ["response_format" in body for _, body in endpoint.asked] == [True, True]
    told = endpoint.asked[1][1]["messages"][1]
    assert (told["content"], told["tool_calls"][0]["id"]) == ("Let me see.", "a")
