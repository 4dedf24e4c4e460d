"""The comparison with other runtimes: what is asked, what the limit is, who runs when, and what is written."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from caesura.runtime.model.config import parse_config
from caesura.runtime.text.tokenizer import load_tokenizer
from safetensors import safe_open

from benchmarks.limits import Limits, best
from benchmarks.peers import environments, referee, workload
from benchmarks.peers.checkpoint import make_tokenizer, model_config, write_checkpoint, write_int8
from benchmarks.peers.cli import parse_peers, parse_scenarios
from benchmarks.peers.environments import CannotInstall, Place
from benchmarks.peers.referee import Entry, Finding, Run, compete, turns
from benchmarks.peers.report import common_prefix, fill, markdown, rows, scenario_document
from benchmarks.peers.roofline import SHAPES, Machine, Roofline, Shape
from benchmarks.peers.systems import Settings
from benchmarks.peers.workload import AGENTS, CROWD, SCENARIOS, Reply, Transcript, run_scenario

MACHINE = Machine(20.5e9, 160e9, 580e9)
TINY = Shape(hidden=16, layers=1, heads=2, kv_heads=1, inner=32, vocab=512, tied=False)
VOCAB = 1000


class Recorder:
    """Answers at once; remembers every request's length and new tokens."""

    def __init__(self, short_by: int = 0) -> None:
        self.requests: list[tuple[list[int], int]] = []
        self._short_by = short_by

    def about(self) -> dict[str, str]:
        return {}

    async def session(self) -> Transcript:
        return Transcript(self._complete)

    async def close(self) -> None:
        pass

    async def _complete(self, prompt: list[int], new_tokens: int) -> Reply:
        self.requests.append((prompt, new_tokens))
        await asyncio.sleep(0)
        return Reply([len(prompt)] * (new_tokens - self._short_by), cached=len(prompt) // 2)


def play(name: str, seed: int = 0, *, short_by: int = 0, **changes: Any) -> tuple[Recorder, workload.Result]:
    scenario = SCENARIOS[name]
    if scenario.agents is not None:
        scenario = replace(scenario, agents=replace(scenario.agents, tool_s=0.0, arrival_s=0.0, **changes))
    recorder = Recorder(short_by)
    return recorder, asyncio.run(run_scenario(recorder, scenario, seed, VOCAB))


# -- what is asked -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("a", [(512, 1), (512, 128)]), ("b", [(512, 128)] * 16), ("c", [(2048, 1)])],
)
def test_scenarios_ask_for_what_their_titles_say(name: str, lengths: list[tuple[int, int]]) -> None:
    recorder, result = play(name)
    assert [(len(prompt), new) for prompt, new in recorder.requests] == lengths
    assert SCENARIOS[name].metric in result.figures
    assert result.complete


def test_agents_share_a_beginning_and_resend_what_they_read_and_wrote() -> None:
    recorder, result = play("d")
    lengths = sorted(len(prompt) for prompt, _ in recorder.requests)
    assert lengths == [length for length in (640, 736, 832, 928) for _ in range(16)]
    assert len({tuple(prompt[:512]) for prompt, _ in recorder.requests}) == 1
    assert len({tuple(prompt[512:640]) for prompt, _ in recorder.requests}) == 16
    longest = [prompt for prompt, _ in recorder.requests if len(prompt) == 928]
    assert all(prompt[640:672] == [640] * 32 for prompt in longest)  # what the first turn gave
    assert sum(lengths) == 50176  # that the share of cached tokens refers to
    assert result.figures["cached_share"] == pytest.approx(0.5)


def test_seeds_give_everybody_the_same_prompts_and_no_other_run_the_same() -> None:
    (one, _), (same, _), (other, _) = play("b", 1), play("b", 1), play("b", 2)
    assert one.requests == same.requests
    assert not {tuple(prompt) for prompt, _ in one.requests} & {tuple(prompt) for prompt, _ in other.requests}
    assert all(300 <= token < VOCAB - 64 for prompt, _ in one.requests for token in prompt)


@pytest.mark.parametrize("name", ["a", "b", "d"])
def test_missing_tokens_are_noticed(name: str) -> None:
    assert not play(name, short_by=1)[1].complete


def test_the_crowd_arrives_over_time() -> None:
    assert SCENARIOS["e2"].agents == CROWD
    assert CROWD.count == 4 * AGENTS.count
    recorder = Recorder()
    hasty = replace(SCENARIOS["e2"], agents=replace(CROWD, count=4, rounds=1, arrival_s=0.01))
    result = asyncio.run(run_scenario(recorder, hasty, 0, VOCAB))
    assert len(recorder.requests) == 4
    assert result.figures["total_s"] > 0.005  # nobody's arrival may be skipped
    assert [len(prompt) for prompt, _ in recorder.requests] == [640] * 4


