"""Wiring of the device executor: a GPU, several of them, or processes on a CPU that share one model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from caesura.runtime.config import EngineConfig
from caesura.runtime.errors import InvalidRequest
from caesura.runtime.executors.crew import Load, Pools, ProcessCrew, new_folder
from caesura.runtime.executors.torch_cuda import CudaExecutor
from caesura.runtime.logs import note
from caesura.runtime.model.cuda.device import Device
from caesura.runtime.model.cuda.loading import load_part
from caesura.runtime.model.cuda.runner import Options, Runner, arena_for
from caesura.runtime.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

WORKING_BYTES = 3 << 30  # of a GPU, for activations, graphs and workspaces
POOL_SHARE = 0.95  # of what is left

PoolPages = Callable[[EngineConfig, int, int | None], tuple[int, int]]  # -> device and host pages


def refuse_unsupported(config: EngineConfig) -> None:
    """Raise InvalidRequest for settings that belong to the CPU's own executor, or to one process."""
    if config.quantization:
        raise InvalidRequest(
            f"quantization is {config.quantization!r}, which only the CPU's decoder has: leave it out with device "
            f"{config.device!r} and tensor_parallel {config.tensor_parallel}"
        )
    if config.tensor_parallel > 1 and config.kv_disk is not None:
        raise InvalidRequest("kv_disk and tensor_parallel do not go together yet: leave one of them out")
    if config.tensor_parallel > 1 and ":" in config.device:
        raise InvalidRequest(
            f"device is {config.device!r}, but tensor_parallel is {config.tensor_parallel}: say cuda, and choose the "
            "GPUs with CUDA_VISIBLE_DEVICES"
        )


def build_device(
    config: EngineConfig,
    folder: Path,
    tokenizer: Tokenizer,
    pool_pages: PoolPages,
    disk_pages: Callable[[EngineConfig, int, int], int],
) -> tuple[CudaExecutor, str]:
    """Load the model (or this process's part), size the pools by what is left, join the others; and what its costs
    depend on."""
    refuse_unsupported(config)
    size = config.tensor_parallel
    device = Device("cuda:0" if config.device == "cuda" else config.device)
    device.bind()
    if config.num_threads is not None:
        import torch

        torch.set_num_threads(config.num_threads)
    crew = None
    if size > 1:
        meeting = new_folder()
        crew = ProcessCrew([_order(config, folder, rank, meeting) for rank in range(1, size)])
    try:
        model, shard = load_part(
            folder,
            device,
            dtype=config.dtype,
            load_format=config.load_format,
            seed=config.seed,
            size=size,
        )
        token_bytes = model.config.kv_values_per_token * model.dtype.itemsize
        free_bytes = device.free_bytes()
        if crew is not None:
            free_bytes = min(free_bytes, crew.free_bytes)
        budget = int(POOL_SHARE * max(0, free_bytes - WORKING_BYTES)) if device.is_cuda else None
        device_pages, host_pages = pool_pages(config, token_bytes, budget)
        options = Options(deterministic=config.deterministic, max_rows=min(256, config.max_running))
        on_disk = disk_pages(config, token_bytes, device_pages)
        arena = arena_for(
            model,
            device,
            config.page_size,
            device_pages,
            host_pages,
            Path(config.kv_disk) if config.kv_disk is not None else None,
            on_disk,
        )
        group = crew.join(Pools(config.page_size, device_pages, host_pages, options), device) if crew else None
        runner = Runner(model, shard, arena, device, group, options)
    except BaseException:
        if crew is not None:
            crew.close()
        raise
    if device.is_cuda and runner.flashinfer_refused is not None:
        note(_log, logging.WARNING, "flashinfer_off", reason=runner.flashinfer_refused)
    executor = CudaExecutor(runner, eos_ids=tokenizer.eos_ids, vocab_limit=tokenizer.vocab_size, crew=crew)
    key = f"{shard.config}|{config.dtype}|{config.page_size}|{config.deterministic}|{config.num_threads}|{size}"
    return executor, f"{key}|{device.name}|{runner.flashinfer_refused is None}|{runner.graphs is not None}"


def _order(config: EngineConfig, folder: Path, rank: int, meeting: str) -> Load:
    return Load(
        rank=rank,
        size=config.tensor_parallel,
        folder=meeting,
        device=config.device,
        model=str(folder),
        dtype=config.dtype,
        load_format=config.load_format,
        seed=config.seed,
        num_threads=config.num_threads,
    )
