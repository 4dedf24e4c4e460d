"""llama-cpp-python: one sequence at a time, with the cache that ``generate`` keeps of the last one."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

from benchmarks.peers.systems import MAX_CONTEXT_TOKENS, Settings, Unsupported
from benchmarks.peers.workload import Reply, Transcript


class LlamaCpp:
    """A model and the one thread that runs it."""

    def __init__(self, settings: Settings) -> None:
        import llama_cpp

        if settings.pool != "ample":
            raise Unsupported("one sequence has no KV pool to share")
        self._llama = llama_cpp.Llama(
            settings.model,
            n_ctx=MAX_CONTEXT_TOKENS,
            n_threads=settings.threads,
            n_threads_batch=settings.threads,
            verbose=False,
        )
        self._executor = ThreadPoolExecutor(1)

    def about(self) -> dict[str, str]:
        door = "Llama.generate, in process, one request after the other; KV of 2 bytes"
        return {"door": door, "llama-cpp-python": metadata.version("llama-cpp-python")}

    async def session(self) -> Transcript:
        return Transcript(self._complete)

    async def _complete(self, prompt: list[int], new_tokens: int) -> Reply:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._generate, prompt, new_tokens)

    def _generate(self, prompt: list[int], new_tokens: int) -> Reply:
        tokens: list[int] = []
        stream = self._llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        for token in stream:
            tokens.append(int(token))
            if len(tokens) == new_tokens:
                break
        stream.close()
        return Reply(tokens)

    async def close(self) -> None:
        self._executor.shutdown()
        self._llama.close()


def open_system(settings: Settings) -> LlamaCpp:
    """See the package."""
    return LlamaCpp(settings)