# -- the limit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "weight_bytes", "expected"),
    [
        ("135m", 4, {"a": 36.3, "b": 115, "c": 565, "d": 147}),
        ("135m", 1, {"a": 127, "b": 278, "c": 1237, "d": 341}),
        ("10m", 4, {"a": 536, "b": 1435, "c": 7629, "d": 1850}),
    ],
)
def test_limits_are_those_worked_out_by_hand(model: str, weight_bytes: int, expected: dict[str, float]) -> None:
    roofline = Roofline(SHAPES[model], MACHINE, weight_bytes)
    for name, limit in expected.items():
        assert roofline.limit(SCENARIOS[name]) == pytest.approx(limit, rel=0.02), name


def test_shapes_have_the_sizes_their_names_say() -> None:
    assert SHAPES["135m"].parameters == pytest.approx(134.5e6, rel=0.001)
    assert SHAPES["10m"].parameters == pytest.approx(10.5e6, rel=0.01)
    assert SHAPES["135m"].kv_bytes == 45 * 1024
    assert SHAPES["10m"].kv_bytes == 8 * 1024


def test_less_memory_never_raises_a_limit() -> None:
    roofline = Roofline(SHAPES["135m"], MACHINE)
    times = [roofline.agents_s(AGENTS, pool) for pool in (1536, 2560, 5120, 8192, None)]
    assert times == sorted(times, reverse=True)
    assert times[-1] == times[-2]  # 7,680 tokens are all there ever are
    assert roofline.limit(SCENARIOS["e"]) < roofline.limit(SCENARIOS["d"])
    assert AGENTS.most_tokens == 960


def test_a_faster_machine_has_a_higher_limit() -> None:
    faster = Machine(2 * MACHINE.read_bytes_s, 2 * MACHINE.fp32_ops_s, 2 * MACHINE.int8_ops_s)
    for scenario in SCENARIOS.values():
        slow, fast = (Roofline(SHAPES["10m"], machine).limit(scenario) for machine in (MACHINE, faster))
        assert fast == pytest.approx(2 * slow)


def test_the_machine_is_what_it_was_at_its_best() -> None:
    one, other = Limits(1.0, 5.0, 3.0, 1.0, 9.0), Limits(2.0, 4.0, 7.0, 1.0, 8.0)
    assert best([one, other]) == Limits(2.0, 5.0, 7.0, 1.0, 9.0)
    assert best([one]).fp32_ops_s == 5.0
    assert best([one, other]).fp32_ops_s == 7.0


# -- the checkpoint ----------------------------------------------------------------------------------------------------


