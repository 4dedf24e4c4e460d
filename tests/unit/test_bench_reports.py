"""The study of pause policies: what is kept, what counts as carried, what the tables say, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks import fidelity
from benchmarks.pause.capacity import LEAST_REQUESTS, capacity, carry_out, unloaded
from benchmarks.pause.cli import main
from benchmarks.pause.plots import _curves, _file
from benchmarks.pause.pool import Chain, work
from benchmarks.pause.report import capacity_rows, cells, curve, headings, markdown, setting
from benchmarks.pause.runs import MEASURED_SHARE, WARM_SHARE, RunRefused, RunSpec, run
from benchmarks.pause.store import Store, _code
from benchmarks.pause.study import Findings, _carried, _search, quick_study

SPEC = RunSpec("math", "min_waste", 2.0, minutes=0.5)
FINE = {"normalized_latency_s": 0.01, "decided_early": False}
LINE = '{"prompt_tokens": 20, "segments": [{"generate_tokens": 100}]}\n'
DOOMED = '{"prompt_tokens": 2000, "segments": [{"generate_tokens": 1, "tool_s": null, "deadline_s": 20}]}\n'


# -- capacity ----------------------------------------------------------------------------------------------------------


def test_a_rate_of_which_a_run_cannot_tell_is_never_carried() -> None:
    tried: list[float] = []

    def world(spec: RunSpec) -> dict[str, Any]:
        tried.append(spec.rate_rps)
        return {**FINE, "normalized_latency_s": 9.0 if spec.rate_rps > 0.5 else 0.01}

    found = carry_out(capacity(replace(SPEC, minutes=0.5), 0.02, 1.0, 1.03), world)
    assert found.rps == found.low_rps == 0.0
    window_s = 30 * (MEASURED_SHARE - WARM_SHARE)
    assert min(tried) * window_s == pytest.approx(LEAST_REQUESTS, rel=0.01)
    assert min(tried) * window_s >= LEAST_REQUESTS
    longer = carry_out(capacity(replace(SPEC, minutes=5.0), 0.02, 0.001, 1.03), world)
    assert longer.low_rps == pytest.approx(0.5, rel=0.03)


def test_a_run_without_measured_requests_is_not_carried() -> None:
    assert run(replace(SPEC, rate_rps=1e-3, minutes=0.01))["normalized_latency_s"] is None
    assert carry_out(capacity(SPEC, 0.02, 1.0, 1.03), lambda spec: {**FINE, "normalized_latency_s": None}).rps == 0.0


@pytest.mark.parametrize("engine", ["simulated", "15M"])
def test_unloaded_means_one_after_the_other(engine: str) -> None:
    specs: list[RunSpec] = []

    def note(spec: RunSpec) -> dict[str, Any]:
        specs.append(spec)
        return FINE

    assert carry_out(unloaded(replace(SPEC, engine=engine, limit_s=0.1)), note) == 0.01
    assert specs[0].alone
    assert specs[0].limit_s is None
    with pytest.raises(RunRefused, match="nothing to measure"):
        carry_out(unloaded(SPEC), lambda spec: {**FINE, "normalized_latency_s": None})


def test_a_request_that_a_deadline_may_close_decides_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "lost.jsonl"
    trace.write_text(DOOMED + LINE)
    found = run(RunSpec(str(trace), "preserve", 0.5, minutes=1.5, limit_s=0.013))
    assert not found["decided_early"]
    assert found["normalized_latency_s"] < 0.013
    assert found["requests"]["lost"] > 10


def test_a_program_longer_than_the_pool_is_refused_with_the_numbers(tmp_path: Path) -> None:
    trace = tmp_path / "long.jsonl"
    trace.write_text(LINE.replace("20", "5000"))
    with pytest.raises(RunRefused, match=r"5000 tokens.*KV pool 1984"):
        run(RunSpec(str(trace), "lru", 1.0, minutes=0.5, kv_tokens=2000))


# -- the store ---------------------------------------------------------------------------------------------------------


def test_an_edited_trace_is_another_workload(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(LINE)
    spec, store = RunSpec(str(trace), "lru", 1.0), Store(tmp_path / "runs.jsonl")
    store.add(spec, FINE)
    assert store.find(spec) == FINE
    trace.write_text(LINE.replace("20", "21"))
    assert store.find(spec) is None


def test_the_code_of_a_result_is_all_that_makes_it() -> None:
    names = {name for name, _ in _code()}
    assert names >= {
        "benchmarks/dummy.py",
        "runtime/build.py",
        "runtime/clock.py",
        "runtime/native/decoder.c",
        "runtime/native/attention.h",
        "runtime/record.py",
        "scheduler/policies/min_waste.py",
    }
    assert not any(name.startswith(("runtime/embedded", "runtime/server")) for name in names)


def test_a_torn_last_line_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"key": "torn')
    store = Store(path)
    store.add(SPEC, FINE)
    store.add(replace(SPEC, seed=1), FINE)
    again = Store(path)
    assert again.find(SPEC) == again.find(replace(SPEC, seed=1)) == FINE


# -- tables, figures, JSON ---------------------------------------------------------------------------------------------


def ran(policy: str, rate_rps: float, latency_s: float | None, label: str = "mix", **changes: Any) -> dict[str, Any]:
    shares = {cause: {"share": 0.1} for cause in ("idle", "preserve", "recompute", "swap", "waste")}
    record = {"label": label, "policy": policy, "seed": 0, "rate_rps": rate_rps, "normalized_latency_s": latency_s}
    record |= {"decided_early": False, "throughput_rps": rate_rps, "waste": shares, "post_tool_ttft_s": {}}
    record |= {"tokens_recomputed": 0.0, "tokens_computed": 1.0, "max_wait_s": 0.0, "minutes": 6.0, "machine": "m"}
    return {**record, "kv_tokens": None, "host_tokens": None, **changes}


def studied(runs: list[dict[str, Any]], label: str = "mix", workload: str = "mix", **rps: float) -> dict[str, Any]:
    return {
        "runs": runs,
        "unloaded_s": {workload: 0.01},
        "capacity_rps": {label: rps},
        "capacity_seeds_rps": {label: {policy: [{"seed": 0, "rps": found}] for policy, found in rps.items()}},
        "bound_rps": {label: {"endless memory": 0.0}},
        "config": {"latency_factor": 2.0, "code": "c", "machines": {"m": {"kv_tokens": 64, "host_tokens": 128}}},
    }


def test_carrying_nothing_is_said_and_divides_nothing() -> None:
    document = studied([], lru_host=4.0, discard=0.0)
    strong, weak = (
        dict(zip(headings(document, "mix"), cells(document, "mix", row), strict=True))
        for row in capacity_rows(document, "mix")
    )
    assert (strong["requests/s"], strong["to discard"], strong["to lru_host"]) == ("4", "-", "1.00")
    assert (weak["requests/s"], weak["to discard"], weak["to lru_host"]) == ("none", "-", "-")
    assert "endless memory would carry nothing)" in markdown(document, "mix")


def test_a_table_shows_the_highest_load_within_the_limit() -> None:
    runs = [ran("a", 4.0, 0.015), ran("a", 4.8, 0.019), ran("a", 5.2, 0.034), ran("a", 5.3, None)]
    (row,) = capacity_rows(studied(runs, a=5.5), "mix")
    assert row["run"]["rate_rps"] == 4.8


def test_only_far_more_than_anybody_carries_is_overload() -> None:
    near, far = ([ran(policy, rate, 0.03) for policy in "ab"] for rate in (4.3, 4.4))
    assert not [heading for heading in headings(studied(near, a=4.0, b=2.0), "mix") if "done/s" in heading]
    assert "done/s at 4.4" in headings(studied(far, a=4.0, b=2.0), "mix")


def test_the_setting_names_the_pools_that_were_given() -> None:
    assert "pool 64 and host 0 tokens" in setting(studied([ran("a", 1.0, 0.01, host_tokens=0)], a=1.0), "mix")
    assert "pool 32 and host 128 tokens" in setting(studied([ran("a", 1.0, 0.01, kv_tokens=32)], a=1.0), "mix")


@pytest.mark.parametrize("label", ["run@2.jsonl", "run@2.jsonl@32000"])
def test_the_path_of_a_trace_may_have_any_letters(label: str) -> None:
    document = studied([ran("a", 1.0, 0.015, label)], label, "run@2.jsonl", a=1.0)
    assert f"**{label} (unloaded: 10.0 ms a token" in markdown(document, label)
    assert _file(f"folder/{label}") == label.replace("@", "-").replace(".", "-")


def test_policies_without_complete_runs_have_no_line() -> None:
    runs = [ran("a", 2.0, 0.02), ran("a", 1.0, 0.01), ran("b", 1.0, 0.9, decided_early=True), ran("c", 1.0, None)]
    lines: dict[str, list[tuple[float, ...]]] = {}
    axes = SimpleNamespace(plot=lambda *points, label, **_: lines.update({label: [*points[:2]]}))
    document = studied(runs, a=2.0, b=0.5, c=0.0)
    assert _curves(cast(Any, axes), document, "mix", "normalized_latency_s") == 2.0
    assert lines == {"a": [(1.0, 2.0), (0.01, 0.02)]}
    assert curve(document, "mix", "b") == curve(document, "mix", "c") == []


def test_json_has_no_infinity() -> None:
    outcome = {"rps": 900.0, "low_rps": 900.0, "high_rps": math.inf}
    assert _carried(Chain("capacity", SPEC), outcome) == {"seed": 0, "rps": 900.0, "low_rps": 900.0, "high_rps": None}


def test_a_search_does_not_begin_at_nothing() -> None:
    study = quick_study(policies=("discard", "lru", "swap"), workloads=("mix",), kv_tokens=(None,))
    findings = Findings(study, capacities={"mix": {"discard": [{"seed": 0, "rps": 0.0}]}})
    assert _search(findings, ("mix", None), "lru", 0, 0.02).guess_rps == study.guess_rps
    findings.capacities["mix"]["swap"] = [{"seed": 0, "rps": 7.0}]
    assert _search(findings, ("mix", None), "lru", 0, 0.02).guess_rps == 7.0


def test_results_are_written_before_anything_is_made_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(document: dict[str, Any]) -> Iterator[Any]:
        raise ZeroDivisionError

    monkeypatch.setattr("benchmarks.pause.cli.conduct", lambda study, *_: Findings(study))
    monkeypatch.setattr("benchmarks.pause.cli.screen", broken)
    out = tmp_path / "study.json"
    with pytest.raises(ZeroDivisionError):
        main(["--quick", "--json", str(out), "--store", str(tmp_path / "runs.jsonl")])
    assert json.loads(out.read_text())["capacity_rps"] == {}


# -- wrong usage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--seeds 0", "must be at least 1"),
        ("--rates 1,0", "above 0"),
        ("--guess -1", "above 0"),
        ("--minutes nan", "above 0"),
        ("--kv-tokens 0", "above 0"),
        ("--tolerance 1", "above 1"),
        ("--host-tokens -1", "must be at least 0"),
    ],
)
def test_numbers_that_make_no_study(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(words.split())
    assert leaving.value.code == 2
    assert said in capsys.readouterr().err


def test_what_a_run_cannot_do_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    near = tmp_path / "near.json"
    near.write_text("5")
    with pytest.raises(SystemExit, match="2"):
        main(["--near", str(near)])
    assert "no capacity_rps" in capsys.readouterr().err
    small = ["--quick", "--workloads", "qa", "--kv-tokens", "512", "--store", str(tmp_path / "runs.jsonl"), "--quiet"]
    with pytest.raises(SystemExit, match="2"):
        main([*small, "--jobs", "1"])
    assert "KV pool 496" in capsys.readouterr().err


def test_a_worker_says_what_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain("run", RunSpec("qa", "lru", 1.0, kv_tokens=512))
    monkeypatch.setattr("sys.stdin", [json.dumps(asdict(chain))])
    work(tmp_path / "runs.jsonl")
    assert "KV pool 496" in json.loads(capsys.readouterr().out)["refused"]


@pytest.mark.parametrize(
    ("words", "said"),
    [("--policies nonsense", "min_waste"), ("--workload nonsense", "mix-4096"), ("--seeds 0", "must be at least 1")],
)
def test_fidelity_names_what_it_does_not_know(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        fidelity.main(words.split())
    assert said in capsys.readouterr().err
