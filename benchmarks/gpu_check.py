"""Build, check and time the GPU path on one NVIDIA GPU, in under eight minutes: a short table comes last.

    python -m benchmarks.gpu_check [--budget-s 460] [--only build,tests,speed,swap,mix] [--mix-seconds 20]
                                   [--results DIR] [--kernels DIR]

Needs torch with CUDA, nvcc, flashinfer-python with apache-tvm-ffi, msgspec and pytest; nothing of Caesura itself has to
be installed. Each stage is a process with a limit of its own and cannot take another one down. What is printed before
the table is each stage's output; ``--results`` keeps it and the figures as files. ``--kernels`` is a folder made by
``python -m benchmarks.gpu.prebuild`` on a machine that has nvcc alone: then nothing is compiled on the GPU's machine.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARK = "FIGURE "
LEAST_S = 15.0  # less is not worth a stage's start
KERNELS = """
# FlashInfer asks a package of this name for compiled kernels before it compiles any
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

__version__ = version("flashinfer-python")
FOLDER = Path({folder!r})


def get_jit_cache_dir():  # up to 0.6
    return str(FOLDER)


def get_jit_cache_providers():  # from 0.7 on
    return [
        SimpleNamespace(
            provider_id="prebuilt",
            distribution="flashinfer-jit-cache",
            version=__version__,
            jit_cache_dir=str(FOLDER),
            cuda_architectures=["sm" + (FOLDER / "arch").read_text().replace(".", "")],
            modules=[module.name for module in FOLDER.iterdir()],
        )
    ]
