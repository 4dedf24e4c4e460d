"""Generation: constraints, types, choices, samples."""

from __future__ import annotations

import dataclasses
import enum
import json
import warnings
from typing import Literal

import pydantic
import pytest
from caesura.lang import (
    Capabilities,
    ChoicesDecision,
    ChoicesSamplingMethod,
    DefinitionError,
    OutputError,
    ProgramError,
    ScriptedBackend,
    ScriptError,
    UnsupportedByBackend,
    function,
    gen,
    gen_int,
    gen_string,
    greedy_token_selection,
    select,
    token_length_normalized,
    unconditional_likelihood_normalized,
)
from caesura.lang.backend import Finish
from caesura.lang.generate import value_of


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.0


class Person(pydantic.BaseModel):
    name: str
    tags: list[str]


def run(expr, *replies, **options):
    """Run one expression against a script and check that no session is left."""
    backend = ScriptedBackend(list(replies))

    @function
    def program(s):
        s += expr

    state = program.run(backend=backend, **options)
    state.error()
    assert backend.open_sessions == 0
    return state, backend


@pytest.mark.parametrize(
    ("kind", "text", "value", "constraint"),
    [
        (int, "-42", -42, "regex"),
        (float, "2.50", 2.5, "regex"),
        (bool, "true", True, "choices"),
        (str, "as it is", "as it is", None),
        (Color, "blue", Color.BLUE, "choices"),
        (Literal[1, "two"], "1", 1, "choices"),
        (Point, '{"x": 3}', Point(3), "json_schema"),
        (Person, '{"name": "Ada", "tags": ["a"]}', Person(name="Ada", tags=["a"]), "json_schema"),
        (list[int], "[1, 2]", [1, 2], "json_schema"),
        (dict[str, float], '{"a": 1.5}', {"a": 1.5}, "json_schema"),
        (int | None, "null", None, "json_schema"),
    ],
)
def test_typed_values(kind, text, value, constraint):
    state, backend = run(gen("x", type=kind), text)
    assert state["x"] == value
    assert type(state["x"]) is type(value)
    assert state.text_of("x") == state.text() == text
    held = backend.requests[0].request.constraint
    assert (held.kind if held else None) == constraint


def test_a_truncated_typed_value_says_why():
    state, _ = run(gen("x", type=Person, max_tokens=3), '{"name": "Ada", "tags": []}')
    with pytest.raises(ProgramError, match=r"no Person.*cut off at max_tokens"):
        state["x"]
    assert isinstance(state.error(), OutputError)


@pytest.mark.parametrize(
    ("kind", "reply"), [(float, "2.50"), (Literal["New", "New York"], "New York"), (float | None, "2.5")]
)
def test_a_typed_value_that_is_cut_off_is_none_even_if_it_reads_well(kind, reply):
    state, _ = run(gen("x", type=kind, max_tokens=1), reply)
    with pytest.raises(OutputError, match=r"may be no whole .* cut off at max_tokens"):
        state["x"]
    assert run(gen("x", type=kind, max_tokens=4), reply)[0].error() is None


@pytest.mark.parametrize(("kind", "text"), [(list[int], "[1, 2]"), (bool, "true"), (Literal["New", "York"], "New")])
def test_a_typed_value_that_cannot_go_on_is_whole(kind, text):
    node = gen("x", type=kind)
    assert value_of(node, text, Finish("length")) == node.output.parse(text)


def test_types_without_a_schema_are_refused():
    with pytest.raises(DefinitionError, match="no JSON schema"):
        gen("x", type=threading_lock())
    with pytest.raises(DefinitionError, match="at least one value"):
        gen("x", type=enum.Enum("Empty", {}))


def threading_lock():
    import threading

    return type(threading.Lock())


