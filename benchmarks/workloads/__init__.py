"""Workloads by name. ``docs/policies.md`` describes them; ``trace.py`` reads any other from a file."""

from __future__ import annotations

from pathlib import Path

from benchmarks.workloads.agents import coding, forks, hang, shift, turns
from benchmarks.workloads.infercept import KINDS, mix, single
from benchmarks.workloads.model import MAX_SHARED, Arrival, Branch, Program, Segment, Workload, every_segment
from benchmarks.workloads.trace import BadTrace, read_trace, trace_workload, write_program

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("mix", "InferCept's six augmentations in equal parts, nothing shared", mix()),
        Workload("mix-512", "the mix, each kind with a shared system prompt of 512 tokens", mix(512)),
        Workload("mix-4096", "the mix, each kind with a shared system prompt of 4,096 tokens", mix(4096)),
        Workload("forks", "planners with two to five sub-agents on the same context, some of them nested", forks),
        Workload("coding", "coding agents: 5,000 to 17,500 tokens, eleven turns, tools with a heavy tail", coding),
        Workload("shift", "two tools that exchange their durations half-way", shift),
        Workload("hang", "one program in twenty waits for a tool that never answers", hang),
        Workload("turns", "ten calls with two dozen tokens between them", turns),
        *(Workload(kind, f"InferCept's {kind} alone", single(kind)) for kind in KINDS),
    )
}


def find_workload(name: str) -> Workload:
    """A named workload, or a trace when the name is a file. ValueError names the ones there are."""
    if name in WORKLOADS:
        return WORKLOADS[name]
    path = Path(name)
    if path.is_file():
        return trace_workload(path)
    raise ValueError(f"workload is {name!r}; it must be a trace file or one of {', '.join(WORKLOADS)}")


__all__ = [
    "MAX_SHARED",
    "WORKLOADS",
    "Arrival",
    "BadTrace",
    "Branch",
    "Program",
    "Segment",
    "Workload",
    "every_segment",
    "find_workload",
    "read_trace",
    "trace_workload",
    "write_program",
]
