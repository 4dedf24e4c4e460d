"""Many runs of one program, a bounded number at a time; one failure takes no other result with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from caesura.lang.errors import BatchError, DefinitionError, ProgramError
from caesura.lang.runner import runner
from caesura.lang.state import ProgramState

if TYPE_CHECKING:
    from caesura.lang.program import Program

AUTO_CONCURRENCY = 1024


def run_batch(
    program: Program,
    batch_kwargs: Sequence[Any],
    *,
    num_threads: int | str = "auto",
    progress_bar: bool = False,
    generator_style: bool = False,
    return_exceptions: bool = False,
    **options: Any,
) -> Any:
    """See `Program.run_batch`."""
    program.split(options, also=run_batch.__kwdefaults__ or ())  # a misspelt option is told once, and not by every run
    is_list = hasattr(batch_kwargs, "__iter__") or hasattr(batch_kwargs, "__getitem__")  # data sets may be indexed only
    if not is_list or isinstance(batch_kwargs, (str, Mapping)):
        raise DefinitionError(
            f"run_batch of {program.name!r}: the items are {batch_kwargs!r}; give a list of dicts or of tuples"
        )
    bound = AUTO_CONCURRENCY if num_threads == "auto" else num_threads
    if not isinstance(bound, int) or bound < 1:
        raise DefinitionError(f"num_threads is {num_threads!r}; it must be 'auto' or at least 1")
    batch = _Batch(program, [_arguments(program, item) for item in batch_kwargs], bound, options)
    if generator_style:
        return batch.results(return_exceptions, progress_bar)
    return list(batch.results(return_exceptions, progress_bar))


def _arguments(program: Program, item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(item, Mapping):
        return (), dict(item)
    if isinstance(item, (list, tuple)):
        return tuple(item), {}
    raise DefinitionError(
        f"run_batch of {program.name!r}: an item is {type(item).__name__}; give dicts, or tuples of arguments"
    )


class _Batch:
    """Starts runs as slots come free, on the loop; the caller takes results in order."""

    def __init__(
        self, program: Program, items: list[tuple[tuple[Any, ...], dict[str, Any]]], bound: int, options: dict[str, Any]
    ) -> None:
        self._program = program
        self._items = items
        self._bound = min(bound, max(len(items), 1))
        self._options = options
        self._outcomes: list[ProgramState | BaseException | None] = [None] * len(items)
        self._changed: asyncio.Event | None = None
        self._feeding: asyncio.Task[None] | None = None
        self._running: set[ProgramState] = set()

    def results(self, return_exceptions: bool, progress_bar: bool) -> Iterator[Any]:
        """Outcomes in order, each as soon as it and all before it are there."""
        states: list[Any] = []
        errors: dict[int, BaseException] = {}
        with _progress(progress_bar, len(self._items), self._program.name) as advance:
            try:
                runner().wait(self._begin())
                for i in range(len(self._items)):
                    outcome = runner().wait(self._outcome(i))
                    error = outcome if isinstance(outcome, BaseException) else outcome.failure
                    advance(error is not None)
                    states.append(outcome)
                    if error is not None:
                        errors[i] = error
                    if return_exceptions and error is not None:
                        yield error
                    elif not isinstance(outcome, BaseException):  # one that never began is told of at the end
                        yield outcome
            finally:
                if len(states) < len(self._items):  # the caller went away: so do the programs
                    runner().call(self._cancel)
        if errors and not return_exceptions:
            raise BatchError(states, errors)

    async def _begin(self) -> None:
        self._changed = asyncio.Event()
        self._feeding = runner().spawn(self._feed())

    async def _feed(self) -> None:
        places = iter(range(len(self._items)))
        workers = [asyncio.ensure_future(self._worker(places)) for _ in range(self._bound)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()

    async def _worker(self, places: Iterator[int]) -> None:
        for i in places:
            args, kwargs = self._items[i]
            state: ProgramState | None = None
            try:
                state = self._program.run(*args, **{**self._options, **kwargs, "use_thread": True})
                self._running.add(state)
                with contextlib.suppress(ProgramError):
                    await state.wait_async()
                self._outcomes[i] = state
            except Exception as error:  # wrong arguments in one item do not stop the others
                self._outcomes[i] = error
            finally:
                if state is not None:
                    self._running.discard(state)
            assert self._changed is not None
            self._changed.set()

    async def _outcome(self, i: int) -> ProgramState | BaseException:
        assert self._changed is not None
        while (outcome := self._outcomes[i]) is None:
            self._changed.clear()
            await self._changed.wait()
        return outcome

    def _cancel(self) -> None:
        for state in self._running:
            state.cancel()
        if self._feeding is not None:
            self._feeding.cancel()


@contextlib.contextmanager
def _progress(wanted: bool, total: int, label: str) -> Iterator[Any]:
    if not wanted:
        yield lambda failed: None
        return
    from rich.progress import Progress

    with Progress(transient=False) as progress:
        bar = progress.add_task(label, total=total)
        failures = 0

        def advance(failed: bool) -> None:
            nonlocal failures
            failures += failed
            told = f"{label} [red]({failures} failed)[/red]" if failures else label
            progress.update(bar, advance=1, description=told)

        yield advance
