"""Measuring a machine: what comes out, and what is kept for the next start."""

from __future__ import annotations

from pathlib import Path

import pytest
from caesura.runtime import calibrate
from caesura.runtime.clock import VirtualClock
from caesura.runtime.executors.base import Executor
from caesura.runtime.executors.sim import SimExecutor
from caesura.scheduler.profile import CostProfile

GIVEN = CostProfile(0.01, 0.001, 0.0, 0.001, 0.0001, 64)


def executor(host_pages: int = 32) -> Executor:
    return SimExecutor(GIVEN, VirtualClock(), num_device_pages=64, num_host_pages=host_pages)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(calibrate, "BUDGET_S", 0.02)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_every_cost_is_measured() -> None:
    profile = calibrate.measure(executor())
    assert profile.source == "measured"
    assert min(profile.step_s, profile.token_s, profile.swap_base_s, profile.swap_token_s) > 0
    assert profile.attention_s >= 0
    assert profile.saturation_tokens >= 16


def test_without_a_host_tier_copies_cost_nothing() -> None:
    assert calibrate.measure(executor(host_pages=0)).swap_token_s == 0.0


def test_the_second_start_reads_what_the_first_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = calibrate.measured(executor(), "a model")
    monkeypatch.setattr(calibrate, "measure", lambda _: GIVEN)
    assert calibrate.measured(executor(), "a model") == first
    assert calibrate.measured(executor(), "another model") == GIVEN
    for file in tmp_path.rglob("*.json"):
        file.write_text("{ torn")
    assert calibrate.measured(executor(), "a model") == GIVEN
