"""The part of JSON schema that scripted answers are checked against: enough to catch a wrong script."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def schema_problem(value: Any, schema: Any, root: Any = None, path: str = "$") -> str:
    """What is wrong with ``value`` under ``schema``, "" when nothing is.

    Knows type, enum, const, properties, required, additionalProperties (false), items, anyOf, oneOf, allOf and local
    ``$ref``; everything else is taken as fulfilled.
    """
    root = schema if root is None else root
    if schema is True or schema == {}:
        return ""
    if schema is False:
        return f"{path}: nothing is allowed here"
    if "$ref" in schema:
        return schema_problem(value, _resolve(schema["$ref"], root), root, path)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            problems = [schema_problem(value, option, root, path) for option in schema[key]]
            if all(problems):
                return problems[0]
    for part in schema.get("allOf", ()):
        if problem := schema_problem(value, part, root, path):
            return problem
    if "enum" in schema and value not in schema["enum"]:
        return f"{path}: {value!r} is none of {schema['enum']}"
    if "const" in schema and value != schema["const"]:
        return f"{path}: {value!r} is not {schema['const']!r}"
    if problem := _type_problem(value, schema.get("type"), path):
        return problem
    if isinstance(value, dict):
        return _object_problem(value, schema, root, path)
    if isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            if problem := schema_problem(item, schema["items"], root, f"{path}[{i}]"):
                return problem
    return ""


def _type_problem(value: Any, wanted: Any, path: str) -> str:
    names = [wanted] if isinstance(wanted, str) else list(wanted or ())
    if not names:
        return ""
    for name in names:
        fits = isinstance(value, _TYPES.get(name, (object,)))
        if fits and not (isinstance(value, bool) and name in ("integer", "number")):
            return ""
    return f"{path}: {value!r} is no {' or '.join(names)}"


def _object_problem(value: dict[str, Any], schema: Mapping[str, Any], root: Any, path: str) -> str:
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            return f"{path}: {name!r} is missing"
    for name, item in value.items():
        if name in properties:
            if problem := schema_problem(item, properties[name], root, f"{path}.{name}"):
                return problem
        elif schema.get("additionalProperties") is False:
            return f"{path}: {name!r} is not allowed"
    return ""


def _resolve(reference: str, root: Any) -> Any:
    target = root
    for part in reference.removeprefix("#/").split("/"):
        target = target[part.replace("~1", "/").replace("~0", "~")]
    return target
