"""The command line without an engine: help, arguments, errors and exit codes."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from caesura.lang import ScriptedBackend, ScriptedReply
from caesura.lang.cli import run_command
from caesura.lang.cli.app import app
from caesura.lang.traces.run_trace import RunTrace
from typer.testing import CliRunner, Result

PROGRAMS = """
from caesura.lang import assistant, call_tool, function, gen, user

def lookup(word: str) -> str:
    return word.upper()

@function
def ask(s, word: str, times: int = 1, loud: bool = False, tags: list[str] = []):
    s += user(f"{word} {times} {loud} {tags}")
    s += assistant(gen("answer"))
    return times

@function
def plain(s):
    s += "Look up: " + gen("word")
    s += " = " + call_tool("found", lookup, s["word"])

@function
def broken(s):
    s += "x"
    raise ValueError("the user's own mistake")
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    path = tmp_path / "programs.py"
    path.write_text(PROGRAMS)
    return path


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(model: str | None, policy: str | None) -> Any:
        return _Closing(["fine"])

    monkeypatch.setattr(run_command, "start_engine", start)


class _Closing(ScriptedBackend):
    def __enter__(self) -> _Closing:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.open_sessions == 0


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def python(code: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=os.environ | environ
    )
    return done.stdout


def test_help_loads_no_torch_and_little_else() -> None:
    code = """
import sys
bare = len(sys.modules)
from caesura.lang.cli import main
sys.argv = ["caesura", "--help"]
try:
    main()
except SystemExit as ended:
    assert not ended.code
heavy = [name for name in ("torch", "numpy", "pydantic", "tokenizers", "rich.live") if name in sys.modules]
print("heavy", heavy, "modules", len(sys.modules) - bare)
"""
    last = python(code).splitlines()[-1]
    assert last.startswith("heavy [] ")
    assert int(last.split()[-1]) < 260  # about 0.2 s where nothing else runs


def test_every_command_offers_json_and_says_what_it_does() -> None:
    for name in ("demo", "run", "chat", "doctor", "bench"):
        result = invoke(name, "--help")
        assert result.exit_code == 0
        assert "--json" in result.stdout


def test_arguments_follow_the_annotations(programs: Path) -> None:
    target = f"{programs}:ask"
    result = invoke("run", target, "--arg", "word=a=b", "--arg", "times=3", "--arg", "loud=yes", "--arg", 'tags=["x"]')
    assert result.exit_code == 0, result.stderr
    assert "user: a=b 3 True ['x']" in result.stdout
    assert "assistant: fine" in result.stdout
    assert "returned: 3" in result.stdout


def test_a_program_without_roles_prints_its_text(programs: Path) -> None:
    result = invoke("run", f"{programs}:plain")
    assert "Look up: fine = FINE" in result.stdout
    assert "1 tool calls" in result.stdout


def test_json_is_one_document(programs: Path) -> None:
    result = invoke("run", f"{programs}:ask", "--arg", "word=hi", "--json")
    document = json.loads(result.stdout)
    assert set(document) == {"text", "variables", "usage", "decisions"}
    assert document["variables"] == {"answer": "fine"}
    assert document["usage"]["generations"] == 1


def test_text_outside_of_turns_is_printed_where_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mixed.py"
    path.write_text("""
from caesura.lang import assistant, function, gen, user

def lookup(word: str) -> str:
    return word.upper()

@function
def mixed(s):
    s += "before " + gen("plain")
    s += user("hi") + assistant(gen("answer", tools=[lookup]))
    s += "between"
    s += user("bye")
    s += "after"
""")
    replies: list[str | ScriptedReply] = ["that", ScriptedReply(tool_calls=[("lookup", {"word": "x"})]), "found"]
    monkeypatch.setattr(run_command, "start_engine", lambda model, policy: _Closing(replies))
    *lines, _ = invoke("run", str(path)).stdout.splitlines()
    assert lines == [
        "before that",
        "user: hi",
        "assistant calls: lookup(word='x')",
        "tool lookup: X",
        "assistant: found",
        "between",
        "user: bye",
        "after",
    ]


SAYS = """
from caesura.lang import assistant, function, gen, user

@function
def says(s):
    s += "日本語"
    s.set_var("sum", {(1, 2): float("nan"), "half": "\\ud83d"})
"""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_whatever_a_program_says_can_be_printed(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "says.py").write_text(SAYS)
    code = f"""
import sys
from caesura.lang import ScriptedBackend
from caesura.lang.cli import main, run_command
import contextlib
run_command.start_engine = lambda model, policy: contextlib.nullcontext(ScriptedBackend([]))
sys.argv = ["caesura", "run", {str(tmp_path / "says.py")!r}, *sys.argv[1:]]
"""
    plain = python(code + "main()", PYTHONIOENCODING=encoding)
    assert plain.startswith("日本語" if encoding == "utf-8" else "???")
    document = json.loads(python(code + "sys.argv.append('--json'); main()", PYTHONIOENCODING=encoding))
    assert document["text"] == "日本語"
    assert document["variables"] == {"sum": {"(1, 2)": None, "half": "\ufffd"}}


