"""The embedded model's tasks, calculator and chat format: right answers, disjoint splits, limits, exact rendering."""

from __future__ import annotations

import json
import random
import re
from fractions import Fraction

import pytest
from caesura.runtime.embedded.calculator import MAX_EXPRESSION_CHARS, CalculatorError, calculate
from caesura.runtime.embedded.chat import CALCULATOR_TOOL, calls_message, parse_calls, render
from caesura.runtime.embedded.phrases import HOLDERS, NAMES, THINGS
from caesura.runtime.embedded.tasks import Kind, Split, Task, TaskMaker, check, make_tasks, split_of

OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


def solve(task: Task) -> str:
    """The answer, computed without the calculator under test."""
    values: list[Fraction] = []
    for step in task.steps:
        left = values[-1] if step.left is None else Fraction(step.left)
        right = values[-1] if step.right is None else Fraction(step.right)
        values.append(OPERATIONS[step.operator](left, right))
    assert all(value.denominator == 1 for value in values)
    wanted = values if task.kind is Kind.PARALLEL else values[-1:]
    return " and ".join(str(value.numerator) for value in wanted)


@pytest.mark.parametrize("split", list(Split))
def test_answers_are_right_and_calls_lead_to_them(split: Split) -> None:
    for task in make_tasks(3, 2000, split):
        assert task.answer == solve(task)
        results = [calculate(call) for call in task.calls]
        assert task.answer == (" and ".join(results) if task.kind is Kind.PARALLEL else results[-1])
        assert check(task, f"The answer is {task.answer}.")


def test_questions_name_every_operand_of_their_own() -> None:
    for task in make_tasks(4, 1000):
        written = {int(number) for number in re.findall(r"\d+", task.question)}
        own = {n for step in task.steps for n in (step.left, step.right) if n is not None}
        assert own == written


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("kind", list(Kind))
def test_small_tasks_are_about_small_numbers(split: Split, kind: Kind) -> None:
    maker = TaskMaker(random.Random(6), split, (kind,), small=True)
    tasks = [maker.make() for _ in range(200)]
    assert all(task.answer == solve(task) for task in tasks)
    own = [n for task in tasks for step in task.steps for n in (step.left, step.right) if n is not None]
    dividends = [step.left for task in tasks for step in task.steps if step.operator == "/"]
    assert sum(n < 100 for n in own) >= len(own) - len(dividends)
    assert any(n < 10 for n in own) and all(n < 10 or split_of(n) is split for n in own if n < 100)


def test_splits_share_no_number_and_no_name() -> None:
    operands: dict[Split, set[int]] = {}
    for split in Split:
        tasks = make_tasks(5, 3000, split)
        operands[split] = {n for t in tasks for s in t.steps for n in (s.left, s.right) if n is not None}
        assert all(split_of(n) is split for n in operands[split])
        others = [words for table in (NAMES, THINGS, HOLDERS) for key, words in table.items() if key != split]
        foreign = re.compile(rf"\b({'|'.join(word for words in others for word in words)})\b")
        assert not any(foreign.search(task.question) for task in tasks)
    assert not operands[Split.TRAIN] & operands[Split.HELD_OUT]
    share = sum(split_of(n) is Split.HELD_OUT for n in range(10, 100_000)) / 99_990
    assert 0.09 < share < 0.11


def test_same_seed_same_tasks() -> None:
    assert make_tasks(7, 50) == make_tasks(7, 50)
    assert make_tasks(7, 50) != make_tasks(8, 50)
    assert {task.kind for task in make_tasks(7, 200)} == set(Kind)
    assert {task.kind for task in make_tasks(7, 50, kinds=[Kind.STORY])} == {Kind.STORY}
    with pytest.raises(ValueError, match="n is -1"):
        make_tasks(7, -1)


