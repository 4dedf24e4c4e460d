"""Tool calls in a model's text: found while it streams, in the three formats open models write.

``parse`` is the streaming parser fed once, so the two can never disagree. Nothing is evaluated, every loop is bounded,
and the time is linear in the text.
"""

from __future__ import annotations

from collections.abc import Collection

from caesura.runtime.text.tool_events import (
    CallArguments,
    CallEnded,
    CallStarted,
    ContentDelta,
    Event,
    ParsedCall,
    ToolFormat,
)
from caesura.runtime.text.tool_formats import HermesMachine, Llama3Machine, PythonicMachine
from caesura.runtime.text.tool_grammar import tool_grammar

__all__ = [
    "CallArguments",
    "CallEnded",
    "CallStarted",
    "ContentDelta",
    "Event",
    "ParsedCall",
    "ToolCallParser",
    "ToolFormat",
    "collect",
    "detect_format",
    "parse",
    "tool_grammar",
]


_MACHINES: dict[ToolFormat, type[HermesMachine] | type[Llama3Machine] | type[PythonicMachine]] = {
    ToolFormat.HERMES: HermesMachine,
    ToolFormat.LLAMA3_JSON: Llama3Machine,
    ToolFormat.PYTHONIC: PythonicMachine,
}


def detect_format(template_source: str) -> ToolFormat:
    """The format a chat template teaches, by the marks it writes; Hermes if it shows none."""
    if "<tool_call>" in template_source:
        return ToolFormat.HERMES
    if any(sign in template_source for sign in ("[func_name1(", "<|python_start|>", "[func1(")):
        return ToolFormat.PYTHONIC
    if any(sign in template_source for sign in ("<|python_tag|>", "ipython", '"parameters": ')):
        return ToolFormat.LLAMA3_JSON
    return ToolFormat.HERMES


class ToolCallParser:
    """Splits a stream of text into content and calls.

    ``tool_names`` are the tools on offer. For Hermes, whose calls are marked, a name outside them is still a call (the
    caller can answer that there is no such tool); for the other two it is content. Text that may begin a call is held
    back until that is decided; a false start is given back as content. A call that is cut off or malformed ends
    with ``complete`` False and the text there was.
    """

    def __init__(self, format: ToolFormat, tool_names: Collection[str] = ()) -> None:
        self._machine = _MACHINES[ToolFormat(format)](tool_names)
        self._finished = False

    def push(self, text: str) -> list[Event]:
        """Events of more text."""
        return self._machine.push(text)

    def finish(self, *, cut_off: bool = False) -> list[Event]:
        """The last events. ``cut_off``: a limit ended the text, so what may have begun one more call is dropped. May be
        called again, to no effect."""
        if self._finished:
            return []
        self._finished = True
        return self._machine.finish(cut_off=cut_off)

    @property
    def was_cut(self) -> bool:
        """Whether the text was cut off where one more call had begun."""
        return self._machine.was_cut


def parse(
    text: str, format: ToolFormat, tool_names: Collection[str] = (), *, cut_off: bool = False
) -> tuple[str, list[ParsedCall]]:
    """(content, calls) of a whole answer, or of one that was ``cut_off``."""
    parser = ToolCallParser(format, tool_names)
    return collect([*parser.push(text), *parser.finish(cut_off=cut_off)])


def collect(events: list[Event]) -> tuple[str, list[ParsedCall]]:
    """(content, calls) of a list of events."""
    content: list[str] = []
    names: dict[int, str] = {}
    calls: list[ParsedCall] = []
    for event in events:
        if isinstance(event, ContentDelta):
            content.append(event.text)
        elif isinstance(event, CallStarted):
            names[event.index] = event.name
        elif isinstance(event, CallEnded):
            calls.append(ParsedCall(names[event.index], event.arguments, event.complete))
    return "".join(content), calls
