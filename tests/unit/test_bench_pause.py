"""The study of pause policies: metrics, capacity, the link, the store, workers, reports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from caesura.runtime.clock import VirtualClock
from caesura.runtime.executors.cost import CostExecutor, MachineCosts
from caesura.scheduler.policies import POLICIES
from caesura.scheduler.types import Move, MoveId, MoveKind, PageId

from benchmarks.calibrate import COLUMNS, StepSample, fit
from benchmarks.fidelity import Twins, compare
from benchmarks.pause.capacity import capacity, carry_out, unloaded
from benchmarks.pause.cli import found_rps, main
from benchmarks.pause.page import (
    PAGE,
    fill,
    machine_table,
    merged,
    place_of,
    policy_table,
    study_part,
    workload_table,
)
from benchmarks.pause.pool import Chain, run_all
from benchmarks.pause.profiles import FREE_COPIES, GPTJ, PUBLISHED, find_machine, write_machine
from benchmarks.pause.report import capacity_rows, markdown
from benchmarks.pause.runs import RunSpec, run
from benchmarks.pause.store import Store
from benchmarks.pause.study import SURE_STRETCH, UNSURE_STRETCH, conduct, full_study
from benchmarks.workloads import WORKLOADS

COSTS = MachineCosts(0.01, 0.001, copy_base_s=0.5, copy_token_s=0.01, slice_s=0.002, pair_s=1e-6, read_s=1e-5)
SPEC = RunSpec("math", "min_waste", 2.0, minutes=0.5)


def executor(clock: VirtualClock) -> CostExecutor:
    return CostExecutor(COSTS, clock, page_size=10, num_device_pages=64, num_host_pages=64, token_bytes=8)


def move(number: int, kind: MoveKind, pages: int) -> Move:
    numbers = tuple(PageId(page) for page in range(pages))
    return Move(MoveId(number), kind, numbers, numbers)


# -- the cost executor -------------------------------------------------------------------------------------------------


def test_one_link_carries_one_copy_at_a_time_and_those_in_first() -> None:
    clock = VirtualClock()
    link = executor(clock)
    link.begin([move(1, MoveKind.OUT, 5), move(2, MoveKind.OUT, 5)])
    assert link.next_copy_at == pytest.approx(1.0)  # 0.5 + 50 tokens
    clock.advance_to(0.3)
    link.begin([move(3, MoveKind.IN, 10)])
    clock.advance_to(1.0)
    assert link.acknowledged() == [1]
    clock.advance_to(2.4)
    assert link.acknowledged() == []  # the copy in goes before the waiting one out: 1.0 + 0.5 + 1.0
    clock.advance_to(2.5)
    assert link.acknowledged() == [3]
    assert link.acknowledged(wait_s=9.0) == [2]
    assert clock.now() == pytest.approx(3.5)
    assert link.next_copy_at is None
    assert link.link_busy_s == pytest.approx(3.5)


def test_copies_follow_each_other_without_a_gap_however_late_one_looks() -> None:
    clock = VirtualClock()
    link = executor(clock)
    link.begin([move(1, MoveKind.OUT, 5), move(2, MoveKind.OUT, 5)])
    clock.advance_to(1.9)
    assert link.acknowledged() == [1]
    clock.advance_to(2.0)
    assert link.acknowledged() == [2]


def test_a_step_costs_what_its_work_costs() -> None:
    assert COSTS.step_time_s(20, 2, 1000.0, 300) == pytest.approx(0.01 + 0.02 + 0.004 + 0.001 + 0.003)


def test_policies_are_told_the_published_figures() -> None:
    profile = GPTJ.profile
    assert profile.forward_s(384) == pytest.approx(0.0278, rel=0.01)
    assert profile.hidden_tokens(384) == 605
    assert PUBLISHED["13b-2a100"].profile.hidden_tokens(384) == 319


# -- runs and capacity -------------------------------------------------------------------------------------------------


def test_a_run_repeats_itself_exactly() -> None:
    first, second = run(SPEC), run(SPEC)
    assert {**first, "wall_s": 0} == {**second, "wall_s": 0}
    assert first["requests"]["measured"] > 20
    assert first["normalized_latency_s"] > 0.01
    assert first["waste"]["waste"]["gb_s"] == pytest.approx(first["waste"]["waste"]["token_s"] * GPTJ.token_bytes / 1e9)


def test_more_load_is_slower_and_alone_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.pause.capacity.UNLOADED_REQUESTS", 40)
    alone = carry_out(unloaded(SPEC), run)
    little, much = run(SPEC), run(replace(SPEC, rate_rps=30.0))
    assert alone <= little["normalized_latency_s"] < much["normalized_latency_s"]


def test_a_run_over_its_limit_ends_early_and_only_then() -> None:
    over = run(replace(SPEC, rate_rps=40.0, limit_s=0.02, policy="discard"))
    assert over["decided_early"]
    assert over["simulated_s"] < 30
    assert not run(replace(SPEC, limit_s=0.05))["decided_early"]


def test_starved_requests_are_counted() -> None:
    """Far beyond what the machine carries almost nobody ends, and the latency must show it."""
    swamped = run(replace(SPEC, rate_rps=90.0, minutes=0.15))
    assert swamped["requests"]["unfinished"] > swamped["requests"]["measured"] / 2
    assert swamped["normalized_latency_s"] > 3 * run(SPEC)["normalized_latency_s"]


def test_capacity_is_found_from_either_side_and_interpolated() -> None:
    def world(spec: RunSpec) -> dict[str, Any]:
        latency = 0.01 / (1 - min(0.999, spec.rate_rps / 8))  # doubles at 4
        early = spec.limit_s is not None and latency > 3 * spec.limit_s
        return {"normalized_latency_s": latency, "decided_early": early, "rate_rps": spec.rate_rps}

    for guess in (0.1, 3.9, 30.0):
        found = carry_out(capacity(SPEC, 0.02, guess, 1.03), world)
        assert found.low_rps <= 4.0 <= found.high_rps <= 1.03 * found.low_rps
        assert found.rps == pytest.approx(4.0, rel=0.005)


def test_a_policy_that_never_carries_anything_has_no_capacity() -> None:
    found = carry_out(
        capacity(SPEC, 0.02, 1.0, 1.03), lambda spec: {"normalized_latency_s": 9.0, "decided_early": False}
    )
    assert found.rps == found.low_rps == 0.0


def test_bad_rates_are_refused() -> None:
    with pytest.raises(ValueError, match="rate"):
        run(replace(SPEC, rate_rps=0.0))


# -- store, workers, command line --------------------------------------------------------------------------------------


def test_the_store_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    Store(path).add(SPEC, {"normalized_latency_s": 1.0})
    with path.open("a") as file:
        file.write('{"key": "torn')
    again = Store(path)
    assert again.find(SPEC) == {"normalized_latency_s": 1.0}
    assert again.find(replace(SPEC, seed=1)) is None
    assert again.find(replace(SPEC, kv_tokens=999)) is None


def test_workers_bring_the_same_results_as_one_process(tmp_path: Path) -> None:
    chains = [Chain("run", replace(SPEC, seed=seed)) for seed in range(3)]
    here, there = Store(tmp_path / "here.jsonl"), Store(tmp_path / "there.jsonl")
    alone = {chain.spec.seed: outcome for chain, outcome in run_all(chains, here, 1, lambda *_: None)}
    noted: list[int] = []
    both = {}
    for chain, outcome in run_all(chains, there, 2, lambda chain, _: noted.append(chain.spec.seed)):
        both[chain.spec.seed] = outcome
    for seed in range(3):
        first, second = alone[seed]["runs"][0], both[seed]["runs"][0]
        assert {**first, "wall_s": 0} == {**second, "wall_s": 0}
    assert sorted(noted) == [0, 1, 2]
    assert Store(there.path).find(SPEC) is not None


def test_searches_that_take_turns_share_the_minutes_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each makes a run before any makes its next, and all find what they would have found alone."""
    made: list[str] = []
    carried = {"lru": 2.0, "swap": 3.0, "min_waste": 4.0}

    def world(spec: RunSpec) -> dict[str, Any]:
        made.append(spec.policy)
        latency_s = 0.01 if spec.rate_rps < carried[spec.policy] else 9.0
        return {"normalized_latency_s": latency_s, "decided_early": False}

    monkeypatch.setattr("benchmarks.pause.pool.run", world)
    chains = [Chain("capacity", replace(SPEC, policy=policy), 0.02, 2.9, 1.2) for policy in carried]
    alone = run_all(chains, Store(tmp_path / "alone.jsonl"), 1, lambda *_: None)
    found = {chain.spec.policy: outcome["rps"] for chain, outcome in alone}
    made.clear()
    together = run_all(chains, Store(tmp_path / "together.jsonl"), 1, lambda *_: None, in_turns=3)
    assert {chain.spec.policy: outcome["rps"] for chain, outcome in together} == found
    assert made[:6] == ["lru", "swap", "min_waste", "min_waste", "swap", "lru"]


