"""A response as it grows: items, and the events that tell of them. What does not stream is made of the same events."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from caesura.runtime.server.answer import Delta, Ended
from caesura.runtime.server.errors import ApiError

Event = dict[str, Any]
_FAILURES = {408: "server_error", 429: "rate_limit_exceeded"}


@dataclass(slots=True)
class _Item:
    """The output item being written. ``kind``: message, reasoning or function_call."""

    kind: str
    id: str
    index: int
    pieces: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    call_id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def part(self) -> dict[str, Any]:
        """The one content part of a message or of reasoning."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self.logprobs)}

    def body(self, status: str) -> dict[str, Any]:
        """The item as clients see it."""
        out: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        parts = [] if status == "in_progress" else [self.part()]
        if self.kind == "message":
            return {**out, "role": "assistant", "content": parts}
        if self.kind == "reasoning":
            return {**out, "summary": [], "content": parts}
        return {**out, "call_id": self.call_id, "name": self.name, "arguments": self.text}


class ResponseBuilder:
    """Turns the deltas of one answer into a response and its events."""

    def __init__(self, response_id: str, model: str, echo: dict[str, Any]) -> None:
        self.id = response_id
        self._head = {"id": response_id, "object": "response", "created_at": int(time.time()), "model": model}
        self._echo = echo
        self._open: _Item | None = None
        self._pending: list[dict[str, Any]] = []  # logprobs of text that is still held back
        self.output: list[dict[str, Any]] = []
        self.status = "in_progress"
        self.usage: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        self.incomplete: dict[str, Any] | None = None
        self._completed_at: int | None = None

    @property
    def calls(self) -> list[tuple[str, str, str]]:
        """(id, name, arguments) of the calls so far."""
        items = [item for item in self.output if item["type"] == "function_call"]
        return [(item["call_id"], item["name"], item["arguments"]) for item in items]

    def response(self) -> dict[str, Any]:
        """The whole response object as of now."""
        return {
            **self._head,
            **self._echo,
            "background": False,
            "completed_at": self._completed_at,
            "error": self.error,
            "incomplete_details": self.incomplete,
            "output": list(self.output),
            "service_tier": "default",
            "status": self.status,
            "usage": self.usage,
        }

    # -- events -----------------------------------------------------------------------------------------------

    def begin(self) -> list[Event]:
        """The response exists."""
        both = ("response.created", "response.in_progress")
        return [self._event(kind, response=self.response()) for kind in both]

    def take(self, delta: Delta) -> list[Event]:
        """Events of a delta."""
        events: list[Event] = []
        if delta.reasoning:
            events += self._write("reasoning", delta.reasoning)
        if delta.content or (delta.logprobs and not (delta.tool_calls or delta.reasoning)):
            self._pending += delta.logprobs
        if delta.content:
            events += self._write("message", delta.content)
        for call in delta.tool_calls:
            events += self._call(call)
        return events

    def end(self, ended: Ended, usage: dict[str, Any]) -> list[Event]:
        """The items end, and with them the response; ``finish`` tells of that."""
        cut_off = ended.reason in ("length", "abort")
        events = self._close("incomplete" if cut_off else "completed")
        if not self.output and not cut_off:
            events += self._write("message", "") + self._close("completed")
        self.status = {"length": "incomplete", "abort": "cancelled"}.get(ended.reason, "completed")
        if ended.reason == "length":
            self.incomplete = {"reason": "max_output_tokens"}
        if self.status == "completed":
            self._completed_at = int(time.time())
        self.usage = _usage(usage)
        return events

    def fail(self, error: ApiError) -> list[Event]:
        """The response ends without its answer."""
        events = self._close("incomplete")
        self.status = "failed"
        code = "invalid_prompt" if error.status == 400 else _FAILURES.get(error.status, "server_error")
        self.error = {"code": code, "message": error.message}
        return events

    def finish(self) -> Event:
        """The last event."""
        kind = "response.failed" if self.status == "failed" else "response.incomplete"
        return self._event("response.completed" if self.status == "completed" else kind, response=self.response())

    # -- items ------------------------------------------------------------------------------------------------

    @staticmethod
    def _event(kind: str, **values: Any) -> Event:
        return {"type": kind, **values}

    def _start(self, kind: str, call_id: str = "", name: str = "") -> list[Event]:
        events = self._close("completed")
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        item = self._open = _Item(kind, f"{prefix}_{secrets.token_hex(12)}", len(self.output))
        item.call_id, item.name = call_id, name
        events.append(self._event("response.output_item.added", output_index=item.index, item=item.body("in_progress")))
        if kind != "function_call":
            events.append(self._event("response.content_part.added", **self._place(item), part=item.part()))
        return events

    @staticmethod
    def _place(item: _Item) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        return place if item.kind == "function_call" else {**place, "content_index": 0}

    def _write(self, kind: str, text: str) -> list[Event]:
        """More of a message or of reasoning; begins the item when another one is open."""
        events = [] if self._open is not None and self._open.kind == kind else self._start(kind)
        item = self._open
        assert item is not None
        item.pieces.append(text)
        if kind == "reasoning":
            events.append(self._event("response.reasoning_text.delta", **self._place(item), delta=text))
            return events
        logprobs, self._pending = self._pending, []
        item.logprobs += logprobs
        if text:
            events.append(self._event("response.output_text.delta", **self._place(item), delta=text, logprobs=logprobs))
        return events

    def _call(self, delta: dict[str, Any]) -> list[Event]:
        """A chat's delta of a call."""
        events: list[Event] = []
        function = delta["function"]
        if "id" in delta:
            self._pending.clear()
            events += self._start("function_call", delta["id"], function["name"])
        item = self._open
        if function.get("arguments") and item is not None and item.kind == "function_call":
            item.pieces.append(function["arguments"])
            kind = "response.function_call_arguments.delta"
            events.append(self._event(kind, **self._place(item), delta=function["arguments"]))
        return events

    def _close(self, status: str) -> list[Event]:
        item, self._open = self._open, None
        if item is None:
            return []
        place = self._place(item)
        if item.kind == "function_call":
            kind = "response.function_call_arguments.done"
            events = [self._event(kind, **place, name=item.name, arguments=item.text)]
        else:
            done = {"message": "response.output_text.done", "reasoning": "response.reasoning_text.done"}[item.kind]
            more = {"logprobs": list(item.logprobs)} if item.kind == "message" else {}
            events = [
                self._event(done, **place, text=item.text, **more),
                self._event("response.content_part.done", **place, part=item.part()),
            ]
        body = item.body(status)
        self.output.append(body)
        return [*events, self._event("response.output_item.done", output_index=item.index, item=body)]


def _usage(chat: dict[str, Any]) -> dict[str, Any]:
    """A chat's usage object in this protocol's terms."""
    return {
        "input_tokens": chat["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": chat["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": chat["completion_tokens"],
        "output_tokens_details": chat["completion_tokens_details"],
        "total_tokens": chat["total_tokens"],
    }
