"""What a study found, as tables: on the screen and in Markdown."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

RIVALS = ("discard", "lru_host", "infercept", "oracle")


def capacity_rows(document: dict[str, Any], label: str) -> list[dict[str, Any]]:
    """One row a policy, the strongest first: capacity, spread, ratio to rivals, and the run nearest below it."""
    seeds = document["capacity_seeds_rps"][label]
    medians = document["capacity_rps"][label]
    rows = []
    for policy, rps in sorted(medians.items(), key=lambda item: -item[1]):
        values = [entry["rps"] for entry in seeds[policy]]
        row: dict[str, Any] = {"policy": policy, "rps": rps, "low": min(values), "high": max(values)}
        row |= {f"to_{rival}": rps / medians[rival] if rival in medians else None for rival in RIVALS}
        rows.append(row | {"run": _below(document, label, policy, rps)})
    return rows


def _below(document: dict[str, Any], label: str, policy: str, rps: float) -> dict[str, Any] | None:
    """The complete run at the highest rate that is still carried."""
    runs = [run for run in document["runs"] if run["policy"] == policy and label_of(run) == label]
    runs = [run for run in runs if not run["decided_early"] and run["rate_rps"] <= rps * 1.001]
    return max(runs, key=lambda run: float(run["rate_rps"]), default=None)


def label_of(run: dict[str, Any]) -> str:
    """The workload of a run, with its pool size where that was chosen."""
    return run["workload"] if run["kv_tokens"] is None else f"{run['workload']}@{run['kv_tokens']}"


HEADINGS = (
    "policy",
    "requests/s",
    "spread",
    *(f"to {rival}" for rival in RIVALS),
    "resume p50",
    "p99",
    "waste",
    "wait",
)


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, in the order of HEADINGS."""
    run = row["run"]
    ratios = [f"{row[f'to_{rival}']:.2f}" if row[f"to_{rival}"] else "-" for rival in RIVALS]
    spread = f"{row['low']:.3g}-{row['high']:.3g}" if row["low"] != row["high"] else "-"
    if run is None:
        return [row["policy"], f"{row['rps']:.3g}", spread, *ratios, "-", "-", "-", "-"]
    resumed = run["post_tool_ttft_s"]
    return [
        row["policy"],
        f"{row['rps']:.3g}",
        spread,
        *ratios,
        f"{resumed['p50'] * 1e3:.0f} ms" if resumed else "-",
        f"{resumed['p99'] * 1e3:.0f} ms" if resumed else "-",
        f"{run['waste']['waste']['share']:.1%}",
        f"{run['max_wait_s']:.1f} s",
    ]


def screen(document: dict[str, Any]) -> list[Table]:
    """One table a workload."""
    tables = []
    for label in document["capacity_rps"]:
        unloaded_ms = document["unloaded_s"][label.split("@")[0]] * 1e3
        title = f"{label}: requests/s carried at twice the unloaded {unloaded_ms:.1f} ms a token"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in HEADINGS:
            first = heading == "policy"
            table.add_column(heading, justify="left" if first else "right", no_wrap=first, overflow="fold")
        for row in capacity_rows(document, label):
            table.add_row(*cells(row))
        tables.append(table)
    return tables


def markdown(document: dict[str, Any]) -> str:
    """The same tables for a page."""
    parts = []
    for label in document["capacity_rps"]:
        unloaded_ms = document["unloaded_s"][label.split("@")[0]] * 1e3
        lines = [f"**{label}** (unloaded: {unloaded_ms:.1f} ms a token)", ""]
        lines.append("| " + " | ".join(HEADINGS) + " |")
        lines.append("|---" + "|---:" * (len(HEADINGS) - 1) + "|")
        lines += ["| " + " | ".join(cells(row)) + " |" for row in capacity_rows(document, label)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def curve(document: dict[str, Any], label: str, policy: str) -> list[tuple[float, dict[str, Any]]]:
    """Complete runs by rate (median over the seeds is the caller's business)."""
    found = [
        (run["rate_rps"], run)
        for run in document["runs"]
        if run["policy"] == policy and label_of(run) == label and not run["decided_early"]
    ]
    return sorted(found, key=lambda pair: float(pair[0]))


def seconds_used(document: dict[str, Any]) -> float:
    """Processor seconds of all runs."""
    return sum(float(run.get("wall_s", 0.0)) for run in document["runs"])
