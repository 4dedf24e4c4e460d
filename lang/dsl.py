"""The words of the language: what a program adds to its state. Names and arguments are SGLang's, and more."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from caesura.lang import ir
from caesura.lang.backend import Constraint
from caesura.lang.choices import ChoicesSamplingMethod, token_length_normalized
from caesura.lang.errors import DefinitionError
from caesura.lang.reasoning import marks_of
from caesura.lang.sampling import Sampling, check_pattern
from caesura.lang.symbols import Symbol
from caesura.lang.tools import OnError, as_tool, as_tools, check_options
from caesura.lang.typed import DTYPE_REGEX, DTYPE_STOP, output_type


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    stop_regex: str | Sequence[str] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
    dtype: type | str | None = None,
    choices: Sequence[str] | None = None,
    choices_method: ChoicesSamplingMethod | None = None,
    regex: str | None = None,
    json_schema: str | Mapping[str, Any] | None = None,
    *,
    ebnf: str | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    logit_bias: Mapping[int, float] | None = None,
    type: Any = None,
    tools: Sequence[Any] | None = None,
    tool_choice: Any = "auto",
    max_tool_rounds: int = 8,
    parallel_tool_calls: bool = True,
) -> ir.Expr:
    """Generate text into the variable ``name``. Arguments left out are taken from the run.

    ``dtype`` (int, float, bool, str) holds the text to a pattern, the value stays a str; ``type`` (those, an Enum, a
    Literal, a dataclass, a pydantic model, a list of them, ...) makes the value an object of that type. ``choices``
    makes it a `select`. At most one of regex, json_schema, ebnf, dtype and type. With ``n`` the value is a list, and
    the state continues with the first. With ``tools`` the model may call them, in parallel, for up to
    ``max_tool_rounds`` rounds; ``tool_choice`` is "auto", "none", "required" or a tool.
    """
    _check_name("gen", name)
    if choices is not None:
        _at_most_one(
            choices=choices,
            regex=regex,
            json_schema=json_schema,
            ebnf=ebnf,
            dtype=dtype,
            type=type,
            tools=tools or None,
        )
        return select(name, choices, temperature or 0.0, choices_method or token_length_normalized)
    given = locals()
    sampling = Sampling.of({key: given[key] for key in _SAMPLING})
    constraint, output = _constraint(regex=regex, json_schema=json_schema, ebnf=ebnf, dtype=dtype, kind=type)
    if dtype is not None and stop is None and (stops := DTYPE_STOP.get(_dtype(dtype))):
        sampling = Sampling.of({**{key: getattr(sampling, key) for key in _SAMPLING}, "stop": stops})
    bound = as_tools(tools or (), f"gen({name!r})")
    if bound and (n or 1) != 1:
        raise DefinitionError(f"gen({name!r}): n and tools do not go together; fork the state instead")
    if not hasattr(max_tool_rounds, "__index__") or not 0 <= max_tool_rounds <= 1000:
        raise DefinitionError(f"max_tool_rounds is {max_tool_rounds!r}; it must be an int between 0 and 1000")
    choice = _tool_choice(tool_choice, [item.name for item in bound])
    return ir.Gen(name, sampling, constraint, output, bound, choice, max_tool_rounds, parallel_tool_calls)


_SAMPLING = tuple(Sampling.__dataclass_fields__)


def _check_name(word: str, name: object) -> None:
    """Raise DefinitionError when something else stands where the variable's name belongs."""
    if name is not None and not isinstance(name, (str, Symbol)):
        raise DefinitionError(f'the name of {word} is {name!r}; the first argument is the variable: {word}("x", ...)')


def _at_most_one(**given: object) -> None:
    names = [key for key, value in given.items() if value is not None]
    if len(names) > 1:
        raise DefinitionError(f"{' and '.join(names)} are given; a generation is held to one of them")


def _tool_choice(choice: Any, names: Sequence[str]) -> str:
    wanted = choice if isinstance(choice, str) else as_tool(choice).name
    if wanted not in ("auto", "none", "required", *names):
        raise DefinitionError(
            f"tool_choice is {wanted!r}; it must be 'auto', 'none', 'required' or one of {list(names)}"
        )
    return wanted


