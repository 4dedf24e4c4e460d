"""Wiring: an engine from its configuration. The one place where torch enters the runtime."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from caesura.runtime.calibrate import measured, with_disk
from caesura.runtime.clock import MonotonicClock
from caesura.runtime.config import EMBEDDED, EngineConfig
from caesura.runtime.engine import Engine
from caesura.runtime.errors import InvalidRequest
from caesura.runtime.executors.base import Executor, OverlappingExecutor
from caesura.runtime.logs import note
from caesura.runtime.text.template import ChatTemplate, load_template
from caesura.runtime.text.tokenizer import Tokenizer, load_tokenizer
from caesura.scheduler.policies import make_policy
from caesura.scheduler.scheduler import SchedulerConfig

_log = logging.getLogger(__name__)

DEFAULT_KV_BYTES = 1 << 30
MIN_KV_TOKENS = 256
DISK_POOLS = 8  # the file is this many times the device pool, unless told otherwise


@dataclass(frozen=True, slots=True)
class Runtime:
    """An engine with the text layer that belongs to its model."""

    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate
    model_name: str
    vocab_size: int  # the model's own, which the tokenizer may exceed


def build(config: EngineConfig) -> Runtime:
    """Load the model, size the pools, measure the machine, wire the engine. Errors come before anything runs."""
    from caesura.runtime.model.config import read_config
    from caesura.runtime.model.weights import resolve_source

    folder = _embedded_folder() if config.model == EMBEDDED else resolve_source(config.model, config.revision)
    tokenizer = load_tokenizer(folder)
    template = load_template(folder, tokenizer)
    executor: Executor
    overlapping: OverlappingExecutor | None = None
    if config.device == "cpu" and config.tensor_parallel == 1:
        executor, key = _build_cpu(config, folder, tokenizer)
    else:
        from caesura.runtime.build_device import build_device

        executor, key = build_device(config, folder, tokenizer, _pool_pages, _disk_pages)
        overlapping = executor
    disk = executor.num_disk_pages and config.kv_disk
    key += f"|{bool(executor.num_host_pages)}|{disk}"
    profile = config.profile or measured(executor, key, wide=config.device != "cpu")
    if executor.num_disk_pages and not profile.disk_token_s:
        profile = with_disk(executor, profile)
    engine = Engine(
        executor,
        make_policy(config.policy),
        profile,
        MonotonicClock(),
        SchedulerConfig(config.max_step_tokens, config.max_running),
        share_prefixes=config.share_prefixes,
        overlapping=overlapping,
    )
    return Runtime(engine, tokenizer, template, config.model, read_config(folder).vocab_size)


def _build_cpu(config: EngineConfig, folder: Path, tokenizer: Tokenizer) -> tuple[Executor, str]:
    """The CPU's executor, and what its costs depend on."""
    from caesura.runtime.executors.torch_cpu import TorchExecutor
    from caesura.runtime.model import load_model

    model = load_model(folder, dtype=config.dtype, load_format=config.load_format, seed=config.seed)
    token_bytes = model.config.kv_values_per_token * model.dtype.itemsize
    device_pages, host_pages = _pool_pages(config, token_bytes)
    executor = TorchExecutor(
        model,
        page_size=config.page_size,
        num_device_pages=device_pages,
        num_host_pages=host_pages,
        eos_ids=tokenizer.eos_ids,
        deterministic=config.deterministic,
        num_threads=config.num_threads,
        vocab_limit=tokenizer.vocab_size,
        native=config.native,
        quantization=config.quantization,
        kv_disk=Path(config.kv_disk) if config.kv_disk is not None else None,
        num_disk_pages=_disk_pages(config, token_bytes, device_pages),
    )
    if config.native and executor.native_refused is not None:
        note(_log, logging.WARNING, "native_decoder_off", reason=executor.native_refused)
    key = f"{model.config}|{config.dtype}|{config.page_size}|{config.deterministic}|{config.num_threads}"
    return executor, f"{key}|{executor.native_refused is None}|{config.quantization}"


def _embedded_folder() -> Path:
    from caesura.runtime.embedded import checkpoint_path

    return checkpoint_path()


def _pool_pages(config: EngineConfig, token_bytes: int, device_bytes: int | None = None) -> tuple[int, int]:
    """Pages of the device and the host pool, checked against the memory there is.

    ``device_bytes`` are a GPU's for its pool; None: both pools share the system's memory.
    """
    from caesura.runtime.model.memory import available_memory_bytes, require_memory

    kv_tokens = config.kv_tokens
    free_bytes = available_memory_bytes()
    if kv_tokens is None and device_bytes is not None:
        kv_tokens = max(MIN_KV_TOKENS, device_bytes // token_bytes)
    elif kv_tokens is None:
        budget = DEFAULT_KV_BYTES if free_bytes is None else min(DEFAULT_KV_BYTES, free_bytes // 4)
        kv_tokens = max(MIN_KV_TOKENS, min(budget // token_bytes, 1 << 18))
    host_tokens = config.host_kv_tokens
    if host_tokens is None:
        host_tokens = 2 * kv_tokens if make_policy(config.policy).uses_host else 0
        if device_bytes is not None and free_bytes is not None:
            host_tokens = min(host_tokens, free_bytes // 2 // config.tensor_parallel // token_bytes)
    what = f"the KV pools (kv_tokens {kv_tokens}, host_kv_tokens {host_tokens})"
    in_memory = host_tokens if device_bytes is not None else kv_tokens + host_tokens
    require_memory(in_memory * token_bytes, what, "lower kv_tokens or host_kv_tokens")
    return -(-kv_tokens // config.page_size), -(-host_tokens // config.page_size)


def _disk_pages(config: EngineConfig, token_bytes: int, device_pages: int) -> int:
    """Pages of the file in ``kv_disk``; none for a policy that does not swap."""
    if config.kv_disk_tokens and config.kv_disk is None:
        raise InvalidRequest(
            f"kv_disk_tokens is {config.kv_disk_tokens}, but kv_disk names no folder: give one, or leave both out"
        )
    if config.kv_disk is None or not make_policy(config.policy).uses_host:
        return 0
    if config.kv_disk_tokens is not None:
        return -(-config.kv_disk_tokens // config.page_size)
    try:
        free_bytes = shutil.disk_usage(config.kv_disk).free
    except OSError as error:
        raise InvalidRequest(f"kv_disk is {config.kv_disk!r}; it must be a writable folder: {error.strerror}") from None
    return min(DISK_POOLS * device_pages, free_bytes // 2 // (token_bytes * config.page_size))
