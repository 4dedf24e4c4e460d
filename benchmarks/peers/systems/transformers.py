"""Hugging Face ``generate``: requests that wait together make one batch; nothing is kept between two calls."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

from benchmarks.peers.systems import Settings, Unsupported
from benchmarks.peers.workload import Reply, Transcript

GATHER_S = 0.02  # requests that come this close together are one batch


class Transformers:
    """A model, and the requests that wait for it."""

    def __init__(self, settings: Settings) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        if settings.pool != "ample":
            raise Unsupported("generate has no KV pool")
        torch.set_num_threads(settings.threads)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=torch.float32, attn_implementation="sdpa"
        )
        self._model = loaded
        self._model.eval()
        self._waiting: list[tuple[list[int], int, asyncio.Future[Reply]]] = []
        self._working = False
        self._executor = ThreadPoolExecutor(1)  # always the same thread: torch gives each its own pool of helpers

    def about(self) -> dict[str, str]:
        versions = {name: metadata.version(name) for name in ("transformers", "torch")}
        return {"door": "generate, static batches of equal lengths", **versions}

    async def session(self) -> Transcript:
        return Transcript(self._complete)

    async def _complete(self, prompt: list[int], new_tokens: int) -> Reply:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Reply] = loop.create_future()
        self._waiting.append((prompt, new_tokens, answer))
        if not self._working:
            self._working = True
            try:
                await asyncio.sleep(GATHER_S)
                while self._waiting:
                    await self._serve_some(loop)
            finally:
                self._working = False
        return await answer

    async def _serve_some(self, loop: asyncio.AbstractEventLoop) -> None:
        """One batch: everyone whose lengths agree with those of the first in line."""
        prompt, new_tokens, _ = self._waiting[0]
        batch = [one for one in self._waiting if (len(one[0]), one[1]) == (len(prompt), new_tokens)]
        self._waiting = [one for one in self._waiting if one not in batch]
        written = await loop.run_in_executor(self._executor, self._generate, [one[0] for one in batch], new_tokens)
        for (_, _, answer), tokens in zip(batch, written, strict=True):
            answer.set_result(Reply(tokens))

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        import torch

        ids = torch.tensor(prompts)  # [batch, prompt]
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=3,
                eos_token_id=None,
            )
        rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return rows

    async def close(self) -> None:
        self._executor.shutdown()


def open_system(settings: Settings) -> Transformers:
    """See the package."""
    return Transformers(settings)
