"""Every example runs, offline, and does what its first lines say. One engine serves them all."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import caesura.lang
import pytest
from caesura.lang import Engine, ProgramState, get_server_info
from caesura.lang.backends.engine import EngineBackend
from caesura.runtime.embedded.calculator import calculate

from tests.integration.live_server import live_server

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.py"))
ELSEWHERE = {  # examples with tests of their own
    "anywhere.py": "test_lang_http.py",
    "hello.py": "test_cli_engine.py",
    "react.py": "test_cli_engine.py",
    "pause_picture.py": "test_example_timeline.py",
    "pause_timeline.py": "test_example_timeline.py",
}


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
    assert not any(get_server_info(engine)["contexts"].values())


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


def test_a_vote_takes_the_majority(run: Callable[..., Any]) -> None:
    state = run("fork_and_vote.py", branches=5)
    assert state["value"] == [calculate(expression) for expression in state["expression"]]
    assert state["value"].count(state.ret_value) == max(map(state["value"].count, state["value"]))
    assert state.usage().cached_tokens > 0.5 * state.usage().prompt_tokens


def test_thoughts_lead_to_the_answer(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    state = run("tree_of_thought.py")
    best = max(state.ret_value.answers(), key=lambda thought: thought.likelihood)
    assert best.said == "The answer is 9490."
    assert "9490" in capsys.readouterr().out.splitlines()[-1]


def test_letters_become_orders(run: Callable[..., Any]) -> None:
    states = run("extract.py")
    orders = [state.ret_value for state in states]
    assert all(1 <= order.quantity <= 100_000 for order in orders)
    assert all("\n" not in state.text_of("order") for state in states)


def test_a_batch_keeps_failures_beside_their_rows(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = run("batch.py", rows=40)
    failed = [type(getattr(one, "root", one)).__name__ for one in outcomes if isinstance(one, Exception)]
    assert {"DefinitionError", "ContextTooLong", "ToolError"} == set(failed)
    assert sum(isinstance(one, ProgramState) for one in outcomes) == 40 - len(failed) >= 30
    assert "40 rows" in capsys.readouterr().out


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
