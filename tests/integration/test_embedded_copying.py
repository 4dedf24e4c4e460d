"""A network that is about to be trained can already copy a little, and one too small for it is left as it is."""

from __future__ import annotations

import pytest
import torch
from caesura.runtime.embedded.copying import plant
from caesura.runtime.embedded.net import Shape, TinyLlama

SHAPE = Shape(vocab=800)


def network(shape: Shape = SHAPE) -> TinyLlama:
    torch.manual_seed(7)
    return TinyLlama(shape).eval()


@torch.no_grad()
def likelier(model: TinyLlama) -> float:
    """By how many nats the token that followed last time is ahead of the average one, in sequences said twice."""
    said = torch.stack([torch.randperm(model.shape.vocab)[:30] for _ in range(20)])
    ids = torch.cat((said, said), 1)
    told = model.logits(model.hidden_states(ids))[:, 32:-1].log_softmax(-1)
    followed = told.gather(-1, ids[:, 33:, None]).squeeze(-1)
    return float((followed - told.mean(-1)).mean())


def test_what_followed_a_token_before_is_likelier_to_follow_it_again() -> None:
    model = network()
    assert abs(likelier(model)) < 0.05
    plant(model, seed=3)
    assert likelier(model) > 0.15


def test_a_seed_plants_the_same_again() -> None:
    first, again, other = network(), network(), network()
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        plant(model, seed)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        states = [model.hidden_states(ids) for model in (first, again, other)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    "shape", [Shape(layers=1), Shape(heads=2, kv_heads=2), Shape(hidden=128, heads=4, kv_heads=2)], ids=str
)
def test_a_network_too_small_for_it_stays_as_it_is(shape: Shape) -> None:
    model, untouched = network(shape), network(shape)
    plant(model, seed=1)
    for planted, plain in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(planted, plain)
