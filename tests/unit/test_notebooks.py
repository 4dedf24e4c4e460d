"""The committed notebooks: executed, small, and without a trace of the machine. `make test` runs them anew."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
MAX_BYTES = 160_000


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_has_small_clean_outputs(path):
    text = path.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert len(text) < MAX_BYTES
    assert not re.search(r"/(work|tmp|root|home|Users)/", text)


def test_every_notebook_is_listed():
    listed = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"\((\w+\.ipynb)\)", listed)) == {path.name for path in FOLDER.glob("*.ipynb")}