def test_the_engine_reads_the_checkpoint(tmp_path: Path) -> None:
    from caesura.runtime.model import load_model

    folder = write_checkpoint(tmp_path / "model", TINY)
    model = load_model(folder, dtype="float32", load_format="auto", seed=0)
    assert model.config.vocab_size == load_tokenizer(folder).vocab_size == TINY.vocab
    assert sum(1 for _ in tmp_path.iterdir()) == 1
    before = (folder / "model.safetensors").stat().st_mtime_ns
    write_checkpoint(folder, TINY)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_int8_weights_are_the_float_ones_within_half_a_step(tmp_path: Path) -> None:
    plain, rounded = write_checkpoint(tmp_path / "plain", TINY), write_int8(tmp_path / "int8", TINY)
    name = "model.layers.0.mlp.up_proj.weight"
    with safe_open(plain / "model.safetensors", "pt") as one, safe_open(rounded / "model.safetensors", "pt") as other:
        scale = other.get_tensor(f"{name}_scale")
        error = (one.get_tensor(name) - other.get_tensor(name) * scale).abs()
        assert bool((error <= scale / 2 + 1e-7).all())
        assert "lm_head.weight_scale" not in other.keys()  # noqa: SIM118 (no mapping)
    config = json.loads((rounded / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["dynamic"] is True


@pytest.mark.parametrize("vocab", [512, 8192, 49152])
def test_tokenizers_have_exactly_the_models_vocabulary(vocab: int) -> None:
    tokenizer = make_tokenizer(vocab)
    assert tokenizer.get_vocab_size() == vocab
    assert tokenizer.decode(tokenizer.encode("Every text comes back, even ü.").ids) == "Every text comes back, even ü."


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab is 100; it must lie between 260"):
        make_tokenizer(100)


def test_configs_are_ones_the_engine_knows() -> None:
    for shape in SHAPES.values():
        assert parse_config(model_config(shape)).kv_values_per_token * 4 == shape.kv_bytes


# -- taking turns ------------------------------------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
settings = json.loads(sys.argv[-1])
system = settings["system"]
if system == "absent":
    print(json.dumps({"error": "not here"}), flush=True)
    sys.exit()
print(json.dumps({"start_s": 0.1, "about": {"version": "1"}}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if task["scenario"] == "warm-up":
        print(json.dumps({"done": True}), flush=True)
        continue
    if system == "hangs":
        time.sleep(60)
    if system == "dies" and task["seed"] == 1:
        sys.exit(3)
    figures = {"prefill_tok_s": 10.0 + task["seed"], "total_s": 1.0}
    print(json.dumps({"figures": figures, "tokens": [task["seed"], 7], "complete": True}), flush=True)
"""


def entry(system: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Entry:
    python = tmp_path / "python"
    if not python.exists():
        (tmp_path / "worker.py").write_text(WORKER)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/worker.py "$@"\n')
        python.chmod(0o700)
        monkeypatch.setattr(referee, "FOLDER", tmp_path)
        monkeypatch.setattr(referee, "ROOT", tmp_path)
        monkeypatch.setattr(referee, "STOP_S", 1.0)
    return Entry(Settings(system, "model", "ample", "none", 100, 10, 1, str(tmp_path)), Place(python, tmp_path))


def test_systems_take_turns_and_who_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entries = [entry(name, monkeypatch, tmp_path) for name in ("one", "dies", "absent", "hangs")]
    said: list[str] = []
    findings, abouts = compete(entries, [SCENARIOS["c"]], vocab=1000, repeats=2, run_s=3.0, say=said.append)
    assert [run.figures["prefill_tok_s"] for run in findings["c", "one"].runs] == [10.0, 11.0]
    assert findings["c", "one"].failure is None
    assert len(findings["c", "dies"].runs) == 1
    assert "ended without an answer" in str(findings["c", "dies"].failure)
    assert findings["c", "absent"].failure == "absent: not here"
    assert "gave no answer in 3 s, in scenario c" in str(findings["c", "hangs"].failure)
    assert set(abouts) == {"one", "dies", "hangs"}
    assert any("one" in text and "prefill_tok_s" in text for text in said)


def test_everybody_begins_once() -> None:
    assert [turns(["a", "b", "c"], repeat)[0] for repeat in range(3)] == ["a", "b", "c"]
    assert all(sorted(turns(["a", "b", "c"], repeat)) == ["a", "b", "c"] for repeat in range(5))
    assert turns([], 3) == []


def test_a_step_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    with pytest.raises(CannotInstall, match="peer: install failed: no such thing"):
        environments.run(["sh", "-c", "echo no such thing; exit 1"], "peer", "install")
    with pytest.raises(CannotInstall, match="took more than 0 s"):
        environments.run(["sleep", "5"], "peer", "install", limit_s=0.1)


# -- what is written ---------------------------------------------------------------------------------------------------


def finding(*values: float, complete: bool = True) -> Finding:
    return Finding([Run({"out_tok_s": value, "total_s": 1.0}, (1, 2, 3), complete, 0.01) for value in values])


def document() -> dict[str, Any]:
    found = {("b", "caesura"): finding(90, 110, 100), ("b", "vllm"): finding(40, 60, 50), ("b", "gone"): Finding()}
    found["b", "gone"].failure = "gone: no such wheel"
    found["b", "openvino"] = finding(80.0, complete=False)
    return {
        "model": "135m",
        "quantization": "none",
        "repeats": 3,
        "when": "2026-01-02T03:04:05Z",
        "stolen_cpu_share": 0.01,
        "hardware": {"cpu": "A CPU", "cores": 2},
        "software": {"commit": "0123456789abcdef"},
        "limits": {"best": {"read_bytes_s": 20e9, "torch_ops_s": 1e11, "native_ops_s": 2e11, "int8_ops_s": 5e11}},
        "scenarios": {"b": scenario_document(SCENARIOS["b"], found, 200.0)},
        "notes": ["A note."],
    }


def test_documents_hold_every_repeat_and_reasons() -> None:
    scenario = document()["scenarios"]["b"]
    assert scenario["caesura"]["out_tok_s"] == [90, 110, 100]
    assert scenario["caesura"]["stolen_share"] == [0.01] * 3
    assert scenario["limit"] == 200.0
    assert scenario["gone"] == {"failure": "gone: no such wheel"}
    assert json.loads(json.dumps(scenario)) == scenario


def test_tables_put_the_limit_and_the_ratio_beside_each_figure() -> None:
    found = {row[1]: row for row in rows(document())}
    assert found["caesura"][2:6] == ("100", "90 - 110", "50%", "")
    assert found["vllm"][2:6] == ("50", "40 - 60", "25%", "2.00")
    assert "incomplete" in found["openvino"][3]
    assert found["gone"][2:4] == ("-", "gone: no such wheel")
    assert found["limit"][2] == "200"


def test_the_page_is_filled_between_its_marks() -> None:
    section = markdown(document())
    assert "| b | vllm | 50 | 40 - 60 | 25% | 2.00 |" in section
    assert "200 GFLOP/s" in section
    assert "- A note." in section
    page = fill("above\n<!-- peers: begin -->\nold\n<!-- peers: end -->\nbelow\n", section)
    assert page.startswith("above\n")
    assert page.endswith("below\n")
    assert "old" not in page
    assert fill(page, section) == page
    with pytest.raises(ValueError, match="the page has no"):
        fill("no marks", section)


def test_agreement_is_the_common_beginning() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0


def test_arguments() -> None:
    assert [scenario.name for scenario in parse_scenarios("abcde")] == list("abcde")
    assert [scenario.name for scenario in parse_scenarios("e2,a")] == ["a", "e2"]
    assert parse_peers("vllm,openvino,vllm") == ["vllm", "openvino"]
    assert parse_peers("none") == []
    for wrong in ("abz", ""):
        with pytest.raises(ValueError, match="there are a, b"):
            parse_scenarios(wrong)
    with pytest.raises(ValueError, match="there are vllm"):
        parse_peers("sglang")