def test_dtype_is_sglangs_and_stays_text():
    state, backend = run(
        gen_int("a") + gen("b", dtype="float") + gen_string("c") + gen("d", dtype=bool), "12", "1.5", '"q"', "True"
    )
    assert [state[name] for name in "abcd"] == ["12", "1.5", '"q"', "True"]
    requests = [record.request for record in backend.requests]
    assert requests[0].stop == (" ", "\n")
    assert requests[0].constraint.source == r"[-+]?[0-9]+[ \n]*"
    assert requests[2].stop == ()


def test_dtype_and_regex_warn_and_regex_wins():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        node = gen("x", dtype=int, regex="[a-z]+")
    assert "dtype is ignored" in str(caught[0].message)
    assert node.constraint.source == "[a-z]+"


def test_json_schema_as_text_or_dict():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for given in (schema, json.dumps(schema)):
        state, backend = run(gen("x", json_schema=given), '{"a": 1}')
        assert state["x"] == '{"a": 1}'
        assert json.loads(backend.requests[0].request.constraint.source) == schema


def test_all_sampling_arguments_arrive():
    arguments = {
        "max_tokens": 9,
        "min_tokens": 2,
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "stop_regex": "z+",
        "temperature": 0.3,
        "top_p": 0.4,
        "top_k": 5,
        "min_p": 0.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.6,
        "repetition_penalty": 1.2,
        "ignore_eos": True,
        "seed": 7,
        "logit_bias": {4: -1.0},
        "return_logprob": True,
        "top_logprobs_num": 2,
        "ebnf": 'start: "x"',
    }
    _, backend = run(gen("x", **arguments), "x")
    request = backend.requests[0].request
    assert (request.max_tokens, request.min_tokens, request.seed, request.logprobs) == (9, 2, 7, 2)
    assert (request.stop, request.stop_token_ids, request.stop_regex) == (("a", "b"), (3,), ("z+",))
    assert (request.temperature, request.top_p, request.top_k, request.min_p) == (0.3, 0.4, 5, 0.1)
    assert (request.frequency_penalty, request.presence_penalty, request.repetition_penalty) == (0.2, 0.6, 1.2)
    assert (request.ignore_eos, request.logit_bias, request.constraint.kind) == (True, ((4, -1.0),), "ebnf")


def test_a_runs_logprob_arguments_count_as_a_generations_own():
    @function
    def program(s):
        s += "one two " + gen("x")

    options = {"return_logprob": True, "logprob_start_len": 0, "return_text_in_logprobs": True}
    backend = ScriptedBackend(["a b"], capabilities=Capabilities(prompt_logprobs=True))
    meta = program.run(backend=backend, **options).get_meta_info("x")
    assert [text for _, _, text in meta["input_token_logprobs"]] == [" two", " "]
    assert [text for _, _, text in meta["output_token_logprobs"]] == ["a", " b"]
    assert isinstance(program.run(backend=ScriptedBackend(["a b"]), **options).error(), UnsupportedByBackend)


def test_several_samples_make_a_list_and_the_first_goes_on():
    backend = ScriptedBackend({"x": ["one", "two", "three"], "y": "!"})

    @function
    def program(s):
        s += "say " + gen("x", n=3, seed=5)
        s += gen("y")

    state = program.run(backend=backend)
    assert sorted(state["x"]) == ["one", "three", "two"]
    assert state.text() == f"say {state['x'][0]}!"
    assert sorted(record.request.seed for record in backend.requests[:3]) == [5, 6, 7]
    assert len(state.get_meta_info("x")["samples"]) == 3
    assert backend.open_sessions == 0


def test_typed_samples():
    state, _ = run(gen("x", type=int, n=2), "1", "2")
    assert sorted(state["x"]) == [1, 2]


def test_one_failing_sample_fails_the_program_and_frees_all():
    backend = ScriptedBackend(["one"])

    @function
    def program(s):
        s += gen("x", n=3)

    with pytest.raises(ScriptError):
        program.run(backend=backend).text()
    assert backend.open_sessions == 0


def choose(method, scores, choices=("no", "yes indeed")):
    backend = ScriptedBackend([], scores=scores)

    @function
    def program(s):
        s += "sure? " + select("x", list(choices), choices_method=method) + "."

    state = program.run(backend=backend)
    assert state.text() == f"sure? {state['x']}."
    return state


