"""Tools: Python functions with a JSON schema, and what calling one yields."""

from __future__ import annotations

import inspect
import json
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

from caesura.lang.errors import DefinitionError

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_MAX_CHARS = 64 * 1024

OnError = Literal["observe", "raise"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call: which tool, and its arguments as JSON text (model's call) or as Python values (program's)."""

    tool: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call yielded. ``text`` is what the model reads; it begins with ``Error:`` when ``ok`` is false."""

    ok: bool
    value: Any
    text: str
    error: str | None = None
    elapsed_s: float = 0.0
    attempts: int = 1
    exception: BaseException | None = None


@dataclass(frozen=True, slots=True)
class ToolOutput:
    """What a tool may return when the model shall read another text than the value as JSON."""

    value: Any
    text: str


class Tool:
    """A function that programs and models can call.

    Calling the object calls the function. The JSON schema is made from the signature when first needed.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        retries: int = 0,
        expected_s: float | None = None,
        on_error: OnError = "observe",
        max_chars: int = DEFAULT_MAX_CHARS,
        parameters: Mapping[str, Any] | None = None,
        local_names: Mapping[str, Any] | None = None,
    ) -> None:
        if not callable(function):
            raise DefinitionError(f"a tool must be a function, not {type(function).__name__}")
        self.function = function
        self.name: str = name or (getattr(function, "__name__", None) or type(function).__name__).strip("<>")
        doc = description if description is not None else inspect.getdoc(function)
        self.description = (doc or "").strip()
        self.timeout_s = timeout_s
        self.retries = retries or 0
        self.expected_s = expected_s
        self.on_error: OnError = on_error or "observe"
        self.max_chars = max_chars
        self._given_parameters = parameters
        self._arguments: _Arguments | None = None
        self._signature = _signature(function, local_names)
        self._check()
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - an object with an async __call__
        )

    def _check(self) -> None:
        if not self.name.replace("_", "a").replace("-", "a").isalnum() or len(self.name) > 64:
            raise DefinitionError(
                f"tool name {self.name!r}: letters, digits, _ and - only, at most 64; give one with @tool(name=...)"
            )
        check_options(f"tool {self.name!r}", self.timeout_s, self.retries, self.expected_s, self.on_error)
        if self.max_chars < 1:
            raise DefinitionError(f"max_chars of tool {self.name!r} is {self.max_chars}; it must be at least 1")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __get__(self, instance: object, owner: type | None = None) -> Tool:
        if instance is None:
            return self
        bound = object.__new__(Tool)
        bound.__dict__.update(self.__dict__)
        bound.function = self.function.__get__(instance, owner)
        bound._arguments = None
        if self._signature is not None:
            bound._signature = self._signature.replace(parameters=list(self._signature.parameters.values())[1:])
        return bound

    def __repr__(self) -> str:
        return f"Tool({self.name!r})"

    @property
    def parameters(self) -> Mapping[str, Any]:
        """JSON schema of the arguments."""
        if self._given_parameters is not None:
            return self._given_parameters
        return self._model.schema

    @property
    def spec(self) -> dict[str, Any]:
        """The declaration a model reads, in OpenAI's shape."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    @property
    def _model(self) -> _Arguments:
        if self._arguments is None:
            self._arguments = _Arguments.of(self)
        return self._arguments

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Check a program's own arguments against the signature, before anything runs."""
        try:
            signature = inspect.signature(self.function)
        except (TypeError, ValueError):  # some builtins have none
            return
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise DefinitionError(f"call of tool {self.name}{signature}: {error}") from None

    def parse_arguments(self, arguments: str) -> dict[str, Any]:
        """A model's JSON arguments as keyword arguments. Raises ValueError with what is wrong, for the model."""
        if self._given_parameters is not None:
            try:
                value = json.loads(arguments or "{}")
            except RecursionError:
                raise ValueError("arguments are nested too deeply") from None
            if not isinstance(value, dict):
                raise ValueError(f"arguments must be a JSON object, not {type(value).__name__}")
            return value
        return self._model.parse(arguments or "{}")


class _Arguments:
    """A pydantic model of a signature: strict, nothing extra. Fields have neutral names and the real ones as
    aliases, because a parameter may well be called ``json`` or ``copy``."""

    def __init__(self, model: Any, names: dict[str, str], schema: dict[str, Any]) -> None:
        self._model = model
        self._names = names
        self.schema = schema

    @staticmethod
    def of(tool: Tool) -> _Arguments:
        from pydantic import ConfigDict, Field, create_model

        try:
            signature = tool._signature or inspect.signature(tool.function, eval_str=True)
        except (NameError, TypeError, ValueError) as error:
            raise DefinitionError(f"tool {tool.name!r}: its signature cannot be read: {error}") from error
        described: dict[str, Any] = {}
        names: dict[str, str] = {}
        for i, parameter in enumerate(signature.parameters.values()):
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise DefinitionError(
                    f"tool {tool.name!r}: parameter {parameter.name!r} is {parameter.kind.description}; "
                    "a model can only fill named parameters"
                )
            kind = Any if parameter.annotation is parameter.empty else parameter.annotation
            default = ... if parameter.default is parameter.empty else parameter.default
            names[f"arg{i}"] = parameter.name
            described[f"arg{i}"] = (kind, Field(default=default, alias=parameter.name, title=parameter.name))
        config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=False)
        try:
            model: Any = create_model(tool.name, __config__=config, **described)
            schema = _tidy(model.model_json_schema(by_alias=True))
        except DefinitionError:
            raise
        except Exception as error:
            raise DefinitionError(
                f"tool {tool.name!r}: no JSON schema for its signature: {first_line(error)}"
            ) from error
        return _Arguments(model, names, schema)

    def parse(self, arguments: str) -> dict[str, Any]:
        from pydantic import ValidationError

        try:
            parsed = self._model.model_validate_json(arguments)
        except ValidationError as error:
            raise ValueError(validation_problems(error)) from None
        return {self._names[key]: getattr(parsed, key) for key in parsed.model_fields_set}