def test_a_run_is_recorded_replayed_and_resumed(programs: Path, tmp_path: Path) -> None:
    tape = str(tmp_path / "run.jsonl")
    first = invoke("run", f"{programs}:plain", "--record", tape)
    assert "Look up: fine = FINE" in first.stdout
    for option in ("--replay", "--resume"):
        again = invoke("run", f"{programs}:plain", option, tape)
        assert "Look up: fine = FINE" in again.stdout
    changed = invoke("run", f"{programs}:ask", "--arg", "word=hi", "--replay", tape)
    assert changed.exit_code == 1
    assert "the program has changed since the recording: it has no (further) turn of user" in changed.stderr
    assert invoke("run", f"{programs}:plain", "--replay", str(tmp_path / "none")).exit_code == 2
    assert invoke("run", f"{programs}:plain", "--record", str(programs)).exit_code == 2
    assert programs.read_text() == PROGRAMS
    both = invoke("run", f"{programs}:plain", "--replay", tape, "--record", tape)
    assert both.exit_code == 2
    assert "do not go together" in both.stderr
    for option in ("--model", "--policy", "--url"):
        unused = invoke("run", f"{programs}:plain", "--replay", tape, option, "http://x")
        assert unused.exit_code == 2 and "--replay runs no model" in unused.stderr
    for option in ("--record", "--resume"):
        nowhere = invoke("run", f"{programs}:plain", option, os.devnull)
        assert nowhere.exit_code == 2 and "is no file that a run is written to" in nowhere.stderr


def test_a_trace_is_saved_or_printed_also_of_a_failed_run(programs: Path, tmp_path: Path) -> None:
    assert "call_tool" not in invoke("run", f"{programs}:plain", "--trace", str(tmp_path / "t.html")).stdout
    assert "<svg" in (tmp_path / "t.html").read_text()
    assert invoke("run", f"{programs}:broken", "--trace", str(tmp_path / "t.json")).exit_code == 1
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert "pause" in invoke("run", f"{programs}:plain", "--trace", "-").stderr
    assert "must end in .html or .json" in invoke("run", f"{programs}:plain", "--trace", "t.txt").stderr


def test_a_trace_that_cannot_be_written_hides_neither_result_nor_failure(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = invoke("run", f"{programs}:plain", "--trace", str(tmp_path / "no" / "t.html"))
    assert (early.exit_code, early.stdout) == (2, "") and "cannot write" in early.stderr

    def full(self: RunTrace, path: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunTrace, "save", full)
    trace = str(tmp_path / "t.html")
    late = invoke("run", f"{programs}:plain", "--trace", trace)
    assert late.exit_code == 2 and "fine = FINE" in late.stdout and "No space left" in late.stderr
    failed = invoke("run", f"{programs}:broken", "--trace", trace)
    assert failed.exit_code == 1 and "the user's own mistake" in failed.stderr and "No space left" in failed.stderr


def test_streaming_prints_the_text(programs: Path) -> None:
    result = invoke("run", f"{programs}:plain", "--stream")
    assert "Look up: fine = FINE" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere.py"], 2, ["nowhere.py does not exist"]),
        (["{file}"], 2, ["several programs", "ask, plain, broken"]),
        (["{file}:other"], 2, ["no program 'other'", "ask, plain, broken"]),
        (["{file}:ask"], 2, ["missing word", "ask(word: str, times: int = 1", "--arg word=..."]),
        (["{file}:ask", "--arg", "word"], 2, ["must read name=value"]),
        (["{file}:ask", "--arg", "wrd=x"], 2, ["no argument 'wrd'", "ask(word: str"]),
        (["{file}:ask", "--arg", "word=x", "--arg", "times=many"], 2, ["times is 'many'", "no int"]),
        (["{file}:broken"], 1, ["the user's own mistake", "programs.py", "raise ValueError"]),
    ],
)
def test_errors_are_one_message_and_the_next_command(
    programs: Path, arguments: list[str], code: int, words: list[str]
) -> None:
    result = invoke("run", *(part.replace("{file}", str(programs)) for part in arguments))
    assert result.exit_code == code
    assert result.stdout == ""
    flat = " ".join(result.stderr.split())
    for word in words:
        assert word in flat
    assert result.stderr.splitlines()[-1].startswith("try: ")
    assert "Traceback" not in result.stderr


def test_parameters_without_a_name_are_not_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "open.py"
    path.write_text("from caesura.lang import function\n@function\ndef take(s, a: int, *rest, **more): ...\n")
    result = invoke("run", str(path))
    assert "missing a; the program is take(a: int, *rest, **more)" in result.stderr
    assert result.stderr.endswith("--arg a=...\n")


