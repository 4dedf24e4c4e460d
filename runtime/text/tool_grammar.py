"""Grammars under which a model's tool calls are well formed and their arguments valid, in Lark as llguidance reads it.

A grammar says what may be written, not what should: under "auto" any text is allowed until a call begins, and from
there on the call must be one of the tools with arguments that satisfy its schema.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from caesura.runtime.errors import InvalidRequest
from caesura.runtime.text.tool_events import ToolFormat

MAX_TOOLS = 128
MAX_PARAMETERS = 128
MAX_SCHEMA_CHARS = 64 << 10
MAX_SCHEMA_DEPTH = 64

# JSON as models were taught to write it: one blank after a colon or comma, so nothing to loop in. What a grammar cannot
# say (a format "path", unique items) is left to whoever reads the call, instead of refusing all tools for one of them.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
_OPEN, _CLOSE, _PYTHON_TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"

_PROSE = frozenset({"description", "title", "examples", "default", "$comment", "deprecated"})
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})

Tool = Mapping[str, Any]


def tool_grammar(
    format: ToolFormat,
    tools: Sequence[Tool],
    *,
    choice: str = "auto",
    parallel: bool = True,
    special_ids: Mapping[str, int] | None = None,
) -> str | None:
    """A Lark grammar for an assistant turn that may call ``tools``; None if there is nothing to hold it to.

    ``tools`` are function specs (``name``, ``parameters`` as a JSON schema; the OpenAI wrapper is taken too).
    ``choice``: "auto" (text, or text and then calls), "required" (calls alone), "none", or a tool's name (that call
    alone). ``parallel`` allows several calls. ``special_ids`` are the tokenizer's control tokens: a format's mark found
    there is one token, any other is ordinary text. Raises InvalidRequest, naming the tool and the limit.
    """
    if choice == "none" or (not tools and choice == "auto"):
        return None
    specs = [_spec(tool, i) for i, tool in enumerate(tools)]
    if len(specs) > MAX_TOOLS:
        raise InvalidRequest(f"tools has {len(specs)} entries; the limit is {MAX_TOOLS}")
    names = [name for name, _ in specs]
    if len(set(names)) != len(names):
        raise InvalidRequest("tools holds two functions of the same name")
    if choice not in ("auto", "required"):
        specs = [spec for spec in specs if spec[0] == choice]
        parallel = False
    if not specs:
        raise InvalidRequest(f"tool_choice is {choice!r}; the tools are {', '.join(names) or 'none'}")
    build: Callable[..., list[str]] = {
        ToolFormat.HERMES: _hermes,
        ToolFormat.LLAMA3_JSON: _llama3,
        ToolFormat.PYTHONIC: _pythonic,
    }[ToolFormat(format)]
    return "\n".join(build(specs, choice == "auto", parallel, special_ids or {})) + "\n"


def _hermes(
    specs: Sequence[tuple[str, dict[str, Any]]], auto: bool, parallel: bool, special_ids: Mapping[str, int]
) -> list[str]:
    close = mark_of(_CLOSE, special_ids)
    lines = ["body: " + " | ".join(f"call_{i}" for i in range(len(specs)))]
    for i, (name, schema) in enumerate(specs):
        opening = _text('\n{"name": ' + json.dumps(name) + ', "arguments": ')
        lines.append(f"call_{i}: {opening} a{i} {_text('}' + chr(10))} {close}")
        lines.append(f"a{i}: %json {_json(schema)}")
    more = f' ("\\n" {mark_of(_OPEN, special_ids)} body)*' if parallel else ""
    if not auto:
        return [f"start: {mark_of(_OPEN, special_ids)} body{more}", *lines]
    if _OPEN in special_ids:
        head = f"head: TEXT {mark_of(_OPEN, special_ids)}"
    else:
        head = "head[lazy]: /(?s:.*)<tool_call>/"
    # the mark spelled out in free text would be read as the beginning of a call, so it cannot be part of it
    text = "TEXT: /(?s:.*)/ & ~/(?s:.*)<tool_call>(?s:.*)/"
    return [f"start: TEXT | head body{more}", head, text, *lines]


def _llama3(
    specs: Sequence[tuple[str, dict[str, Any]]], auto: bool, parallel: bool, special_ids: Mapping[str, int]
) -> list[str]:
    lines = ["body: " + " | ".join(f"call_{i}" for i in range(len(specs)))]
    for i, (name, schema) in enumerate(specs):
        opening = _text(f': {json.dumps(name)}, "parameters": ')
        lines.append(f'call_{i}: {opening} a{i} "}}"')
        lines.append(f"a{i}: %json {_json(schema)}")
    key = _text('{"name"')
    more = f' ("; " {key} body)*' if parallel else ""
    tag = f"({mark_of(_PYTHON_TAG, special_ids)})? " if _PYTHON_TAG in special_ids else ""
    if not auto:
        return [f"start: {tag}{key} body{more}", *lines]
    tagged = f" | {mark_of(_PYTHON_TAG, special_ids)} {key} body{more}" if tag else ""
    # keys by which the parser may know a call, with any blanks a model may put: none of them in free text
    early = '\\{[ \\t\\r\\n]*"(name|function|type|id|arguments|parameters)"'
    head = ["head[lazy]: HEAD", f'HEAD: /(?s:.*)\\{{"name"/ & ~/(?s:.*){early}(?s:.+)/']
    text = f"TEXT: /(?s:.*)/ & ~/(?s:.*){early}(?s:.*)/"
    return [f"start: TEXT | head body{more}{tagged}", *head, text, *lines]


def _pythonic(
    specs: Sequence[tuple[str, dict[str, Any]]], auto: bool, parallel: bool, special_ids: Mapping[str, int]
) -> list[str]:
    del special_ids
    lines: list[str] = []
    firsts: list[str] = []
    values: dict[str, str] = {}
    calls = " | ".join(f'"{name}(" a{i}' for i, (name, _) in enumerate(specs))
    more = f' (", " ({calls}))*' if parallel else ""
    # a call however a model may space it; free text holds none, so that what the parser reads is what was held
    names = "|".join(_escaped(name) for name, _ in specs)
    early = f"\\[[ \\t\\r\\n]*({names})[ \\t\\r\\n]*\\("
    shared = ["ANY: /(?s:.*)/", f"EARLY: ANY /{early}(?s:.+)/", f"LATE: ANY /{early}/ ANY", "TEXT: ANY & ~LATE"]
    for i, (name, schema) in enumerate(specs):
        lines += _keyword_rules(f"a{i}", name, schema, values)
        if auto:
            lines.append(f"head_{i}[lazy]: HEAD_{i}")
            lines.append(f'HEAD_{i}: (ANY "[{name}(") & ~EARLY')
            firsts.append(f"head_{i} a{i}")
        else:
            firsts.append(f'"[{name}(" a{i}')
    lines += [f"{rule}: {wanted}" for wanted, rule in values.items()]
    listed = f'({" | ".join(firsts)}){more} "]"'
    if not auto:
        return [f"start: {listed}", *lines]
    return [f"start: TEXT | {listed}", *shared, *lines]


def _keyword_rules(rule: str, tool: str, schema: Mapping[str, Any], values: dict[str, str]) -> list[str]:
    """``a=1, b="x")``: keywords in the schema's order, optional ones may be left out. Ends with the parenthesis.

    ``values`` collects what the keywords may be, one rule for all that are alike.
    """
    properties = schema.get("properties") or {}
    if not isinstance(properties, Mapping) or len(properties) > MAX_PARAMETERS:
        raise InvalidRequest(f"tool {tool!r}: properties must be an object of at most {MAX_PARAMETERS}")
    required = set(schema.get("required") or ())
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    lines: list[str] = []
    for i, (key, value) in enumerate(properties.items()):
        if not (key.isascii() and key.replace(".", "_").replace("-", "_").isidentifier()):
            raise InvalidRequest(f"tool {tool!r}: parameter {key!r} cannot be written as a Python keyword")
        wanted = _python_value(value, shared)
        name = values.setdefault(wanted, f"v{len(values)}")
        skip_first = "" if key in required else f" | {rule}_f{i + 1}"
        skip_later = "" if key in required else f" | {rule}_l{i + 1}"
        lines.append(f'{rule}_f{i}: "{key}=" {name} {rule}_l{i + 1}{skip_first}')
        lines.append(f'{rule}_l{i}: ", {key}=" {name} {rule}_l{i + 1}{skip_later}')
    end = len(properties)
    lines.append(f"{rule}: {rule}_f0" if end else f'{rule}: ")"')
    if end:
        lines += [f'{rule}_f{end}: ")"', f'{rule}_l{end}: ")"']
    return lines


def _python_value(schema: Any, shared: Mapping[str, Any]) -> str:
    """A value as a Python literal: constants by their Python names, the rest as JSON, which Python reads alike."""
    if isinstance(schema, Mapping) and "enum" not in schema and "const" not in schema:
        if schema.get("type") == "boolean":
            return '("True" | "False")'
        if schema.get("type") == "null":
            return '"None"'
    if isinstance(schema, Mapping):
        schema = {**shared, **schema}
    return f"%json {_json(schema)}"


def _spec(tool: Tool, index: int) -> tuple[str, dict[str, Any]]:
    """A tool's name and the schema of its arguments, closed to other keys."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(name, str):
        raise InvalidRequest(f"tools[{index}] has no name")
    if not (1 <= len(name) <= 64 and name.isascii() and all(char.isalnum() or char in "_.-" for char in name)):
        raise InvalidRequest(f"tools[{index}]: name {name!r:.80} must be 1 to 64 of a-z, A-Z, 0-9, '_', '.', '-'")
    schema = inner.get("parameters")
    if schema is None or schema == {}:
        schema = {"type": "object", "properties": {}}
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"tool {name!r}: parameters must be a JSON schema object")
    schema = dict(schema)
    schema.setdefault("type", "object")
    if schema["type"] != "object":
        raise InvalidRequest(f"tool {name!r}: parameters must describe an object, not {schema['type']!r}")
    if not any(key in schema for key in ("$ref", "anyOf", "oneOf", "allOf", "patternProperties")):
        schema.setdefault("additionalProperties", False)
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise InvalidRequest(f"tool {name!r}: parameters nest deeper than {MAX_SCHEMA_DEPTH}")
    if len(_json(schema)) > MAX_SCHEMA_CHARS:
        raise InvalidRequest(f"tool {name!r}: parameters have more than {MAX_SCHEMA_CHARS} characters")
    return name, dict(_bare(schema))