def test_a_study_writes_its_json_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.pause.capacity.UNLOADED_REQUESTS", 40)
    store, out = tmp_path / "runs.jsonl", tmp_path / "study.json"
    words = ["--simulate", "--quick", "--policies", "discard,min_waste", "--workloads", "virtual_env", "--minutes"]
    words += ["0.3", "--store", str(store), "--tolerance", "1.3", "--json", str(out), "--guess", "8"]
    assert main(words) == 0
    document = json.loads(out.read_text())
    assert set(document) >= {"runs", "capacity_rps", "config"}
    assert document["capacity_rps"]["virtual_env"].keys() == {"discard", "min_waste"}
    assert document["capacity_rps"]["virtual_env"]["min_waste"] > document["capacity_rps"]["virtual_env"]["discard"]
    record = document["runs"][0]
    assert record.keys() >= {"policy", "workload", "rate_rps", "seed", "normalized_latency_s", "throughput_rps"}
    assert record["waste"].keys() == {"preserve", "recompute", "swap", "idle", "waste"}
    lines = store.read_text().count("\n")
    capsys.readouterr()
    assert main([*words, "--quiet"]) == 0
    assert store.read_text().count("\n") == lines  # everything was known
    assert json.loads(out.read_text())["capacity_rps"] == document["capacity_rps"]
    assert "min_waste" in capsys.readouterr().out
    rows = capacity_rows(document, "virtual_env")
    assert [row["policy"] for row in rows] == ["min_waste", "discard"]
    assert "| min_waste |" in markdown(document, "virtual_env")


