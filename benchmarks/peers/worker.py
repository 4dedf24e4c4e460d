"""One system in a process of its own: reads a scenario a line, answers with its result a line.

``python -m benchmarks.peers.worker SETTINGS``, by ``referee``. What a library prints goes to standard error; the
answers go where standard output was.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import asdict
from importlib import import_module
from typing import Any, TextIO

from benchmarks.peers.systems import Settings, Unsupported
from benchmarks.peers.workload import SCENARIOS, System, run_scenario, warm_up

MODULES = {name: name for name in ("vllm", "openvino", "transformers", "llamacpp")} | {"caesura": "ours"}


async def serve(settings: Settings, answers: TextIO) -> None:
    """Open the system, then run what is asked for until the input ends."""

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    begun = time.perf_counter()
    try:
        opened = import_module(f"benchmarks.peers.systems.{MODULES[settings.system]}").open_system(settings)
    except Unsupported as reason:
        return say(error=str(reason))
    system: System = opened
    say(start_s=time.perf_counter() - begun, about=system.about())
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            task = json.loads(line)
            if task["scenario"] == "warm-up":
                await warm_up(system, task["vocab"])
                say(done=True)
            else:
                result = await run_scenario(system, SCENARIOS[task["scenario"]], task["seed"], task["vocab"])
                say(**asdict(result))
    finally:
        await system.close()
    return None


def main() -> None:
    """Run ``serve`` with the answers kept apart from what libraries print."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        asyncio.run(serve(Settings(**json.loads(sys.argv[1])), answers))
    except Exception as error:  # whatever a library raises is this run's result
        lines = str(error).strip().splitlines()
        answers.write(json.dumps({"error": f"{type(error).__name__}: {lines[-1] if lines else ''}"[:400]}) + "\n")
        answers.flush()
        raise


if __name__ == "__main__":
    main()