"""


@dataclass(frozen=True, slots=True)
class Stage:
    """A command and how long it may take."""

    name: str
    limit_s: float
    command: tuple[str, ...]


def stages(mix_seconds: float, mix_rate: float, results: Path) -> list[Stage]:
    """All stages, in the order in which they are wanted."""
    tests = ("-m", "pytest", "tests/gpu", "-q", "-s", "-p", "no:cacheprovider", "--timeout", "100", "-m", "gpu")
    mix = ("-m", "benchmarks.gpu.mix", str(mix_seconds), str(mix_rate), str(results / "mix.json"))
    return [
        Stage("machine", 60, ("-m", "benchmarks.gpu.machine")),
        Stage("build", 240, ("-m", "benchmarks.gpu.build")),
        Stage("tests", 170, tests),
        Stage("speed", 130, ("-m", "benchmarks.gpu.speed")),
        Stage("swap", 60, ("-m", "benchmarks.gpu.swap")),
        Stage("mix", 90 + 8 * mix_seconds, mix),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages and print the table; 1 when something failed or a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--budget-s", type=float, default=460.0, help="for all stages together")
    parser.add_argument("--only", help="comma-separated stages")
    parser.add_argument("--mix-seconds", type=float, default=20.0, help="of real time for each policy of the mix")
    parser.add_argument("--mix-rate", type=float, default=4.0, help="requests a second of the mix")
    parser.add_argument("--results", type=Path, help="folder for logs and figures")
    parser.add_argument("--kernels", type=Path, help="FlashInfer's kernels, compiled before")
    options = parser.parse_args(arguments)
    results = options.results or Path(tempfile.mkdtemp())
    results.mkdir(parents=True, exist_ok=True)
    chosen = stages(options.mix_seconds, options.mix_rate, results)
    if options.only:
        names = options.only.split(",")
        unknown = set(names) - {stage.name for stage in chosen}
        if unknown:
            parser.error(f"no stage named {', '.join(sorted(unknown))}")
        chosen = [stage for stage in chosen if stage.name in names]
    ends = time.monotonic() + options.budget_s
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        environment = environment_for(Path(folder), options.kernels)
        for stage in chosen:
            rows += run_stage(stage, min(stage.limit_s, ends - time.monotonic()), environment, results)
    (results / "figures.json").write_text(json.dumps(rows, indent=1))
    print_table(rows)
    return 0 if all(row["held"] is not False for row in rows) else 1


def environment_for(folder: Path, kernels: Path | None = None) -> dict[str, str]:
    """The variables under which ``caesura`` is found in this checkout, installed or not, and CUDA's files by nvcc."""
    package = folder / "caesura"
    package.mkdir()
    for name in ("lang", "runtime", "scheduler"):
        (package / name).symlink_to(ROOT / name)
    if kernels is not None:
        (folder / "flashinfer_jit_cache.py").write_text(KERNELS.format(folder=str(kernels.resolve())))
    path = os.pathsep.join(filter(None, [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    return os.environ | toolchain(folder) | own


def toolchain(folder: Path) -> dict[str, str]:
    """What compiling FlashInfer's kernels may lack beside nvcc: the place of CUDA; headers of
    cuBLAS and cuRAND, which pip's packages have; a ``libcuda.so`` to link with, which a driver has by another name."""
    found: dict[str, str] = {}
    compilers = filter(None, ("/usr/local/cuda/bin/nvcc", shutil.which("nvcc")))
    nvcc = next((Path(one).resolve() for one in compilers if Path(one).exists()), None)
    if nvcc is not None and "CUDA_HOME" not in os.environ:
        found["CUDA_HOME"] = str(nvcc.parent.parent)
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
    wanted = ("cublasLt.h", "curand_kernel.h")
    headers = sorted(
        {str(file.parent) for place in places for name in wanted for file in place.glob(f"*/include/{name}")}
    )
    if headers:
        found["CPLUS_INCLUDE_PATH"] = os.pathsep.join([*headers, os.environ.get("CPLUS_INCLUDE_PATH", "")]).strip(":")
    drivers = (
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib64",
        "/usr/local/nvidia/lib64",
        "/usr/local/nvidia/lib",
        "/usr/lib",
    )
    driver = next((file for place in drivers if (file := Path(place) / "libcuda.so.1").exists()), None)
    if driver is not None:
        (folder / "lib").mkdir()
        (folder / "lib" / "libcuda.so").symlink_to(driver)
        found["LIBRARY_PATH"] = os.pathsep.join([str(folder / "lib"), os.environ.get("LIBRARY_PATH", "")]).strip(":")
    return found


def run_stage(stage: Stage, limit_s: float, environment: dict[str, str], results: Path) -> list[dict[str, Any]]:
    """A stage's figures, and one that says how it ended. Its output is shown when it has ended."""
    print(f"--- {stage.name} (at most {limit_s:.0f} s)", flush=True)
    if limit_s < LEAST_S:
        return [_row(stage.name, "no time left", held=False)]
    begun = time.monotonic()
    log = results / f"{stage.name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *stage.command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    lines = log.read_text(errors="replace").splitlines()
    figures = [json.loads(line[len(MARK) :]) for line in lines if line.startswith(MARK)]
    said = [line for line in lines if not line.startswith(MARK)]
    print("\n".join(said[-60:] if code else said[-12:]), flush=True)
    spent = time.monotonic() - begun
    how = "ok" if code == 0 else f"TIMED OUT after {limit_s:.0f} s" if code is None else f"FAILED with code {code}"
    return [*figures, _row(stage.name, f"{how}, {spent:.0f} s", held=code == 0)]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave nothing of a stage behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _row(stage: str, how: str, *, held: bool) -> dict[str, Any]:
    return {"what": f"[{stage}]", "value": how, "unit": "", "share": None, "target": None, "below": False, "held": held}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Narrow lines: what, value, share and target, and whether it holds."""
    print("=== table", flush=True)
    for row in rows:
        value = row["value"] if isinstance(row["value"], str) else f"{row['value']:,.4g}"
        line = f"{row['what']:44} {value} {row['unit']}"
        if row["share"] is not None:
            line += f" | {row['share']:.1%}"
        if row["target"] is not None:
            line += f" ({'at most' if row['below'] else 'at least'} {row['target']:.0%})"
        print(line + {True: "", False: "  MISSED", None: ""}[row["held"]], flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
