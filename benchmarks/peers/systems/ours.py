"""Caesura: the engine on a thread of this process (``EngineService``), contexts that pause while their tools run."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from caesura.runtime.api import Handle, PendingCall
from caesura.runtime.config import EngineConfig
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.service import EngineService

from benchmarks.peers.systems import MAX_RUNNING, Settings, Unsupported
from benchmarks.peers.workload import Reply

DISK_SHARE = 4  # of the disk tier, in small pools


def engine_config(settings: Settings) -> EngineConfig:
    """The defaults, with the pools that the scenario allows. Raises Unsupported for what this version lacks."""
    known = {field.name for field in fields(EngineConfig)}
    wanted: dict[str, Any] = {"num_threads": settings.threads, "max_running": MAX_RUNNING}
    if settings.quantization != "none":
        if "quantization" not in known:
            raise Unsupported("this version has no quantization")
        wanted["quantization"] = settings.quantization
    if settings.pool == "ample":
        wanted |= {"kv_tokens": settings.ample_tokens, "host_kv_tokens": 0}
    elif settings.pool == "tiered":
        wanted |= {"kv_tokens": settings.small_tokens, "host_kv_tokens": settings.ample_tokens}
    else:
        wanted |= {"kv_tokens": settings.small_tokens, "host_kv_tokens": 0}
        if "kv_disk" in known:
            wanted |= {"kv_disk": settings.scratch, "kv_disk_tokens": settings.ample_tokens * DISK_SHARE}
    return EngineConfig(model=settings.model, **wanted)


class Ours:
    """A service and what it was made from."""

    def __init__(self, settings: Settings) -> None:
        self._config = engine_config(settings)
        self._service = EngineService.start(self._config)

    def about(self) -> dict[str, str]:
        config = self._config
        default = EngineConfig()
        changed = {
            field.name: str(getattr(config, field.name))
            for field in fields(config)
            if getattr(config, field.name) != getattr(default, field.name) and field.name not in ("model", "kv_disk")
        }
        return {"door": "EngineService, in process", "policy": config.policy, **changed}

    async def session(self) -> Conversation:
        return Conversation(await self._service.open())

    async def close(self) -> None:
        self._service.close()


class Conversation:
    """One context: only what is new is sent, and the engine hears when a tool begins."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def turn(self, token_ids: list[int], new_tokens: int) -> Reply:
        await self._handle.append(token_ids)
        tokens: list[int] = []
        cached = None
        params = SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        async for chunk in self._handle.generate(params):
            tokens += chunk.token_ids
            if chunk.finish is not None:
                cached = chunk.finish.cached_tokens
        return Reply(tokens, cached)

    async def tool_begins(self) -> None:
        await self._handle.pause([PendingCall("tool")])

    async def close(self) -> None:
        await self._handle.close()


def open_system(settings: Settings) -> Ours:
    """See the package."""
    return Ours(settings)