def _signature(function: Callable[..., Any], local_names: Mapping[str, Any] | None) -> inspect.Signature | None:
    """The signature with annotations resolved, None when it has to wait (a name that is defined later)."""
    try:
        return inspect.signature(function, eval_str=True, locals=local_names)
    except (NameError, TypeError, ValueError, AttributeError):
        return None


def first_line(error: BaseException) -> str:
    """What pydantic says of a type, without its advice and addresses."""
    return str(error).partition("\n")[0]


def validation_problems(error: Any) -> str:
    """A pydantic ValidationError in one line."""
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc']) or 'value'}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False)
    )


def _tidy(schema: dict[str, Any]) -> dict[str, Any]:
    """Without generated titles: they cost prompt tokens and say nothing."""
    schema.pop("title", None)
    for value in schema.get("properties", {}).values():
        value.pop("title", None)
    schema.setdefault("properties", {})
    return schema


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_s: float | None = DEFAULT_TIMEOUT_S,
    retries: int = 0,
    expected_s: float | None = None,
    on_error: OnError = "observe",
    max_chars: int = DEFAULT_MAX_CHARS,
) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(function: Callable[..., Any] | None = None, /, **options: Any) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a function a tool: ``@tool`` or ``@tool(timeout_s=5, retries=2, ...)``.

    Its signature becomes the JSON schema, its docstring the description. Sync functions run in threads (at most
    12), async ones on the event loop, where they must not block.
    """
    # Types that are local to where the tool is defined can only be looked up there.
    names = dict(sys._getframe(1).f_locals)
    if function is not None:
        return Tool(function, local_names=names)
    return lambda wrapped: Tool(wrapped, local_names=names, **options)


def check_options(
    whose: str, timeout_s: float | None, retries: int | None, expected_s: float | None, on_error: str | None
) -> None:
    """Raise DefinitionError for an option of a tool, or of one call, that is out of range. None says nothing."""
    if timeout_s is not None and not (is_number(timeout_s) and timeout_s > 0):
        raise DefinitionError(f"timeout_s of {whose} is {timeout_s!r}; it must be a number above 0, or None")
    if retries is not None and not (hasattr(retries, "__index__") and 0 <= retries <= 100):
        raise DefinitionError(f"retries of {whose} is {retries!r}; it must be an int between 0 and 100")
    if expected_s is not None and not (is_number(expected_s) and expected_s >= 0):
        raise DefinitionError(f"expected_s of {whose} is {expected_s!r}; it must be a number of at least 0, or None")
    if on_error not in (None, "observe", "raise"):
        raise DefinitionError(f"on_error of {whose} is {on_error!r}; give 'observe' or 'raise'")


def is_number(value: object) -> bool:
    """Whether it is a finite int or float, numpy's included."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def as_tool(value: Any) -> Tool:
    """A Tool as it is; a plain function becomes one."""
    from caesura.lang.program import Program

    if isinstance(value, Tool):
        return value
    if isinstance(value, Program):
        raise DefinitionError(
            f"{value.name!r} is a program, no tool; give a function that runs it: {value.name}.run(...).ret_value"
        )
    if callable(value):
        return Tool(value)
    raise DefinitionError(f"{value!r} is no tool; give a function or a @tool")


def as_tools(values: Any, whose: str) -> tuple[Tool, ...]:
    """A list of tools and functions, each name once."""
    if not isinstance(values, Iterable):
        raise DefinitionError(f"tools of {whose} is {values!r}; give a list of tools")
    tools = tuple(as_tool(value) for value in values)
    names = [tool.name for tool in tools]
    if len(set(names)) != len(names):
        raise DefinitionError(f"two tools of {whose} have one name: {names}")
    return tools


def render(value: Any) -> str:
    """The one rule: a str as it is, everything else as JSON. Raises ValueError for what JSON cannot say."""
    if isinstance(value, str):
        return value
    from pydantic_core import PydanticSerializationError, to_json

    try:
        return to_json(value).decode()
    except (PydanticSerializationError, RecursionError, ValueError) as error:
        raise ValueError(
            f"the result is a {type(value).__name__}, which JSON cannot express: {error}; return a str, or "
            "ToolOutput(value, text)"
        ) from None


def clip(text: str, max_chars: int) -> str:
    """Cut an over-long result, and say so in it."""
    if len(text) <= max_chars:
        return text
    return f"{text[:max_chars]}\n[cut: {max_chars} of {len(text)} characters shown]"
