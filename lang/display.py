"""How states look in a notebook. Static HTML, readable without scripts."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from caesura.lang.state import ProgramState

MAX_CHARS = 20_000


def state_html(state: ProgramState) -> str:
    """Variables as a table above the text. Does not wait: a running program shows what is there."""
    phase = "failed" if state.failure else "done" if state.done else "running"
    rows = "".join(
        f"<tr><td style='text-align:left'><code>{html.escape(name)}</code></td>"
        f"<td style='text-align:left'>{html.escape(_clip(str(value)))}</td></tr>"
        for name, value in state.variables.items()
    )
    core = state.core_or_none
    text = html.escape(_clip(core.text())) if core is not None else ""
    error = f"<p><b>{html.escape(str(state.failure))}</b></p>" if state.failure else ""
    usage = state.usage()
    head = (
        f"{html.escape(state.execution.program)}: {phase}, {usage.generations} generations, "
        f"{usage.completion_tokens} tokens, {usage.tool_calls} tool calls"
    )
    return (
        f"<details open><summary>{head}</summary>{error}<table>{rows}</table>"
        f"<pre style='white-space:pre-wrap'>{text}</pre></details>"
    )


def _clip(text: str) -> str:
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]} [{len(text) - MAX_CHARS} more characters]"
