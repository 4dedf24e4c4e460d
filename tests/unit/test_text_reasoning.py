"""Thinking is told from the answer, however the text is cut."""

from __future__ import annotations

import itertools
import random

import pytest
from caesura.runtime.text.reasoning import MARKS, ThinkSplitter, detect_marks, opens_thinking, split

QWEN, OPENED = MARKS["qwen3"], MARKS["deepseek-r1"]
TEXTS = [
    ("<think>\nhm, 6*7\n</think>\n\n42", QWEN, "hm, 6*7", "42"),
    ("\n <think>a\n\nb</think>c\n", QWEN, "a\n\nb", "c\n"),
    ("<think></think>x", QWEN, "", "x"),
    ("plain <think>no</think>", QWEN, "", "plain <think>no</think>"),
    ("<thin", QWEN, "", "<thin"),
    ("", QWEN, "", ""),
    ("<think>never ends</thin", QWEN, "never ends</thin", ""),
    ("<think>a</think>b</think><think>c", QWEN, "a", "b</think><think>c"),
    ("hm\n</think>\n42", OPENED, "hm", "42"),
    ("<think>hm</think>42", OPENED, "hm", "42"),
    ("all of it\n", OPENED, "all of it", ""),
    ("a < b </ c <</think>d", OPENED, "a < b </ c <", "d"),
    ("◁think▷さ◁/think▷し", MARKS["kimi"], "さ", "し"),
]


@pytest.mark.parametrize(("text", "marks", "thinking", "answer"), TEXTS)
def test_every_cut_gives_the_same_parts(text, marks, thinking, answer):
    assert split(text, marks) == (thinking, answer)
    cuts = itertools.combinations(range(len(text) + 1), 2)
    for first, second in cuts:
        splitter = ThinkSplitter(marks)
        parts = [splitter.push(piece) for piece in (text[:first], text[first:second], text[second:])]
        parts.append(splitter.finish())
        assert "".join(part[0] for part in parts) == thinking, (first, second)
        assert "".join(part[1] for part in parts) == answer, (first, second)
        assert splitter.finish() == ("", "")


def test_random_texts_by_the_character_equal_the_whole():
    rng = random.Random(5)
    for _ in range(500):
        text = "".join(rng.choice(["<think>", "</think>", "</", "\n", "a", " ", "<"]) for _ in range(rng.randrange(9)))
        for marks in (QWEN, OPENED):
            splitter = ThinkSplitter(marks)
            parts = [splitter.push(char) for char in text] + [splitter.finish()]
            assert ("".join(a for a, _ in parts), "".join(b for _, b in parts)) == split(text, marks), repr(text)


def test_a_template_tells_the_marks_and_a_prompt_whether_thinking_is_open():
    assert detect_marks("{{ '<think>' }} ... '</think>'") == QWEN
    assert detect_marks("{{ message.content }}") is None
    assert opens_thinking("<|im_start|>assistant\n<think>\n", QWEN)
    assert not opens_thinking("<|im_start|>assistant\n<think>\n\n</think>\n\n", QWEN)
