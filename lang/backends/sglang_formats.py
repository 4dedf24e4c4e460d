"""Chat formats by name, for servers that take text and tell nothing of their template.

A server's own template is better where it can be had (HTTPBackend, OpenAIBackend): these are the plain cores of the
common ones. Content passes `without_control`, so that tool output cannot open or close a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from caesura.lang.backend import Piece, ToolSpec
from caesura.lang.errors import DefinitionError

TOOL_TEXT = (
    "You can call the functions below; each line in <tools></tools> describes one as JSON.\n"
    "<tools>\n{tools}\n</tools>\n"
    'To call one, write\n<tool_call>\n{{"name": ..., "arguments": {{...}}}}\n</tool_call>\n'
    "and stop. Its result then stands in <tool_response></tool_response>."
)


@dataclass(frozen=True, slots=True)
class NamedFormat:
    """A chat format: what opens and closes each role's turn. ``stop`` ends an assistant's turn, ``control`` is what
    content must not contain."""

    name: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    tool: tuple[str, str]
    stop: tuple[str, ...]
    control: tuple[str, ...]

    async def turn(
        self, role: str, *, first: bool, tools: Sequence[ToolSpec] | None = None
    ) -> tuple[Sequence[Piece], Sequence[Piece]]:
        opening, closing = self._marks(role)
        if not tools:
            return [Piece(opening, special=True)], [Piece(closing, special=True)]
        declared = Piece(TOOL_TEXT.format(tools="\n".join(json.dumps(spec["function"]) for spec in tools)))
        if role == "system":
            return [Piece(opening, special=True)], [Piece("\n\n"), declared, Piece(closing, special=True)]
        before, after = self.system
        return [Piece(before, special=True), declared, Piece(after + opening, special=True)], [
            Piece(closing, special=True)
        ]

    async def tool_results(
        self, results: Sequence[tuple[str, str]], *, tools: Sequence[ToolSpec] | None = None
    ) -> Sequence[Piece]:
        pieces = [Piece(self.assistant[1], special=True)]
        for _, content in results:
            pieces += [Piece(self.tool[0], special=True), Piece(content), Piece(self.tool[1], special=True)]
        return [*pieces, Piece(self.assistant[0], special=True)]

    def _marks(self, role: str) -> tuple[str, str]:
        known = {"system": self.system, "user": self.user, "assistant": self.assistant, "tool": self.tool}
        if role not in known:
            raise DefinitionError(f"the chat format {self.name!r} has no role {role!r}; it has {', '.join(known)}")
        return known[role]


def _chatml(role: str) -> tuple[str, str]:
    return f"<|im_start|>{role}\n", "<|im_end|>\n"


def _llama(role: str) -> tuple[str, str]:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"


CHATML = NamedFormat(
    "chatml",
    _chatml("system"),
    _chatml("user"),
    _chatml("assistant"),
    ("<|im_start|>user\n<tool_response>\n", "\n</tool_response><|im_end|>\n"),
    ("<|im_end|>",),
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
)
LLAMA3 = NamedFormat(
    "llama-3",
    _llama("system"),
    _llama("user"),
    _llama("assistant"),
    _llama("ipython"),
    ("<|eot_id|>",),
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|begin_of_text|>", "<|end_of_text|>"),
)
GEMMA = NamedFormat(
    "gemma",
    ("<start_of_turn>user\n", "<end_of_turn>\n"),  # it knows no system turn
    ("<start_of_turn>user\n", "<end_of_turn>\n"),
    ("<start_of_turn>model\n", "<end_of_turn>\n"),
    ("<start_of_turn>user\n<tool_response>\n", "\n</tool_response><end_of_turn>\n"),
    ("<end_of_turn>",),
    ("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>"),
)
PLAIN = NamedFormat(
    "plain",
    ("SYSTEM: ", "\n"),
    ("USER: ", "\n"),
    ("ASSISTANT: ", "\n"),
    ("TOOL: ", "\n"),
    ("\nUSER:",),
    (),
)
FORMATS = {one.name: one for one in (CHATML, LLAMA3, GEMMA, PLAIN)}
ALL_CONTROL = tuple(dict.fromkeys(mark for one in FORMATS.values() for mark in one.control))
_BY_MODEL = (
    (re.compile(r"qwen|chatml|hermes|smollm|internlm|yi-", re.IGNORECASE), CHATML),
    (re.compile(r"llama-?(3|4)", re.IGNORECASE), LLAMA3),
    (re.compile(r"gemma", re.IGNORECASE), GEMMA),
)


def format_named(name: str) -> NamedFormat:
    """The format of this name. Raises DefinitionError that lists them."""
    if name not in FORMATS:
        raise DefinitionError(f"there is no chat format {name!r}; there are {', '.join(FORMATS)}, or give your own")
    return FORMATS[name]


def format_of_model(path: str) -> NamedFormat | None:
    """The format that a model's name suggests, None when it suggests none."""
    return next((one for pattern, one in _BY_MODEL if pattern.search(path)), None)
