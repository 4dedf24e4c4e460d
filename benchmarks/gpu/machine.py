"""What this machine is."""

from __future__ import annotations

import shutil
import subprocess
from importlib import metadata

import torch

from benchmarks.gpu.common import report


def main() -> None:
    """Versions, the GPU, the compiler."""
    free, total = torch.cuda.mem_get_info()
    report("GPU", torch.cuda.get_device_name(), f"{total / 2**30:.0f} GiB, {free / 2**30:.0f} free")
    versions = []
    for name in ("torch", "triton", "flashinfer-python", "apache-tvm-ffi", "msgspec"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} MISSING")
    report("versions", ", ".join(versions), f"CUDA {torch.version.cuda}")
    nvcc = shutil.which("nvcc")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.splitlines() if nvcc else ["none"]
    report("nvcc", said[-1])


if __name__ == "__main__":
    main()
