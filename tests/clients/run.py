"""Run the libraries people use against one ``caesura serve`` process, each in an environment of its own.

``python -m tests.clients.run [--slow] [NAME ...]``. Environments lie in ``.venv-clients``, are made from each client's
``requirements.txt`` (a complete ``pip freeze``) and are made again when that file changes. Each client has its own API
key, so none finds another's prefixes in the cache. Prints a table; fails when a check fails or cannot run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path

from tests.clients.server import Served, served

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent.parent / ".venv-clients"
INSTALL_DEADLINE_S = 900.0
CHECK_DEADLINE_S = 180.0


@dataclass(frozen=True, slots=True)
class Client:
    """A library to check. ``checks`` names the folder of its ``check.py`` where that is another's.

    ``borrows`` makes this interpreter's own packages visible behind the locked ones: torch need not come twice.
    """

    name: str
    package: str
    checks: str = ""
    slow: bool = False
    whole: bool = True  # all of its requirements are installed
    borrows: bool = False

    @property
    def lock(self) -> Path:
        return HERE / self.name / "requirements.txt"

    @property
    def script(self) -> Path:
        return HERE / (self.checks or self.name) / "check.py"

    @property
    def version(self) -> str:
        """The locked version of the library itself."""
        for line in self.lock.read_text().splitlines():
            name, _, version = line.partition("==")
            if name.lower().replace("_", "-") == self.package:
                return version
        raise SystemExit(f"{self.lock}: no {self.package}")


CLIENTS = (
    Client("openai", "openai"),
    Client("openai-2", "openai", checks="openai"),
    Client("openai-agents", "openai-agents"),
    Client("langchain", "langgraph"),
    Client("pydantic-ai", "pydantic-ai-slim"),
    Client("smolagents", "smolagents"),
    Client("litellm", "litellm"),
    Client("sglang", "sglang", whole=False),
    Client("sglang-torch", "sglang", checks="sglang", slow=True, whole=False, borrows=True),
)


@dataclass(slots=True)
class Outcome:
    """What became of one client's checks. ``trouble`` holds what went wrong, by check."""

    passed: int = 0
    seconds: float = 0.0
    trouble: dict[str, str] = field(default_factory=dict)


def prepare(client: Client) -> Path:
    """The interpreter of the client's environment, made if need be. Raises CalledProcessError, TimeoutExpired."""
    folder = ENVIRONMENTS / client.name
    python, stamp = folder / "bin" / "python", folder / ".lock"
    wanted = hashlib.sha256(client.lock.read_bytes() + sys.version.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _quietly([*pip, "install", "--no-deps", "-r", str(client.lock)])
    if client.whole:
        _quietly([*pip, "check"])
    if client.borrows:
        packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        (Path(packages) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    stamp.write_text(wanted)
    return python


def _quietly(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_DEADLINE_S)


def run_checks(client: Client, python: Path, server: Served, key: str) -> Outcome:
    """Run a client's checks in a process of their own."""
    outcome = Outcome()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {
        "CAESURA_URL": server.url,
        "CAESURA_KEY": key,
        "PYTHONPATH": str(HERE / "support"),
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [str(python), str(client.script)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=CHECK_DEADLINE_S,
        )
        output, noise, status = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        output, noise, status = _text(error.stdout), _text(error.stderr), None
        outcome.trouble["(time)"] = f"not done after {CHECK_DEADLINE_S:g} s\n{noise[-2000:]}"
    outcome.seconds = time.perf_counter() - started
    for line in output.splitlines():
        row = json.loads(line)
        if row["ok"]:
            outcome.passed += 1
        else:
            outcome.trouble[row["check"]] = row["error"]
    if (status and not outcome.trouble) or not output:
        outcome.trouble["(start)"] = f"exit status {status}\n{noise[-4000:]}"
    return outcome


def _text(output: bytes | str | None) -> str:
    return output.decode("utf-8", "replace") if isinstance(output, bytes) else output or ""


def check_client(client: Client, server: Served, key: str) -> Outcome:
    """Prepare and run one client; what goes wrong is in the outcome."""
    try:
        python = prepare(client)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        return Outcome(trouble={"(environment)": f"{error}\n{_text(error.stderr)[-4000:]}"})
    return run_checks(client, python, server, key)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="tests.clients.run", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="clients to check; all by default")
    parser.add_argument("--slow", action="store_true", help="the slow ones, too")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {client.name for client in CLIENTS}
    if unknown:
        parser.error(f"no client {', '.join(sorted(unknown))}; there are {', '.join(c.name for c in CLIENTS)}")
    quick = [client.name for client in CLIENTS if arguments.slow or not client.slow]
    chosen = [client for client in CLIENTS if client.name in (arguments.names or quick)]
    keys = {client.name: secrets.token_hex(16) for client in chosen}
    outcomes: dict[str, Outcome] = {}
    with served(keys) as server:
        print(f"{'client':<15}{'version':<16}{'passed':>8}{'failed':>8}{'seconds':>10}")
        for client in chosen:
            outcome = outcomes[client.name] = check_client(client, server, keys[client.name])
            numbers = f"{outcome.passed:>8}{len(outcome.trouble):>8}{outcome.seconds:>10.1f}"
            print(f"{client.name:<15}{client.version:<16}{numbers}", flush=True)
    for name, outcome in outcomes.items():
        for check, error in outcome.trouble.items():
            print(f"\n{name}: {check}\n{error}", file=sys.stderr)
    sys.exit(1 if any(outcome.trouble for outcome in outcomes.values()) else 0)


if __name__ == "__main__":
    main()
