"""Traces: one program a line of JSON.

``{"kind", "prompt_tokens", "segments": [{"generate_tokens", "tool_s", "tool_tokens"}, ...]}``; a segment without
``tool_s`` goes on at once. Optional: ``id``; ``shared`` and ``shared_tokens`` of the program; ``tool``, ``hint_s``,
``deadline_s``, ``wait_any`` and ``branches`` (``[{"prompt_tokens", "segments"}, ...]``) of a segment. ``tool_s`` null
never returns and needs a ``deadline_s``; a segment with branches has none. A trace has at most 64 shared prompts.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from benchmarks.workloads.model import MAX_SHARED, Branch, Program, Segment, Workload

MAX_TOKENS = 1 << 24


class BadTrace(ValueError):
    """A line that is not a program; the message names line, field and limit."""


def read_trace(path: Path) -> list[Program]:
    """All programs of a file. Raises BadTrace or OSError."""
    programs = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                programs.append(parse_program(json.loads(line)))
            except (BadTrace, json.JSONDecodeError) as error:
                raise BadTrace(f"{path.name}, line {number}: {error}") from None
    if not programs:
        raise BadTrace(f"{path.name} holds no programs; it needs one JSON object a line")
    shared = {(program.shared, program.shared_tokens) for program in programs if program.shared_tokens}
    if len(shared) > MAX_SHARED:
        raise BadTrace(
            f"{path.name} has {len(shared)} shared prompts; {MAX_SHARED} is the most: give fewer programs `shared`"
        )
    return programs


def trace_workload(path: Path) -> Workload:
    """Programs of a file, drawn with replacement (as InferCept's benchmark does)."""
    programs = read_trace(path)

    def draw(source: random.Random, progress: float) -> Program:
        return programs[source.randrange(len(programs))]

    return Workload(path.stem, f"{len(programs)} programs of {path.name}, drawn with replacement", draw)


def parse_program(record: Any) -> Program:
    """A program from its JSON object."""
    if not isinstance(record, dict):
        raise BadTrace("a line must be a JSON object")
    kind = record.get("kind", "trace")
    return Program(
        kind=str(kind),
        prompt_tokens=_count(record, "prompt_tokens", 1),
        segments=_segments(record.get("segments"), str(kind)),
        shared=str(record.get("shared", "")),
        shared_tokens=_count(record, "shared_tokens", 0) if record.get("shared") else 0,
    )


def _segments(records: Any, kind: str) -> tuple[Segment, ...]:
    if not isinstance(records, list) or not records:
        raise BadTrace("segments must be a list with at least one segment")
    return tuple(_segment(record, kind) for record in records)


def _segment(record: Any, kind: str) -> Segment:
    if not isinstance(record, dict):
        raise BadTrace("a segment must be a JSON object")
    branches = record.get("branches", [])
    if not isinstance(branches, list) or not all(isinstance(branch, dict) for branch in branches):
        raise BadTrace("branches must be a list of JSON objects")
    waits = "tool_s" in record
    tool_s = math.inf if waits and record["tool_s"] is None else _seconds(record, "tool_s") or 0.0
    deadline_s = _seconds(record, "deadline_s")
    if math.isinf(tool_s) and deadline_s is None:
        raise BadTrace("tool_s is null, so the tool never returns; give the segment a deadline_s")
    if waits and branches:
        raise BadTrace("a segment has tool_s or branches, not both")
    if branches and deadline_s is not None:
        raise BadTrace("a segment with branches has a deadline_s; give one to the tools inside the branches")
    return Segment(
        generate_tokens=_count(record, "generate_tokens", 1),
        tool=str(record.get("tool", kind)) if waits else "",
        tool_s=tool_s,
        tool_tokens=_count(record, "tool_tokens", 0),
        hint_s=_seconds(record, "hint_s"),
        deadline_s=deadline_s,
        branches=tuple(
            Branch(_count(branch, "prompt_tokens", 0), _segments(branch.get("segments"), kind)) for branch in branches
        ),
        wait_any=bool(record.get("wait_any", False)),
    )


def _count(record: dict[str, Any], name: str, least: int) -> int:
    value = record.get(name, 0)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_TOKENS:
        raise BadTrace(f"{name} is {value!r}; it must be a whole number from {least} to {MAX_TOKENS}")
    return value


def _seconds(record: dict[str, Any], name: str) -> float | None:
    value = record.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise BadTrace(f"{name} is {value!r}; it must be a number of seconds from 0 on")
    return float(value)


def write_program(program: Program) -> str:
    """The line of a program."""
    record: dict[str, Any] = {"kind": program.kind, "prompt_tokens": program.prompt_tokens}
    if program.shared:
        record |= {"shared": program.shared, "shared_tokens": program.shared_tokens}
    return json.dumps(record | {"segments": _plain(program.segments)})


def _plain(segments: tuple[Segment, ...]) -> list[dict[str, Any]]:
    records = []
    for segment in segments:
        record: dict[str, Any] = {"generate_tokens": segment.generate_tokens}
        if segment.tool:
            record |= {"tool": segment.tool, "tool_s": None if math.isinf(segment.tool_s) else segment.tool_s}
        if segment.tool_tokens:
            record["tool_tokens"] = segment.tool_tokens
        for name in ("hint_s", "deadline_s"):
            if getattr(segment, name) is not None:
                record[name] = getattr(segment, name)
        if segment.branches:
            record["branches"] = [
                {"prompt_tokens": branch.prompt_tokens, "segments": _plain(branch.segments)}
                for branch in segment.branches
            ]
        if segment.wait_any:
            record["wait_any"] = True
        records.append(record)
    return records
