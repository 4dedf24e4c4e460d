"""Tools of real MCP servers, over stdio and over HTTP on the loopback: results, deadlines, cancellation, death."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from caesura.lang import (
    DefinitionError,
    McpServer,
    ScriptedBackend,
    ScriptedReply,
    assistant,
    call_tool,
    call_tools,
    function,
    gen,
    mcp_tools,
    user,
)
from caesura.lang.mcp.connection import McpUnavailable

SERVER = Path(__file__).with_name("mcp_server.py")


@function
def call(s, tool, options=None, **arguments):
    s += call_tool("it", tool, **(options or {}), **arguments)


def result(tool, options=None, **arguments):
    state = call.run(tool, options, **arguments, backend=ScriptedBackend([]))
    return state.tool_result("it")


def wait_for(marks, text):
    end = time.monotonic() + 30
    while text not in (marks.read_text() if marks.exists() else ""):
        assert time.monotonic() < end, f"the server never said {text!r}"
        time.sleep(0.02)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(port, marks):
    process = subprocess.Popen(
        [sys.executable, str(SERVER), str(port)],
        env={**os.environ, "MCP_MARKS": str(marks)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return process
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < end, "the server does not listen"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mcp")


@pytest.fixture(scope="module")
def stdio(folder):
    os.environ["MCP_SECRET"] = "not for servers"
    env = {"MCP_MARKS": str(folder / "stdio"), "MCP_GIVEN": "yes"}
    with mcp_tools(McpServer("marks", command=(sys.executable, str(SERVER), "stdio"), env=env)) as tools:
        yield tools
    del os.environ["MCP_SECRET"]


def test_results_are_text_structured_values_and_errors(stdio):
    assert result(stdio["marks__add"], a=1, b=2).text == "3"
    place = result(stdio["marks__where_is"], place={"city": "Oslo"})
    assert place.value == {"city": "OSLO", "floor": 0}
    mixed = result(stdio["marks__mixed"])
    assert (mixed.value, mixed.text) == (mixed.text, "one\n[image image/png, 3 bytes]\ntwo")
    failed = result(stdio["marks__fails"], why="no")
    assert not failed.ok
    assert failed.text.startswith("Error: ")
    wrong = result(stdio["marks__add"], a="x", b=2)
    assert not wrong.ok
    assert "valid integer" in wrong.text
    with pytest.raises(DefinitionError, match="missing a required argument: 'b'"):
        result(stdio["marks__add"], a=1)


def test_a_model_calls_them_and_reads_their_schemas(stdio):
    @function
    def ask(s):
        s += user("What is 2 and 3, and 4 and 5?")
        s += assistant(gen("answer", tools=stdio))

    calls = [("marks__add", {"a": 2, "b": 3}), ("marks__add", {"a": 4, "b": 5}), ("marks__add", {"a": 1, "c": 1})]
    backend = ScriptedBackend([ScriptedReply(tool_calls=calls), "5 and 9."])
    state = ask.run(backend=backend)
    assert [told.text for _, told in state.tool_calls("answer")][:2] == ["5", "9"]
    assert "missing a required argument" in state.tool_calls("answer")[2][1].text
    (spec,) = (tool.spec["function"] for tool in stdio if tool.name == "marks__add")
    assert spec["description"] == "Add two numbers."
    assert spec["parameters"]["required"] == ["a", "b"]


def test_a_late_call_is_cancelled_at_the_server(stdio, folder):
    late = result(stdio["marks__waits"], {"timeout_s": 0.2})
    assert "gave no result within 0.2 s" in late.text
    wait_for(folder / "stdio", "waits is cancelled")


def test_a_server_says_how_far_it_is(stdio, folder):
    class Events(list):
        def append(self, event):
            super().append(event)
            if event[0] == "report":
                (folder / "heard").touch()

    backend = ScriptedBackend([])
    backend.events = Events()
    state = call.run(stdio["marks__steps"], heard=str(folder / "heard"), backend=backend)
    assert state["it"] == "heard"
    assert [event[2:] for event in backend.events if event[0] == "report"] == [(0.25, 0)]


def test_the_process_sees_what_it_is_given_and_no_more(stdio):
    seen = result(stdio["marks__environment"]).value
    assert (seen["secret"], seen["given"]) == (None, "yes")


def test_a_server_that_dies_fails_its_calls_and_is_started_again_at_the_next(stdio):
    before = result(stdio["marks__environment"]).value["pid"]

    @function
    def both(s):
        s += call_tools("them", [(stdio["marks__waits"],), (stdio["marks__dies"],)])

    state = both.run(backend=ScriptedBackend([]))
    waits, dies = state.tool_results("them")
    assert not waits.ok
    assert not dies.ok
    assert "MCP server 'marks': Connection closed" in dies.text
    assert result(stdio["marks__environment"]).value["pid"] != before


def test_a_server_that_hangs_when_it_is_started_again_is_ended_with_its_tools(folder):
    pid = folder / "pid"
    started_again = "import os, time; open(os.environ['PID'], 'x').write(str(os.getpid())); time.sleep(300)"
    once = f"""
