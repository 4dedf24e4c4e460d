"""The sampler against plain torch references, by distribution and by property."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from caesura.runtime.executors.base import SampledToken
from caesura.runtime.model.sampler import SampleFailure, sample, uniform
from caesura.runtime.sampling import SamplerState, SamplingParams

EOS = frozenset({0})


def state(seed: int = 1, generated: int = 0, **params: Any) -> SamplerState:
    made = SamplerState(SamplingParams(**params), seed=seed)
    made.num_generated = generated
    return made


def one(logits: torch.Tensor, sampler: SamplerState) -> SampledToken:
    outcome = sample(logits.clone()[None], [sampler], EOS)[0]
    assert isinstance(outcome, SampledToken)
    return outcome


def draws(logits: torch.Tensor, count: int, **params: Any) -> torch.Tensor:
    """How often each token is drawn over ``count`` positions of one generation."""
    states = [state(seed=11, generated=index, **params) for index in range(count)]
    outcomes = sample(logits.expand(count, -1).clone(), states, EOS)
    assert all(isinstance(outcome, SampledToken) for outcome in outcomes)
    tokens = [outcome.token_id for outcome in outcomes if isinstance(outcome, SampledToken)]
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[0])


def truncated(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """The reference distribution, token by token."""
    probs = torch.softmax(logits.double() / temperature, dim=-1)
    order = sorted(range(len(probs)), key=lambda index: -float(probs[index]))
    kept, mass = torch.zeros_like(probs), 0.0
    for rank, index in enumerate(order):
        in_k = top_k < 1 or rank < top_k
        if in_k and (mass < top_p or rank == 0) and probs[index] >= min_p * probs[order[0]]:
            kept[index] = probs[index]
        mass += float(probs[index])
    return kept / kept.sum()


def chi_square_limit(freedom: int) -> float:
    """About the 99.99 % point (Wilson-Hilferty); the seed is fixed, so this either passes always or never."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, -1, 1.0, 0.0),
        (0.7, -1, 1.0, 0.0),
        (1.6, 7, 1.0, 0.0),
        (1.0, -1, 0.8, 0.0),
        (1.0, -1, 1.0, 0.1),
        (1.3, 12, 0.9, 0.05),
        (1.0, 1, 1.0, 0.0),
        (1.0, -1, 0.0, 0.0),
    ],
)
def test_tokens_follow_the_truncated_distribution(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 1.5
    count = 6000
    found = draws(logits, count, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p).double()
    expected = truncated(logits, temperature, top_k, top_p, min_p) * count
    assert bool((found[expected == 0] == 0).all())
    kept = expected > 0
    statistic = float(((found[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert freedom == 0 or statistic < chi_square_limit(freedom)


def test_a_wide_vocabulary_takes_the_full_sort_when_it_must() -> None:
    """More tokens pass than the shortlist holds."""
    logits = torch.zeros(3000)
    found = draws(logits, 4000, temperature=1.0, top_p=0.5)
    assert int((found > 0).sum()) > 1000
    assert int((found > 0).sum()) <= 1501
    peaked = logits.clone()
    peaked[77] = 20.0
    assert int(draws(peaked, 50, temperature=1.0, top_p=0.5)[77]) == 50
    assert int((draws(logits, 2000, temperature=1.0, top_k=600) > 0).sum()) <= 600


def test_uniforms_are_even_and_depend_on_seed_and_position() -> None:
    values = np.array([uniform(5, position) for position in range(4000)])
    counts = np.histogram(values, bins=20, range=(0.0, 1.0))[0]
    assert float(((counts - 200.0) ** 2 / 200.0).sum()) < chi_square_limit(19)
    assert values.min() >= 0.0
    assert values.max() < 1.0
    assert uniform(5, 3) == uniform(5, 3)
    assert len({uniform(5, 3), uniform(5, 4), uniform(6, 3), uniform(53, 0)}) == 4


def test_a_row_is_drawn_alike_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 500, generator=generator) * 2
    mixed = [
        state(seed=0, temperature=0.0),
        state(seed=1, temperature=1.0),
        state(seed=2, temperature=0.8, top_p=0.9, logprobs=4),
        state(seed=3, temperature=1.2, top_k=9),
        state(seed=4, temperature=1.0, min_p=0.2, logit_bias=((3, 4.0),)),
        state(seed=5, temperature=1.0, repetition_penalty=1.3, presence_penalty=0.4),
    ]
    mixed[5].counts.update({7: 2, 9: 1})
    together = sample(logits.clone(), mixed, EOS)
    for row, sampler in enumerate(mixed):
        assert sample(logits[row : row + 1].clone(), [sampler], EOS) == [together[row]]
    order = [4, 2, 0, 5, 1, 3]
    assert sample(logits[order].clone(), [mixed[row] for row in order], EOS) == [together[row] for row in order]


def test_greedy_takes_the_largest_with_and_without_other_options() -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(4))
    best = int(logits.argmax())
    assert one(logits, state(temperature=0.0)).token_id == best
    assert one(logits, state(temperature=0.0, logprobs=0)).token_id == best
    assert one(logits, state(temperature=0.0, logit_bias=((best, -100.0),))).token_id != best
    assert one(logits, state(temperature=0.0, logit_bias=((17, 100.0), (5000, 100.0)))).token_id == 17
    twice = ((17, 60.0), (18, 100.0), (17, 60.0))
    assert one(logits, state(temperature=0.0, logit_bias=twice)).token_id == 17, "what is given twice adds up"


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_logprobs_match_log_softmax_before_truncation(temperature: float) -> None:
    logits = torch.randn(60, generator=torch.Generator().manual_seed(6))
    token = one(logits, state(temperature=temperature, top_k=2, logprobs=5))
    reference = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    assert token.logprob == pytest.approx(float(reference[token.token_id]), abs=1e-6)
    values, ids = reference.topk(5)
    assert [index for index, _ in token.top_logprobs] == ids.tolist()
    assert [value for _, value in token.top_logprobs] == pytest.approx(values.tolist(), abs=1e-6)
    assert one(logits, state(temperature=temperature)).logprob is None
    assert one(logits, state(temperature=temperature, logprobs=0)).top_logprobs == ()


def test_penalties_change_the_logits_as_documented() -> None:
    logits = torch.tensor([2.0, 1.0, -1.0, 0.5, 0.0])
    sampler = state(temperature=0.0, logprobs=5, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    sampler.prompt_ids = frozenset({0, 2})
    sampler.counts = Counter({1: 3})
    expected = torch.tensor([1.0, 0.5 - 1.5 - 0.25, -2.0, 0.5, 0.0])
    token = one(logits, sampler)
    found = dict(token.top_logprobs)
    reference = torch.log_softmax(expected, dim=-1)
    assert [found[index] for index in range(5)] == pytest.approx(reference.tolist(), abs=1e-6)


def test_end_tokens_are_banned_until_the_minimum() -> None:
    logits = torch.tensor([9.0, 8.0, 1.0, 0.0])
    early = state(temperature=0.0, min_new_tokens=3, stop_token_ids=(1,), generated=2)
    late = state(temperature=0.0, min_new_tokens=3, stop_token_ids=(1,), generated=3)
    assert one(logits, early).token_id == 2
    assert one(logits, late).token_id == 0


class Mask:
    """A matcher that allows a fixed set."""

    stopped = False

    def __init__(self, *allowed: int) -> None:
        self.allowed = allowed

    def fill_mask(self, row: Any) -> None:
        row[:] = 0
        for token in self.allowed:
            row.view(np.uint32)[token // 32] |= np.uint32(1 << (token % 32))

    def accept(self, token_id: int) -> None:
        assert token_id in self.allowed


def test_masks_bind_greedy_and_random_rows_and_the_words_last_bit() -> None:
    logits = torch.randn(70, generator=torch.Generator().manual_seed(8))
    for token in (0, 31, 32, 63, 69):
        for temperature in (0.0, 1.5):
            sampler = state(temperature=temperature, top_p=0.7, logprobs=3)
            sampler.matcher = Mask(token)
            drawn = one(logits, sampler)
            assert drawn.token_id == token
            assert drawn.logprob == pytest.approx(0.0)
            assert drawn.top_logprobs == ((token, 0.0),)


def test_a_finished_grammar_ends_before_the_minimum() -> None:
    sampler = state(temperature=0.0, min_new_tokens=5)
    sampler.matcher = Mask(0)
    assert one(torch.randn(10), sampler).token_id == 0


def test_failures_stay_in_their_row() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(9))
    logits[2, 5] = float("nan")
    states = [state(temperature=temperature) for temperature in (0.0, 1.0, 1.0, 0.8)]
    states[0].matcher = Mask()
    outcomes = sample(logits, states, EOS)
    assert isinstance(outcomes[0], SampleFailure)
    assert isinstance(outcomes[2], SampleFailure)
    assert "not finite" in outcomes[2].reason
    assert isinstance(outcomes[1], SampledToken)
    assert isinstance(outcomes[3], SampledToken)
    bad = sample(torch.full((2, 5), float("nan")), [state(temperature=0.0)] * 2, EOS)
    assert all(isinstance(outcome, SampleFailure) for outcome in bad)


@pytest.mark.parametrize("temperature", [9e-4, 1e-20, 5e-324])
def test_the_coldest_temperatures_take_the_likeliest_token(temperature: float) -> None:
    logits = torch.randn(300, generator=torch.Generator().manual_seed(3)) * 40
    drawn = one(logits, state(temperature=temperature, logprobs=3))
    assert drawn.token_id == int(logits.argmax())
    assert drawn.logprob == pytest.approx(0.0, abs=1e-3)
