"""Measuring a machine: what comes out, and what is kept for the next start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from caesura.runtime import calibrate
from caesura.runtime.clock import VirtualClock
from caesura.runtime.executors.base import ExecOutput, Executor, SliceInput
from caesura.runtime.executors.cost import CostExecutor, MachineCosts
from caesura.runtime.executors.sim import SimExecutor
from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import Move

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


class Roofline(CostExecutor):
    """A step takes what reading the weights takes, or what the arithmetic of its rows takes: whichever is longer."""

    def execute(self, slices: Sequence[SliceInput], copies: Sequence[Move]) -> ExecOutput:
        rows = sum(len(piece.token_ids) for piece in slices)
        before = self._clock.now()
        output = super().execute(slices, copies)
        self._clock.advance_to(before + max(READ_S, rows * ROW_S))
        return output


READ_S, ROW_S = 4e-3, 20e-6


def test_the_point_from_which_on_rows_cost_their_full_price_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "BUDGET_S", 10.0)
    clock = VirtualClock()
    made = Roofline(
        MachineCosts(0.0, 0.0, 0.0, 0.0),
        clock,
        page_size=16,
        num_device_pages=1024,
        num_host_pages=0,
        token_bytes=1,
    )
    profile = calibrate.measure(made, wide=True, clock=clock.now)
    assert profile.saturation_tokens == pytest.approx(READ_S / ROW_S, rel=0.02)  # 200 rows
    assert profile.step_s == pytest.approx(READ_S, rel=0.02)
    assert profile.token_s == pytest.approx(ROW_S, rel=0.05)
    assert profile.forward_s(8192) == pytest.approx(8192 * ROW_S, rel=0.01)


def test_a_slow_device_is_not_measured_for_long() -> None:
    clock = VirtualClock()
    made = Roofline(
        MachineCosts(0.5, 0.1, 0.0, 0.0), clock, page_size=16, num_device_pages=1024, num_host_pages=0, token_bytes=1
    )
    profile = calibrate.measure(made, wide=True, clock=clock.now)
    assert clock.now() < 10
    assert profile.saturation_tokens == 16


def test_the_second_start_reads_what_the_first_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = calibrate.measured(executor(), "a model")
    monkeypatch.setattr(calibrate, "measure", lambda *_, **__: GIVEN)
    assert calibrate.measured(executor(), "a model") == first
    assert calibrate.measured(executor(), "another model") == GIVEN
    for file in tmp_path.rglob("*.json"):
        file.write_text("{ torn")
    assert calibrate.measured(executor(), "a model") == GIVEN
