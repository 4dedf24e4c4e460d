"""MCP servers: which there are, and what their tools are called. No server runs here."""

from __future__ import annotations

import json

import pytest
from caesura.lang import DefinitionError, McpServer, ToolOutput, call_tool, function, mcp_servers, mcp_tools, tool
from caesura.lang.backends.scripted import ScriptedBackend
from caesura.lang.errors import ToolError
from caesura.lang.mcp.toolset import allowed, tool_names
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=40)
@given(st.sets(st.tuples(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=80)), max_size=8))
def test_names_are_identifiers_and_all_different_and_do_not_depend_on_the_order(pairs):
    ordered = sorted(pairs)
    names = tool_names(ordered)
    assert len(set(names)) == len(ordered)
    assert all(name.isidentifier() and name.isascii() and len(name) <= 64 for name in names)
    assert tool_names(ordered[::-1]) == names[::-1]


def test_names_are_prefixed_by_the_server():
    assert tool_names([("files", "read"), ("my server", "get.page/v2")]) == ["files__read", "my_server__get_page_v2"]
    first, second = tool_names([("a", "b__c"), ("a", "b-c")])  # both would be a__b_c
    assert first != second
    with pytest.raises(DefinitionError, match="two MCP servers are called 'a'"):
        tool_names([("a", "b"), ("a", "b")])


def test_a_prefixed_name_allows_that_tool_alone():
    own = ["read", "files__read"]
    names = tool_names([("files", own[0]), ("other", own[1])])
    assert allowed(names, own, ["files__read"]) == {"files__read"}
    assert allowed(names, own, ["read"]) == {"files__read"}
    assert allowed(names, own, None) == set(names)


def test_a_configuration_file_as_other_clients_write_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN_FOR_TEST", "abc")
    path = tmp_path / "mcp.json"
    servers = {
        "files": {
            "command": "npx",
            "args": ["-y", "server", "${NOT_SET_HERE:-/data}"],
            "env": {"KEY": "${TOKEN_FOR_TEST}"},
        },
        "web": {"type": "http", "url": "https://example.org/mcp", "headers": {"X": "Bearer ${TOKEN_FOR_TEST}"}},
    }
    path.write_text(json.dumps({"mcpServers": servers}))
    found = mcp_servers(path)
    assert found["files"].command == ("npx", "-y", "server", "/data")
    assert found["files"].env == {"KEY": "abc"}
    assert found["web"].headers == {"X": "Bearer abc"}
    assert "abc" not in repr(found)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"args": []}, "url is None; it must be a non-empty text"),
        ({"command": "x", "args": "y"}, "args must be a list"),
        ({"command": "x", "env": {"A": 1}}, "env must be an object of texts"),
        ({"command": "${SURELY_NOT_SET}"}, "the environment variable SURELY_NOT_SET is not set"),
        ({"type": "sse", "url": "http://a"}, "type is 'sse'"),
        ({"url": "file:///etc/passwd"}, "it must be http"),
        (1, "it must be an object"),
    ],
)
def test_mistakes_in_a_configuration_are_named(tmp_path, entry, message):
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps({"mcpServers": {"it": entry}}))
    with pytest.raises(DefinitionError, match=message) as caught:
        mcp_servers(path)
    assert "mcp.json" in str(caught.value)
    assert "'it'" in str(caught.value)


def test_what_is_no_configuration_or_server(tmp_path):
    for text in ("", "[]", "{}"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DefinitionError, match=r"x\.json"):
            mcp_servers(tmp_path / "x.json")
    with pytest.raises(DefinitionError, match="either a command or a url"):
        McpServer("a")
    with pytest.raises(DefinitionError, match="no URL"):
        mcp_tools("rm -rf /")  # a text is never a command
    with pytest.raises(DefinitionError, match="no server"):
        mcp_tools()
    named = {"http://127.0.0.1:1/x": "mcp", "https://a.org/mcp": "a.org"}
    assert {url: McpServer.of(url).name for url in named} == named
    assert McpServer.of(["npx", "-y", "@who/server-files", "/tmp"]).name == "server-files"


def test_a_tool_may_choose_its_text_and_speak_of_its_error_in_its_own_words():
    @tool
    def measured(ok: bool) -> ToolOutput:
        if not ok:
            raise ToolError("the scale is empty")
        return ToolOutput({"kg": 3.25}, "3.25 kg")

    @function
    def weigh(s):
        s += call_tool("good", measured, True) + "; " + call_tool("bad", measured, False)

    state = weigh.run(backend=ScriptedBackend([]))
    assert state.text() == "3.25 kg; Error: the scale is empty"
    assert state.tool_result("good").value == {"kg": 3.25}
