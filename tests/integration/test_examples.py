"""Every example runs, offline, and does what its first lines say. One engine serves them all."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import inspect
import itertools
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import caesura.lang
import pytest
from caesura.lang import Engine, ProgramState, get_server_info
from caesura.lang.backends.engine import EngineBackend
from caesura.runtime.embedded.tools import calculate, convert

from tests.integration.live_server import live_server

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.py"))
ELSEWHERE = {  # examples with tests of their own
    "anywhere.py": "test_lang_http.py",
    "hello.py": "test_cli_engine.py",
    "pause_picture.py": "test_example_timeline.py",
    "pause_timeline.py": "test_example_timeline.py",
}

CLOSED_S = 20.0


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineBackend]:
    with Engine(kv_tokens=1 << 15) as backend:
        yield backend


@pytest.fixture
def run(engine: EngineBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Runs an example's ``main`` on the shared engine; afterwards no context is left."""

    def shared(model: str | None = None, **options: Any) -> contextlib.AbstractContextManager[EngineBackend]:
        assert model is None and not options
        return contextlib.nullcontext(engine)

    monkeypatch.setattr(caesura.lang, "Engine", shared)
    monkeypatch.setenv("COLUMNS", "200")
    yield lambda name, **arguments: load(name).main(**arguments)
    until = time.monotonic() + CLOSED_S
    while any(get_server_info(engine)["contexts"].values()):  # a program's contexts close behind it
        assert time.monotonic() < until, get_server_info(engine)["contexts"]
        time.sleep(0.01)


def load(name: str) -> ModuleType:
    """The example as a module, read anew."""
    spec = importlib.util.spec_from_file_location(f"example_{Path(name).stem}", EXAMPLES / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def calls(state: ProgramState, name: str = "answer") -> list[str]:
    return [call.tool for call, _ in state.tool_calls(name)]


@pytest.mark.parametrize("name", FILES)
def test_an_example_says_what_it_shows_and_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / name).read_text()
    assert text.startswith('"""') and len(text.splitlines()) <= 160
    index = (EXAMPLES / "README.md").read_text()
    assert f"({name})" in index
    tests = ELSEWHERE.get(name)
    here = (
        Path(__file__).read_text()
        if tests is None
        else "".join(p.read_text() for p in EXAMPLES.parent.glob(f"tests/*/{tests}"))
    )
    assert Path(name).stem in here


def test_react_observes_what_it_acted_on(run: Callable[..., Any]) -> None:
    state = run("react.py", question="Subtract 977 from 4821, then multiply the result by 36.")
    assert state["action0"] == " calculator[4821 - 977]"
    assert state["observation0"] == "3844"
    assert state.get_meta_info("thought1")["cached_tokens"] > 0.8 * state.get_meta_info("action0")["prompt_tokens"]


def test_react_goes_from_entry_to_entry(run: Callable[..., Any]) -> None:
    state = run("react.py")
    steps = [state[f"action{step}"].split("[")[0].strip() for step in range(4)]
    assert steps == ["lookup", "lookup", "calculator", "answer"]
    expression = re.search(r"\[(.*)\]", state["action2"])
    assert expression is not None and state.ret_value == calculate(expression[1])


def test_the_model_picks_its_tools(run: Callable[..., Any]) -> None:
    sums, people, age, length, notes, none = run("model_tools.py")
    assert calls(sums) == ["calculator", "calculator"] and "208728" in sums["answer"]
    assert calls(people) == ["lookup", "lookup"]
    assert sorted(calls(age)) == ["calculator", "lookup", "lookup"]
    assert calls(length) == ["lookup", "lookup", "convert"]
    assert calls(notes) == ["get_note", "calculator"] and "11400" in notes["answer"]
    assert not calls(none)
    for state in (people, age, length):
        assert state.tool_calls("answer")[-1][1].text in state["answer"]


