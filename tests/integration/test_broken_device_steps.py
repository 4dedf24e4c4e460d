"""Numbers that are not finite, on the executor of devices: they are noticed a step late, and stay their context's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from caesura.runtime.clock import MonotonicClock
from caesura.runtime.engine import Engine
from caesura.runtime.errors import ContextClosed
from caesura.runtime.model.weights import Model
from caesura.runtime.sim import generation
from caesura.scheduler.policies import make_policy
from caesura.scheduler.profile import CostProfile

from tests.integration.device_executor import make_device_executor
from tests.integration.test_identical_output import tiny_model

PAGE = 16
PROFILE = CostProfile(0.001, 1e-5, 0.0, 1e-4, 1e-6, 256)
POISON = 7
BAD = [POISON, *(10 + place % 20 for place in range(39))]


@pytest.fixture(scope="module")
def model() -> Model:
    """A model whose embedding of one token is not finite."""
    sound = tiny_model()
    embeddings = sound.embeddings.clone()
    embeddings[POISON] = float("nan")
    return dataclasses.replace(sound, embeddings=embeddings, head=sound.head.clone())


def make(model: Model, policy: str = "preserve") -> Engine:
    executor = make_device_executor(model, PAGE, num_device_pages=32, num_host_pages=32, flashinfer=False)
    return Engine(executor, make_policy(policy), PROFILE, MonotonicClock(), overlapping=executor)


def drive(engine: Engine) -> None:
    for _ in range(100):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


@pytest.mark.parametrize("policy", ["min_waste", "lru_host", "lru"])
def test_the_cache_does_not_keep_what_is_not_finite(model: Model, policy: str) -> None:
    engine = make(model, policy)
    told: list[object] = []
    first = engine.open()
    engine.append(first, BAD)
    engine.prefill(first, told.append)
    drive(engine)
    second = engine.open()
    engine.append(second, BAD[:32])
    engine.score(second, 20, told.append)
    drive(engine)
    assert [type(one) for one in told] == [ContextClosed] * 2
    engine.check()


def scores_of(engine: Engine) -> list[float]:
    context = engine.open()
    engine.append(context, [20 + place % 15 for place in range(8)])
    engine.prefill(context, lambda _: None)
    drive(engine)
    engine.append(context, [21, 22, 23, 24])
    found: list[list[float]] = []
    engine.score(context, 9, found.append)  # type: ignore[arg-type]
    drive(engine)
    return found[0]


def test_who_gets_the_pages_of_a_broken_context_is_not_disturbed(model: Model) -> None:
    """It is closed while its step is under way, and its pages are given away before anybody knows."""
    expected = scores_of(make(model))
    engine = make(model)
    broken = engine.open()
    engine.append(broken, BAD)
    engine.prefill(broken, lambda _: None)
    engine.step()
    engine.close(broken)
    assert scores_of(engine) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("num_tokens", range(8, 17))
def test_who_runs_beside_a_broken_context_is_not_disturbed(model: Model, num_tokens: int) -> None:
    engine = make(model)
    errors: list[str | None] = []
    bystander = engine.open()
    engine.append(bystander, [20 + place % 15 for place in range(num_tokens)])
    work = generation(engine, bystander, 30, lambda chunk: errors.append(chunk.finish.error) if chunk.finish else None)
    engine.generate(bystander, work)
    for _ in range(4):
        engine.step()
    broken = engine.open()
    engine.append(broken, BAD)
    engine.prefill(broken, lambda _: None)
    drive(engine)
    assert errors == [None]


def test_rows_that_are_not_finite_are_zero_in_all_layers(model: Model) -> None:
    cache = make_device_executor(model, PAGE, num_device_pages=4, num_host_pages=0, flashinfer=False).runner.cache
    cache.pages.fill_(float("nan"))
    slots = torch.tensor([page * cache.page_slots + page for page in range(3)])
    cache.keep_finite(slots, torch.tensor([True, False, True]))
    at_zero = (cache.pages[:4] == 0).all(-1).all(-1).nonzero()
    layers = cache.pages.shape[1]
    assert {tuple(row) for row in at_zero.tolist()} == {
        (1, layer, side, 1) for layer in range(layers) for side in (0, 1)
    }
