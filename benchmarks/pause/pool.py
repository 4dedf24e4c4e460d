"""Chains of runs on several processes. They talk in lines of JSON, and every finished run reaches the disk at once."""

from __future__ import annotations

import functools
import itertools
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.pause.capacity import Search, capacity, carry_out, unloaded
from benchmarks.pause.runs import RunRefused, RunSpec, run
from benchmarks.pause.store import Store

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Chain:
    """One search (``kind`` "capacity"), one measurement of the empty machine ("unloaded") or one run ("run")."""

    kind: str
    spec: RunSpec
    limit_s: float = 0.0
    guess_rps: float = 1.0
    tolerance: float = 1.03
    stretch: float = 1.4


def _runs_of(chain: Chain) -> Search[dict[str, Any]]:
    if chain.kind == "unloaded":
        return {"unloaded_s": (yield from unloaded(chain.spec))}
    if chain.kind == "run":
        return {"runs": [(yield chain.spec)]}
    found = yield from capacity(chain.spec, chain.limit_s, chain.guess_rps, chain.tolerance, stretch=chain.stretch)
    return {"rps": found.rps, "low_rps": found.low_rps, "high_rps": found.high_rps, "runs": list(found.runs)}


def _known_or_new(spec: RunSpec, store: Store, emit: Emit) -> dict[str, Any]:
    """A known run is taken from the store, a new one is emitted."""
    known = store.find(spec)
    if known is not None:
        return known
    result = run(spec)
    emit({"spec": asdict(spec), "result": result})
    return result


def run_all(
    chains: Iterable[Chain],
    store: Store,
    jobs: int,
    noted: Callable[[Chain, dict[str, Any]], None],
    *,
    in_turns: int = 1,
) -> Iterator[tuple[Chain, dict[str, Any]]]:
    """Outcomes as they come; a chain is asked for when somebody is free to take it.

    ``noted`` hears of each new run. One job runs here, more in processes of their own. ``in_turns``, with one job: so
    many chains make a run each before any of them makes the next.
    """
    if jobs <= 1:
        yield from _take_turns(chains, store, noted, in_turns)
        return
    todo = iter(chains)
    lines: queue.SimpleQueue[tuple[_Worker, dict[str, Any]]] = queue.SimpleQueue()
    workers = [_Worker(store.path, lines) for _ in range(jobs)]
    try:
        busy = sum(worker.give(next(todo, None)) for worker in workers)
        while busy:
            worker, line = lines.get()
            given = worker.chain
            if "refused" in line:
                raise RunRefused(line["refused"])
            if given is None or "failed" in line:
                raise RuntimeError(f"a worker failed at {given}: {line.get('failed')}")
            if "spec" in line:
                store.add(RunSpec(**line["spec"]), line["result"])
                noted(given, line["result"])
                continue
            yield given, line
            busy -= not worker.give(next(todo, None))
    finally:
        for worker in workers:
            worker.stop()


def _take_turns(
    chains: Iterable[Chain], store: Store, noted: Callable[[Chain, dict[str, Any]], None], in_turns: int
) -> Iterator[tuple[Chain, dict[str, Any]]]:
    """There and back again, so that a machine that becomes steadily slower does so for all alike."""

    def keep(chain: Chain, line: dict[str, Any]) -> None:
        store.add(RunSpec(**line["spec"]), line["result"])
        noted(chain, line["result"])

    todo = iter(chains)
    while group := list(itertools.islice(todo, in_turns)):
        going: list[tuple[Chain, Search[dict[str, Any]], Any]] = [(chain, _runs_of(chain), None) for chain in group]
        while going:
            waiting = []
            for chain, search, result in going:
                try:
                    spec = search.send(result)
                except StopIteration as end:
                    yield chain, end.value
                else:
                    result = _known_or_new(spec, store, functools.partial(keep, chain))
                    waiting.append((chain, search, result))
            going = waiting[::-1]


class _Worker:
    """A process, and the thread that listens to it."""

    def __init__(self, store: Path, lines: queue.SimpleQueue[tuple[_Worker, dict[str, Any]]]) -> None:
        self.chain: Chain | None = None
        self._lines = lines
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.pause.pool", str(store)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def give(self, chain: Chain | None) -> bool:
        """Set it to work; False when there is none left."""
        self.chain = chain
        if chain is None:
            return False
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(chain)) + "\n")
        self._process.stdin.flush()
        return True

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put((self, json.loads(line)))
        self._lines.put((self, {"failed": "the process ended"}))

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


def work(store_path: Path) -> None:
    """A worker: chains in, one a line; runs and outcomes out."""
    store = Store(store_path)

    def emit(line: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    for line in sys.stdin:
        record = json.loads(line)
        chain = Chain(**{**record, "spec": RunSpec(**record["spec"])})
        try:
            emit(carry_out(_runs_of(chain), lambda spec: _known_or_new(spec, store, emit)))
        except RunRefused as error:
            emit({"refused": str(error)})


if __name__ == "__main__":
    work(Path(sys.argv[1]))
