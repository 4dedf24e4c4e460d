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
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "examples" / "pause_timeline.py"), run_name="__main__")
    printed = capsys.readouterr().out
    document = (ROOT / "docs" / "architecture.md").read_text()
    shown = printed if policy == "min_waste" else printed.splitlines()[-1]
    assert shown.strip() in document


def test_the_picture_in_the_readme_is_drawn_from_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    picture = runpy.run_path(str(ROOT / "examples" / "pause_picture.py"))["picture"]
    assert picture(["discard", "min_waste"]) == (ROOT / "docs" / "img" / "pause.svg").read_text()
    assert "docs/img/pause.svg" in (ROOT / "README.md").read_text()