import os, sys
if os.path.exists(os.environ["PID"] + ".first"):
    exec({started_again!r})
open(os.environ["PID"] + ".first", "x").close()
os.execv(sys.executable, [sys.executable, {str(SERVER)!r}, "stdio"])
"""
    env = {"MCP_MARKS": str(folder / "hangs"), "PID": str(pid)}
    with mcp_tools(McpServer("marks", command=(sys.executable, "-c", once), env=env)) as tools:
        assert not result(tools["marks__dies"]).ok
        late = result(tools["marks__environment"], {"timeout_s": 2})
        assert not late.ok and "2" in late.text
    for _ in range(1000):
        try:
            os.kill(int(pid.read_text()), 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    else:
        raise AssertionError("the process lives on")


def test_half_of_a_character_is_refused_and_ends_no_connection(stdio):
    before = result(stdio["marks__environment"]).value["pid"]
    refused = result(stdio["marks__fails"], why="\ud800")
    assert not refused.ok and "half of a character" in refused.text
    assert result(stdio["marks__environment"]).value["pid"] == before


def test_over_http_a_cancelled_program_cancels_the_call_and_a_new_server_is_found_again(folder):
    marks = folder / "http"
    port = free_port()
    process = serve(port, marks)
    allowed = ["add", "there__waits", "dies"]
    try:
        with mcp_tools(McpServer("there", url=f"http://127.0.0.1:{port}/mcp"), allow=allowed) as tools:
            assert tools.names == ["there__add", "there__waits", "there__dies"]
            assert result(tools["there__add"], a=1, b=2).text == "3"
            state = call.run(tools["there__waits"], backend=ScriptedBackend([]))
            wait_for(marks, "waits begins")
            state.cancel()
            wait_for(marks, "waits is cancelled")
            assert not result(tools["there__dies"]).ok
            process.wait(timeout=30)
            assert "MCP server 'there'" in result(tools["there__add"], a=1, b=2).text
            process = serve(port, marks)
            assert result(tools["there__add"], a=3, b=4).text == "7"
        assert "its tools are closed" in result(tools["there__add"], a=1, b=2).text
        with pytest.raises(DefinitionError, match="allow names a tool 'rm' that no server has"):
            mcp_tools(McpServer("there", url=f"http://127.0.0.1:{port}/mcp"), allow=["rm"])
    finally:
        process.kill()
        process.wait(timeout=30)


def test_over_http_an_error_of_one_call_disturbs_no_other(folder):
    marks = folder / "busy"
    port = free_port()
    process = serve(port, marks)
    try:
        with mcp_tools(McpServer("there", url=f"http://127.0.0.1:{port}/mcp")) as tools:
            waiting = call.run(tools["there__waits"], backend=ScriptedBackend([]))
            wait_for(marks, "waits begins")
            assert "come back later" in result(tools["there__busy"]).text
            assert result(tools["there__add"], a=1, b=2).text == "3"
            assert not waiting.done
            waiting.cancel()
            wait_for(marks, "waits is cancelled")
    finally:
        process.kill()
        process.wait(timeout=30)


def test_tools_that_are_refused_leave_no_server_behind(folder):
    marks = folder / "refused"
    started = McpServer("marks", command=(sys.executable, str(SERVER), "stdio"), env={"MCP_MARKS": str(marks)})
    with pytest.raises(DefinitionError, match="allow names a tool 'rm' that no server has"):
        mcp_tools(started, allow=["rm"])
    wait_for(marks, "the server ends")


def test_a_server_that_cannot_be_started_or_does_not_answer():
    with pytest.raises(McpUnavailable, match="MCP server 'nowhere'"):
        mcp_tools(["/nowhere"])
    with pytest.raises(McpUnavailable, match="its last words: no disk"):
        mcp_tools(McpServer("broken", command=(sys.executable, "-c", "import sys; sys.exit('no disk')")))
    with pytest.raises(McpUnavailable, match=r"did not answer within 0\.3 s"):
        mcp_tools([sys.executable, "-c", "import time; time.sleep(60)"], connect_timeout_s=0.3)
