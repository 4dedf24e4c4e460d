"""What ``caesura top`` draws: figures, pools, contexts, decisions, tools. Names may be anybody's: only text here."""

from __future__ import annotations

from typing import Any, Protocol

from caesura.lang.cli.live import SHORT, STYLES, megabytes
from caesura.lang.printable import printable
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

BAR_CHARS = 30
SHOWN_DECISIONS = 6
SHOWN_TOOLS = 6
RATE_WINDOW_S = 5.0
ORDER = ("running", "queued", "preserved", "swapped", "discarded", "released", "idle")


class Past(Protocol):
    """What was told before: ``url``, and the latest samples and decisions, oldest first."""

    url: str
    samples: list[dict[str, Any]]
    decisions: list[dict[str, Any]]


def top_view(past: Past, state: dict[str, Any], lost: str | None, height: int | None = None) -> RenderableType:
    """The whole view. ``height`` bounds the lines, contexts giving way first."""
    server, engine = state["server"], state["engine"]
    decisions = past.decisions[-SHOWN_DECISIONS:][::-1]
    tools = engine["tools"][:SHOWN_TOOLS]
    parts: list[RenderableType] = [_heading(past, server, engine, lost), *_pools(engine), Text()]
    fixed = 12 + (len(decisions) + 2 if decisions else 0) + (len(tools) + 2 if tools else 0)
    room = len(engine["contexts"]) if height is None else max(3, height - fixed)
    parts.append(_contexts(engine, room))
    if decisions:
        parts += [Text(), _decisions(decisions, engine["now_s"])]
    if tools:
        parts += [Text(), _tools(tools)]
    return Group(*parts)


def throughput(samples: list[dict[str, Any]], engine: dict[str, Any]) -> float:
    """Tokens computed a second, over the last seconds."""
    recent = [sample for sample in samples if sample["at_s"] >= engine["now_s"] - RATE_WINDOW_S]
    if not recent or engine["now_s"] - recent[0]["at_s"] < 0.2:
        return 0.0
    done: float = engine["pool"]["tokens_computed"] - recent[0]["tokens_computed"]
    return done / float(engine["now_s"] - recent[0]["at_s"])


