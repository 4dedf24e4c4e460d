"""What a study found, as tables: on the screen and in Markdown."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

RIVALS = ("discard", "lru_host", "infercept", "oracle")
OVERLOAD = 1.1  # times the largest capacity: nearer to it somebody may still carry the load


def capacity_rows(document: dict[str, Any], label: str) -> list[dict[str, Any]]:
    """One row a policy, the strongest first: capacity, spread, ratio to rivals, and the run nearest below it."""
    seeds = document["capacity_seeds_rps"][label]
    medians = document["capacity_rps"][label]
    rows = []
    for policy, rps in sorted(medians.items(), key=lambda item: -item[1]):
        values = [entry["rps"] for entry in seeds[policy]]
        row: dict[str, Any] = {"policy": policy, "rps": rps, "low": min(values), "high": max(values)}
        row |= {f"to_{rival}": _ratio(rps, medians.get(rival)) for rival in RIVALS}
        row["to_bound"] = _ratio(rps, bound_rps(document, label))
        rows.append(row | {"run": _below(document, label, policy, rps)})
    return rows


def _ratio(rps: float, to: float | None) -> float | None:
    """None where either carries nothing, or the other was not run."""
    return rps / to if rps and to else None


def workload_of(document: dict[str, Any], label: str) -> str:
    """The workload of a label, which is the workload alone or followed by ``@`` and a pool size."""
    return label if label in document["unloaded_s"] else label.rpartition("@")[0]


def limit_s(document: dict[str, Any], label: str) -> float:
    """The normalized latency at which a load is still carried."""
    return float(document["config"]["latency_factor"] * document["unloaded_s"][workload_of(document, label)])


def bound_rps(document: dict[str, Any], label: str) -> float | None:
    """The least of what would be carried with something given for nothing; None when that was not measured."""
    return min(document.get("bound_rps", {}).get(label, {}).values(), default=None)


def at_common_rate(document: dict[str, Any], label: str) -> tuple[dict[str, dict[str, Any]], float]:
    """A run of every policy at one rate: the highest at which most have a complete run. Those without are left out."""
    curves = {policy: dict(curve(document, label, policy)) for policy in document["capacity_rps"][label]}
    rates = sorted({rate for points in curves.values() for rate in points})
    rate = max(rates, key=lambda rate: (sum(rate in points for points in curves.values()), rate), default=0.0)
    return {policy: points[rate] for policy, points in curves.items() if rate in points}, rate


def _overload(document: dict[str, Any], label: str) -> tuple[dict[str, dict[str, Any]], float] | None:
    """Runs of several policies at one rate that none of them carries; None when there are none."""
    common, rate = at_common_rate(document, label)
    most = max(document["capacity_rps"][label].values())
    return (common, rate) if len(common) > 1 and rate >= OVERLOAD * most else None


def _below(document: dict[str, Any], label: str, policy: str, rps: float) -> dict[str, Any] | None:
    """The complete run at the highest rate, up to the policy's capacity, whose latency is within the limit."""
    limit = limit_s(document, label)
    runs = [run for run in _runs(document, label, policy) if _complete(run) and run["rate_rps"] <= rps * 1.001]
    runs = [run for run in runs if run["normalized_latency_s"] <= limit]
    return max(runs, key=lambda run: float(run["rate_rps"]), default=None)


def _runs(document: dict[str, Any], label: str, policy: str) -> list[dict[str, Any]]:
    return [run for run in document["runs"] if run["policy"] == policy and run["label"] == label]


def _complete(run: dict[str, Any]) -> bool:
    """It went to its end and measured something."""
    return not run["decided_early"] and run["normalized_latency_s"] is not None


def headings(document: dict[str, Any], label: str) -> list[str]:
    """What the columns are, units included; rivals that were not run have none."""
    own = ["own limit"] if label in document.get("own_capacity_rps", {}) else []
    rivals = [f"to {rival}" for rival in RIVALS if rival in document["capacity_rps"][label]]
    rivals += ["to bound"] if bound_rps(document, label) else []
    overload = _overload(document, label)
    beyond = [f"done/s at {overload[1]:.2g}"] if overload else []
    return [
        "policy",
        "requests/s",
        "spread",
        *own,
        *rivals,
        *beyond,
        "p50 ms",
        "p99 ms",
        "again %",
        "waste %",
        "wait s",
    ]


