"""Figures of a study: latency against load, where the waste goes, latency against memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.pause.report import at_common_rate, curve, limit_s, workload_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAUSES = (
    ("idle", "held by paused contexts, nobody waiting", "#c9d7e8"),
    ("preserve", "held by paused contexts while others wait", "#4c78a8"),
    ("recompute", "batch held up by recomputing", "#e45756"),
    ("swap", "at either end of a copy", "#f2b447"),
)
STRONG = {"min_waste": "#d62728", "oracle": "#000000"}
PALETTE = ("#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#ff7f0e")
DASHES = ("-", "--", ":")


def draw_all(document: dict[str, Any], folder: Path) -> list[Path]:
    """All figures for which the document has runs, as PNG files; returns their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for label in document["capacity_rps"]:
        if any(len(curve(document, label, policy)) > 2 for policy in document["capacity_rps"][label]):
            paths.append(_save(_latency(document, label), folder / f"latency-{_file(label)}.png"))
            paths.append(_save(_throughput(document, label), folder / f"throughput-{_file(label)}.png"))
            paths.append(_save(_waste(document, label), folder / f"waste-{_file(label)}.png"))
            paths.append(_save(_pareto(document, label), folder / f"pareto-{_file(label)}.png"))
    sized = {workload_of(document, label) for label in document["capacity_rps"] if label not in document["unloaded_s"]}
    return paths + [_save(_memory(document, name), folder / f"memory-{_file(name)}.png") for name in sorted(sized)]


def _file(label: str) -> str:
    return re.sub(r"\W+", "-", Path(label).name)


def _save(figure: Figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path


def styles(policies: list[str]) -> dict[str, tuple[str, str, float]]:
    """Colour, dash and width by policy; the same policy looks the same in every figure of a study."""
    found = {}
    plain = [policy for policy in sorted(policies) if policy not in STRONG]
    for number, policy in enumerate(plain):
        found[policy] = (PALETTE[number % len(PALETTE)], DASHES[number // len(PALETTE) % len(DASHES)], 1.4)
    return found | {policy: (color, "-", 2.4) for policy, color in STRONG.items()}


def _figure(width: float = 8.0, height: float = 4.6) -> tuple[Figure, Axes]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    return figure, axes


def _curves(axes: Axes, document: dict[str, Any], label: str, metric: str) -> float:
    """A line for each policy that has complete runs, the strongest first; returns the highest rate."""
    medians = document["capacity_rps"][label]
    look, most = styles(list(medians)), 0.0
    for policy in sorted(medians, key=lambda name: -medians[name]):
        points = [(rate, run[metric]) for rate, run in curve(document, label, policy)]
        if points:
            color, dash, width = look[policy]
            axes.plot(*zip(*points, strict=True), dash, color=color, linewidth=width, marker=".", label=policy)
            most = max(most, points[-1][0])
    return most


def _latency(document: dict[str, Any], label: str) -> Figure:
    figure, axes = _figure()
    limit = limit_s(document, label)
    _curves(axes, document, label, "normalized_latency_s")
    axes.axhline(limit, color="#888888", linewidth=1, linestyle="--")
    axes.annotate("twice unloaded", (0.005, limit), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    axes.set_ylim(0, 2.5 * limit)
    axes.set_xlim(left=0)
    axes.set_xlabel("requests per second")
    axes.set_ylabel("normalized latency (s per token)")
    axes.set_title(f"{label}: latency against load", loc="left")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), title="by load carried")
    return figure


def _throughput(document: dict[str, Any], label: str) -> Figure:
    """What gets done when more comes than can be done."""
    figure, axes = _figure()
    most = _curves(axes, document, label, "throughput_rps")
    axes.plot([0, most], [0, most], color="#888888", linewidth=1, linestyle="--", label="all of it")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests per second that arrive")
    axes.set_ylabel("requests per second that are completed")
    axes.set_title(f"{label}: throughput against load", loc="left")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), title="by load carried")
    return figure


def _waste(document: dict[str, Any], label: str) -> Figure:
    """Where the memory goes that does no work."""
    by_policy, rate = at_common_rate(document, label)
    figure, axes = _figure(height=0.32 * len(by_policy) + 1.6)
    axes.grid(axis="x", color="#e6e6e6")
    axes.grid(axis="y", visible=False)
    order = sorted(by_policy, key=lambda name: float(by_policy[name]["waste"]["waste"]["share"]), reverse=True)
    left = dict.fromkeys(order, 0.0)
    for cause, words, color in CAUSES:
        shares = []
        for policy in order:
            waste = by_policy[policy]["waste"]
            share = waste[cause]["share"] - (waste["preserve"]["share"] if cause == "idle" else 0.0)
            shares.append(100 * max(0.0, share))
        axes.barh(order, shares, left=list(left.values()), color=color, label=words, height=0.7)
        left = {policy: left[policy] + share for policy, share in zip(order, shares, strict=True)}
    axes.set_xlabel("share of the KV pool over the run (%)")
    axes.set_title(f"{label}: memory that does no work, at {rate:.3g} requests/s", loc="left")
    axes.legend(
        frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.55 / (0.1 * len(by_policy) + 1)), ncols=2
    )
    return figure


def _pareto(document: dict[str, Any], label: str) -> Figure:
    """Latency and memory in use at one load: left and low is good."""
    by_policy, rate = at_common_rate(document, label)
    figure, axes = _figure(7.0, 4.6)
    look = styles(list(by_policy))
    for policy, run in by_policy.items():
        at = run["used_tokens_mean"] / 1000, run["normalized_latency_s"] * 1e3
        axes.plot(*at, "o", color=look[policy][0], markersize=8 if policy in STRONG else 6)
        axes.annotate(policy, at, xytext=(6, 3), textcoords="offset points", fontsize=8, color=look[policy][0])
    axes.set_xlabel("KV held on the device, mean (thousand tokens)")
    axes.set_ylabel("normalized latency (ms a token)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_title(f"{label}: latency and memory at {rate:.3g} requests/s", loc="left")
    return figure


def _pool_tokens(label: str) -> int:
    return int(label.rpartition("@")[2])


def _memory(document: dict[str, Any], workload: str) -> Figure:
    """The load each policy carries on pools of several sizes."""
    figure, axes = _figure()
    labels = sorted(
        (label for label in document["capacity_rps"] if label.rpartition("@")[0] == workload), key=_pool_tokens
    )
    policies = list(document["capacity_rps"][labels[0]])
    look = styles(policies)
    for policy in policies:
        points = [
            (_pool_tokens(label) / 1000, document["capacity_rps"][label][policy])
            for label in labels
            if policy in document["capacity_rps"][label]
        ]
        color, dash, width = look[policy]
        axes.plot(*zip(*points, strict=True), dash, color=color, linewidth=width, marker="o", label=policy)
    axes.set_xlabel("KV pool on the device (thousand tokens)")
    axes.set_ylabel("requests/s at twice the unloaded latency")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_title(f"{workload}: load carried against memory", loc="left")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