def test_check_wants_the_last_numbers() -> None:
    task = Task("What is 2 + 3?", "5", ("2 + 3",), Kind.PLAIN, ())
    assert check(task, "2 + 3 makes 5.")
    assert not check(task, "It is 5 or 6.")
    assert not check(task, "It is -5.")
    assert not check(task, "It is 15.")
    assert not check(task, "")
    both = Task("", "1200 and 7", (), Kind.PARALLEL, ())
    assert check(both, "The answers are 1,200 and 7.")
    assert not check(both, "The answers are 7 and 1200.")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("4827 * 396", "1911492"),
        ("2 + 3 * 4", "14"),
        ("(2 + 3) * 4", "20"),
        ("10 - 4 - 3", "3"),
        ("100 / 10 / 5", "2"),
        ("-3 * -(2 - 5)", "-9"),
        ("7 / 2", "3.5"),
        ("1 / 3", "0.333333"),
        ("-2 / 3", "-0.666667"),
        ("0.1 + 0.2", "0.3"),
        (".5 * 4.", "2"),
        ("  12*12  ", "144"),
        ("1 / 10000000", "0"),
        ("9" * 30 + " + 1", "1" + "0" * 30),
    ],
)
def test_calculator_values(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "empty"),
        ("1 / 0", "division by zero"),
        ("1 / (2 - 2)", "division by zero"),
        ("2 ** 3", "a number should stand"),
        ("2 +", "ends where"),
        ("(2", "not closed"),
        ("2)", "unexpected '\\)'"),
        ("2 3", "after a complete value"),
        ("1e9", "unexpected 'e'"),
        ("__import__('os')", "unexpected '_'"),
        ("\u0663 + 1", "unexpected"),
        ("1" * 31, "limit is 30"),
        ("1+" * MAX_EXPRESSION_CHARS, "limit is 200"),
        ("(" * 50 + "1" + ")" * 50, "nested deeper than 20"),
    ],
)
def test_calculator_refuses(expression: str, message: str) -> None:
    with pytest.raises(CalculatorError, match=message):
        calculate(expression)


def test_calculator_agrees_with_fractions_on_random_expressions() -> None:
    rng = random.Random(1)
    for _ in range(500):
        a, b, c = (rng.randrange(1, 10**5) for _ in range(3))
        assert calculate(f"{a} - {b} * ({c} + {a})") == str(a - b * (c + a))
        assert calculate(f"{a * b} / {b}") == str(a)


def test_template_renders_calls_exactly_as_the_model_writes_them() -> None:
    written = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "48 * 39"}}\n</tool_call>'
    as_text = calls_message(["48 * 39"])
    as_object = json.loads(json.dumps(as_text))
    as_object["tool_calls"][0]["function"]["arguments"] = {"expression": "48 * 39"}
    for message in (as_text, as_object, {"role": "assistant", "content": written}):
        text = render([{"role": "user", "content": "?"}, message])
        assert text.endswith(f"<|im_start|>assistant\n{written}<|im_end|>\n")
    assert parse_calls(written) == ["48 * 39"]
    assert parse_calls("no call") == parse_calls("<tool_call>{broken</tool_call>") == []


def test_rendering_a_longer_conversation_only_appends() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 * 3?"},
        calls_message(["2 * 3"]),
        {"role": "tool", "content": "6"},
        {"role": "assistant", "content": "The answer is 6."},
        {"role": "user", "content": "Thanks"},
    ]
    before = ""
    for length in range(1, len(messages) + 1):
        text = render(messages[:length], [CALCULATOR_TOOL])
        assert text.startswith(before)
        before = text
    assert before.startswith("<|im_start|>system\nBe brief.\n\nTools, ")
    assert "\n-calculator(expression): Evaluate" in before
    assert "<|im_start|>user\n<tool_response>\n6\n</tool_response><|im_end|>\n" in before


def test_parallel_results_share_one_user_turn() -> None:
    messages = [
        {"role": "user", "content": "?"},
        calls_message(["1 + 2", "3 + 4"]),
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "7"},
    ]
    text = render(messages, add_generation_prompt=True)
    assert "</tool_call>\n<tool_call>" in text
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n7\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert "system" not in text
