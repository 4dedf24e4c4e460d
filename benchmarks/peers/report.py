"""Results as data, as a table on the screen, and as ``docs/performance.md``.

``python -m benchmarks.peers.report FILE...`` writes the page's tables from the files of ``--json``.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.peers.referee import Finding
from benchmarks.peers.workload import SCENARIOS, Scenario

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
START, END = "<!-- peers: begin -->", "<!-- peers: end -->"
OURS = "caesura"
KEPT_OUT = ("limit", "metric", "title")


def scenario_document(scenario: Scenario, findings: Mapping[tuple[str, str], Finding], limit: float) -> dict[str, Any]:
    """``{system: {figure: [values by repeat], "stolen_share": [...], ...}, "limit": ...}``."""
    document: dict[str, Any] = {"title": scenario.title, "metric": scenario.metric, "limit": limit}
    for (name, system), finding in findings.items():
        if name != scenario.name:
            continue
        entry: dict[str, Any] = {}
        for figure in dict.fromkeys(figure for run in finding.runs for figure in run.figures):
            entry[figure] = [run.figures.get(figure) for run in finding.runs]
        if finding.runs:
            entry["stolen_share"] = [round(run.stolen_share, 4) for run in finding.runs]
            entry["complete"] = all(run.complete for run in finding.runs)
        if finding.failure is not None:
            entry["failure"] = finding.failure
        document[system] = entry
    return document


def agreement(scenario: Scenario, findings: Mapping[tuple[str, str], Finding]) -> list[str]:
    """How far each peer's tokens agree with ours: other orders of summation part ways at the first near tie."""
    ours = findings.get((scenario.name, OURS))
    if ours is None or scenario.name != "a":
        return []
    words = []
    for (name, system), finding in findings.items():
        if name == scenario.name and system != OURS and finding.runs and ours.runs:
            pairs = [(one.tokens, other.tokens) for one, other in zip(ours.runs, finding.runs, strict=False)]
            same = [common_prefix(one, other) for one, other in pairs]
            words.append(
                f"tokens of (a) equal to {system}'s: the first {', '.join(map(str, same))} of {len(pairs[0][0])}"
            )
    return words


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens agree from the beginning."""
    differing = (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(one), len(other)))


def rows(document: Mapping[str, Any]) -> list[tuple[str, str, str, str, str, str, str]]:
    """Scenario, system, median, spread, share of the limit, ratio of ours to it, stolen share: as texts."""
    found = []
    for name, scenario in document["scenarios"].items():
        systems = {key: value for key, value in scenario.items() if key not in KEPT_OUT}
        ours = _median(systems.get(OURS, {}), scenario["metric"])
        for system, entry in systems.items():
            median = _median(entry, scenario["metric"])
            if median is None:
                found.append((name, system, "-", entry.get("failure", "not run"), "", "", ""))
                continue
            values = entry[scenario["metric"]]
            lacking = "" if entry["complete"] else ", incomplete"
            spread = f"{_figures(min(values))} - {_figures(max(values))}{lacking}"
            ratio = "" if ours is None or system == OURS else f"{ours / median:.2f}"
            share = f"{median / scenario['limit']:.0%}"
            found.append((name, system, _figures(median), spread, share, ratio, f"{max(entry['stolen_share']):.1%}"))
        found.append((name, "limit", _figures(scenario["limit"]), "", "", "", ""))
    return found


def _figures(rate: float) -> str:
    """Three figures, and no fewer than there are before the point."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _median(entry: Mapping[str, Any], metric: str) -> float | None:
    return statistics.median(entry[metric]) if entry.get(metric) else None


def table(document: Mapping[str, Any]) -> Table:
    """For the screen."""
    title = f"{document['model']}, quantization {document['quantization']}, {document['repeats']} repeats, tok/s"
    found = Table(title=f"{title}, CPU stolen {document['stolen_cpu_share']:.1%}", title_justify="left")
    for heading in ("", "system", "median", "spread", "of limit", "ours / it", "stolen, most"):
        found.add_column(heading, justify="left" if heading in ("", "system", "spread") else "right")
    last = None
    for row in rows(document):
        if last not in (None, row[0]):
            found.add_section()
        found.add_row(*row)
        last = row[0]
    return found


def markdown(document: Mapping[str, Any]) -> str:
    """One document as a section of the page."""
    machine, limits = document["hardware"], document["limits"]["best"]
    lines = [
        f"### {document['model']}, {'float32' if document['quantization'] == 'none' else document['quantization']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {document['when'][:10]}, commit "
        f"{str(document['software']['commit'])[:9]}; "
        f"reads {limits['read_bytes_s'] / 1e9:.1f} GB/s, float32 "
        f"{max(limits['torch_ops_s'], limits['native_ops_s']) / 1e9:.0f} GFLOP/s, int8 "
        f"{limits['int8_ops_s'] / 1e9:.0f} GOP/s; "
        f"{document['repeats']} repeats, CPU stolen {document['stolen_cpu_share']:.1%}.",
        "",
        "| | system | median tok/s | spread | of limit | ours / it |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(row[:6])} |" for row in rows(document)]
    return "\n".join([*lines, "", *(f"- {note}" for note in document["notes"]), ""])


def fill(page: str, sections: str) -> str:
    """The page with everything between its marks replaced. Raises ValueError without marks."""
    before, begin, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {START} ... {END}")
    return f"{before}{START}\n\n{sections}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    """Write the page's tables; 2 without files."""
    if not arguments:
        print("give the JSON files of python -m benchmarks.peers --json", file=sys.stderr)
        return 2
    documents = [json.loads(Path(name).read_text()) for name in arguments]
    titles = "\n".join(f"- **{scenario.name}**: {scenario.title}" for scenario in SCENARIOS.values())
    sections = "\n".join(markdown(document) for document in documents)
    PAGE.write_text(fill(PAGE.read_text(), f"{titles}\n\n{sections}"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