@pytest.mark.parametrize(
    "method", [token_length_normalized, greedy_token_selection, unconditional_likelihood_normalized]
)
def test_all_three_methods_choose(method):
    assert choose(method, {"no": -3.0, "yes indeed": -1.0})["x"] == "yes indeed"
    state = choose(method, {"no": -0.5, "yes indeed": -1.0})
    assert state["x"] == "no"
    meta = state.get_meta_info("x")
    assert meta["normalized_prompt_logprobs"] == [-0.5, -1.0]
    assert len(meta["input_token_logprobs"][1]) == 2


def test_methods_by_hand():
    def scores(*values):
        return [(value, i, None) for i, value in enumerate(values)]

    def pick(method, given, alone=None):
        return method(
            choices=["a", "b"],
            normalized_prompt_logprobs=[sum(s[0] for s in one) / len(one) for one in given],
            input_token_logprobs=given,
            output_token_logprobs=[[], []],
            unconditional_token_logprobs=alone,
        ).decision

    given = [scores(-0.1, -5.0), scores(-1.0, -0.2)]
    assert pick(token_length_normalized, given) == "b"
    assert pick(greedy_token_selection, given) == "a"  # the first token decides
    assert pick(unconditional_likelihood_normalized, given, [scores(-0.1, -9.0), scores(-1.0, -0.2)]) == "a"


def test_an_own_choices_method():
    class Longest(ChoicesSamplingMethod):
        def __call__(self, *, choices, **_):
            return ChoicesDecision(max(choices, key=len))

    assert choose(Longest(), None)["x"] == "yes indeed"


def test_gen_with_choices_is_a_select():
    backend = ScriptedBackend([], scores={"a": -1.0, "b": -2.0})

    @function
    def program(s):
        s += gen("x", choices=["a", "b"])

    assert program.run(backend=backend)["x"] == "a"


def test_generations_without_a_name_get_one():
    state, _ = run(gen() + gen(), "a", "b")
    assert state.variables == {"gen_1": "a", "gen_2": "b"}


def test_the_scripted_backend_honours_stops_and_limits():
    state, _ = run(gen("x", stop=[";", "\n"]), "one; two\nthree")
    assert (state["x"], state.get_meta_info("x")["finish_reason"]) == ("one", {"type": "stop", "matched": ";"})
    state, _ = run(gen("x", max_tokens=2), "one two three")
    assert (state["x"], state.get_meta_info("x")["finish_reason"]) == ("one two", {"type": "length"})
    state, _ = run(gen("x", stop_regex=r"\d+"), "ab12cd")
    assert state["x"] == "ab"


@pytest.mark.parametrize(
    ("expr", "reply"),
    [
        (gen("x", regex="[0-9]+"), "abc"),
        (gen("x", type=Color), "green"),
        (gen("x", type=Point), '{"y": 1}'),
        (gen("x", type=Point), '{"x": "1"}'),
        (gen("x", type=Person), '{"name": "A", "tags": [1]}'),
        (gen("x", json_schema={"enum": [1, 2]}), "3"),
        (gen("x", json_schema={"type": "object", "additionalProperties": False}), '{"a": 1}'),
        (gen("x", json_schema={"anyOf": [{"type": "null"}, {"const": 5}]}), "6"),
        (gen("x", json_schema={"type": "integer"}), "true"),
    ],
)
def test_a_script_that_breaks_its_grammar_is_an_error(expr, reply):
    state, _ = run(expr, reply)
    assert isinstance(state.error(), ScriptError)


def test_scripts_that_end_or_lack_a_name():
    assert "over after 1" in str(run(gen("x") + gen("y"), "a")[0].error())
    backend = ScriptedBackend({"x": ["1", "2"]})

    @function
    def program(s):
        s += gen("x") + gen("x") + gen("x")

    assert "over after 2 replies for 'x'" in str(program.run(backend=backend).error())