def seconds(value: float | None) -> str:
    """A duration in few characters."""
    if value is None:
        return "?"
    for limit, unit, size in ((0.0995, "ms", 0.001), (120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if value < limit:
            shown = value / size
            return f"{shown:.1f} {unit}" if unit == "s" and shown < 9.95 else f"{shown:.0f} {unit}"
    return f"{value / 86400:.0f} d"


def _heading(past: Past, server: dict[str, Any], engine: dict[str, Any], lost: str | None) -> Text:
    account, pool = engine["account"], engine["pool"]
    again = account["tokens_recomputed"] / max(1, account["tokens_computed"])
    copied = int((account["pages_out"] + account["pages_in"]) * engine["page_bytes"])
    text = Text()
    text.append("// ", "green").append("caesura ", "bold").append(past.url, "dim")
    text.append("  model ", "dim").append(_clean(str(server["model"])), "bold")
    text.append("  policy ", "dim").append(_clean(str(engine["policy"])), "bold")
    text.append("  up ", "dim").append(seconds(server["uptime_s"]), "bold")
    if server["draining"]:
        text.append("  draining", "yellow")
    text.append(f"\n{throughput(past.samples, engine):,.0f} tokens/s", "bold")
    text.append(f"   {pool['running']} running", STYLES["running"]).append(
        f"  {pool['queued']} queued", STYLES["queued"]
    )
    text.append(f"  {pool['paused']} paused", STYLES["preserved"])
    text.append(f"   {account['tokens_computed']:,.0f} computed, {again:.1%} again, {megabytes(copied)} copied", "dim")
    text.append(f", waste {account['waste_token_s']:,.0f} token-s", "dim")
    if lost:
        text.append(f"\n{_clean(lost)}; trying again", "bold red")
    return text


def _pools(engine: dict[str, Any]) -> list[Text]:
    pool = engine["pool"]
    device = [
        ("running", pool["running_pages"], "green", "█"),
        ("preserved", pool["paused_pages"], "cyan", "▓"),
        ("cached", pool["cached_pages"], "magenta", "▒"),
        ("free", pool["free_pages"], "dim", "░"),
    ]
    used = pool["host_used_pages"]
    host = [("copies", used, "blue", "▓"), ("free", engine["host_pages"] - used, "dim", "░")]
    lines = [_bar("device", device, engine["device_pages"], engine["page_size"])]
    if engine["host_pages"]:
        lines.append(_bar("host", host, engine["host_pages"], engine["page_size"]))
    return lines


def _bar(title: str, parts: list[tuple[str, int, str, str]], total: int, page_size: int) -> Text:
    text = Text(f"{title:<7}")
    drawn = seen = 0
    for _, pages, style, char in parts:
        seen += pages
        width = round(BAR_CHARS * seen / max(1, total)) - drawn
        text.append(char * width, style)
        drawn += width
    text.append(f" {total * page_size:,} tokens")
    for name, pages, style, char in parts:
        text.append(f"  {char} ", style)
        text.append(f"{name} {100 * pages / max(1, total):.0f}%")
    return text


def _contexts(engine: dict[str, Any], room: int) -> RenderableType:
    contexts = sorted(engine["contexts"], key=lambda context: _place(context["state"]))
    if not contexts:
        return Text("no contexts: the engine is idle", "dim")
    table = _table(("context", "right", 8), ("state", "left", 9), ("waits for", "left", None), ("for", "right", 7))
    table.add_column("expected", justify="right", no_wrap=True, width=8)
    table.add_column("tokens", justify="right", no_wrap=True, width=9)
    table.add_column("on device", justify="right", no_wrap=True, width=9)
    for context in contexts[:room]:
        tokens, held = context["num_tokens"], context["held_tokens"]
        table.add_row(
            f"#{context['id']}",
            Text(_clean(context["state"]), STYLES.get(context["state"], "")),
            Text(_clean(context["tool"])),
            seconds(max(0.0, engine["now_s"] - context["since_s"])),
            seconds(context["expected_remaining_s"]) if context["tool"] else "",
            f"{tokens:,}",
            Text(f"{100 * held / max(1, tokens):.0f}%", "" if held else "dim"),
        )
    hidden = engine["num_contexts"] - min(room, len(contexts))
    return Group(table, Text(f"and {hidden} more", "dim")) if hidden > 0 else table


def _place(state: str) -> int:
    return ORDER.index(state) if state in ORDER else len(ORDER)


def _decisions(decisions: list[dict[str, Any]], now_s: float) -> Table:
    table = _table(("ago", "right", 7), ("context", "right", 8), ("did", "left", 6), ("tool", "left", 16))
    for name in ("keep", "swap", "drop"):
        table.add_column(name, justify="right", no_wrap=True, width=7)
    table.add_column("why", no_wrap=True, overflow="ellipsis", ratio=1, style="dim")
    table.expand = True
    for decision in decisions:
        action, costs = decision["action"], decision["costs"]
        cells = [
            Text(_cost(costs[f"{name}_token_s"]), "bold" if name == action else "dim")
            for name in ("preserve", "swap", "discard")
        ]
        style = STYLES.get(
            {"preserve": "preserved", "swap": "swapped", "discard": "discarded"}.get(action, "released"), ""
        )
        table.add_row(
            seconds(max(0.0, now_s - decision["now"])),
            f"#{decision['context_id']}",
            Text(_clean(SHORT.get(action, action)), style),
            Text(_clean(decision["tool"]) or "idle"),
            *cells,
            Text(_clean(decision["reason"])),
        )
    return table


def _tools(tools: list[dict[str, Any]]) -> Table:
    table = _table(("tool", "left", None), ("waiting", "right", 8), ("calls", "right", 8), ("median", "right", 8))
    table.add_column("longest", justify="right", no_wrap=True, width=8)
    for tool in tools:
        known = tool["calls"] > 0
        table.add_row(
            Text(_clean(tool["tool"])),
            str(tool["waiting"] or ""),
            f"{tool['calls']:,}",
            seconds(tool["median_s"]) if known else "",
            seconds(tool["longest_s"]) if known else "",
        )
    return table


def _table(*columns: tuple[str, Any, int | None]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), show_edge=False, header_style="dim")
    for name, justify, width in columns:
        low, high = (None, None) if width is not None else (16, 36)
        table.add_column(
            name, justify=justify, no_wrap=True, width=width, min_width=low, max_width=high, overflow="ellipsis"
        )
    return table


def _clean(text: str) -> str:
    """Without control characters: a name must not steer the terminal."""
    return printable(text, keep="")


def _cost(value: float | None) -> str:
    if value is None:
        return "inf"
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.1 or not value else f"{value:.3f}"
