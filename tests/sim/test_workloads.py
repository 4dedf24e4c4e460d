"""Workloads: what they are made of, that luck is shared, that traces survive, and that programs are played right."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from caesura.runtime.executors.cost import MachineCosts
from caesura.scheduler.context import Call
from caesura.scheduler.policies import POLICIES
from caesura.scheduler.types import ContextId

from benchmarks.pause.drive import Load
from benchmarks.pause.profiles import Machine
from benchmarks.pause.runs import simulated
from benchmarks.workloads import (
    MAX_SHARED,
    WORKLOADS,
    Arrival,
    BadTrace,
    Branch,
    Program,
    Segment,
    every_segment,
    find_workload,
    read_trace,
    write_program,
)

MACHINE = Machine(
    name="small",
    costs=MachineCosts(step_s=0.01, row_s=0.0001, copy_base_s=0.0, copy_token_s=0.00001),
    saturation_tokens=64,
    max_step_tokens=128,
    max_running=16,
    kv_tokens=1024,
    host_tokens=2048,
    token_bytes=100,
    page_size=16,
    given="",
    assumed="",
)


def drawn(name: str, count: int = 1200, seed: int = 3) -> list[Program]:
    arrivals = find_workload(name).arrivals(2.0, 10.0, seed)
    return [arrival.program for arrival in itertools.islice(arrivals, count)]


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_is_made_of_sound_programs(name: str) -> None:
    for program in drawn(name, 200):
        assert program.prompt_tokens > 0
        assert program.output_tokens > 0
        for segment in every_segment(program.segments):
            assert segment.generate_tokens > 0
            assert segment.tool_s >= 0
            assert segment.tool_tokens >= 0
            assert math.isfinite(segment.tool_s) or segment.deadline_s is not None
            assert not (segment.tool and segment.branches)


@pytest.mark.parametrize(
    ("kind", "pauses", "mean_s", "prompt", "returned"),
    [
        ("math", 2.81, 8.3e-5, 405, 21),
        ("qa", 3.04, 0.709, 934, 57),
        ("virtual_env", 5.35, 0.085, 1973, 10),
        ("chat", 3.46, 28.2, 117, 42),
        ("image", 6.92, 19.9, 117, 24),
        ("tts", 6.92, 17.15, 117, 24),
    ],
)
def test_the_mix_has_the_published_statistics(
    kind: str, pauses: float, mean_s: float, prompt: float, returned: float
) -> None:
    programs = drawn(kind)
    calls = [segment for program in programs for segment in program.segments if segment.tool]
    assert statistics.fmean(program.pauses for program in programs) == pytest.approx(pauses, rel=0.12)
    assert statistics.fmean(call.tool_s for call in calls) == pytest.approx(mean_s, rel=0.1)
    assert statistics.fmean(program.prompt_tokens for program in programs) == pytest.approx(prompt, rel=0.3)
    assert statistics.fmean(call.tool_tokens for call in calls) == pytest.approx(returned, rel=0.3)
    assert max(call.tool_s for call in calls) <= 60.0


def test_a_few_calls_of_coding_agents_hold_most_of_the_time() -> None:
    durations = sorted(
        (segment.tool_s for program in drawn("coding") for segment in program.segments if segment.tool), reverse=True
    )
    share = sum(durations[: len(durations) * 3 // 100]) / sum(durations)
    assert share > 0.5
    assert statistics.fmean(durations) == pytest.approx(0.9, rel=0.25)


def test_the_same_seed_is_the_same_programs_at_every_rate() -> None:
    slow = list(itertools.islice(WORKLOADS["mix"].arrivals(1.0, 10, 7), 300))
    fast = list(itertools.islice(WORKLOADS["mix"].arrivals(4.0, 10, 7), 300))
    assert [arrival.program for arrival in slow] == [arrival.program for arrival in fast]
    assert all(a.at_s == pytest.approx(4 * b.at_s) for a, b in zip(slow, fast, strict=True))
    other = list(itertools.islice(WORKLOADS["mix"].arrivals(1.0, 10, 8), 300))
    assert [arrival.program for arrival in other] != [arrival.program for arrival in slow]


def test_arrivals_are_poisson() -> None:
    arrivals = [arrival.at_s for arrival in itertools.islice(WORKLOADS["qa"].arrivals(5.0, 10, 0), 4000)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.06)
    assert statistics.pstdev(gaps) == pytest.approx(statistics.fmean(gaps), rel=0.08)


def test_durations_shift_half_way() -> None:
    programs = drawn("shift", 1200)  # rate 2, ten minutes: the run is 1,200 programs long
    for half, tool in ((programs[:600], "lookup"), (programs[600:], "report")):
        fast = [s.tool_s for program in half for s in program.segments if s.tool == tool]
        slow = [s.tool_s for program in half for s in program.segments if s.tool and s.tool != tool]
        assert statistics.fmean(slow) > 10 * statistics.fmean(fast)


def test_a_trace_survives_writing_and_reading(tmp_path: Path) -> None:
    programs = [*drawn("mix-512", 20), *drawn("forks", 20), *drawn("hang", 40)]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(write_program(program) + "\n" for program in programs))
    assert read_trace(path) == programs
    assert next(find_workload(str(path)).arrivals(1.0, 1.0, 0)).program in programs


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[]", "must be a JSON object"),
        ("{", "line 1"),
        ('{"prompt_tokens": 0, "segments": [{"generate_tokens": 1}]}', "prompt_tokens is 0"),
        ('{"prompt_tokens": 1, "segments": []}', "at least one segment"),
        ('{"prompt_tokens": 1, "segments": [{"generate_tokens": -2}]}', "generate_tokens is -2"),
        ('{"prompt_tokens": 1, "segments": [{"generate_tokens": 1, "tool_s": -1}]}', "tool_s is -1"),
        ('{"prompt_tokens": 1, "segments": [{"generate_tokens": 1, "tool_s": null}]}', "deadline_s"),
        ("", "holds no programs"),
        ('{"prompt_tokens": 1, "segments": [{"generate_tokens": 1, "branches": [1]}]}', "list of JSON objects"),
        (
            '{"prompt_tokens": 1, "segments": [{"generate_tokens": 1, "deadline_s": 2, "branches": '
            '[{"prompt_tokens": 1, "segments": [{"generate_tokens": 1}]}]}]}',
            "with branches has a deadline_s",
        ),
    ],
)
def test_a_bad_trace_says_what_is_wrong(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(BadTrace, match=words):
        read_trace(path)


def test_a_trace_has_so_many_shared_prompts_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    programs = [Program("a", 1, (Segment(1),), f"s{number}", 50) for number in range(MAX_SHARED)]
    lines = [write_program(program) + "\n" for program in (*programs, Program("a", 1, (Segment(1),)))]
    path.write_text("".join(lines))
    assert len(read_trace(path)) == MAX_SHARED + 1
    path.write_text("".join([*lines, write_program(Program("a", 1, (Segment(1),), "one more", 50))]))
    with pytest.raises(BadTrace, match="65 shared prompts"):
        read_trace(path)


def test_an_unknown_workload_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="mix-4096"):
        find_workload("nonsense")


# -- playing -----------------------------------------------------------------------------------------------------------


def prepared(
    programs: list[Program],
    policy: str = "min_waste",
    gap_s: float = 0.0,
    *,
    tool_scale: float = 1.0,
    alone: bool = False,
) -> Load:
    def arrivals() -> Iterator[Arrival]:
        for number, program in enumerate(programs):
            yield Arrival(number, number * gap_s, program)
        yield Arrival(len(programs), math.inf, programs[0])

    engine, simulation = simulated(MACHINE, policy)
    return Load(engine, simulation, arrivals(), tool_scale=tool_scale, alone=alone)


def played(load: Load) -> Load:
    load.start()
    load.simulation.run(10_000.0)
    load.engine.check()
    assert not load.open
    return load


def play(programs: list[Program], policy: str = "min_waste", gap_s: float = 0.0) -> Load:
    return played(prepared(programs, policy, gap_s))


def test_a_lone_program_takes_what_the_costs_say() -> None:
    program = Program("one", 128, (Segment(10, "tool", 5.0, 20), Segment(4)))
    record = play([program]).records[0]
    prefill = 0.01 + 128 * 0.0001
    after_tool = 0.01 + 21 * 0.0001  # the last generated token and the tool's twenty
    decode = 0.01 + 0.0001
    assert record.first_token_s == pytest.approx(prefill)
    assert record.resumed_s == [pytest.approx(after_tool)]
    assert record.served_s(math.inf) == pytest.approx(prefill + after_tool + (9 + 3) * decode)
    assert record.away_s == pytest.approx(5.0)
    assert record.started_tokens == 14


def test_branches_work_side_by_side_and_count_as_one_program() -> None:
    branch = Branch(16, (Segment(4, "tool", 3.0, 8), Segment(4)))
    program = Program("tree", 64, (Segment(5, branches=(branch, branch)), Segment(3)))
    record = play([program]).records[0]
    assert record.program.output_tokens == record.started_tokens == 5 + 2 * 8 + 3
    assert 2.9 < record.away_s <= 3.0  # both wait at about the same time: not six seconds
    assert record.end_s is not None
    assert record.end_s < 4.0


def test_the_first_branch_is_enough_for_wait_any() -> None:
    quick, slow = (
        Branch(16, (Segment(4, "tool", 1.0, 8), Segment(4))),
        Branch(16, (Segment(4, "tool", 90.0, 8), Segment(4))),
    )
    program = Program("race", 64, (Segment(5, branches=(quick, slow), wait_any=True), Segment(3)))
    record = play([program]).records[0]
    assert record.end_s is not None
    assert record.end_s < 3.0


def test_what_a_dropped_branch_was_generating_does_not_count() -> None:
    quick, slow = Branch(16, (Segment(4),)), Branch(16, (Segment(6, "tool", 0.0, 2), Segment(400)))
    record = play([Program("race", 64, (Segment(5, branches=(slow, quick), wait_any=True), Segment(3)))]).records[0]
    assert record.end_s is not None
    assert record.end_s < 2.0
    assert record.started_tokens == 5 + 4 + 3  # the slow one was in its first segment


def test_a_branch_may_be_dropped_at_the_moment_it_would_branch() -> None:
    nested = Branch(4, (Segment(6, branches=(Branch(3, (Segment(3),)),)), Segment(3)))
    program = Program("race", 10, (Segment(5, branches=(Branch(4, (Segment(6),)), nested), wait_any=True), Segment(3)))
    assert play([program]).records[0].started_tokens == 5 + 6 + 6 + 3


def test_hints_and_deadlines_scale_with_the_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    load = prepared(
        [Program("one", 10, (Segment(5, "tool", 8.0, 2, hint_s=6.0, deadline_s=40.0), Segment(3)))], tool_scale=0.25
    )
    pause, told = load.engine.pause, []

    def note(context: ContextId, calls: Sequence[Call], *, wait_any: bool, deadline_at: float | None) -> None:
        told.append((*calls, (deadline_at or 0.0) - load.simulation.clock.now()))
        pause(context, calls, wait_any=wait_any, deadline_at=deadline_at)

    monkeypatch.setattr(load.engine, "pause", note)
    played(load)
    assert told == [(Call("tool", 1.5, 2.0), pytest.approx(10.0))]


def test_alone_each_program_comes_when_the_one_before_has_ended() -> None:
    programs = [Program("one", 64, (Segment(10, "tool", 5.0, 20), Segment(4)))] * 3
    records = played(prepared(programs, gap_s=1.0, alone=True)).records
    assert [record.arrival_s for record in records] == [0.0, records[0].end_s, records[1].end_s]
    apart = played(prepared(programs, gap_s=50.0, alone=True)).records
    assert [record.arrival_s for record in apart] == [0.0, 50.0, 100.0]


def test_a_run_with_too_many_programs_at_once_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.pause.drive.MAX_OPEN", 2)
    load = prepared([Program("one", 64, (Segment(10),))] * 5)
    load.start()
    load.simulation.run(10.0)
    assert load.overrun
    assert len(load.records) == 3


def test_a_hanging_tool_ends_with_its_deadline() -> None:
    hanging = Program("hang", 64, (Segment(5, "tool", math.inf, 0, deadline_s=7.0), Segment(3)))
    load = play([hanging, Program("ok", 64, (Segment(5, "tool", 1.0, 4), Segment(3)))], gap_s=0.1)
    assert [record.lost for record in load.records] == [True, False]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_brings_all_programs_home(policy: str) -> None:
    """Forks, shared prompts and scarce memory; nobody is forgotten and the accounts add up."""
    tree = Branch(24, (Segment(6, "search", 0.4, 30), Segment(6)))
    programs = [
        Program(
            "agent",
            60 + 13 * number % 90,
            (
                Segment(8, "shell", 0.3 * (number % 5), 40),
                Segment(5, branches=(tree, tree) if number % 3 == 0 else (), tool_tokens=16),
                Segment(9, "person", 4.0, 12),
                Segment(4),
            ),
            "system" if number % 2 else "",
            96 if number % 2 else 0,
        )
        for number in range(24)
    ]
    load = play(programs, policy, gap_s=0.15)
    assert [record.started_tokens for record in sorted(load.records, key=lambda record: record.number)] == [
        program.output_tokens for program in programs
    ]
    assert load.engine.scheduler.meter.tokens_computed > 0


def test_the_line_format_is_the_documented_one() -> None:
    program = Program("qa", 12, (Segment(3, "qa", 0.5, 7), Segment(2)))
    assert json.loads(write_program(program)) == {
        "kind": "qa",
        "prompt_tokens": 12,
        "segments": [{"generate_tokens": 3, "tool": "qa", "tool_s": 0.5, "tool_tokens": 7}, {"generate_tokens": 2}],
    }
