"""One module a system, each with ``open_system(settings) -> System``, run by ``worker`` in its environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

MAX_CONTEXT_TOKENS = 4096
MAX_RUNNING = 64


@dataclass(frozen=True, slots=True)
class Settings:
    """What a system is opened with. ``pool`` as in ``workload.Scenario``: how much KV memory it may use.

    ``ample_tokens`` of KV hold everything a scenario needs twice over; ``small_tokens`` is the small pool.
    """

    system: str
    model: str
    pool: str
    quantization: str
    ample_tokens: int
    small_tokens: int
    kv_token_bytes: int
    scratch: str

    @property
    def threads(self) -> int:
        """Cores that may be used."""
        return len(os.sched_getaffinity(0))

    @property
    def pool_tokens(self) -> int:
        """Tokens of the main KV pool."""
        return self.ample_tokens if self.pool == "ample" else self.small_tokens


class Unsupported(Exception):
    """This system cannot be had with these settings; says why."""