def test_a_search_begins_at_what_an_earlier_study_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chains: list[Chain] = []

    def note(given: Iterable[Chain], *_: object, **__: object) -> Iterator[tuple[Chain, dict[str, Any]]]:
        for chain in given:
            chains.append(chain)
            yield chain, {"unloaded_s": 0.01, "rps": 3.0, "low_rps": 3.0, "high_rps": 3.0, "runs": []}

    monkeypatch.setattr("benchmarks.pause.study.run_all", note)
    earlier = {"capacity_rps": {"qa": {"lru": 7.0}}, "bound_rps": {"qa": {"free copies": 9.0}}}
    study = full_study(workloads=("qa",), policies=("lru", "swap"), seeds=(0,), own_limits=False, curves=False)
    conduct(replace(study, near=found_rps(earlier)), Store(tmp_path / "runs.jsonl"), 1, lambda _: None)
    begun = {(chain.spec.policy, chain.spec.machine): (chain.guess_rps, chain.stretch) for chain in chains[1:]}
    assert begun == {
        ("preserve", GPTJ.name): (study.guess_rps, UNSURE_STRETCH),  # endless memory, of which nothing was known
        ("min_waste", GPTJ.name + FREE_COPIES): (9.0, SURE_STRETCH),
        ("lru", GPTJ.name): (7.0, SURE_STRETCH),
        ("swap", GPTJ.name): (3.0, UNSURE_STRETCH),  # a rival's
    }
    with pytest.raises(ValueError, match="--json of this command"):
        found_rps({"rows": []})  # of a fidelity run


def test_the_page_is_filled_between_its_marks() -> None:
    page = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
    filled = fill(page, {"two": "new \\1\n\n", "one": "newer"})
    assert filled == "a\n<!-- one -->\nnewer\n<!-- end -->\nb\n<!-- two -->\nnew \\1\n<!-- end -->\n"
    with pytest.raises(ValueError, match="three"):
        fill(page, {"three": "x"})


def test_studies_in_pieces_add_up() -> None:
    config = {"study": {"engine": "simulated", "machine": "gptj-6b-a100"}, "code": "a", "machines": {"m": {}}}
    config["latency_factor"] = 2.0
    whole = {"runs": [], "unloaded_s": {"mix": 0.01}, "config": config, "bound_rps": {"mix": {"endless memory": 9.0}}}

    def piece(**seeds: list[tuple[int, float]]) -> dict[str, Any]:
        found = {policy: [{"seed": seed, "rps": rps} for seed, rps in each] for policy, each in seeds.items()}
        return {**whole, "capacity_seeds_rps": {"mix": found}, "capacity_rps": {"mix": dict.fromkeys(found, 1.0)}}

    one, two = piece(lru=[(0, 2.0)]), piece(lru=[(0, 2.0), (1, 4.0)], discard=[(0, 1.0)])
    assert place_of(one) == "simulated"
    together = merged([one, two])
    assert together["capacity_rps"] == {"mix": {"lru": 3.0, "discard": 1.0}}
    rows = {row["policy"]: row for row in capacity_rows(together, "mix")}
    assert rows["lru"]["to_discard"] == 3.0
    assert rows["lru"]["to_bound"] == pytest.approx(1 / 3)


