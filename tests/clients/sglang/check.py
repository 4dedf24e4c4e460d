"""SGLang's frontend language against this server: programs change nothing at all.

Known defects of the client itself are kept clear of, not tested: after a failed expression its state blocks forever;
``gen(n=2)`` fails on the list that a server rightly answers; scoring needs a prompt of three tokens or more.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import sglang as sgl
from harness import api_key, base_url, check, fresh_salt, get, main, quiet, stats

OWN_WORDS = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\nI am a small"
CHOICES = [" house", " model", " mode", " 77"]


def connect() -> Any:
    """A backend on the server."""
    return sgl.RuntimeEndpoint(base_url(), api_key=api_key())


backend = connect()
sgl.set_default_backend(backend)


@sgl.function
def answer(s: Any, start: str, limit: int) -> None:
    """Text, a generation, text."""
    s += start
    s += sgl.gen("more", max_tokens=limit, temperature=0)
    s += "!"


@check
def function_and_gen() -> None:
    """A program gives what the route gives; its meta information is the server's."""
    state = answer.run(start="The answer is", limit=6)
    more = state["more"]
    plain = get("/generate", {"text": "The answer is", "sampling_params": {"max_new_tokens": 6, "temperature": 0}})
    assert more == plain["text"] and more
    assert state.text() == f"The answer is{more}!"
    meta = state.get_meta_info("more")
    assert meta["completion_tokens"] <= 6 and meta["prompt_tokens"] == plain["meta_info"]["prompt_tokens"]
    assert meta["finish_reason"]["type"] in ("length", "stop")


@check
def sampling_arguments() -> None:
    """Stop strings, minimal lengths, penalties, ``ignore_eos``, log-probabilities."""

    @sgl.function
    def program(s: Any) -> None:
        s += "The answer is"
        s += sgl.gen("stopped", max_tokens=40, stop=["\n", "."], temperature=0)
        s += sgl.gen("long", max_tokens=12, min_tokens=12, ignore_eos=True, top_k=20, top_p=0.9, min_p=0.01,
                     frequency_penalty=0.3, presence_penalty=0.2)  # fmt: skip
        s += sgl.gen(
            "scored", max_tokens=3, ignore_eos=True, return_logprob=True, logprob_start_len=0, top_logprobs_num=2
        )

    state = program.run()
    assert "." not in state["stopped"] and "\n" not in state["stopped"]
    assert state.get_meta_info("long")["completion_tokens"] == 12
    meta = state.get_meta_info("scored")
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]
    assert len(meta["output_top_logprobs"][0]) == 2
    assert all(row[0] <= 0 for row in meta["output_token_logprobs"])


@check
def grammars() -> None:
    """A regex, a JSON schema, the typed shortcuts."""

    @sgl.function
    def program(s: Any) -> None:
        s += "The answer is "
        s += sgl.gen("code", regex=r"[A-C]{3}-[0-9]{2}", max_tokens=20)
        s += " and "
        s += sgl.gen("object", json_schema='{"type":"object","properties":{"a":{"enum":[1,2]}},"required":["a"],'
                     '"additionalProperties":false}', max_tokens=40)  # fmt: skip
        s += " and "
        s += sgl.gen("truth", dtype=bool, max_tokens=8)
        s += " and "
        s += sgl.gen_int("whole", max_tokens=8)

    state = program.run(temperature=0)
    assert re.fullmatch(r"[A-C]{3}-[0-9]{2}", state["code"])
    assert re.sub(r"\s", "", state["object"]) in ('{"a":1}', '{"a":2}')
    assert state["truth"] in ("True", "False")
    int(state["whole"])


@check
def select_by_all_methods() -> None:
    """A sure case, the model's own words: each choices method finds them by its own rule, with true scores."""

    @sgl.function
    def program(s: Any, method: Any) -> None:
        s += OWN_WORDS
        s += sgl.select("noun", choices=CHOICES, choices_method=method)

    for method in (
        sgl.token_length_normalized,
        sgl.greedy_token_selection,
        sgl.unconditional_likelihood_normalized,
    ):
        state = program.run(method=method)
        assert state["noun"] == CHOICES[1] and state.text() == OWN_WORDS + CHOICES[1]
        meta = state.get_meta_info("noun")
        scores = meta["normalized_prompt_logprobs"]
        assert len(scores) == len(CHOICES) and all(score <= 0 for score in scores)
        assert scores.index(max(scores)) == 1
        for text, rows in zip(CHOICES, meta["input_token_logprobs"], strict=True):
            assert "".join(row[2] for row in rows).endswith(text)
            assert all(row[0] is not None for row in rows), "every token has its logprob"


@check
def gen_with_choices() -> None:
    """``gen(choices=)`` is a ``select``."""

    @sgl.function
    def program(s: Any) -> None:
        s += OWN_WORDS
        s += sgl.gen("noun", choices=CHOICES)

    assert program.run()["noun"] == CHOICES[1]