def _dtype(dtype: type | str) -> type:
    kinds = {"int": int, "float": float, "str": str, "bool": bool}
    kind = kinds.get(dtype) if isinstance(dtype, str) else dtype
    if kind not in DTYPE_REGEX:
        raise DefinitionError(f"dtype is {dtype!r}; it must be int, float, str or bool (type= takes any type)")
    return kind


def _constraint(
    *, regex: str | None, json_schema: str | Mapping[str, Any] | None, ebnf: str | None, dtype: Any, kind: Any
) -> tuple[Constraint | None, Any]:
    if dtype is not None and regex is not None:
        warnings.warn("both dtype and regex are given; dtype is ignored", stacklevel=3)
        dtype = None
    _at_most_one(regex=regex, json_schema=json_schema, ebnf=ebnf, dtype=dtype, type=kind)
    if dtype is not None:
        return Constraint("regex", DTYPE_REGEX[_dtype(dtype)]), None
    if kind is not None:
        output = output_type(kind)
        return output.constraint, output
    if regex is not None:
        check_pattern("regex", regex)
        return Constraint("regex", regex), None
    if json_schema is not None:
        return Constraint("json_schema", _schema_text(json_schema)), None
    if ebnf is not None and not isinstance(ebnf, str):
        raise DefinitionError(f"ebnf is {ebnf!r}; it must be a str")
    return (Constraint("ebnf", ebnf), None) if ebnf is not None else (None, None)


def _schema_text(schema: str | Mapping[str, Any]) -> str:
    if not isinstance(schema, (str, Mapping)):
        raise DefinitionError(f"json_schema is {schema!r}; it must be a dict or JSON text (type= takes Python types)")
    try:
        if isinstance(schema, Mapping):
            return json.dumps(schema)
        parsed = json.loads(schema)
    except (TypeError, ValueError) as error:
        raise DefinitionError(f"json_schema is no JSON: {error}") from None
    if not isinstance(parsed, (dict, bool)):
        raise DefinitionError(f"json_schema must be a JSON object, not {type(parsed).__name__}")
    return schema


def gen_int(name: str | None = None, **arguments: Any) -> ir.Expr:
    """``gen(name, dtype=int, ...)``. The value is a str, as in SGLang; ``gen(name, type=int)`` gives an int."""
    return gen(name, dtype=int, **arguments)


def gen_string(name: str | None = None, **arguments: Any) -> ir.Expr:
    """``gen(name, dtype=str, ...)``: a quoted string of word characters."""
    return gen(name, dtype=str, **arguments)


def select(
    name: str | None = None,
    choices: Sequence[str] | None = None,
    temperature: float = 0.0,
    choices_method: ChoicesSamplingMethod = token_length_normalized,
) -> ir.Select:
    """Append the most likely of ``choices``. Scores are in ``get_meta_info(name)``."""
    _check_name("select", name)
    if not choices or isinstance(choices, str) or any(not isinstance(choice, str) or not choice for choice in choices):
        raise DefinitionError(f"choices of select({name!r}) is {choices!r}; give a list of non-empty str")
    if len(set(choices)) != len(choices):
        raise DefinitionError(f"choices of select({name!r}) has duplicates: {list(choices)}")
    if temperature > 1e-5:
        raise DefinitionError(f"select({name!r}): temperature is {temperature}; choices are compared, not drawn: use 0")
    return ir.Select(name, tuple(choices), choices_method)


def call_tool(
    name: str | None,
    tool: Callable[..., Any],
    /,
    *args: Any,
    timeout_s: float | None = None,
    retries: int | None = None,
    on_error: OnError | None = None,
    expected_s: float | None = None,
    **kwargs: Any,
) -> ir.CallTool:
    """Call ``tool(*args, **kwargs)`` and append its result; the context is paused meanwhile.

    ``s[name]`` is the text of the result, ``s.tool_result(name)`` all of it. ``timeout_s`` (of each attempt),
    ``retries`` and ``on_error`` ("observe": an error becomes text, "raise": it ends the program) override the tool's
    own. ``expected_s`` tells the scheduler how long it will take; it changes speed, never results.
    """
    _check_name("call_tool", name)
    return ir.CallTool(name, invocation(tool, args, kwargs, timeout_s, retries, on_error, expected_s))


