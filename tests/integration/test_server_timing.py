"""SEC-26: does the cache tell one key what another has sent? An attacker asks for prompts that a victim sent before and
for prompts that nobody sent, and tries to tell them apart. 0.5 is guessing; the same key must be able to tell, or the
test has no power.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import httpx
import pytest
from fastapi import FastAPI

from tests.integration.server_client import embedded_service, run

VICTIM, ATTACKER = "sk-victim-0001", "sk-attacker-0001"
MAX_AUC, MIN_POWER = 0.55, 0.95


def auc(hits: Sequence[float], misses: Sequence[float]) -> float:
    """How often a hit is smaller than a miss; ties count half. 0.5: they cannot be told apart. Never below 0.5, since
    an attacker may guess the other way round."""
    order = sorted([(value, 0) for value in hits] + [(value, 1) for value in misses])
    wins = ties = 0.0
    seen = at = 0
    while at < len(order):
        end = at
        while end < len(order) and order[end][0] == order[at][0]:
            end += 1
        num_hits = sum(1 for _, kind in order[at:end] if kind == 0)
        num_misses = end - at - num_hits
        wins += seen * num_misses
        ties += num_hits * num_misses
        seen += num_hits
        at = end
    area = (wins + ties / 2) / (len(hits) * len(misses))
    return max(area, 1 - area)


class Probe:
    """What one request shows to its sender: the cached tokens it is told, and what the engine did for it."""

    def __init__(self, client: httpx.AsyncClient, draw: random.Random, num_tokens: int) -> None:
        self._client = client
        self._draw = draw
        self._num_tokens = num_tokens

    def prompt(self) -> list[int]:
        return [self._draw.randrange(10, 200) for _ in range(self._num_tokens)]

    async def ask(self, key: str, prompt: list[int], salt: str | None = None) -> tuple[float, float, float, float]:
        """(cached tokens told, tokens computed, steps taken, seconds)."""
        service = embedded_service()
        before = await service.read_stats()
        body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1, "temperature": 0}, "cache_salt": salt}
        started = time.perf_counter()
        answer = await self._client.post("/generate", json=body, headers={"authorization": f"Bearer {key}"})
        took_s = time.perf_counter() - started
        assert answer.status_code == 200
        after = await service.read_stats()
        cached = answer.json()["meta_info"]["cached_tokens"]
        return cached, after["tokens_computed"] - before["tokens_computed"], after["steps"] - before["steps"], took_s

    async def areas(self, key: str, count: int, salt: str | None = None) -> list[float]:
        """AUC of each measure, over ``count`` prompts that the victim sent and as many that nobody sent."""
        hits, misses = [], []
        for _ in range(count):
            sent, fresh = self.prompt(), self.prompt()
            await self.ask(VICTIM, sent)
            for prompt, into in self._draw.sample([(sent, hits), (fresh, misses)], 2):
                into.append(await self.ask(key, prompt, salt))
        return [auc([row[i] for row in hits], [row[i] for row in misses]) for i in range(4)]


def test_sec_26_work_and_usage_tell_nothing_across_keys() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        probe = Probe(client, random.Random(7), 65)
        for key, salt in ((ATTACKER, None), (VICTIM, "another salt")):
            told, computed, steps, _ = await probe.areas(key, 20, salt)
            assert told == computed == 0.5, "not only no more than guessing: exactly the same"
            assert steps <= MAX_AUC
        told, computed, _, _ = await probe.areas(VICTIM, 20)
        assert min(told, computed) >= MIN_POWER

    run(test, api_keys=(VICTIM, ATTACKER))


@pytest.mark.slow
def test_sec_26_time_tells_nothing_across_keys(capsys: pytest.CaptureFixture[str]) -> None:
    """The real attack, by the clock. Wants a quiet machine."""

    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        probe = Probe(client, random.Random(8), 513)
        across = (await probe.areas(ATTACKER, 500))[3]
        within = (await probe.areas(VICTIM, 500))[3]
        with capsys.disabled():
            print(f"\nAUC by time, 500 hits and 500 misses: across keys {across:.3f}, within a key {within:.3f}")  # noqa: T201
        assert across <= MAX_AUC
        assert within >= MIN_POWER

    run(test, api_keys=(VICTIM, ATTACKER))


def test_the_area_is_what_it_says() -> None:
    assert auc([1, 2], [3, 4]) == auc([3, 4], [1, 2]) == 1.0
    assert auc([1, 1], [1, 1]) == 0.5
    assert auc([1, 3], [2, 4]) == 0.75
