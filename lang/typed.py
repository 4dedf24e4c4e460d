"""Typed outputs: a Python type becomes a grammar for the model and a parser for its text."""

from __future__ import annotations

import enum
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from caesura.lang.backend import Constraint
from caesura.lang.errors import DefinitionError, OutputError
from caesura.lang.tools import first_line, validation_problems

# The patterns SGLang uses for ``dtype``; values stay strings.
DTYPE_REGEX: dict[type, str] = {
    int: r"[-+]?[0-9]+[ \n]*",
    float: r"[-+]?[0-9]*\.?[0-9]+[ \n]*",
    bool: r"(True|False)",
    str: r"\"[\w\d\s]*\"",
}
DTYPE_STOP: dict[type, tuple[str, ...]] = {int: (" ", "\n"), float: (" ", "\n")}

# Objects are written on one line, spaced as in tool calls: a small model loops in white space where it may. What a
# grammar cannot say is checked by the parser alone.
ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
LAYOUT_KEY = "x-guidance"  # llguidance reads it; servers of other kinds get the schema without it

_INT = r"-?(0|[1-9][0-9]{0,17})"
_FLOAT = r"-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][-+]?[0-9]{1,3})?"


@dataclass(frozen=True, slots=True)
class OutputType:
    """What ``gen(type=...)`` asks for: the grammar, and how the text becomes a value."""

    name: str
    constraint: Constraint | None
    parse: Callable[[str], Any]

    def may_go_on(self, text: str) -> bool:
        """Whether ``text``, which is of the type, may begin a longer one: a number, or another option."""
        if self.constraint is not None and self.constraint.kind == "choices":
            return any(other != text and other.startswith(text) for other in json.loads(self.constraint.source))
        return self.constraint is not None and text.strip()[-1:].isdigit()


def output_type(kind: Any) -> OutputType:
    """The output type for ``kind``: int, float, bool, str, an Enum, a Literal, or anything pydantic has a schema for.

    Raises DefinitionError for types without a JSON schema.
    """
    name = getattr(kind, "__name__", None) or str(kind)
    if kind is str:
        return OutputType("str", None, lambda text: text)
    if kind is int:
        return OutputType("int", Constraint("regex", _INT), _guarded("int", lambda text: int(text.strip())))
    if kind is float:
        return OutputType("float", Constraint("regex", _FLOAT), _guarded("float", lambda text: float(text.strip())))
    if kind is bool:
        return _options("bool", {"true": True, "false": False})
    if isinstance(kind, enum.EnumMeta):
        options: list[enum.Enum] = list(kind)
        members = {str(item.value): item for item in options}
        if len(members) != len(options):
            raise DefinitionError(f"the values of {name} are not distinct as text: {sorted(members)}")
        return _options(name, members)
    if typing.get_origin(kind) is Literal:
        return _options(name, {str(value): value for value in typing.get_args(kind)})
    return _schema_type(name, kind)


def _schema_type(name: str, kind: Any) -> OutputType:
    from pydantic import TypeAdapter, ValidationError

    try:
        adapter = TypeAdapter(kind)
        schema = adapter.json_schema()
    except Exception as error:
        raise DefinitionError(f"type={name} has no JSON schema: {first_line(error)}") from error

    def parse(text: str) -> Any:
        try:
            return adapter.validate_json(text.strip())
        except ValidationError as error:
            raise OutputError(
                f"the generated text is no {name}: {validation_problems(error)}; it is {_shown(text)}"
            ) from error

    return OutputType(name, Constraint("json_schema", json.dumps({**schema, LAYOUT_KEY: ONE_LINE})), parse)


def plain_schema(source: str) -> Any:
    """The schema of a constraint, without what only our own grammars understand."""
    schema = json.loads(source)
    return {key: value for key, value in schema.items() if key != LAYOUT_KEY} if isinstance(schema, dict) else schema


def _options(name: str, values: Mapping[str, Any]) -> OutputType:
    if not values or any(not text for text in values):
        raise DefinitionError(f"type={name} needs at least one value, and none that is empty as text")
    constraint = Constraint("choices", json.dumps(list(values)))
    return OutputType(name, constraint, _guarded(name, lambda text: values[text if text in values else text.strip()]))


def _guarded(name: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def guarded(text: str) -> Any:
        try:
            return parse(text)
        except (ValueError, KeyError) as error:
            raise OutputError(f"the generated text is no {name}: {_shown(text)}") from error

    return guarded


def _shown(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")
