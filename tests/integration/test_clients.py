"""OpenAI's client and the documented curl lines against a ``caesura serve`` process on the embedded model.

The checks of the client are those of ``tests/clients/openai/check.py``, which also run against other versions of it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients.server import Served, served

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ROOT / "tests" / "clients"
DOCUMENTED = "localhost:30000"
CURL_DEADLINE_S = 60.0
SCRIPT = """set -euo pipefail
key="authorization: Bearer $KEY"
curl() { command curl --silent --show-error --fail-with-body --noproxy '*' --max-time 30 --header "$key" "$@"; }
"""


def openai_checks() -> dict[str, Callable[[], None]]:
    """The checks by name. They import their ``harness`` as the other environments do, from its folder."""
    sys.path.insert(0, str(CLIENTS / "support"))
    try:
        spec = importlib.util.spec_from_file_location("openai_check", CLIENTS / "openai" / "check.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return dict(sys.modules["harness"].CHECKS)
    finally:
        sys.path.remove(str(CLIENTS / "support"))


CHECKS = openai_checks()
KEYS = {"client": "key-of-the-client"}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """One server, with a key, for all of this file."""
    with served(KEYS) as running:
        yield running


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_the_openai_client(name: str, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAESURA_URL", server.url)
    monkeypatch.setenv("CAESURA_KEY", KEYS["client"])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    CHECKS[name]()


def curl_blocks() -> list[tuple[str, str]]:
    """(file, text) of every documented shell block that calls a running server."""
    blocks = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
    texts = {file: (ROOT / file).read_text() for file in ("README.md", "docs/server.md")}
    return [(file, block) for file, text in texts.items() for block in blocks.findall(text) if DOCUMENTED in block]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize(("file", "block"), curl_blocks(), ids=[file for file, _ in curl_blocks()])
def test_documented_curl_lines_do_what_they_say(file: str, block: str, server: Served) -> None:
    # a line "# -> text" says that the text stands in the output of the commands before it
    script, expected = SCRIPT, []
    for line in block.splitlines():
        if line.startswith("# -> "):
            expected.append(line.removeprefix("# -> "))
            line = "echo; echo '=== expected'"
        script += line.replace(DOCUMENTED, server.url.removeprefix("http://")) + "\n"
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=CURL_DEADLINE_S,
        env={**os.environ, "KEY": KEYS["client"]},
    )
    assert done.returncode == 0, f"{file}: {done.stdout}{done.stderr}"
    said = ""
    for text, output in zip(expected, done.stdout.split("=== expected\n"), strict=False):
        said = output if output.strip() else said  # several expectations of one command
        assert text in said, f"{file}: {text!r} is not in {said!r}"
    assert expected, f"{file}: the block promises nothing"


def test_both_documents_have_curl_lines() -> None:
    assert [file for file, _ in curl_blocks()] == ["README.md", "docs/server.md"]
