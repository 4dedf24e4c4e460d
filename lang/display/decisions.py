"""A pause decision: what was done with the KV, why, and the three costs it was chosen from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from caesura.lang.display.markup import Markup, folded, join, listed, table, tag, view

BAR_CHARS = 24
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def decision_html(decision: Any) -> str:
    """One decision, on its own."""
    return view(decision_part(decision))


def decisions_html(decisions: Sequence[Any]) -> str:
    """Several, in order."""
    if not decisions:
        return view(tag("span", "No pause was long enough to decide about.", cls="cz-soft"))
    return view(*decision_parts(decisions, is_open=True))


def decision_parts(decisions: Sequence[Any], *, is_open: bool = False) -> list[Markup]:
    """Several, one below the other."""
    return listed(decisions, "decisions", lambda decision: decision_part(decision, is_open=is_open))


def decision_part(decision: Any, *, is_open: bool = True) -> Markup:
    """The decision in a line; unfolded, the arithmetic."""
    action = decision.action.value
    summary = join(
        tag("b", action, cls=f"cz-{action}"), f" while {decision.tool or 'nothing'} runs: {decision.reason} ",
        tag("span", f"({decision.policy})", cls="cz-soft"),
    )  # fmt: skip
    return folded(summary, costs_table(decision), _facts(decision), is_open=is_open)


def costs_table(decision: Any) -> Markup:
    """Three bars on one scale, in token-seconds of KV memory wasted."""
    costs = {name: getattr(decision.costs, f"{name}_token_s") for name in ("preserve", "swap", "discard")}
    finite = [cost for cost in costs.values() if cost < float("inf")]
    most = max(finite, default=0.0)
    lines = []
    for name, cost in costs.items():
        chosen = name == decision.action.value
        cells = [
            tag("th", f"{name} ✓" if chosen else name),
            tag("td", bar(cost / most if most > 0 else 0.0), cls=f"cz-{name}"),
            tag("td", amount(cost)),
        ]
        lines.append(tag("tr", *cells, cls="cz-chosen" if chosen else None))
    return tag("table", *lines, cls="cz-costs")


def bar(share: float) -> str:
    """A bar of block characters, which needs no style; a share above 0 is never invisible."""
    eighths = round(8 * BAR_CHARS * min(max(share, 0.0), 1.0))
    if share > 0:
        eighths = max(1, eighths)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def amount(cost: float) -> str:
    """Token-seconds, with three digits that say something."""
    if cost == float("inf"):
        return "impossible"
    return f"{cost:,.0f} token·s" if cost >= 100 else f"{cost:.3g} token·s"


def _facts(decision: Any) -> Markup:
    rows: list[list[str]] = [
        ["context", f"{decision.context_tokens:,} tokens, {decision.affected_tokens:,} of them its own"],
        ["pause", f"{decision.elapsed_s:.2f} s so far, {decision.expected_remaining_s:.2f} s expected to come"],
        ["others", f"{decision.batch_tokens:,} tokens in the running batch, {decision.free_pages:,} free pages"],
    ]
    return table(rows, cls="cz-facts")