@check
def fork_and_join() -> None:
    """Branches share the prefix that was computed once; both ways of joining."""
    head = f"{fresh_salt()} " + "word " * 60

    @sgl.function
    def program(s: Any) -> None:
        s += head
        s.sync()
        forks = s.fork(3)
        forks += lambda i: f"branch {i}:" + sgl.gen("part", max_tokens=5, temperature=0, ignore_eos=True)
        forks.join()
        s += " joined: " + " | ".join(s["part"])
        more = s.fork(2)
        for i, branch in enumerate(more):
            branch += f" tail {i}" + sgl.gen(f"tail{i}", max_tokens=3, ignore_eos=True)
        more.join("concate_and_append")
        s += sgl.gen("end", max_tokens=2, ignore_eos=True)

    state = program.run()
    assert len(state["part"]) == 3 and state.get_meta_info("end")["completion_tokens"] == 2
    assert " tail 0" in state.text() and " tail 1" in state.text()
    assert state.text().index(" tail 0") < state.text().index(" tail 1")
    page = stats()["page_size"]
    assert state.get_meta_info("end")["cached_tokens"] > 60 - page, "the head was in the cache"


@check
def copies_and_scopes() -> None:
    """``copy`` and ``var_scope``."""

    @sgl.function
    def program(s: Any) -> None:
        s += "One "
        with s.copy() as aside:
            aside += "aside" + sgl.gen("aside", max_tokens=3)
        with s.var_scope("scope"):
            s += "two" + sgl.gen("inner", max_tokens=3, ignore_eos=True)

    state = program.run()
    assert state["scope"] == "two" + state["inner"]
    assert "aside" not in state.text()


@check
def roles() -> None:
    """Role blocks render by the template that the client picks from the server's ``model_path``."""

    @sgl.function
    def program(s: Any) -> None:
        s += sgl.system("Be brief.")
        s += sgl.user("Who are you?")
        s += sgl.assistant(sgl.gen("said", max_tokens=8))

    state = program.run()
    assert [message["role"] for message in state.messages()] == ["system", "user", "assistant"]
    assert state.messages()[-1]["content"] == state["said"].lstrip()


@check
def stream() -> None:
    """``text_iter`` and its asynchronous form put together what was generated."""
    state = answer.run(start="The answer is", limit=12, stream=True)
    pieces = list(state.text_iter())
    assert "".join(pieces) == state.text()
    state = answer.run(start="The answer is", limit=12, stream=True)
    assert "".join(state.text_iter("more")) == state["more"]

    async def read() -> str:
        running = answer.run(start="The answer is", limit=12, stream=True)
        text = "".join([piece async for piece in running.text_async_iter("more")])
        return text if text == running["more"] else f"{text!r} is not {running['more']!r}"

    assert asyncio.run(read()) == state["more"]


@check
def run_batch() -> None:
    """A batch on threads gives what single runs give, in order; the traced prefix is sent ahead."""
    head = "A long beginning that all of these programs have in common, word for word, number"

    @sgl.function
    def program(s: Any, i: int) -> None:
        s += head
        s += f" {i}:" + sgl.gen("x", max_tokens=6, temperature=0, ignore_eos=True)

    states = program.run_batch([{"i": i} for i in range(12)], num_threads=4, progress_bar=False)
    assert [state["x"] for state in states] == [program.run(i=i)["x"] for i in range(12)]
    assert all(f"number {i}:" in state.text() for i, state in enumerate(states))
    streamed = program.run_batch([{"i": i} for i in range(4)], num_threads=2, generator_style=True)
    assert [state["x"] for state in streamed] == [state["x"] for state in states[:4]]


@check
def bind_and_cache() -> None:
    """A bound program's constant prefix is cached on the server ahead of its runs."""
    head = f"{fresh_salt()} " + "constant " * 60

    @sgl.function
    def program(s: Any, context: str, i: int) -> None:
        s += context
        s += f" item {i}" + sgl.gen("x", max_tokens=2, ignore_eos=True)

    bound = program.bind(context=head)
    bound.cache(backend)
    state = bound.run(i=5)
    assert state["x"] is not None
    assert state.get_meta_info("x")["cached_tokens"] >= 60 - stats()["page_size"]


@check
def server_calls() -> None:
    """The calls beside generation: information and the cache."""
    info = sgl.get_server_info(backend)
    assert info["version"] and info["internal_states"]
    quiet()
    sgl.flush_cache(backend)
    assert backend.get_model_name() == get("/get_model_info")["model_path"]
    assert answer.run(start="The answer is", limit=4).get_meta_info("more")["cached_tokens"] == 0


if __name__ == "__main__":
    main()
