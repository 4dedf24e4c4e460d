"""The jinja2 environment chat templates run in: no way out, no endless work, marks kept.

A template comes with a checkpoint, so it is a stranger's program. jinja2's immutable sandbox keeps it from Python's
internals; this adds bounds on work (every loop turn and call looks at the deadline, numbers that size
strings are limited) and carries the marks of ``template_pieces`` through operators, filters and output.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn, TypeVar

import jinja2
from caesura.runtime.errors import TemplateError
from caesura.runtime.text.template_pieces import MAX_DEPTH, Marked, concat, is_clean, spread, to_json
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 16 << 20
MAX_NODES = 1_000_000
MAX_NUMBER = 1_000_000  # widths, repeat counts
_T = TypeVar("_T")


class _Work(threading.local):
    until: float = float("inf")


_work = _Work()


def check_deadline() -> None:
    """Raises TemplateError once the render that runs in this thread is late."""
    if time.monotonic() > _work.until:
        raise TemplateError("the chat template outlasted its deadline")


def with_deadline(job: Callable[[], _T], limit_s: float) -> _T:
    """Run ``job`` in a thread of its own and wait ``limit_s`` for it.

    The job sees the same deadline from inside and ends soon after; one that sits in a single long operation is
    left behind (the thread is a daemon) and its result is thrown away.
    """
    done: list[_T] = []
    failed: list[BaseException] = []

    def work() -> None:
        _work.until = time.monotonic() + limit_s
        try:
            done.append(job())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="chat-template", daemon=True)
    thread.start()
    thread.join(limit_s + 0.05)
    if done:
        return done[0]
    if failed:
        raise as_template_error(failed[0])
    raise TemplateError(f"the chat template did not finish within {limit_s:g} s")


def as_template_error(error: BaseException) -> BaseException:
    """Whatever a template raised, as one kind of error."""
    if isinstance(error, TemplateError | KeyboardInterrupt | SystemExit):
        return error
    if isinstance(error, jinja2.TemplateError | Exception):
        wrapped = TemplateError(f"the chat template failed: {type(error).__name__}: {str(error)[:500]}")
        wrapped.__cause__ = error
        return wrapped
    return error


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> Marked:
    """The rendered text with its marks. Bounded in size; call inside ``with_deadline``."""
    parts: list[str] = []
    size = 0
    for part in template.generate(**variables):
        check_deadline()
        size += len(part)
        if size > MAX_OUTPUT_CHARS:
            raise TemplateError(f"the chat template writes more than {MAX_OUTPUT_CHARS} characters")
        parts.append(part)
    return concat(parts)


class _Bounded(NodeTransformer):
    """Routes loops and string concatenation through bounded, mark-keeping helpers."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_turns", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        first, *rest = node.nodes
        return nodes.Filter(first, "_concat", rest, [], None, None, lineno=node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._weighed(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._weighed(node, node.items) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._weighed(node, [pair.value for pair in node.items])

    def _weighed(self, node: nodes.Expr, items: list[nodes.Expr]) -> nodes.Node:
        plain = all(isinstance(item, nodes.Const) for item in items)
        self.generic_visit(node)
        if plain:
            return node
        return nodes.Filter(node, "_weighed", [], [], None, None, lineno=node.lineno)


class _Generator(CodeGenerator):
    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        _Bounded().visit(node)
        node.set_environment(self.environment)
        super().visit_Template(node, frame)


class _Generation(Extension):
    """``{% generation %}``: marks the assistant's part for training; here its body is simply rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(concat)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed in a chat template")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return isinstance(attr, str) and attr != "mask" and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            _check_number(left)
            if not (isinstance(right, int | float) and abs(right) <= 64):
                raise TemplateError("a chat template may raise numbers to powers up to 64")
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple):
                    _check_size(len(one) * (other if isinstance(other, int) else 1))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str | list | tuple):
            _check_size(len(result))
            if not isinstance(result, str):
                weighed(result)
        elif isinstance(result, int) and result.bit_length() > 4096:
            raise TemplateError("a number in the chat template grows too large")
        if _lost_marks(result) and not (is_clean(left) and is_clean(right)):
            return spread(result)
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        check_deadline()
        for value in (*args, *kwargs.values()):
            _check_number(value)
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        name = getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if name == "join" and args:
                return _joined(owner, args[0])
            if name == "replace":
                _check_replace(owner, args)
            if name in ("format", "format_map"):
                _check_format(owner, (args, kwargs))
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(__obj, Macro) or isinstance(result, Marked):
            return result
        if isinstance(result, dict | list | tuple) and owner is None:
            weighed(result)
        if isinstance(result, str | list | tuple):
            _check_size(len(result))
            inputs_clean = is_clean(args) and is_clean(kwargs) and (owner is None or is_clean(owner))
            return result if inputs_clean else spread(result)
        return result


def _check_number(value: Any) -> None:
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise TemplateError(f"a number above {MAX_NUMBER} in a chat template's call")


def _check_size(size: int) -> None:
    check_deadline()
    if size > MAX_OUTPUT_CHARS:
        raise TemplateError(f"a string in the chat template grows beyond {MAX_OUTPUT_CHARS} characters")


def weighed(value: _T) -> _T:
    """``value``, if it could be printed. A few nested lists that hold themselves twice would be endless to walk."""
    todo: list[tuple[Any, int]] = [(value, 0)]
    for _ in range(MAX_NODES):
        if not todo:
            return value
        item, depth = todo.pop()
        if depth > 2 * MAX_DEPTH:
            break
        if isinstance(item, Mapping):
            todo += [(child, depth + 1) for child in item.values()]
        elif isinstance(item, list | tuple):
            todo += [(child, depth + 1) for child in item]
        if len(todo) > MAX_NODES:
            break
    raise TemplateError(f"a list in the chat template nests or grows beyond {MAX_NODES} entries")


def _check_replace(text: str, args: tuple[Any, ...]) -> None:
    if len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        count = text.count(args[0]) if len(args[1]) > len(args[0]) else 0
        _check_size(len(text) + count * len(args[1]))


def _check_format(pattern: str, values: Any) -> None:
    """A width in a format string sizes the result; no honest template needs four digits of it."""
    digits = 0
    for char in str.__iter__(pattern):
        digits = digits + 1 if char.isdigit() else 0
        if digits > 4:
            raise TemplateError("a width above 9999 in a chat template's format string")
    if "*" in pattern and not isinstance(values, Mapping):
        for value in values if isinstance(values, tuple) else (values,):
            _check_number(value)
    if "{" in pattern:
        nested = pattern.count("{") > 1 and any(":" in part and "{" in part for part in pattern.split("}"))
        if nested and any(isinstance(v, int) and abs(v) > 9999 for v in (*values[0], *values[1].values())):
            raise TemplateError("a width above 9999 in a chat template's format string")


def _joined(separator: str, parts: Iterable[Any]) -> str:
    out: list[str] = []
    size = 0
    for i, part in enumerate(_turns(parts)):
        if not isinstance(part, str):
            raise TemplateError(f"join found a {type(part).__name__} where it needs a string")
        out += (separator, part) if i else (part,)
        size += len(part) + len(separator)
        _check_size(size)
    return concat(out)


def _turns(items: Any) -> Any:
    """A loop's items, each of which looks at the deadline first. Sized things keep their length for ``loop``."""
    if isinstance(items, Undefined):
        return items
    if isinstance(items, str | list | tuple | range | Mapping):
        return _Sized(items)
    return _watched(items)


def _watched(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        check_deadline()
        yield item


class _Sized:
    def __init__(self, items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return _watched(self._items)


def _concat_filter(*parts: Any) -> str:
    texts = [finalize(part) for part in parts]
    texts = [text if isinstance(text, str) else str(text) for text in texts]
    _check_size(sum(map(len, texts)))
    return concat(texts)


def _join_filter(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        key = str(attribute)
        value = [item.get(key, "") if isinstance(item, Mapping) else "" for item in value]
    texts = (finalize(part) for part in value)
    return _joined(d, (text if isinstance(text, str) else str(text) for text in texts))


def finalize(value: Any) -> Any:
    """What ``{{ }}`` prints: containers of message text are message text."""
    if isinstance(value, str) or is_clean(value):
        return value
    return Marked(str(value))


# Filters that hand out one of their inputs, or a slice of it. Any other may mix marked and plain text inside.
_KEEP_MARKS = frozenset(
    {
        "do_trim",
        "do_replace",
        "do_default",
        "do_first",
        "do_last",
        "do_min",
        "do_max",
        "do_random",
        "do_attr",
        "soft_str",
    }
)


def _lost_marks(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, Marked)


def _keep_marks(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result is message text if any of its inputs may be."""
    skip = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        check_deadline()
        for value in (*args[skip:], *kwargs.values()):
            _check_number(value)
        if function.__name__ == "do_replace" and len(args) > skip:
            _check_replace(str(args[skip]), args[skip + 1 :])
        if function.__name__ == "do_format" and len(args) > skip:
            _check_format(str(args[skip]), (args[skip + 1 :], kwargs))
        result = function(*args, **kwargs)
        if isinstance(result, str):
            _check_size(len(result))
            trusted = isinstance(result, Marked) and function.__name__ in _KEEP_MARKS
            if not (trusted or (is_clean(args[skip:]) and is_clean(kwargs))):
                return Marked(str.__str__(result))
        return result

    return wrapped


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(f"the chat template refuses the conversation: {str(message)[:500]}")


def _strftime_now(pattern: str) -> str:
    _check_format(pattern, ())
    return datetime.now().strftime(pattern)


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _SafeNamespace(Namespace):
    def __repr__(self) -> str:
        return "<namespace>"

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError("names in a namespace must not start with an underscore")
        super().__setitem__(name, value)


def make_environment() -> jinja2.Environment:
    """The environment all chat templates share: as transformers sets it up, with the bounds above."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
        finalize=finalize,
        cache_size=0,
        auto_reload=False,
    )
    environment.filters = {name: _keep_marks(f) for name, f in environment.filters.items()}
    environment.filters.update(
        tojson=to_json, join=_join_filter, _turns=_turns, _concat=_concat_filter, _weighed=weighed
    )
    environment.globals.pop("lipsum", None)
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_new_dict,
        namespace=_SafeNamespace,
    )
    return environment