def _bare(schema: Any) -> Any:
    """A schema without its prose, which says nothing to a grammar. Depth is checked before."""
    if isinstance(schema, list | tuple):
        return [_bare(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED_SCHEMAS and isinstance(value, Mapping):
            out[key] = {name: _bare(item) for name, item in value.items()}
        elif key in ("enum", "const"):
            out[key] = value
        elif key not in _PROSE:
            out[key] = _bare(value)
    return out


def _depth(value: Any) -> int:
    """Nesting of a JSON value, without recursion."""
    deepest, todo = 0, [(value, 1)]
    while todo:
        item, depth = todo.pop()
        deepest = max(deepest, depth)
        if depth > MAX_SCHEMA_DEPTH:
            break
        children = item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()
        todo += [(child, depth + 1) for child in children]
    return deepest


def _json(schema: Any) -> str:
    if isinstance(schema, Mapping):
        schema = {**schema, "x-guidance": _LAYOUT}
    try:
        return json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a tool's schema is not plain JSON: {error}") from error


def mark_of(text: str, special_ids: Mapping[str, int]) -> str:
    """A mark of a format as Lark: one control token if it is one, else text."""
    return f"<[{special_ids[text]}]>" if text in special_ids else _text(text)


def _text(text: str) -> str:
    return json.dumps(text)


def _escaped(name: str) -> str:
    return name.replace(".", "\\.").replace("-", "\\-")
