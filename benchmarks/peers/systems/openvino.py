"""OpenVINO GenAI's continuous batching pipeline, stepped by a thread of this process."""

from __future__ import annotations

import asyncio
import queue
import threading
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from benchmarks.peers.systems import MAX_RUNNING, Settings
from benchmarks.peers.workload import Reply, Transcript

BLOCK_TOKENS = 32  # on a CPU
MAX_STEP_TOKENS = 2048
MAX_REFUSALS = 1000


@dataclass(slots=True)
class _Request:
    """One request. The pipeline gives up requests when its pool is short (IGNORED); they are asked for again, from
    where they were, as soon as another one has ended: what a patient client would do."""

    prompt: list[int]
    new_tokens: int
    answer: asyncio.Future[Reply]
    tokens: list[int] = field(default_factory=list)
    handle: Any = None
    refusals: int = 0


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
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": settings.threads}
        if settings.quantization == "none":
            properties["INFERENCE_PRECISION_HINT"] = "f32"  # by default it rounds to bfloat16 where the CPU can
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(settings.model, scheduling, "CPU", properties)
        self._requests: queue.Queue[_Request | None] = queue.Queue()
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
        self._requests.put(_Request(prompt, new_tokens, answer))
        return await answer

    def _run(self) -> None:
        live: dict[int, _Request] = {}
        refused: list[_Request] = []
        number, made_room = 0, False
        while True:
            new = self._new(wait=not live and not refused)
            if new is None:
                return
            if refused and (made_room or not live):
                new, refused = [*refused, *new], []
            for request in new:
                number += 1
                request.handle = self._add(number, request)
                live[number] = request
            self._pipeline.step()
            made_room = False
            for key, request in list(live.items()):
                ended = self._read(request)
                if not ended:
                    continue
                del live[key]
                if ended == "IGNORED" and request.refusals < MAX_REFUSALS:
                    request.refusals += 1
                    refused.append(request)
                else:
                    made_room = True
                    request.answer.get_loop().call_soon_threadsafe(request.answer.set_result, Reply(request.tokens))

    def _new(self, *, wait: bool) -> list[_Request] | None:
        """What has come in; None for the end."""
        found: list[_Request] = []
        while (wait and not found) or not self._requests.empty():
            request = self._requests.get()
            if request is None:
                return None
            found.append(request)
        return found

    def _add(self, number: int, request: _Request) -> Any:
        import numpy as np
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = request.new_tokens - len(request.tokens)
        config.ignore_eos = True
        config.do_sample = False
        ids = openvino.Tensor(np.array([request.prompt + request.tokens], dtype=np.int64))
        return self._pipeline.add_request(number, ids, config)

    @staticmethod
    def _read(request: _Request) -> str:
        """Collect what is there; how it ended, if it has. The state is read first: tokens may come in between."""
        import openvino_genai

        status = request.handle.get_status()
        while request.handle.can_read():
            for part in request.handle.read().values():
                request.tokens.extend(part.generated_ids)
        return "" if status == openvino_genai.GenerationStatus.RUNNING else str(status.name)

    async def close(self) -> None:
        self._requests.put(None)
        await asyncio.to_thread(self._thread.join, 10)


def open_system(settings: Settings) -> OpenVino:
    """See the package."""
    return OpenVino(settings)
