"""Chat templates: whole conversations, single turns, and what follows a tool call; content kept apart from markers."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from caesura.runtime.errors import BrokenCheckpoint, InvalidRequest, TemplateError
from caesura.runtime.text.template_default import DEFAULT_TEMPLATE
from caesura.runtime.text.template_pieces import Marked, Piece, concat, mark, to_pieces
from caesura.runtime.text.template_sandbox import (
    MAX_SOURCE_CHARS,
    make_environment,
    render,
    with_deadline,
)
from caesura.runtime.text.tokenizer_base import Tokenizer, read_json_if_there, token_text

__all__ = ["ChatTemplate", "Piece", "default_template", "load_template"]

MAX_MESSAGES = 4096
MAX_TOOLS = 128
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "ipython", "function"})
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize"})
_CACHE_ENTRIES, _CACHE_CHARS = 128, 4 << 20  # the latter of keys, which have the tools in them, as the values do
_CALL_ID = "call{:05d}"  # nine alphanumerics: some templates insist on that
_T = TypeVar("_T")

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """One compiled chat template.

    ``source`` is jinja2 text from a checkpoint (never from a request). Each render runs under ``deadline_s``.
    Raises TemplateError for a template that is malformed, refuses the conversation, reaches for Python's internals,
    writes too much or takes too long; InvalidRequest for messages that are not JSON-like.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        extra_tokens: Mapping[str, str] | None = None,
        deadline_s: float = 2.0,
    ) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateError(f"the chat template has {len(source)} characters; the limit is {MAX_SOURCE_CHARS}")
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self._constants = {**(extra_tokens or {}), "bos_token": bos_token, "eos_token": eos_token}
        self._deadline_s = deadline_s
        self._template = with_deadline(lambda: make_environment().from_string(source), deadline_s)
        self._cache: OrderedDict[str, Any] = OrderedDict()
        self._cached_chars = 0
        self._lock = threading.Lock()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> str:
        """The conversation as text, as ``apply_chat_template`` of transformers gives it."""
        return _plain(self._render(messages, tools, add_generation_prompt, kwargs))

    def pieces(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> list[Piece]:
        """The same text, with what the template wrote apart from what came in messages, tools and arguments.

        A template may trim, split or otherwise rework content; what cannot be told apart any more counts as
        content. Blanks between a marker and content belong to the content.
        """
        return to_pieces(self._render(messages, tools, add_generation_prompt, kwargs))

    def turn(self, role: str, *, first: bool, tools: Tools | None = None) -> tuple[str, str]:
        """(opening, closing) text around the content of one turn.

        ``first`` puts BOS and the template's default system block in front. The assistant's opening is the
        generation prompt. Tool declarations lie where the template writes them: in the opening of the first turn, or
        for templates that append them to the system text, in that turn's closing. A template that folds the
        system text into the first user turn gives that turn's marker as the system opening.
        """
        opening, closing = self._turn(role, first, tools)
        return _plain(opening), _plain(closing)

    def turn_pieces(self, role: str, *, first: bool, tools: Tools | None = None) -> tuple[list[Piece], list[Piece]]:
        """As ``turn``, with the tool declarations as content, so that a description cannot forge a marker."""
        opening, closing = self._turn(role, first, tools)
        return to_pieces(opening), to_pieces(closing)

    def tool_results(
        self, results: Sequence[tuple[str, str]], *, tools: Tools | None = None, **kwargs: Any
    ) -> list[Piece]:
        """What follows the text of an assistant turn that called tools: its end, ``(name, content)`` results, and the
        opening of the next assistant turn. Results keep their order; the text is what the template itself
        writes for tool messages, or a user turn with ``<tool_response>`` marks if it knows none.
        """
        style = self._cached(f"style\n{_key(tools)}", lambda: self._tool_style(tools))
        return to_pieces(self._results(style, results, tools, kwargs))

    def following(self, messages: Sequence[Message], *, tools: Tools | None = None, **kwargs: Any) -> list[Piece]:
        """What follows the text of an assistant turn when ``messages`` come next: its end, the messages, and the
        opening of the next assistant turn."""
        said = [_said("user", 0), _said("assistant", 1), *messages]
        return to_pieces(_around(self._text(*said, tools=tools, generate=True, kwargs=kwargs), 1)[1])

    @property
    def takes_calls_at_once(self) -> bool:
        """Whether it writes assistant turns of several calls; some refuse them."""

        def takes(count: int) -> bool:
            results = [("probe", "")] * count
            try:
                self._text(_said("user", 0), _called(results), *_told(results), generate=True)
            except TemplateError:
                return False
            return True

        return self._cached("calls at once", lambda: takes(2) or not takes(1))  # not even one call: it says nothing

    # rendering

    def _render(
        self, messages: Sequence[Message], tools: Tools | None, generate: bool, kwargs: Mapping[str, Any]
    ) -> Marked:
        if len(messages) > MAX_MESSAGES:
            raise InvalidRequest(f"messages has {len(messages)} entries; the limit is {MAX_MESSAGES}")
        if tools is not None and len(tools) > MAX_TOOLS:
            raise InvalidRequest(f"tools has {len(tools)} entries; the limit is {MAX_TOOLS}")
        for name, value in kwargs.items():
            if name in _RESERVED or name in self._constants or name.startswith(("_", "return_")):
                raise InvalidRequest(f"chat template argument {name!r} is not allowed")
            if not (value is None or isinstance(value, str | bool | int | float)):
                raise InvalidRequest(f"chat template argument {name!r} must be a string, number or boolean")
        variables: dict[str, Any] = {name: mark(value, name) for name, value in kwargs.items()}
        variables.update(self._constants)
        variables["messages"] = [_message(message, i) for i, message in enumerate(messages)]
        variables["tools"] = None
        if tools is not None:
            variables["tools"] = [mark(_function(tool), f"tools[{i}]") for i, tool in enumerate(tools)]
        variables["documents"] = None
        variables["add_generation_prompt"] = generate
        return with_deadline(lambda: render(self._template, variables), self._deadline_s)

    def _text(
        self,
        *messages: Message,
        tools: Tools | None = None,
        generate: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Marked:
        extra = {"tools_in_user_message": False} if tools and "tools_in_user_message" in self.source else {}
        return self._render(messages, tools, generate, {**extra, **(kwargs or {})})

    def _cached(self, key: str, make: Callable[[], _T]) -> _T:
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                found: _T = self._cache[key]
                return found
        value = make()
        with self._lock:
            self._cached_chars += 0 if key in self._cache else len(key)
            self._cache[key] = value
            while len(self._cache) > _CACHE_ENTRIES or self._cached_chars > _CACHE_CHARS:
                oldest, _ = self._cache.popitem(last=False)
                self._cached_chars -= len(oldest)
        return value

    # turns

    def _turn(self, role: str, first: bool, tools: Tools | None) -> tuple[Marked, Marked]:
        if role not in ROLES:
            raise InvalidRequest(f"role {role!r} is unknown; use one of {', '.join(sorted(ROLES))}")
        return self._cached(f"{role}\n{first}\n{_key(tools)}", lambda: self._find_turn(role, first, tools))

    def _find_turn(self, role: str, first: bool, tools: Tools | None) -> tuple[Marked, Marked]:
        if role == "assistant":
            return self._assistant_turn(first, tools)
        if role == "user":
            return self._first_user_turn(tools) if first else self._later_user_turn()
        if role in ("system", "developer"):
            return self._system_turn(role, first, tools)
        style = self._cached(f"style\n{_key(tools)}", lambda: self._tool_style(tools))
        rest = self._results(style, [("tool", _PROBES[2])], tools)
        before, after = _around(rest, 2)
        closing = self._assistant_closing(tools)
        prompt = self._turn("assistant", False, tools)[0]
        return _drop_prefix(before, closing), _drop_suffix(after, prompt)

    def _first_user_turn(self, tools: Tools | None) -> tuple[Marked, Marked]:
        return _around(self._text(_said("user", 0), tools=tools), 0)

    def _later_user_turn(self) -> tuple[Marked, Marked]:
        text = self._text(_said("user", 0), _said("assistant", 1), _said("user", 2))
        _, rest = _around(text, 1)
        before, after = _around(rest, 2)
        return _drop_prefix(before, self._assistant_closing(None)), after

    def _assistant_closing(self, tools: Tools | None) -> Marked:
        def find() -> Marked:
            return _around(self._text(_said("user", 0), _said("assistant", 1), tools=tools), 1)[1]

        return self._cached(f"closing\n{_key(tools)}", find)

    def _assistant_turn(self, first: bool, tools: Tools | None) -> tuple[Marked, Marked]:
        opening, user_closing = self._first_user_turn(tools)
        if "add_generation_prompt" in self.source:
            text = self._text(_said("user", 0), tools=tools, generate=True)
            prompt = _drop_prefix(_around(text, 0)[1], user_closing)
        else:
            text = self._text(_said("user", 0), _said("assistant", 1), tools=tools)
            between = _around(_around(text, 1)[0], 0)[1]
            prompt = _drop_prefix(between, user_closing)
            if not _plain(prompt).strip(" "):
                prompt = prompt[:0]
        if first:
            prompt = concat([_drop_suffix(opening, self._turn("user", False, None)[0]), prompt])
        return prompt, self._assistant_closing(tools)

    def _system_turn(self, role: str, first: bool, tools: Tools | None) -> tuple[Marked, Marked]:
        user_opening = self._turn("user", False, None)[0]
        if first:
            text = self._text(_said(role, 2), _said("user", 3), tools=tools)
            opening, rest = _around(text, 2)
        else:
            text = self._text(_said("user", 0), _said("assistant", 1), _said(role, 2), _said("user", 3))
            before, rest = _around(_around(text, 1)[1], 2)
            opening = _drop_prefix(before, self._assistant_closing(None))
        between = _around(rest, 3)[0]
        if user_opening and _plain(user_opening) in _plain(between):
            at = _plain(between).rindex(_plain(user_opening))
            between = between[:at]
        return opening, between

    # tool results

    def _tool_style(self, tools: Tools | None) -> str:
        """How this template writes tool messages: after a plain assistant turn, after one with calls, or not at all."""
        for style in ("plain", "calls"):
            try:
                rest = self._results(style, [("tool", _PROBES[2]), ("tool", _PROBES[3])], tools)
            except TemplateError:
                continue
            if _PROBES[2] in _plain(rest) and _PROBES[3] in _plain(rest):
                return style
        return "user"

    def _results(
        self,
        style: str,
        results: Sequence[tuple[str, str]],
        tools: Tools | None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Marked:
        said = _told(results)
        if style == "plain":
            text = self._text(_said("user", 0), _said("assistant", 1), *said, tools=tools, generate=True, kwargs=kwargs)
            return _around(text, 1)[1]
        if style == "user":
            joined = "\n".join(f"<tool_response>\n{content}\n</tool_response>" for _, content in results)
            turn = {"role": "user", "content": joined}
            text = self._text(_said("user", 0), _said("assistant", 1), turn, tools=tools, generate=True, kwargs=kwargs)
            return _around(text, 1)[1]
        text = self._text(_said("user", 0), _called(results), *said, tools=tools, generate=True, kwargs=kwargs)
        rest = _around(text, 1)[1]
        end = _plain(self._assistant_closing(tools))
        at = _plain(rest).find(end) if end.strip() else -1
        if at < 0:
            raise TemplateError("the chat template gives no way to tell where an assistant turn with tool calls ends")
        return rest[at:]


# Contents whose place in a rendered text shows what lies around them. Private-use characters: no template writes them.
_PROBES = tuple(f"\ue0ca{chr(0xE500 + i)}\ue0ce" for i in range(4))


def _said(role: str, probe: int) -> Message:
    return {"role": role, "content": _PROBES[probe]}


def _told(results: Sequence[tuple[str, str]]) -> list[Message]:
    """``(name, content)`` as tool messages."""
    return [
        {"role": "tool", "name": name, "content": content, "tool_call_id": _CALL_ID.format(i)}
        for i, (name, content) in enumerate(results)
    ]


def _called(results: Sequence[tuple[str, str]]) -> Message:
    """The calls that these answer, with a probe in the last one's arguments."""
    calls = [
        {
            "id": _CALL_ID.format(i),
            "type": "function",
            "function": {"name": name, "arguments": {"probe": _PROBES[1] if i == len(results) - 1 else ""}},
        }
        for i, (name, _) in enumerate(results)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _around(text: Marked, probe: int) -> tuple[Marked, Marked]:
    """Before and after a probe content."""
    at = _plain(text).find(_PROBES[probe])
    if at < 0:
        raise TemplateError("the chat template leaves a turn's content out, so turns cannot be told apart")
    return text[:at], text[at + len(_PROBES[probe]) :]


def _drop_prefix(text: Marked, prefix: Marked) -> Marked:
    return text[len(prefix) :] if _plain(text).startswith(_plain(prefix)) else text


def _drop_suffix(text: Marked, suffix: Marked) -> Marked:
    return text[: len(text) - len(suffix)] if suffix and _plain(text).endswith(_plain(suffix)) else text


def _plain(text: Marked) -> str:
    return str.__str__(text)


def _key(tools: Tools | None) -> str:
    if not tools:
        return ""
    try:
        return json.dumps(tools, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"tools must be plain JSON: {error}") from error


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Templates expect the OpenAI wrapper; a bare function spec gets it."""
    if isinstance(tool, Mapping) and "function" not in tool and "name" in tool:
        return {"type": "function", "function": tool}
    return tool


def _message(message: Message, index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"messages[{index}] must be an object with a role")
    out = {str(key): mark(value, f"messages[{index}].{key}") for key, value in message.items()}
    role = message["role"]
    if role in ROLES:  # a known role may stand inside a marker; any other is content like the rest
        out["role"] = str(role)
    if isinstance(out.get("content"), list):
        for part in out["content"]:
            if isinstance(part, dict) and part.get("type") == "text":
                part["type"] = "text"
    return out


def default_template(*, bos_token: str = "", eos_token: str = "<|im_end|>") -> ChatTemplate:
    """The template for a checkpoint that brings none: ChatML-like turns, Hermes-style tools."""
    return ChatTemplate(DEFAULT_TEMPLATE, bos_token=bos_token, eos_token=eos_token)


def load_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template of a checkpoint folder: ``chat_template.jinja``, else ``chat_template`` in
    ``tokenizer_config.json`` (text, or a list of named ones of which ``default`` is taken), else ours.
    """
    folder = Path(folder)
    config = read_json_if_there(folder / "tokenizer_config.json")
    special_map = read_json_if_there(folder / "special_tokens_map.json")
    tokens: dict[str, str] = {}
    for key, value in [*special_map.items(), *config.items()]:
        text = token_text(value) if key.endswith("_token") else None
        if text is not None:
            tokens[key] = text
    if "bos_token" not in tokens and tokenizer.bos_id is not None:
        tokens["bos_token"] = _name_of(tokenizer, tokenizer.bos_id)
    if "eos_token" not in tokens and tokenizer.eos_ids:
        tokens["eos_token"] = _name_of(tokenizer, min(tokenizer.eos_ids))
    bos, eos = tokens.pop("bos_token", ""), tokens.pop("eos_token", "")
    source = _source(folder, config)
    if source is None:
        return default_template(bos_token=bos, eos_token=eos)
    return ChatTemplate(source, bos_token=bos, eos_token=eos, extra_tokens=tokens)


def _source(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > 4 * MAX_SOURCE_CHARS:
            raise BrokenCheckpoint(f"{path.name} has {path.stat().st_size} bytes, which is too much for a template")
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BrokenCheckpoint(f"{path.name} cannot be read as UTF-8 text: {error}") from error
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {
            entry["name"]: entry["template"]
            for entry in found
            if isinstance(entry, Mapping) and isinstance(entry.get("name"), str) and "template" in entry
        }
        found = named.get("default", next(iter(named.values()), None))
    if found is None or isinstance(found, str):
        return found
    raise BrokenCheckpoint(f"tokenizer_config.json: chat_template is a {type(found).__name__}, expected text")


def _name_of(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
