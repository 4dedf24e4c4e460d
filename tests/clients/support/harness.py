"""What the checks of all clients share. Runs in a client's own environment, so it needs the standard library alone.

A ``check.py`` marks its functions with :func:`check` and ends with ``main()``. Where the server is comes from the
environment: ``CAESURA_URL`` (without ``/v1``) and ``CAESURA_KEY``.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable
from typing import Any

HTTP_DEADLINE_S = 30.0
QUIET_DEADLINE_S = 10.0

CHECKS: dict[str, Callable[[], None]] = {}

SYSTEM = "Use the calculator for every calculation."
SUM, SUM_ANSWER = "What is 4827 * 396?", "1911492"
TWO_STEPS, TWO_STEPS_ANSWER = "What is (1840 + 327) * 56?", "121352"
PARALLEL, PARALLEL_ANSWERS = "Compute 48 * 39 and 56 * 31.", ("1872", "1736")


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Register a check under its function's name. It passes when it returns."""
    CHECKS[function.__name__] = function
    return function


def base_url() -> str:
    """The server's address, without ``/v1``."""
    return os.environ["CAESURA_URL"]


def api_key() -> str:
    """The key that the checks use."""
    return os.environ["CAESURA_KEY"]


def calculate(expression: str) -> int:
    """Value of two integers with a sign between them, which is what the embedded model asks for. Raises ValueError."""
    match = re.fullmatch(r"\s*(-?\d+)\s*([-+*/])\s*(-?\d+)\s*", expression)
    if match is None:
        raise ValueError(f"not two integers and an operator: {expression!r}")
    left, right = int(match[1]), int(match[3])
    if match[2] == "/":
        return left // right
    return left + right if match[2] == "+" else left - right if match[2] == "-" else left * right


def get(path: str, body: Any = None) -> Any:
    """The JSON of a route of the server; with a body it is a POST."""
    return json.loads(get_text(path, body))


def get_text(path: str, body: Any = None) -> str:
    """What a route of the server answers."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {api_key()}", "content-type": "application/json"}
    request = urllib.request.Request(base_url() + path, data=data, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=HTTP_DEADLINE_S) as answer:
        text: str = answer.read().decode()
        return text


def stats() -> dict[str, Any]:
    """The engine's account."""
    account: dict[str, Any] = get("/server_info")["internal_states"][0]
    return account


def at_work() -> int:
    """Contexts that wait for the engine or run on it; paused ones are at rest."""
    contexts = stats()["contexts"]
    return int(contexts["queued"] + contexts["running"])


def quiet() -> None:
    """Wait until no context is at work. Raises AssertionError after a while."""
    deadline = time.monotonic() + QUIET_DEADLINE_S
    while at_work():
        assert time.monotonic() < deadline, f"still at work: {stats()['contexts']}"
        time.sleep(0.02)


def fresh_salt() -> str:
    """A ``cache_salt`` that nobody has used: what the cache holds under it, the check itself has put there."""
    return secrets.token_hex(8)


def paused() -> int:
    """Contexts that wait for their tools' results."""
    return int(stats()["contexts"]["paused"])


def continued() -> int:
    """How many conversations have gone on by tool results in the very context that made the calls."""
    return int(
        float(re.findall(r'^caesura_tool_rounds_total\{how="continued"\} (\S+)$', get_text("/metrics"), re.M)[0])
    )


def main() -> None:
    """Run all checks and print one JSON object a line; the exit status says whether all passed.

    What the libraries print goes to the standard error, apart from those lines.
    """
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    failed = 0
    for name, function in CHECKS.items():
        started, error = time.perf_counter(), None
        try:
            function()
        except Exception:
            error = traceback.format_exc()
            failed += 1
        seconds = round(time.perf_counter() - started, 2)
        print(json.dumps({"check": name, "ok": error is None, "seconds": seconds, "error": error}), file=report)
        report.flush()
    sys.exit(1 if failed else 0)
