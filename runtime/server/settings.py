"""Where a server's settings come from: a flag, else the environment, else a TOML file, else the default.

One schema for all: the fields of ``ServerConfig`` and ``EngineConfig``, which own names, types, defaults and limits.
The field ``kv_tokens`` is the flag ``--kv-tokens``, the variable ``CAESURA_KV_TOKENS``, the TOML key ``kv_tokens``. A
field of several values is a repeatable flag (``--cors-origin``), a list divided by commas, a TOML array.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caesura.runtime.config import EngineConfig
from caesura.runtime.errors import InvalidRequest
from caesura.runtime.server.config import ServerConfig

PREFIX = "CAESURA_"
SERVICE_LINK = re.compile(r"CAESURA_(SERVICE_(HOST|PORT)|PORT_\d+_)")
CONFIG_VARIABLE = "CAESURA_CONFIG"
CLIENT_VARIABLES = frozenset(
    {"CAESURA_URL", "CAESURA_KEY", "CAESURA_API_KEY"}
)  # what clients of a server read; none of its settings
SECRETS = frozenset({"api_keys", "admin_keys"})
HIDDEN = "(hidden)"
MAX_FILE_BYTES = 1 << 20
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Field:
    """One setting. ``kind`` is str, int, float, bool, Path or tuple."""

    name: str
    kind: type
    optional: bool
    default: Any
    of_engine: bool

    @property
    def flag(self) -> str:
        """The command line's name of it."""
        if self.name == "model":
            return "MODEL"
        name = self.name.removesuffix("s") if self.kind is tuple else self.name
        return "--" + name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment's name of it."""
        return PREFIX + self.name.upper()


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and where it came from."""

    name: str
    value: Any
    source: str

    @property
    def shown(self) -> Any:
        """The value for a screen or a file: a secret is not told, a path is its text."""
        if self.name in SECRETS and self.value:
            return HIDDEN
        if isinstance(self.value, Path):
            return str(self.value)
        return list(self.value) if isinstance(self.value, tuple) else self.value


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration and the story of each of its values."""

    config: ServerConfig
    settings: tuple[Setting, ...]


def fields() -> dict[str, Field]:
    """All settings by name, the server's first."""
    found: dict[str, Field] = {}
    for owner in (ServerConfig, EngineConfig):
        hints = typing.get_type_hints(owner)
        for one in dataclasses.fields(owner):
            if one.name in ("engine", "profile"):
                continue
            assert one.name not in found, f"{one.name} is a setting of both the server and the engine"
            kind, optional = _kind(hints[one.name])
            found[one.name] = Field(one.name, kind, optional, one.default, owner is EngineConfig)
    return found


def load(flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None) -> Settings:
    """The configuration from all sources. ``flags`` maps names of fields to values, None for those not given; ``file``
    is the TOML file, else CAESURA_CONFIG names it. Raises InvalidRequest that names field, source and limit."""
    known = fields()
    found = {name: Setting(name, field.default, DEFAULT) for name, field in known.items()}
    if file is None and environ.get(CONFIG_VARIABLE):
        file = Path(environ[CONFIG_VARIABLE])
    if file is not None:
        for name, value in _read(file).items():
            source = f"file {file}"
            if name not in known:
                raise InvalidRequest(f"{source}: there is no setting {name!r}{_nearest(name, known)}")
            found[name] = Setting(name, _checked(known[name], value, source), source)
    variables = {field.variable: field for field in known.values()}
    for variable, text in environ.items():
        if _is_service_link(variable, text):
            continue
        if not variable.startswith(PREFIX) or variable == CONFIG_VARIABLE or variable in CLIENT_VARIABLES:
            continue
        if variable not in variables:
            raise InvalidRequest(f"environment: there is no setting {variable!r}{_nearest(variable, variables)}")
        field, source = variables[variable], f"environment {variable}"
        found[field.name] = Setting(field.name, _from_text(field, text, source), source)
    for name, value in flags.items():
        if value is not None:
            field, source = known[name], f"flag {known[name].flag}"
            value = _split(value) if field.kind is tuple else value
            found[name] = Setting(name, _checked(field, value, source), source)
    return Settings(_build(found, known), tuple(found.values()))


