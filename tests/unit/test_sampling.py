"""Sampling arguments are checked once, by name; a generation's state counts what it took."""

from __future__ import annotations

import math
from typing import Any

import pytest
from caesura.runtime.errors import InvalidRequest
from caesura.runtime.sampling import SamplerState, SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", -1),
        ("min_new_tokens", 200),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", -0.5),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -3.0),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("logprobs", -1),
        ("seed", -1),
        ("seed", 1 << 63),
        ("stop", ("x",) * 17),
        ("stop", ("",)),
        ("stop", ("x" * 257,)),
        ("stop_regex", ("x",) * 17),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: Any) -> None:
    arguments: dict[str, Any] = {name: value}
    with pytest.raises(InvalidRequest, match=name):
        SamplingParams(**arguments)


def test_the_limits_themselves_are_allowed() -> None:
    SamplingParams(temperature=0.0, top_p=0.0, top_k=0, min_p=1.0, repetition_penalty=0.01, logprobs=20)
    SamplingParams(max_new_tokens=5, min_new_tokens=5, seed=(1 << 63) - 1, stop=("x" * 256,) * 16)


class Recorder:
    """A matcher that only remembers."""

    stopped = False

    def __init__(self) -> None:
        self.taken: list[int] = []

    def fill_mask(self, row: Any) -> None:
        row[:] = -1

    def accept(self, token_id: int) -> None:
        self.taken.append(token_id)


def test_accepting_counts_tokens_and_moves_the_matcher() -> None:
    matcher = Recorder()
    state = SamplerState(SamplingParams(), seed=1, matcher=matcher)
    for token in (4, 4, 9):
        state.accept(token)
    assert state.num_generated == 3
    assert state.counts == {4: 2, 9: 1}
    assert matcher.taken == [4, 4, 9]