def cells(document: dict[str, Any], label: str, row: dict[str, Any]) -> list[str]:
    """A row as text, in the order of ``headings``."""
    medians, own = document["capacity_rps"][label], document.get("own_capacity_rps", {})
    spread = f"{_load(row['low'])}-{_load(row['high'])}" if row["low"] != row["high"] else "-"
    parts = [row["policy"], _load(row["rps"]), spread]
    if label in own:
        parts.append(_load(own[label][row["policy"]]) if row["policy"] in own[label] else "-")
    compared = [f"to_{rival}" for rival in RIVALS if rival in medians]
    compared += ["to_bound"] if bound_rps(document, label) else []
    parts += ["-" if row[name] is None else f"{row[name]:.2f}" for name in compared]
    if overload := _overload(document, label):
        done = overload[0].get(row["policy"])
        parts.append(f"{done['throughput_rps']:.3g}" if done else "-")
    run = row["run"]
    if run is None:
        return [*parts, "-", "-", "-", "-", "-"]
    resumed = run["post_tool_ttft_s"]
    parts += [f"{resumed[rank] * 1e3:.0f}" if resumed else "-" for rank in ("p50", "p99")]
    again = run["tokens_recomputed"] / max(1.0, run["tokens_computed"])
    return [*parts, f"{again * 100:.1f}", f"{run['waste']['waste']['share'] * 100:.1f}", f"{run['max_wait_s']:.1f}"]


def _load(rps: float) -> str:
    return f"{rps:.3g}" if rps else "none"


def setting(document: dict[str, Any], label: str) -> str:
    """Pools, length, seeds, number and code of a label's runs."""
    runs = [run for run in document["runs"] if run["label"] == label]
    if not runs:
        return "no runs"
    machine = document["config"]["machines"][runs[0]["machine"]]
    kv, host = (machine[pool] if runs[0][pool] is None else runs[0][pool] for pool in ("kv_tokens", "host_tokens"))
    seeds = sorted({run["seed"] for run in runs})
    lengths = sorted({run["minutes"] for run in runs})
    minutes = "-".join(f"{length:g}" for length in (lengths[0], lengths[-1])[: len(lengths)])
    sizes = f"pool {kv:,} and host {host:,} tokens"
    made = f"seeds {', '.join(map(str, seeds))}; {len(runs)} runs, code {document['config']['code']}"
    return f"{sizes}, runs of {minutes} minutes, {made}"


def _title(document: dict[str, Any], label: str) -> str:
    unloaded_ms = document["unloaded_s"][workload_of(document, label)] * 1e3
    bounds = document.get("bound_rps", {}).get(label, {})
    given = "".join(f"; {name} would carry {f'{rps:.3g}/s' if rps else 'nothing'}" for name, rps in bounds.items())
    return f"{label} (unloaded: {unloaded_ms:.1f} ms a token{given})"


def screen(document: dict[str, Any]) -> list[Table]:
    """One table a workload."""
    tables = []
    for label in document["capacity_rps"]:
        title = f"{_title(document, label)}, load carried at twice that"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in headings(document, label):
            first = heading == "policy"
            table.add_column(heading, justify="left" if first else "right", no_wrap=first, overflow="fold")
        for row in capacity_rows(document, label):
            table.add_row(*cells(document, label, row))
        tables.append(table)
    return tables


def markdown(document: dict[str, Any], label: str) -> str:
    """The table of one workload for a page. It begins with what it is and how it was made."""
    columns = headings(document, label)
    lines = [f"**{_title(document, label)}** {setting(document, label)}", "", "| " + " | ".join(columns) + " |"]
    lines.append("|---" + "|---:" * (len(columns) - 1) + "|")
    lines += ["| " + " | ".join(cells(document, label, row)) + " |" for row in capacity_rows(document, label)]
    return "\n".join(lines)


def curve(document: dict[str, Any], label: str, policy: str) -> list[tuple[float, dict[str, Any]]]:
    """Complete runs by rate. All of one seed, so that a curve is one history and not a patchwork."""
    runs = _runs(document, label, policy)
    seed = min((run["seed"] for run in runs), default=0)
    found = [(run["rate_rps"], run) for run in runs if run["seed"] == seed and _complete(run)]
    return sorted(found, key=lambda pair: float(pair[0]))


def seconds_used(document: dict[str, Any]) -> float:
    """Processor seconds of all runs."""
    return sum(float(run.get("wall_s", 0.0)) for run in document["runs"])