def test_parallel_calls_overlap(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    state = run("parallel_tools.py")
    assert len(state.tool_calls("answer")) >= 2
    assert state.get_meta_info("answer")["tool_rounds"] == 1
    assert state["race"] == ["42"]
    printed = capsys.readouterr().out
    assert "south(" in printed and "(ended: another call was first)" in printed


def test_a_vote_takes_the_majority(run: Callable[..., Any]) -> None:
    state = run("fork_and_vote.py", branches=5)
    assert state.ret_value == "1859"
    assert state["value"] == [calculate(expression) for expression in state["expression"]]
    assert state["value"].count(state.ret_value) == max(map(state["value"].count, state["value"]))
    assert state.usage().cached_tokens > 0.5 * state.usage().prompt_tokens


def test_thoughts_lead_to_the_answer(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    state = run("tree_of_thought.py")
    best = max(state.ret_value.answers(), key=lambda thought: thought.likelihood)
    assert best.said == "The answer is 9490."
    assert "9490" in capsys.readouterr().out.splitlines()[-1]


def test_sub_agents_share_what_comes_first(run: Callable[..., Any]) -> None:
    state = run("plan_and_execute.py")
    questions, agents = state.ret_value
    answers = agents["answer"]
    assert len(questions) == len(answers) == 4
    assert convert(12.5, "km", "mi") in answers[1] and "1911492" in answers[3]
    assert all(answer in state["summary"] for answer in answers)
    assert agents.usage().cached_tokens > 0.5 * agents.usage().prompt_tokens


def test_an_adventure_is_many_short_pauses(run: Callable[..., Any]) -> None:
    state, game = run("adventure.py")
    assert game.solved and state["end"].startswith("Done")
    usage = state.usage()
    assert usage.tool_calls == game.steps >= 8
    assert usage.cached_tokens > 0.8 * usage.prompt_tokens


def test_answers_come_from_the_folder(run: Callable[..., Any]) -> None:
    states = run("retrieval.py")
    assert all(calls(state)[:1] == ["search"] and state["answer"] for state in states)
    module = load("retrieval.py")
    folder = module.Folder(module.TOWN)
    assert folder.search("Fish Market built").splitlines()[0] == "Fish Market: Keiko built it in 1921."
    assert folder.read[0] == "fish_market.md"
    assert folder.search("xylophone").startswith("error")


def test_a_folder_may_hold_anything(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.md").touch()
    (tmp_path / "market[b].md").write_text("# Fish Market\n\nKeiko built it in 1921 [/b].\n")
    run("retrieval.py", folder=tmp_path, question=["Who built the Fish Market?"])
    printed = capsys.readouterr().out
    assert "1921 [/b]." in printed and "(market[b].md)" in printed


def test_letters_become_orders(run: Callable[..., Any]) -> None:
    states = run("extract.py")
    orders = [state.ret_value for state in states]
    assert [order.quantity for order in orders] == [48, 312, 95, 1207, 66]
    assert orders[0].model_dump() == {
        "customer": "Wanda", "town": "Ostby", "quantity": 48, "item": "lanterns", "day": "14 May",
    }  # fmt: skip
    assert all("\n" not in state.text_of("order") for state in states)


def test_a_batch_keeps_failures_beside_their_rows(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = run("batch.py", rows=40)
    failed = [type(getattr(one, "root", one)).__name__ for one in outcomes if isinstance(one, Exception)]
    assert {"DefinitionError", "ContextTooLong", "ToolError"} == set(failed)
    assert sum(isinstance(one, ProgramState) for one in outcomes) == 40 - len(failed) >= 30
    assert "40 rows" in capsys.readouterr().out


def test_mcp_tools_run_in_a_process_of_their_own(run: Callable[..., Any]) -> None:
    pytest.importorskip("mcp")
    sums, people, length = run("mcp_tools.py")
    assert calls(sums) == ["desk__calculator"] and "1911492" in sums["answer"]
    assert calls(people) == ["desk__lookup"] and calls(length) == ["desk__convert"]


def test_candidates_share_one_history(run: Callable[..., Any], engine: EngineBackend) -> None:
    before = get_server_info(engine)["tokens_computed"]
    state = run("recommend.py", items=64, candidates=32)
    ranking = state.ret_value
    assert len(ranking) == 32 and [score for score, _ in ranking] == sorted(
        (score for score, _ in ranking), reverse=True
    )
    assert state["best"] == ranking[0][1]
    history = len(engine.service.tokenizer.encode(state.messages()[0]["content"]))
    assert get_server_info(engine)["tokens_computed"] - before < history + 32 * 24  # not once for each candidate


def test_cards_come_while_the_call_goes_on(run: Callable[..., Any], engine: EngineBackend) -> None:
    before = get_server_info(engine)["tokens_computed"]
    state = run("support.py", pace=50.0)
    cards = [state[f"card{piece}"] for piece in range(8)]
    assert cards == ["wait", "wait", "delivery", "wait", "refund", "invoice", "password", "cancel"]
    assert get_server_info(engine)["tokens_computed"] - before < 900  # each piece is computed once


def test_a_person_may_answer_after_the_process_has_died(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "human_in_the_loop.py"), "--folder", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        said = list(itertools.takewhile(lambda line: "Refund 816" not in line, first.stdout))
        first.kill()
    assert any("the calculator runs: 48 * 17" in line for line in said)
    (tmp_path / "d0cd0665.answer").write_text("yes\n")
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert again.stdout.splitlines()[-1] == "Refunded 816 to Wanda."
    assert "the calculator runs" not in again.stdout  # nor has the model thought of it again: it is on the tape


def test_leave_is_given_once_and_for_one_question(tmp_path: Path) -> None:
    desk = load("human_in_the_loop.py").Desk(tmp_path)

    def ask(question: str) -> str:
        return asyncio.run(asyncio.wait_for(desk.ask_person(question), 0.2))

    (tmp_path / "d0cd0665.answer").write_text("yes\n")
    with pytest.raises(TimeoutError):
        ask("Refund 912 to Wanda?")
    assert ask("Refund 816 to Wanda?") == "yes"
    with pytest.raises(TimeoutError):
        ask("Refund 816 to Wanda?")


def test_a_fleet_that_speaks_openai_pauses_on_the_server(engine: EngineBackend) -> None:
    def pauses() -> int:
        return sum(get_server_info(engine)["telemetry"]["tools"].get("calculator", {"counts": [0]})["counts"])

    before, fleet = pauses(), load("agents_over_http.py")
    with live_server(engine.service) as server:
        for _ in range(30):  # a busy machine takes its time
            fleet.main(url=server.url, agents=1, seconds=2.0)
            if pauses() > before:
                return
    raise AssertionError("no call of a tool became a pause")


def test_every_example_can_be_asked_for_help() -> None:
    for name in set(FILES) - set(ELSEWHERE):
        parameters = inspect.signature(load(name).main).parameters
        assert {"url", "model"} - ({"model"} if "http" in name else set()) <= set(parameters), name
