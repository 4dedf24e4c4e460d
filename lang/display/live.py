"""A view that changes in place while a program runs: in a notebook its HTML, in a terminal its tree."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from caesura.lang.runner import runner

if TYPE_CHECKING:
    from caesura.lang.state import ProgramState

EVERY_S = 0.2


def watch(state: ProgramState, every_s: float = EVERY_S) -> None:
    """Show ``state`` until its program has ended; what is left is its last look. Ctrl-C stops looking, not the
    program."""
    if _in_notebook():
        _watch_notebook(state, every_s)
    else:
        _watch_terminal(state, every_s)


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def _watch_notebook(state: ProgramState, every_s: float) -> None:
    from IPython.display import HTML, display

    shown = state._repr_html_()
    handle = display(HTML(shown), display_id=True)  # type: ignore[no-untyped-call]
    while not state.done:
        _wait(state, every_s)
        if (now := state._repr_html_()) != shown:
            shown = now
            handle.update(HTML(shown))  # type: ignore[no-untyped-call]
    handle.update(HTML(state._repr_html_()))  # type: ignore[no-untyped-call]


def _watch_terminal(state: ProgramState, every_s: float) -> None:
    from rich.live import Live

    with Live(state.trace().tree(), auto_refresh=False) as live:
        while not state.done:
            _wait(state, every_s)
            live.update(state.trace().tree(), refresh=True)
        live.update(state.trace().tree(), refresh=True)


def _wait(state: ProgramState, every_s: float) -> None:
    """Until the end, at most ``every_s``; a program that watches another lets it go on."""

    async def end() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(every_s):
                while not state.done:
                    await state.change()

    runner().wait(end())
