"""OpenVINO GenAI's continuous batching pipeline, stepped by a thread of this process."""

from __future__ import annotations

import asyncio
import queue
import threading
from importlib import metadata
from typing import Any

from benchmarks.peers.systems import MAX_RUNNING, Settings
from benchmarks.peers.workload import Reply, Transcript

BLOCK_TOKENS = 32  # on a CPU
MAX_STEP_TOKENS = 2048


class OpenVino:
    """A pipeline and the thread that steps it."""

    def __init__(self, settings: Settings) -> None:
        import openvino_genai

        scheduling = openvino_genai.SchedulerConfig()
        scheduling.enable_prefix_caching = True
        scheduling.max_num_seqs = MAX_RUNNING
        scheduling.max_num_batched_tokens = MAX_STEP_TOKENS
        scheduling.dynamic_split_fuse = True
        scheduling.num_kv_blocks = -(-settings.pool_tokens // BLOCK_TOKENS)
        threads = {"INFERENCE_NUM_THREADS": settings.threads}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(settings.model, scheduling, "CPU", threads)
        self._requests: queue.Queue[tuple[list[int], int, asyncio.Future[Reply]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="pipeline", daemon=True)
        self._thread.start()

    def about(self) -> dict[str, str]:
        versions = {name: metadata.version(name) for name in ("openvino-genai", "openvino")}
        return {
            "door": "ContinuousBatchingPipeline, in process",
            **versions,
            "kv": "its default width (2 bytes or less)",
        }

    async def session(self) -> Transcript:
        return Transcript(self._complete)

    async def _complete(self, prompt: list[int], new_tokens: int) -> Reply:
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._requests.put((prompt, new_tokens, answer))
        return await answer

    def _run(self) -> None:
        live: dict[int, tuple[Any, list[int], asyncio.Future[Reply]]] = {}
        number = 0
        while True:
            while not live or not self._requests.empty():
                request = self._requests.get()
                if request is None:
                    return
                prompt, new_tokens, answer = request
                number += 1
                live[number] = (self._add(number, prompt, new_tokens), [], answer)
            self._pipeline.step()
            for key, (handle, tokens, answer) in list(live.items()):
                if self._read(handle, tokens):
                    del live[key]
                    answer.get_loop().call_soon_threadsafe(answer.set_result, Reply(tokens))

    def _add(self, number: int, prompt: list[int], new_tokens: int) -> Any:
        import numpy as np
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        return self._pipeline.add_request(number, ids, config)

    @staticmethod
    def _read(handle: Any, tokens: list[int]) -> bool:
        """Collect what is there; whether that was all. The state is read first: tokens may come in between."""
        import openvino_genai

        ended: bool = handle.get_status() != openvino_genai.GenerationStatus.RUNNING
        while handle.can_read():
            for part in handle.read().values():
                tokens.extend(part.generated_ids)
        return ended

    async def close(self) -> None:
        self._requests.put(None)
        await asyncio.to_thread(self._thread.join, 10)


def open_system(settings: Settings) -> OpenVino:
    """See the package."""
    return OpenVino(settings)
