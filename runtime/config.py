"""Engine configuration: one frozen dataclass, validated once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from caesura.runtime.errors import InvalidRequest
from caesura.scheduler.policies import DEFAULT_POLICY, make_policy
from caesura.scheduler.profile import CostProfile

EMBEDDED = "embedded"
DEVICE_NAME = re.compile(r"cpu|cuda(:[0-9]{1,2})?")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine is made from.

    ``model`` is ``"embedded"``, a Hugging Face folder, or a hub id. ``kv_tokens`` and ``host_kv_tokens`` size the two
    pools; None picks what fits the machine (host: none unless the policy swaps, then twice the device pool).
    ``kv_disk`` is a folder for a file below them that takes ``kv_disk_tokens`` (None: eight times the device pool, at
    most half of the folder's free space), used where reading it back beats computing again, and gone with the engine.
    ``native`` runs the decoder in C where it can (float32, page sizes that are a multiple of 16, a C compiler); there
    results never depend on batch shape and chunking. ``deterministic`` makes sure of that in torch as well, at a price.
    ``quantization`` "int8" makes 8-bit weights at load, for the C decoder alone: where that cannot be had, the engine
    does not start. ``profile`` None measures the machine at start (under 3 s, cached).
    ``device`` "cuda" (or "cuda:N") computes on a GPU, where kv_tokens None takes what its memory has room for;
    ``tensor_parallel`` splits the model over so many GPUs, or over so many processes on a CPU.
    """

    model: str = EMBEDDED
    revision: str | None = None
    load_format: str = "auto"
    dtype: str = "float32"
    device: str = "cpu"
    tensor_parallel: int = 1
    quantization: str | None = None
    policy: str = DEFAULT_POLICY
    page_size: int = 16
    kv_tokens: int | None = None
    host_kv_tokens: int | None = None
    kv_disk: str | None = None
    kv_disk_tokens: int | None = None
    max_step_tokens: int = 512
    max_running: int = 64
    native: bool = True
    deterministic: bool = False
    share_prefixes: bool = True
    seed: int = 0
    num_threads: int | None = None
    profile: CostProfile | None = None

    def __post_init__(self) -> None:
        try:
            make_policy(self.policy)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        if self.dtype not in ("float32", "bfloat16"):
            raise InvalidRequest(f"dtype is {self.dtype!r}; it must be float32 or bfloat16")
        if not DEVICE_NAME.fullmatch(self.device):
            raise InvalidRequest(f"device is {self.device!r}; it must be cpu, cuda or cuda:N")
        if self.quantization not in (None, "int8"):
            raise InvalidRequest(f"quantization is {self.quantization!r}; it must be int8, or left out")
        if self.load_format not in ("auto", "dummy"):
            raise InvalidRequest(f"load_format is {self.load_format!r}; it must be auto or dummy")
        _bounded("page_size", self.page_size, 1, 64)
        _bounded("max_step_tokens", self.max_step_tokens, 1, 1 << 20)
        _bounded("max_running", self.max_running, 1, 4096)
        _bounded("tensor_parallel", self.tensor_parallel, 1, 64)
        _bounded("seed", self.seed, 0, (1 << 63) - 1)
        if self.num_threads is not None:
            _bounded("num_threads", self.num_threads, 1, 1024)
        for name, value, low in (
            ("kv_tokens", self.kv_tokens, 2 * self.page_size),
            ("host_kv_tokens", self.host_kv_tokens, 0),
            ("kv_disk_tokens", self.kv_disk_tokens, 0),
        ):
            if value is not None:
                _bounded(name, value, low, 1 << 40)


def _bounded(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}; it must lie between {low} and {high}")