def test_only_the_users_own_lines_are_shown(programs: Path) -> None:
    result = invoke("run", f"{programs}:broken")
    files = [line for line in result.stderr.splitlines() if line.strip().startswith("File ")]
    assert len(files) == 1
    assert "programs.py" in files[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(:\n", "invalid syntax"),
        ("import nothing_of_that_name\n", "nothing_of_that_name"),
        ("x = 1\n", "has no program"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "odd.py"
    path.write_text(text)
    result = invoke("run", str(path))
    assert result.exit_code in (1, 2)
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_an_imported_program_is_found_when_the_file_has_none(tmp_path: Path, programs: Path) -> None:
    path = tmp_path / "uses.py"
    path.write_text("from programs import plain\n")
    assert invoke("run", str(path)).exit_code == 0


def test_unknown_policies_are_listed() -> None:
    result = invoke("demo", "--policies", "lru,wishful")
    assert result.exit_code == 2
    assert "'wishful' is no policy" in result.stderr
    assert "min_waste" in result.stderr


def test_a_trace_that_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    result = invoke("demo", "--trace", str(tmp_path / "no" / "trace.json"))
    assert result.exit_code == 2
    assert "cannot write" in result.stderr


def test_the_demo_replaces_no_file_but_a_trace(tmp_path: Path) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "demo.svg"
    trace.write_text('{"mine": 1}')
    refused = invoke("demo", "--trace", str(trace))
    assert refused.exit_code == 2 and "is no trace" in refused.stderr
    assert trace.read_text() == '{"mine": 1}'
    trace.write_text('{"traceEvents": []}')
    picture.mkdir()
    refused = invoke("demo", "--trace", str(trace), "--svg", str(picture))
    assert refused.exit_code == 2 and "demo.svg" in refused.stderr


def test_a_busy_port_is_said_before_the_engine_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Any) -> None:
        raise AssertionError("the engine would be loaded")

    monkeypatch.setattr("caesura.runtime.server.serve", run)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        result = invoke("serve", "--port", str(busy.getsockname()[1]))
    assert result.exit_code == 2
    assert "cannot listen on 127.0.0.1:" in result.stderr and "Address already in use" in result.stderr


def test_settings_are_told_as_json() -> None:
    assert invoke("config", "show", "--json").stdout == invoke("config", "show", "--format", "json").stdout


def test_usage_errors_exit_with_2() -> None:
    assert invoke("demo", "--agents", "0").exit_code == 2
    assert invoke("dance").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("simulate", "nope"), "nope"),
        (("simulate", "mix", "--rate", "-1"), "--rate is -1"),
        (("simulate", "mix", "--minutes", "inf"), "--minutes is inf"),
        (("simulate", "mix", "--kv-tokens", "0"), "--kv-tokens is 0"),
        (("simulate", "mix", "--host-tokens", "-1"), "--host-tokens is -1"),
        (("simulate", sys.executable), "JSON lines"),
        (("bench", "foo"), "simulate"),
    ],
)
def test_wrong_usage_of_benchmarks_exits_with_2_and_one_message(arguments: tuple[str, ...], told: str) -> None:
    run_app = "import sys; from caesura.lang.cli import main; sys.argv[0] = 'caesura'; main()"
    done = subprocess.run([sys.executable, "-c", run_app, *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr and "Traceback" not in done.stderr


def test_benchmarks_need_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from caesura.lang.cli import bench_command

    monkeypatch.setattr(bench_command, "repository", lambda: None)
    result = invoke("bench", "engine")
    assert result.exit_code == 2
    assert "clone" in result.stderr


def test_what_a_model_or_a_tool_says_does_not_command_the_terminal(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "a\x1b]0;owned\x07b\x1b[2Jc\x9bd"
    monkeypatch.setattr(run_command, "start_engine", lambda model, policy: _Closing([hostile] * 4))
    for arguments in (("ask", "--arg", f"word={hostile}"), ("plain",), ("plain", "--stream"), ("broken",)):
        result = invoke("run", f"{programs}:{arguments[0]}", *arguments[1:])
        assert not {"\x1b", "\x07", "\x9b"} & set(result.stdout + result.stderr)
        assert "a\ufffd]0;owned\ufffdb" in result.stdout or arguments[0] == "broken"


def test_no_escape_codes_where_there_is_no_terminal(programs: Path) -> None:
    result = invoke("run", f"{programs}:ask", "--arg", "word=hi")
    assert "\x1b" not in result.stdout + result.stderr


@pytest.mark.parametrize(("parameter", "options"), [("stream", []), ("temperature", ["--temperature", "0"])])
def test_a_parameter_that_is_called_like_an_option_is_refused(
    tmp_path: Path, parameter: str, options: list[str]
) -> None:
    path = tmp_path / "own.py"
    path.write_text(f"from caesura.lang import function\n@function\ndef take(s, {parameter}=1): ...\n")
    result = invoke("run", str(path), "--arg", f"{parameter}=2", *options)
    assert result.exit_code == 2
    assert f"take has a parameter '{parameter}'" in " ".join(result.stderr.split())
