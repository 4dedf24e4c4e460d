"""Compile the C source once per machine and load it.

The result lies in the user's cache folder under a name made from the source, the flags, the compiler and the processor,
so another machine with the same home builds its own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from caesura.runtime.errors import ModelError

ABI = 3
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared")
LIBRARIES = ("-lm", "-lpthread")
COMPILE_TIMEOUT_S = 120
_SOURCE = Path(__file__).parent
_FILES = ("vector.h", "pool.h", "linear.h", "linear_int8.h", "tiles.h", "attention.h", "decoder.c")


class NoNativeLibrary(ModelError):
    """The C decoder cannot be had here; the message says why. The torch path does the same work, slower."""


@functools.cache
def native_library() -> ctypes.CDLL:
    """The compiled library. Raises NoNativeLibrary."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise NoNativeLibrary("no C compiler was found (CC, or cc on the PATH)")
    file = _cache_folder() / f"decoder-{_fingerprint(compiler)}.so"
    if not file.exists():
        _compile(compiler, file)
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise NoNativeLibrary(f"{file.name} cannot be loaded: {error}") from error
    if library.caesura_abi() != ABI:
        raise NoNativeLibrary(f"{file.name} is of another version")
    return library


def _compile(compiler: str, file: Path) -> None:
    """Into a temporary name first: two processes may start together."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        target = Path(folder) / "decoder.so"
        command = [compiler, *FLAGS, "-o", str(target), str(_SOURCE / "decoder.c"), *LIBRARIES]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoNativeLibrary(f"the compiler did not finish: {error}") from error
        if done.returncode:
            raise NoNativeLibrary(f"the compiler failed: {done.stderr.strip()[:500]}")
        target.replace(file)


def _cache_folder() -> Path:
    """Private to the user: what lies there is run."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "caesura" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        details = folder.stat()
    except OSError as error:
        raise NoNativeLibrary(f"the cache folder cannot be made: {error}") from error
    if details.st_uid != os.getuid() or details.st_mode & 0o022:
        raise NoNativeLibrary(f"{folder} must belong to you and be writable by nobody else; run chmod go-w on it")
    return folder


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    for name in _FILES:
        digest.update((_SOURCE / name).read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    digest.update("\0".join((*FLAGS, version, platform.machine(), _processor())).encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