def call_tools(
    name: str | None,
    calls: Sequence[tuple[Any, ...] | ir.ToolInvocation],
    *,
    wait: Literal["all", "any"] = "all",
    timeout_s: float | None = None,
    retries: int | None = None,
    on_error: OnError | None = None,
    expected_s: float | None = None,
) -> ir.CallTools:
    """Call several tools at once: ``[(tool, arg, ...), (tool, {"key": value}), ...]``.

    Results are appended one a line in the order of the calls; ``s[name]`` is the list of their texts. With
    ``wait="any"`` the first success ends the wait and cancels the other calls.
    """
    _check_name("call_tools", name)
    if wait not in ("all", "any"):
        raise DefinitionError(f"wait is {wait!r}; it must be 'all' or 'any'")
    if not isinstance(calls, Iterable):
        raise DefinitionError(f"calls of call_tools({name!r}) is {calls!r}; give a list of (tool, args...)")
    made = []
    for call in calls:
        if isinstance(call, ir.ToolInvocation):
            made.append(call)
            continue
        if not isinstance(call, (tuple, list)) or not call:
            raise DefinitionError(f"call_tools({name!r}): {call!r} is no call; (tool, args...) is wanted")
        tool, *rest = call
        kwargs = rest.pop() if rest and isinstance(rest[-1], dict) else {}
        made.append(invocation(tool, tuple(rest), kwargs, timeout_s, retries, on_error, expected_s))
    if not made:
        raise DefinitionError(f"call_tools({name!r}) has no calls")
    return ir.CallTools(name, tuple(made), wait)


def invocation(
    tool: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    timeout_s: float | None = None,
    retries: int | None = None,
    on_error: OnError | None = None,
    expected_s: float | None = None,
) -> ir.ToolInvocation:
    """A checked call: the arguments fit the signature, the options are in range."""
    made = as_tool(tool)
    made.bind(args, kwargs)
    for value in (*args, *kwargs.values()):
        if isinstance(value, ir.Expr) and not isinstance(value, Symbol):
            raise DefinitionError(
                f"an argument of tool {made.name!r} is {value.label()}, whose value is not known yet; add it to the "
                "state first, and give what it is then: s[name]"
            )
    check_options(f"a call of {made.name!r}", timeout_s, retries, expected_s, on_error)
    return ir.ToolInvocation(made, args, dict(kwargs), timeout_s, retries, expected_s, on_error)


def _turn(role: str, expr: object) -> ir.Expr:
    return ir.Seq((ir.RoleBegin(role), ir.as_expr(expr), ir.RoleEnd(role)))


def system(expr: object) -> ir.Expr:
    """A whole system turn."""
    return _turn("system", expr)


def user(expr: object) -> ir.Expr:
    """A whole user turn."""
    return _turn("user", expr)


def assistant(expr: object) -> ir.Expr:
    """A whole assistant turn."""
    return _turn("assistant", expr)


def system_begin() -> ir.Expr:
    """Open a system turn."""
    return ir.RoleBegin("system")


def system_end() -> ir.Expr:
    """Close it."""
    return ir.RoleEnd("system")


def user_begin() -> ir.Expr:
    """Open a user turn."""
    return ir.RoleBegin("user")


def user_end() -> ir.Expr:
    """Close it."""
    return ir.RoleEnd("user")


def assistant_begin() -> ir.Expr:
    """Open an assistant turn."""
    return ir.RoleBegin("assistant")


def assistant_end() -> ir.Expr:
    """Close it."""
    return ir.RoleEnd("assistant")


def separate_reasoning(expr: object, model_type: str) -> ir.Expr:
    """Keep the answer of the generations in ``expr`` under their names, and the thinking under
    ``<name>_reasoning_content``. The context keeps both, as generated."""
    marks_of(model_type)
    return ir.Reasoning(ir.as_expr(expr), model_type)


def image(expr: Any) -> ir.Expr:
    """An image. No backend of this version reads images; adding one raises UnsupportedByBackend."""
    return ir.Media("image", expr)


def video(path: Any, num_frames: int) -> ir.Expr:
    """A video. No backend of this version reads videos; adding one raises UnsupportedByBackend."""
    return ir.Media("video", path, num_frames)
