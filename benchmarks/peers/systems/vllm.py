"""vLLM on the CPU, through its own asynchronous engine in Python: no HTTP between it and the clients."""

from __future__ import annotations

import itertools
import os
from importlib import metadata
from typing import Any

from benchmarks.peers.systems import MAX_CONTEXT_TOKENS, MAX_RUNNING, Settings
from benchmarks.peers.workload import Reply, Transcript

BLOCK_TOKENS = 128  # its default on a CPU; one block is set aside


class Vllm:
    """An engine, in a process of its own as vLLM does it."""

    def __init__(self, settings: Settings) -> None:
        gib = settings.ample_tokens * settings.kv_token_bytes / 2**30
        cores = sorted(os.sched_getaffinity(0))
        os.environ.update(
            VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)),  # all cores: by default it leaves one to others
            VLLM_CPU_KVCACHE_SPACE=str(max(1, round(gib + 0.5))),
            VLLM_NO_USAGE_STATS="1",
            VLLM_LOGGING_LEVEL="WARNING",
            HF_HUB_OFFLINE="1",
        )
        self._numbers = itertools.count()
        self._engine = self._start(settings)

    def _start(self, settings: Settings) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        more: dict[str, Any] = {}
        if settings.pool != "ample":
            more["num_gpu_blocks_override"] = settings.small_tokens // BLOCK_TOKENS + 1
        longest = MAX_CONTEXT_TOKENS if settings.pool == "ample" else min(MAX_CONTEXT_TOKENS, settings.small_tokens)
        arguments = AsyncEngineArgs(
            model=settings.model,
            dtype="float32",
            max_model_len=longest,
            max_num_seqs=MAX_RUNNING,
            block_size=BLOCK_TOKENS,
            enable_prefix_caching=True,
            disable_log_stats=True,
            **more,
        )
        return AsyncLLM.from_engine_args(arguments)

    def about(self) -> dict[str, str]:
        versions = {name: metadata.version(name) for name in ("vllm-cpu", "torch")}
        offload = "none: refused without a CUDA or XPU device"  # in 0.32: by its connector, after a minute's start
        return {"door": "AsyncLLM", **versions, "block": f"{BLOCK_TOKENS} tokens", "cpu_offload": offload}

    async def session(self) -> Transcript:
        return Transcript(self._complete)

    async def _complete(self, prompt: list[int], new_tokens: int) -> Reply:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        request = {"prompt_token_ids": prompt}
        async for output in self._engine.generate(request, params, str(next(self._numbers))):
            if output.finished:
                return Reply(list(output.outputs[0].token_ids), output.num_cached_tokens)
        raise RuntimeError("vLLM ended a request without its last output")

    async def close(self) -> None:
        self._engine.shutdown()


def open_system(settings: Settings) -> Vllm:
    """See the package."""
    return Vllm(settings)
