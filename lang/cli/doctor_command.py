"""``caesura doctor``: does everything work here, and if not, what to do about it."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from caesura.lang.cli.output import print_json, stdout
from rich.table import Table
from rich.text import Text

Status = Literal["ok", "warn", "fail"]
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
MIN_MEMORY_BYTES = 1 << 30
MIN_PYTHON = (3, 11)
LATEST_TORCH = (2, 14)
PACKAGES = ("numpy", "tokenizers", "tiktoken", "safetensors", "llguidance", "pydantic", "greenlet", "typer", "rich")
VECTOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked at, what was found, and what to do unless it is ok."""

    name: str
    status: Status
    found: str
    advice: str = ""


def doctor_command(*, model: str | None, as_json: bool) -> None:
    """Run all checks. Leaves with 3 when one failed."""
    checks = [*machine_checks(), *package_checks(), *engine_checks(model)]
    worst: Status = max((check.status for check in checks), key=("ok", "warn", "fail").index)
    if as_json:
        print_json({"status": worst, "checks": [asdict(check) for check in checks]})
    else:
        _show(checks, worst)
    if worst == "fail":
        raise SystemExit(3)


def machine_checks() -> list[Check]:
    """Python, processor, memory, compiler."""
    return [_python(), _processor(), _memory(), _compiler()]


def _python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < MIN_PYTHON:
        return Check("python", "fail", found, "use Python 3.11 or newer")
    return Check("python", "ok", found)


def _processor() -> Check:
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    flags = _cpu_flags()
    vectors = [flag for flag in VECTOR_FLAGS if flag in flags]
    found = f"{platform.machine()}, {cores} cores" + (f", {' '.join(vectors)}" if vectors else "")
    if platform.machine() in ("x86_64", "AMD64") and flags and "avx2" not in flags:
        return Check("processor", "warn", found, "without AVX2 generation is slow; use a newer machine")
    return Check("processor", "ok", found)


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())


def _memory() -> Check:
    from caesura.runtime.model.memory import available_memory_bytes

    available = available_memory_bytes()
    if available is None:
        return Check("memory", "warn", "unknown", "no way to ask this system; pools are sized without looking")
    found = f"{available / (1 << 30):.1f} GiB available"
    if available < MIN_MEMORY_BYTES:
        return Check("memory", "warn", found, "close other programs; the KV pools take what is left")
    return Check("memory", "ok", found)


def _compiler() -> Check:
    """Tries what the engine tries: the decoder in C is compiled at first use."""
    from caesura.runtime.native.library import NoNativeLibrary, native_library

    try:
        native_library()
    except NoNativeLibrary as error:
        return Check("compiler", "warn", str(error), "install a C compiler: torch does the work, several times slower")
    return Check("compiler", "ok", "the decoder in C is ready")


def package_checks() -> list[Check]:
    """Versions of what Caesura is built on."""
    checks = [_package("caesura"), _package("torch")]
    torch = checks[1]
    if torch.status == "ok" and _version(torch.found) >= LATEST_TORCH:
        checks[1] = Check("torch", "warn", torch.found, "not tested with this version; pip install 'torch<2.14'")
    return checks + [_package(name) for name in PACKAGES]


def _package(name: str) -> Check:
    try:
        return Check(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", f"pip install {name}")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


def engine_checks(model: str | None) -> list[Check]:
    """Start the engine, generate a token, look at the measured costs. Stops at the first failure."""
    checks: list[Check] = []
    begun = time.perf_counter()
    try:
        from caesura.runtime.config import EMBEDDED, EngineConfig
        from caesura.runtime.service import EngineService

        service = EngineService.start(EngineConfig(model=model or EMBEDDED, kv_tokens=4096))
    except Exception as error:  # whatever it is, it is the finding
        advice = "reinstall: pip install --force-reinstall caesura" if model is None else "give another --model"
        return [Check("model", "fail", _told(error), advice)]
    with service:
        checks.append(Check("model", "ok", f"{service.model_name}, loaded in {time.perf_counter() - begun:.1f} s"))
        checks.append(_tried("generation", lambda: _generation(service), "report this with the output of doctor"))
        checks.append(_tried("costs", lambda: _costs(service), "report this with the output of doctor"))
    return checks


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _tried(name: str, check: Callable[[], str], advice: str) -> Check:
    try:
        return Check(name, "ok", check())
    except Exception as error:
        return Check(name, "fail", _told(error), advice)


def _generation(service: Any) -> str:
    from caesura.lang import Program, gen
    from caesura.lang.backends.engine import EngineBackend

    def one_token(s: Any) -> None:
        s += "1 2 3"
        s += gen("token", max_tokens=1, temperature=0.0, ignore_eos=True)

    begun = time.perf_counter()
    state = Program(one_token).run(backend=EngineBackend(service), deadline_s=60.0)
    state.sync()
    return f"1 token in {1e3 * (time.perf_counter() - begun):.0f} ms"


def _costs(service: Any) -> str:
    profile = service.call_now(lambda engine: engine.scheduler.profile)
    page_bytes = service.stats()["page_bytes"] / service.stats()["page_size"]
    swap = f"{page_bytes / profile.swap_token_s / 1e9:.1f} GB/s" if profile.swap_token_s else "unknown"
    return (
        f"step {1e3 * profile.step_s:.2f} ms + {1e6 * profile.token_s:.0f} µs a token "
        f"+ {1e6 * profile.attention_s:.2f} µs a token behind it; swap {swap}"
    )


def _show(checks: list[Check], worst: Status) -> None:
    console = stdout()
    table = Table(box=None, padding=(0, 1), show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for check in checks:
        found = Text(check.found)
        if check.advice:
            found.append(f"\n{check.advice}", STYLES[check.status])
        table.add_row(Text(check.status, STYLES[check.status]), check.name, found)
    console.print(table)
    last = {"ok": "caesura demo", "warn": "caesura demo", "fail": "the advice above, then caesura doctor"}[worst]
    console.print(Text.assemble(("next: ", "bold"), last))
