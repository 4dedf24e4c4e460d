"""The command line on the embedded model: the demo, the examples, chat, doctor."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from caesura.lang import ScriptedBackend
from caesura.lang.backends.scripted import ScriptedSession
from caesura.lang.cli.app import app
from caesura.lang.cli.chat_command import Conversation
from caesura.lang.cli.demo import run_demo
from caesura.lang.cli.fleet import QUESTIONS, make_fleet
from caesura.lang.cli.watch import Snapshot
from typer.testing import CliRunner, Result

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FIGURES = {
    "wall_s",
    "tokens_computed",
    "tokens_recomputed",
    "bytes_swapped",
    "waste_token_s",
    "answers_right",
    "answers_total",
}


def invoke(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=input)


def test_the_demo_prints_exactly_the_documented_json(tmp_path: Path) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "img" / "demo.svg"
    arguments = ["demo", "--agents", "4", "--policies", "discard,min_waste", "--trace", str(trace)]
    result = invoke(*arguments, "--svg", str(picture), "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert set(document) == {"model", "policies", "without_tool"}
    assert list(document["policies"]) == ["discard", "min_waste"]
    for figures in document["policies"].values():
        assert set(figures) == FIGURES
        assert figures["answers_total"] == 4 * QUESTIONS
        assert figures["answers_right"] >= 0.75 * figures["answers_total"]
    assert set(document["without_tool"]) == {"answers_right", "answers_total"}
    assert document["without_tool"]["answers_right"] <= 0.25 * document["without_tool"]["answers_total"]
    # Discarding what others cannot use is what costs: the pool is too small in both runs.
    discard, ours = document["policies"]["discard"], document["policies"]["min_waste"]
    assert ours["tokens_recomputed"] < discard["tokens_recomputed"]
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"discard", "min_waste"}
    assert picture.read_text().startswith("<svg")


class _Audience:
    """Keeps what a live view would draw."""

    wants_snapshots = True

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.snapshots: list[Snapshot] = []

    def say(self, what: str) -> None: ...

    def begin(self, title: str, run: Any) -> None:
        self.titles.append(title)

    def show(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)

    def end(self, title: str, outcome: Any) -> None: ...


def test_viewers_see_the_fleet_move() -> None:
    audience = _Audience()
    report = run_demo(agents=4, seed=1, policies=["infercept"], trace=None, viewer=audience)
    assert not report.failures
    assert audience.titles == ["without the tool", "infercept"]
    states = {row.state for snapshot in audience.snapshots for row in snapshot.rows.values()}
    assert "running" in states
    assert states & {"preserved", "swapped", "discarded"}
    assert {agent for snapshot in audience.snapshots for agent in snapshot.rows} == {1, 2, 3, 4}
    for pool in (snapshot.pool for snapshot in audience.snapshots):
        assert pool.running + pool.preserved + pool.cached + pool.free == pool.total


def test_a_fleet_is_the_same_for_the_same_seed() -> None:
    assert make_fleet(3, 5) == make_fleet(3, 5)
    assert make_fleet(3, 5) != make_fleet(4, 5)
    delays = [delay for agent in make_fleet(0, 24) for delay in agent.delays_s]
    assert min(delays) >= 0.05 and max(delays) <= 2.0


def test_hello_answers_as_a_script() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "hello.py")], capture_output=True, text=True, timeout=120, check=True
    )
    assert "318 * 47 = 14946" in done.stdout
    assert "14946" in done.stdout.splitlines()[-1]


def test_run_shows_roles_and_the_tools_result() -> None:
    result = invoke("run", str(EXAMPLES / "hello.py"), "--arg", "question=What is 4827 * 396?", "--policy", "lru")
    assert result.exit_code == 0, result.stderr
    assert "user: What is 4827 * 396?" in result.stdout
    assert "tool: 1911492" in result.stdout
    assert "1 tool calls" in result.stdout


def test_react_observes_step_by_step() -> None:
    question = "question=Subtract 977 from 4821, then multiply the result by 36."
    result = invoke("run", str(EXAMPLES / "react.py"), "--arg", question, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["variables"]["observation0"] == "3844"
    assert document["usage"]["tool_calls"] >= 1


def test_eval_counts_with_tools_and_grammar_with_tools_alone_and_without() -> None:
    result = invoke("eval", "embedded", "--tasks", "24", "--seed", "5", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert {name: document[name]["total"] for name in ("with_tools", "without_grammar", "without_tools")} == {
        "with_tools": 24,
        "without_grammar": 24,
        "without_tools": 24,
    }
    assert document["with_tools"]["right"] >= 21  # 98 % of many more
    assert document["without_tools"]["right"] <= 6
    assert sum(skill["right"] for skill in document["skills"].values()) == document["with_tools"]["right"]
    assert 0 <= document["malformed_calls"] <= document["tool_calls"]


def test_chat_reads_standard_input_and_calls_the_calculator() -> None:
    result = invoke("chat", input="What is 4827 * 396?\n\nWhat is 12 + 30?\n")
    assert result.exit_code == 0, result.stderr
    assert "calculator(expression='4827 * 396')" in result.stdout
    assert "= 1911492" in result.stdout
    assert "<tool_call>" not in result.stdout


def test_chat_without_tools_calls_nothing() -> None:
    result = invoke("chat", "--no-tools", "--json", input="What is 4827 * 396?\n")
    roles = [message["role"] for message in json.loads(result.stdout)["messages"]]
    assert roles == ["user", "assistant"]


def test_doctor_finds_nothing_wrong() -> None:
    result = invoke("doctor", "--json")
    document = json.loads(result.stdout)
    assert document["status"] in ("ok", "warn")
    assert {"python", "memory", "torch", "model", "generation", "costs"} <= {
        item["name"] for item in document["checks"]
    }
    assert result.exit_code == 0


def test_chat_outlives_its_window_and_a_line_that_is_longer() -> None:
    long = "word " * 2500
    result = invoke("chat", input=f"What is 12 + 30?\n{long}\nWhat is 9 * 5?\n")
    assert result.exit_code == 0
    first, _, rest = result.stdout.partition("(the window is full: the conversation begins anew)")
    assert "The answer is 42." in first
    assert "(left out: " in rest and rest.rstrip().endswith("The answer is 45.")


def test_chat_tells_its_messages_whatever_became_of_it() -> None:
    result = invoke("chat", "--json", input="What is 12 + 30?\n" + "word " * 2500)
    said = [message["content"] for message in json.loads(result.stdout)["messages"]]
    assert "The answer is 42." in said


def test_chat_goes_on_after_an_answer_that_was_stopped_before_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, marked = threading.Event(), ScriptedSession.mark

    async def mark(self: ScriptedSession) -> int:
        if not begun.is_set():
            begun.set()
            await asyncio.sleep(60)
        return await marked(self)

    monkeypatch.setattr(ScriptedSession, "mark", mark)
    talk = Conversation(ScriptedBackend(["Hello."]), system_text="", tools=[], temperature=0.0)
    talk.ask("one")
    assert begun.wait(20)
    talk.interrupt()
    assert "".join(text for text, _ in talk.pieces(talk.ask("two"))) == "Hello."
    talk.close()
    assert [message["content"] for message in talk.state.messages()] == ["two", "Hello."]


def test_piped_questions_end_with_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def pieces(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "pieces", pieces)
    assert invoke("chat", input="one\ntwo\n").exit_code == 130


def test_chat_with_a_server_that_is_not_there_exits_with_3() -> None:
    result = invoke("chat", "--url", "http://127.0.0.1:1", input="one\n")
    assert result.exit_code == 3
    assert result.stderr.splitlines()[-1] == "try: caesura serve"


@pytest.mark.parametrize("command", [["run", str(EXAMPLES / "hello.py")], ["chat"]])
def test_a_model_that_is_not_there_exits_with_3(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = invoke(*command, "--model", str(tmp_path / "empty"), input="")
    assert result.exit_code == 3
    assert result.stderr.splitlines()[-1].startswith("try: ")
    assert "Traceback" not in result.stderr


def test_an_unknown_policy_exits_with_2() -> None:
    result = invoke("run", str(EXAMPLES / "hello.py"), "--policy", "wishful")
    assert result.exit_code == 2
    assert "policy is 'wishful'" in result.stderr
