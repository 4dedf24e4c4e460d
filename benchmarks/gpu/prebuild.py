"""Compile FlashInfer's kernels without a GPU: ``python -m benchmarks.gpu.prebuild DIR [ARCH]`` (ARCH 9.0a for Hopper).

Needs nvcc, ninja, torch of any kind, flashinfer-python and, for the thresholds of sampling, cuRAND's headers
(nvidia-curand). What else the compiler lacks of CUDA but the kernels do not use is stood in for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import toolchain

ATTENTION = ((128, False), (64, False), (128, True))  # head size, sliding window


def main(target: Path, arch: str) -> int:
    """Leave ``target/NAME/NAME.so`` for every module, and ``target/arch``; 1 when one could not be compiled."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= toolchain(Path(folder))
        _stand_in(Path(folder) / "stand-ins")
        os.environ |= {"FLASHINFER_CUDA_ARCH_LIST": arch, "FLASHINFER_WORKSPACE_BASE": folder}
        target.mkdir(parents=True, exist_ok=True)
        (target / "arch").write_text(arch)  # what they can be used on
        failed = 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for name, error in pool.map(lambda make: _build(make, target), _modules()):
                print(f"{name}: {error or 'compiled'}", flush=True)
                failed += error is not None
    return 1 if failed else 0


def _modules() -> list[Callable[[], Any]]:
    import torch
    from flashinfer.jit.activation import gen_act_and_mul_module
    from flashinfer.jit.attention import modules
    from flashinfer.jit.cascade import gen_cascade_module
    from flashinfer.jit.norm import gen_norm_module
    from flashinfer.jit.rope import gen_rope_module
    from flashinfer.jit.sampling import gen_sampling_module

    kind = torch.bfloat16
    # from 0.7 on, keys and values of one layout, as ours are, have a module of their own
    generate = getattr(modules, "_gen_batch_prefill_primary_module", modules.gen_batch_prefill_module)

    def attention(size: int, window: bool) -> Callable[[], Any]:
        shape = (kind, kind, kind, torch.int32, size, size, 0, window, False, False)
        return lambda: generate("fa2", *shape)

    small = [lambda: gen_act_and_mul_module("silu"), gen_norm_module, gen_rope_module, gen_cascade_module]
    return [*(attention(*one) for one in ATTENTION), gen_sampling_module, *small]


def _build(make: Callable[[], Any], target: Path) -> tuple[str, str | None]:
    spec = make()
    try:
        spec.build(verbose=False)
    except RuntimeError as error:
        return spec.name, str(error)[-2000:]
    (target / spec.name).mkdir(parents=True, exist_ok=True)
    shutil.copy(spec.jit_library_path, target / spec.name / f"{spec.name}.so")
    return spec.name, None


def _stand_in(folder: Path) -> None:
    """An empty driver library and empty headers, each behind the real one if there is one."""
    headers, libraries = folder / "include", folder / "lib"
    headers.mkdir(parents=True)
    libraries.mkdir()
    for name in ("cublasLt.h", "cublas_v2.h", "curand_kernel.h"):
        (headers / name).touch()
    command = [
        "cc",
        "-shared",
        "-fPIC",
        "-Wl,-soname,libcuda.so.1",
        "-x",
        "c",
        "-",
        "-o",
        str(libraries / "libcuda.so"),
    ]
    subprocess.run(command, input=b"", check=True)
    for variable, place in (("CPLUS_INCLUDE_PATH", headers), ("LIBRARY_PATH", libraries)):
        os.environ[variable] = os.pathsep.join(filter(None, [os.environ.get(variable), str(place)]))


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "9.0a"))
