"""The same loads on the engine of this machine, in real time: a dummy model, tool times scaled down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from caesura.runtime.build import build
from caesura.runtime.clock import MonotonicClock
from caesura.runtime.config import EngineConfig
from caesura.runtime.engine import Engine
from caesura.runtime.executors.torch_cpu import TorchExecutor, keep_operators_here
from caesura.runtime.sim import Simulation

from benchmarks.dummy import dummy_checkpoint
from benchmarks.pause.profiles import Machine


class WaitingClock(MonotonicClock):
    """Real time; moving it forward is sleeping."""

    def advance_to(self, moment: float) -> None:
        """Sleep until ``moment`` (not at all if it has passed)."""
        left = moment - self.now()
        if left > 0:
            time.sleep(left)


@contextmanager
def real_engine(model: str, policy: str, machine: Machine) -> Iterator[Engine]:
    """An engine on this machine with the pools, limits and profile of ``machine``; closed in the end."""
    threads = torch.get_num_threads()
    with dummy_checkpoint(model) as folder:
        config = EngineConfig(
            model=str(folder),
            load_format="dummy",
            device=machine.device,
            dtype=machine.dtype,
            policy=policy,
            page_size=machine.page_size,
            kv_tokens=machine.kv_tokens,
            host_kv_tokens=machine.host_tokens,
            max_step_tokens=machine.max_step_tokens,
            max_running=machine.max_running,
            num_threads=machine.threads,
            profile=machine.profile,
        )
        engine = build(config).engine
    if isinstance(engine.executor, TorchExecutor) and engine.executor.native_refused is None:
        keep_operators_here()  # as on the thread of an EngineService
    try:
        yield engine
    finally:
        engine.executor.close()
        torch.set_num_threads(threads)


def real_simulation(engine: Engine, on_step: Callable[[], None] = lambda: None) -> Simulation:
    """The simulator's event loop around a real engine."""
    return Simulation(engine, WaitingClock(), on_step)
