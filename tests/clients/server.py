"""A ``caesura serve`` process on the embedded model, for as long as a ``with`` block."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

START_DEADLINE_S = 120.0
STOP_DEADLINE_S = 30.0
ATTEMPTS = 3  # a port that was free a moment ago may be taken
KV_TOKENS = 1 << 15


@dataclass(frozen=True, slots=True)
class Served:
    """Where a server listens, without ``/v1``; its process id; what it has written so far."""

    url: str
    pid: int
    log: Path


@contextlib.contextmanager
def served(keys: Mapping[str, str] | None = None, *, policy: str = "min_waste") -> Iterator[Served]:
    """A server that is ready, with ``keys`` by name, or none. It is drained at the end.

    Raises RuntimeError with the server's own words when it does not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ["--policy", policy, "--kv-tokens", str(KV_TOKENS)]
        if keys:
            key_file = Path(folder) / "keys"
            key_file.write_text("".join(f"{name}:{key}\n" for name, key in keys.items()))
            key_file.chmod(0o600)
            options += ["--key-file", str(key_file)]
        log = Path(folder) / "server.log"
        for _ in range(ATTEMPTS):
            process, url = _start(options, log)
            try:
                if _is_ready(process, url):
                    yield Served(url, process.pid, log)
                    return
            finally:
                _stop(process)
        raise RuntimeError(f"the server did not start: {log.read_text()}")


def _start(options: list[str], log: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    start = [sys.executable, "-c", "from caesura.lang.cli import main; main()"]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*start, "serve", "--port", str(port), *options],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    return process, f"http://127.0.0.1:{port}"


def _is_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    """Wait for ``/ready``. False when the process has ended or time is over."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_DEADLINE_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), opener.open(f"{url}/ready", timeout=5):
            return True
        time.sleep(0.1)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
