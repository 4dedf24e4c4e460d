"""Tools as they are declared: schemas, the check of arguments, and what is no tool."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

import pytest
from caesura.lang import DefinitionError, Tool, call_tool, call_tools, gen, tool
from caesura.lang.traces.describe import call_text


@tool
def search(query: str, limit: int = 3) -> str:
    """Look a topic up."""
    return f"{limit} pages on {query}"


def test_schema_from_signature_and_docstring():
    @tool(name="find", timeout_s=5)
    def lookup(query: str, kind: Literal["a", "b"] = "a", json: list[int] | None = None, copy: bool = False) -> str:
        """Find things.

        In many places.
        """
        return ""

    spec = lookup.spec
    assert spec["type"] == "function"
    assert spec["function"]["name"] == "find"
    assert spec["function"]["description"].startswith("Find things.")
    parameters = spec["function"]["parameters"]
    assert parameters["required"] == ["query"]
    assert list(parameters["properties"]) == ["query", "kind", "json", "copy"]
    assert parameters["properties"]["kind"]["enum"] == ["a", "b"]
    assert parameters["additionalProperties"] is False
    assert json.dumps(spec)


def test_arguments_are_checked_strictly():
    assert search.parse_arguments('{"query": "x"}') == {"query": "x"}
    for bad, message in [
        ('{"query": 1}', "query: Input should be a valid string"),
        ('{"query": "x", "limit": "3"}', "limit: Input should be a valid integer"),
        ("{}", "query: Field required"),
        ('{"query": "x", "more": 1}', "more: Extra inputs"),
        ("{", "Invalid JSON"),
        ("[]", "value: "),
    ]:
        with pytest.raises(ValueError, match=message):
            search.parse_arguments(bad)


def test_arguments_nested_without_end_are_invalid():
    bare = Tool(lambda **arguments: "", name="bare", parameters={"type": "object"})
    for called in (search, bare):
        with pytest.raises(ValueError):
            called.parse_arguments('{"query": ' + "[" * 100_000)
    assert call_text("search", "[" * 100_000).startswith("search([[[")


def test_a_tool_without_its_arguments_is_no_call():
    with pytest.raises(DefinitionError, match=r"call_tools\('r'\): Tool\('search'\) is no call; \(tool, args\.\.\.\)"):
        call_tools("r", [search])


def test_rich_arguments():
    @dataclasses.dataclass
    class Place:
        x: int

    @tool
    def go(place: Place) -> str:
        return str(place.x)

    assert go.parse_arguments('{"place": {"x": 1}}') == {"place": Place(1)}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tool(3),
        lambda: tool(name="has blanks")(lambda: 1),
        lambda: tool(timeout_s=0)(search.function),
        lambda: tool(retries=-1)(search.function),
        lambda: tool(on_error="explode")(search.function),
        lambda: tool(lambda *args: 1).spec,
        lambda: tool(name="f")(lambda *args: 1).spec,
        lambda: call_tool("x", search),
        lambda: call_tool("x", search, "q", colour=1),
        lambda: call_tool("x", search, "q", timeout_s=-1),
        lambda: call_tools("x", []),
        lambda: call_tools("x", [(search, "q")], wait="some"),
        lambda: call_tool("x", "search"),
        lambda: gen("x", tools=[search, search]),
        lambda: gen("x", tools=[search], tool_choice="weather"),
        lambda: gen("x", tools=[search], n=2),
    ],
)
def test_definition_errors(make):
    with pytest.raises(DefinitionError):
        make()