def _is_service_link(variable: str, value: str) -> bool:
    """What Kubernetes sets in every pod beside a service of the name ``caesura``."""
    return bool(SERVICE_LINK.match(variable)) or (variable == f"{PREFIX}PORT" and "://" in value)


def as_toml(settings: Iterable[Setting]) -> str:
    """A file for ``--config`` that gives the same configuration. Secrets and what is not set are comments."""
    lines = []
    for one in settings:
        note = f"  # {one.source}"
        if one.name in SECRETS and one.value:
            lines.append(
                f"# {one.name} = {len(one.value)} {HIDDEN}: set {PREFIX}{one.name.upper()}, or use key_file{note}"
            )
        elif one.value is None:
            lines.append(f"# {one.name} is not set{note}")
        else:
            lines.append(f"{one.name} = {_toml(one.shown)}{note}")
    return "\n".join(lines) + "\n"


# -- types ----------------------------------------------------------------------------------------------------


def _kind(hint: Any) -> tuple[type, bool]:
    """The plain type of an annotation, and whether None is allowed."""
    optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    if optional:
        (hint,) = [part for part in typing.get_args(hint) if part is not types.NoneType]
    kind = typing.get_origin(hint) or hint
    assert kind in (str, int, float, bool, Path, tuple), f"settings cannot be of type {hint}"
    return kind, optional


_WANTED = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path",
    tuple: "a list of texts",
}  # fmt: skip


def _from_text(field: Field, text: str, source: str) -> Any:
    """A value as the environment has it."""
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    stripped = text.strip()
    if not stripped and field.optional:
        return None
    try:
        if field.kind is bool:
            return words[stripped.lower()]
        if field.kind in (int, float):
            return _checked(field, field.kind(stripped), source)
    except (KeyError, ValueError):
        raise InvalidRequest(_wrong(field, text, source)) from None
    return _checked(field, _split([text]) if field.kind is tuple else text, source)


def _checked(field: Field, value: Any, source: str) -> Any:
    """A value of the field's own type. Raises InvalidRequest for one of another type; nothing is guessed."""
    if field.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if field.kind is Path and isinstance(value, (str, Path)) and str(value):
        return Path(value)
    if field.kind is tuple and isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    right = isinstance(value, field.kind) and isinstance(value, bool) == (field.kind is bool)
    if not right or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidRequest(_wrong(field, value, source))
    return value


def _wrong(field: Field, value: Any, source: str) -> str:
    shown = HIDDEN if field.name in SECRETS else repr(value)[:80]
    return f"{field.name} is {shown} ({source}); it must be {_WANTED[field.kind]}"


def _split(values: Any) -> list[str]:
    return [part.strip() for value in values for part in str(value).split(",") if part.strip()]


# -- files and errors -----------------------------------------------------------------------------------------


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise InvalidRequest(f"file {file}: larger than {MAX_FILE_BYTES} bytes; it holds settings alone")
        return tomllib.loads(data.decode())
    except OSError as error:
        raise InvalidRequest(f"file {file} cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"file {file} is not TOML: {error}") from None


def _build(found: Mapping[str, Setting], known: Mapping[str, Field]) -> ServerConfig:
    """Make the configuration; when it refuses, say where the value at fault came from."""
    try:
        return _config({name: one.value for name, one in found.items()}, known)
    except InvalidRequest as error:
        culprit = _culprit(found, known, str(error))
        raise InvalidRequest(f"{error} ({culprit.name} is from {culprit.source})" if culprit else str(error)) from None


def _config(values: Mapping[str, Any], known: Mapping[str, Field]) -> ServerConfig:
    engine = EngineConfig(**{name: value for name, value in values.items() if known[name].of_engine})
    return ServerConfig(engine, **{name: value for name, value in values.items() if not known[name].of_engine})


def _culprit(found: Mapping[str, Setting], known: Mapping[str, Field], message: str) -> Setting | None:
    """The value that is refused by itself, else the one that the message begins with."""
    for name, one in found.items():
        if one.source != DEFAULT:
            try:
                _config({name: one.value}, known)
            except InvalidRequest:
                return one
    return found.get(message.split(" ", 1)[0])


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else "; caesura config show lists all settings"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