def test_a_table_of_the_page_stays_until_its_workload_is_measured_again() -> None:
    old = {
        label: f"**{label} (unloaded: 1 ms)** seeds 0\n\n| policy | rps |\n|---|---:|\n| lru | 1 |" for label in "ab"
    }
    run = {"policy": "lru", "label": "b", "decided_early": True, "rate_rps": 2.0, "seed": 0, "minutes": 3.0}
    config = {"machines": {"m": {"kv_tokens": 4, "host_tokens": 8}}, "code": "c0de", "study": {}, "latency_factor": 2.0}
    document = {
        "runs": [{**run, "machine": "m", "kv_tokens": None, "host_tokens": None}],
        "unloaded_s": {"b": 0.01},
        "capacity_rps": {"b": {"lru": 2.0}},
        "capacity_seeds_rps": {"b": {"lru": [{"seed": 0, "rps": 2.0}]}},
        "config": config,
    }
    kept, new = study_part([document], "\n\n".join(old.values()) + "\n").split("\n\n**")
    assert kept == old["a"]
    assert "pool 4 and host 8 tokens, runs of 3 minutes, seeds 0; 1 runs, code c0de" in new
    assert "| lru | 2 |" in new


def test_the_page_in_the_repository_lists_what_there_is() -> None:
    page = PAGE.read_text()
    parts = {"policies": policy_table(), "workloads": workload_table(), "machines": machine_table()}
    assert fill(page, parts) == page, "run python -m benchmarks.pause.page"
    for name in (*POLICIES, *WORKLOADS, *PUBLISHED):
        assert f"| `{name}` |" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policies", "nonsense"], "min_waste"),
        (["--workloads", "nonsense"], "mix-4096"),
        (["--profile", "nonsense"], "gptj-6b-a100"),
        (["--near", "nonsense.json"], "nonsense.json"),
    ],
)
def test_names_that_do_not_exist(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 2
    assert said in capsys.readouterr().err


# -- calibration and fidelity ------------------------------------------------------------------------------------------


def test_the_fit_finds_the_costs_that_made_the_steps() -> None:
    truth = dict(zip(COLUMNS, (0.004, 2e-4, 1e-4, 3e-8, 5e-7), strict=True))
    costs = MachineCosts(copy_base_s=0.0, copy_token_s=0.0, **truth)
    samples = []
    for number in range(400):
        slices, rows = 1 + number % 9, 1 + number % 9 + (number * 37 % 200 if number % 3 == 0 else 0)
        read = 50 * slices + number * 13 % 900
        pairs = float(rows * read / slices)
        samples.append(StepSample(rows, slices, pairs, read, costs.step_time_s(rows, slices, pairs, read)))
    samples += [replace(samples[0], seconds=5.0)] * 3  # something else held the machine up
    found, error = fit(samples)
    assert error < 0.02
    for name, value in truth.items():
        assert getattr(found, name) == pytest.approx(value, rel=0.05)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        fit([StepSample(1, 1, 1.0, 1, 0.1)] * 3)


def test_a_machine_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    write_machine(GPTJ, path)
    assert find_machine(str(path)) == GPTJ
    path.write_text('{"name": "half"}')
    with pytest.raises(ValueError, match="no machine profile"):
        find_machine(str(path))


def test_errors_are_relative_and_judged_with_the_costs_of_the_run() -> None:
    real = {"throughput_rps": 2.0, "served_s": {"p50": 1.0, "p99": 4.0}, "normalized_latency_s": 0.1}
    foretold = {"throughput_rps": 1.0, "served_s": {"p50": 1.0, "p99": 4.0}, "normalized_latency_s": 0.1}
    replayed = {"throughput_rps": 2.1, "served_s": {"p50": 1.2, "p99": 4.4}, "normalized_latency_s": 0.1}
    rows = {row.metric: row for row in compare("lru", 0.5, [Twins(real, foretold, replayed, GPTJ, GPTJ, 0.1)] * 3)}
    assert rows["throughput, requests/s"].foretold_error == pytest.approx(-0.5)
    assert rows["throughput, requests/s"].replayed_error == pytest.approx(0.05)
    assert rows["throughput, requests/s"].holds is True
    assert rows["latency without tools, p50"].holds is False
    assert rows["latency without tools, p99"].holds is True
    assert rows["first token, p50"].holds is None
    assert rows["normalized latency, mean"].replayed_error == pytest.approx(0.0)
