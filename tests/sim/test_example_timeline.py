"""The worked example of the documentation says what the scheduler really does."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("policy", ["min_waste", "discard"])
def test_the_example_prints_what_the_document_shows(
    policy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pause_timeline.py", policy])
    runpy.run_path(str(ROOT / "examples" / "pause_timeline.py"), run_name="__main__")
    printed = capsys.readouterr().out
    document = (ROOT / "docs" / "architecture.md").read_text()
    shown = printed if policy == "min_waste" else printed.splitlines()[-1]
    assert shown.strip() in document
