"""Fills the tables of docs/policies.md from what was measured, between ``<!-- NAME -->`` and ``<!-- end -->``.

``python -m benchmarks.pause.page STUDY.json ...`` takes any number of documents written by ``--json``, of studies and
of ``benchmarks fidelity``; parts and workloads for which none was given stay as they are. No figure of a table is typed
by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caesura.scheduler.policies import POLICIES

from benchmarks.pause.profiles import GPTJ, PUBLISHED
from benchmarks.pause.report import markdown
from benchmarks.workloads import WORKLOADS

PAGE = Path(__file__).parent.parent.parent / "docs" / "policies.md"
_TABLE = re.compile(r"^\*\*(\S+) \(unloaded.*\n\n(?:\|.*\n?)+", re.MULTILINE)


def fill(page: str, parts: dict[str, str]) -> str:
    """Replace the named parts. ValueError when the page has no place for one."""
    for name, text in parts.items():
        start, end = _place(page, name)
        page = f"{page[:start]}{text.rstrip()}\n{page[end:]}"
    return page


def _place(page: str, name: str) -> tuple[int, int]:
    """Where a part begins and ends."""
    mark = f"<!-- {name} -->\n"
    if page.count(mark) != 1:
        raise ValueError(f"the page has {page.count(mark)} places <!-- {name} --> ... <!-- end -->; it must have one")
    start = page.index(mark) + len(mark)
    return start, page.index("<!-- end -->", start)


def policy_table() -> str:
    """Name and what it does, from the docstrings."""
    lines = ["| policy | what it does |", "|---|---|"]
    lines += [f"| `{name}` | {_first_sentence(policy.__doc__ or '')} |" for name, policy in POLICIES.items()]
    return "\n".join(lines)


def workload_table() -> str:
    """Name and description."""
    return "\n".join(
        ["| workload | programs |", "|---|---|", *(f"| `{name}` | {it.describe} |" for name, it in WORKLOADS.items())]
    )


def machine_table() -> str:
    """Figures of the published machines, and where they are from."""
    lines = ["| profile | iteration | S | copy | KV pool / host | given | assumed |", "|---|---|---:|---|---|---|---|"]
    for name, machine in PUBLISHED.items():
        costs = machine.costs
        step = f"{costs.step_s * 1e3:.3g} ms + {costs.row_s * 1e3:.3g} ms a token"
        if costs.pair_s:
            step += f" + {costs.pair_s * 1e9:.2g} ns a pair + {costs.read_s * 1e9:.3g} ns a KV token read"
        copy = f"{machine.token_bytes / costs.copy_token_s / 1e9:.3g} GB/s"
        pools = f"{machine.kv_tokens:,} / {machine.host_tokens:,} tokens"
        cells = (f"`{name}`", step, str(machine.saturation_tokens), copy, pools, machine.given, machine.assumed)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fidelity_table(document: dict[str, Any]) -> str:
    """Errors of the simulator, and of what was foretold."""
    lines = ["| policy | requests/s | metric | real | foretold | error | replayed | error | promised |"]
    lines.append("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for row in document["rows"]:
        foretold, replayed = (
            "-" if row[name] is None else f"{row[name]:+.1%}" for name in ("foretold_error", "replayed_error")
        )
        limit = "" if row["limit"] is None else f"{row['limit']:.0%}"
        figures = (f"{row['real']:,.4g}", f"{row['foretold']:,.4g}", foretold, f"{row['replayed']:,.4g}", replayed)
        cells = (row["policy"], f"{row['rate_rps']:g}", row["metric"], *figures, limit)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def place_of(document: dict[str, Any]) -> str:
    """The part of the page that a document fills."""
    if "rows" in document:
        return "fidelity"
    study = document["config"]["study"]
    if any(label not in document["unloaded_s"] for label in document["capacity_rps"]):
        return "memory"
    if study["engine"] != "simulated":
        return f"real {study['engine']}"
    return f"simulated {study['machine'].removeprefix(GPTJ.name).strip('-')}".strip()


def merged(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Studies of one part as one: their workloads, policies and seeds add up, each seed counted once."""
    whole = {**documents[0], "runs": [], "capacity_seeds_rps": {}, "capacity_rps": {}, "bound_rps": {}}
    whole |= {"unloaded_s": {}, "own_capacity_rps": {}}
    configs = [document["config"] for document in documents]
    machines = {name: machine for config in configs for name, machine in config["machines"].items()}
    codes = sorted({config["code"] for config in configs})
    whole["config"] = {**configs[0], "machines": machines, "code": ", ".join(codes)}
    seen: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    for document in documents:
        whole["runs"] += [run for run in document["runs"] if run not in whole["runs"]]
        for name in ("unloaded_s", "bound_rps"):
            whole[name] = {**whole[name], **document.get(name, {})}
        for label, policies in document["capacity_seeds_rps"].items():
            for policy, entries in policies.items():
                of_policy = seen.setdefault(label, {}).setdefault(policy, {})
                of_policy |= {entry["seed"]: entry for entry in entries}
        for label, policies in document.get("own_capacity_rps", {}).items():
            whole["own_capacity_rps"].setdefault(label, {}).update(policies)
    for label, policies in seen.items():
        found = {policy: list(entries.values()) for policy, entries in policies.items()}
        whole["capacity_seeds_rps"][label] = found
        whole["capacity_rps"][label] = {
            policy: statistics.median(entry["rps"] for entry in entries) for policy, entries in found.items()
        }
    return whole


def study_part(documents: Sequence[dict[str, Any]], before: str = "") -> str:
    """The tables of a part: of each workload the one that was measured, else the one that was there before."""
    tables = {found[1]: found[0].rstrip() for found in _TABLE.finditer(before)}
    for label in dict.fromkeys(label for document in documents for label in document["capacity_rps"]):
        of_label = [document for document in documents if label in document["capacity_rps"]]
        tables[label] = markdown(merged(of_label), label)
    return "\n\n".join(tables.values())


def _first_sentence(text: str) -> str:
    words = " ".join(text.split())
    return words.split(". ")[0].rstrip(".") + "."


def main(arguments: Sequence[str]) -> int:
    """Read the documents, fill the page, write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pause.page", description=__doc__)
    parser.add_argument("documents", nargs="*", type=Path, metavar="STUDY.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    parts = {"policies": policy_table(), "workloads": workload_table(), "machines": machine_table()}
    given: dict[str, list[dict[str, Any]]] = {}
    for path in options.documents:
        document = json.loads(path.read_text())
        given.setdefault(place_of(document), []).append(document)
    page = options.page.read_text()
    for place, documents in given.items():
        if place == "fidelity":
            parts[place] = fidelity_table(documents[-1])
        else:
            parts[place] = study_part(documents, page[slice(*_place(page, place))])
    options.page.write_text(fill(page, parts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
