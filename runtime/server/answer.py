"""One choice of a chat answer, as it comes: thinking, content, tool calls, logprobs, the end. Streams and whole
answers are both made of these, so they cannot disagree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from caesura.runtime.executors.base import SampledToken
from caesura.runtime.generation import Finish, TokenChunk
from caesura.runtime.server.kept import KeptCall, KeptContext, new_call_id
from caesura.runtime.text.reasoning import ThinkSplitter
from caesura.runtime.text.tokenizer import Tokenizer
from caesura.runtime.text.tool_parser import (
    CallArguments,
    CallEnded,
    CallStarted,
    ContentDelta,
    Event,
    ToolCallParser,
)


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one choice. ``tool_calls`` are OpenAI's delta objects."""

    choice: int
    content: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    logprobs: tuple[dict[str, Any], ...] = ()
    token_ids: tuple[int, ...] = ()
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of one choice."""

    choice: int
    reason: str
    matched: str | int | None
    finish: Finish
    reasoning_tokens: int = 0


@dataclass(slots=True)
class AnswerReader:
    """Turns a generation's chunks into deltas. Without a parser all text is content, without a splitter nothing is
    thinking. ``stream_reasoning``: thinking is told as it comes, else at once when it ends."""

    choice: int
    tokenizer: Tokenizer
    parser: ToolCallParser | None = None
    splitter: ThinkSplitter | None = None
    stream_reasoning: bool = True
    content: str = ""
    reasoning: str = ""
    reasoning_tokens: int = 0
    kept: KeptContext | None = None  # what was kept of the answer, for the one that goes on from it
    calls: list[KeptCall] = field(default_factory=list)
    whole: bool = True  # every call was complete
    _open: dict[int, tuple[str, str, list[str]]] = field(default_factory=dict)  # index -> id, name, argument pieces
    _told: int = 0  # characters of thinking in deltas

    def read(self, chunk: TokenChunk) -> Delta | None:
        """The next delta, None if there is nothing to say yet."""
        logprobs = tuple(chat_logprob(token, self.tokenizer) for token in chunk.logprobs)
        text, reasoning = self._split(chunk)
        deltas: list[dict[str, Any]] = []
        if self.parser is not None:
            events = self.parser.push(text)
            if chunk.finish is not None:
                events += self.parser.finish(cut_off=chunk.finish.cut_off)
                self.whole = self.whole and not self.parser.was_cut
            text, deltas = self._take(events)
        self.content += text
        if not (text or deltas or logprobs or reasoning):
            return None
        return Delta(self.choice, text, tuple(deltas), logprobs, chunk.token_ids, reasoning)

    def _split(self, chunk: TokenChunk) -> tuple[str, str]:
        """(answer, thinking to be told) of a chunk."""
        if self.splitter is None:
            return chunk.text, ""
        was_thinking = self.splitter.thinking
        thinking, text = self.splitter.push(chunk.text)
        if was_thinking or self.splitter.thinking or thinking:
            self.reasoning_tokens += len(chunk.token_ids)
        if chunk.finish is not None:
            last_thinking, last_text = self.splitter.finish()
            thinking, text = thinking + last_thinking, text + last_text
        self.reasoning += thinking
        if not self.stream_reasoning and self.splitter.thinking and chunk.finish is None:
            return text, ""
        told, self._told = self.reasoning[self._told :], len(self.reasoning)
        return text, told

    def _take(self, events: list[Event]) -> tuple[str, list[dict[str, Any]]]:
        text: list[str] = []
        deltas: list[dict[str, Any]] = []
        for event in events:
            match event:
                case ContentDelta():
                    text.append(event.text)
                case CallStarted():
                    call_id = new_call_id()
                    self._open[event.index] = (call_id, event.name, [])
                    function = {"name": event.name, "arguments": ""}
                    deltas.append({"index": event.index, "id": call_id, "type": "function", "function": function})
                case CallArguments():
                    self._open[event.index][2].append(event.delta)
                    _add(deltas, event.index, event.delta)
                case CallEnded():
                    call_id, name, sent = self._open.pop(event.index)
                    missing = event.arguments.removeprefix("".join(sent)) if not sent else ""
                    _add(deltas, event.index, missing)
                    self.calls.append(KeptCall(call_id, name, event.arguments))
                    self.whole = self.whole and event.complete
        return "".join(text), deltas

    def end(self, finish: Finish, choice: str) -> Ended:
        """How the choice ended. Named functions end with "stop", as the reference service has it."""
        reason: str = finish.reason
        calls = self.calls if reason != "abort" else []  # nothing is kept of what was written
        if calls and not self.whole:
            reason = "length" if finish.matched is None else "stop"
        elif calls:
            reason = "tool_calls" if choice in ("auto", "required") else "stop"
        elif reason == "tool_calls":  # a call that was only thought of
            reason = "stop"
        return Ended(self.choice, reason, finish.matched, finish, self.reasoning_tokens)

    def message(self) -> dict[str, Any]:
        """The whole answer as OpenAI's message object."""
        out: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.splitter is not None:
            out["reasoning_content"] = self.reasoning or None
        if self.calls:
            out["content"] = self.content or None
            out["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return out


def _add(deltas: list[dict[str, Any]], index: int, arguments: str) -> None:
    """More arguments of a call; in one delta with what is already there, since clients look at one a chunk."""
    if deltas and deltas[-1]["index"] == index:
        deltas[-1]["function"]["arguments"] += arguments
    elif arguments:
        deltas.append({"index": index, "function": {"arguments": arguments}})


def chat_logprob(token: SampledToken, tokenizer: Tokenizer) -> dict[str, Any]:
    """One token of ``logprobs.content``."""
    top = [_one(token_id, logprob, tokenizer) for token_id, logprob in token.top_logprobs]
    return {**_one(token.token_id, token.logprob or 0.0, tokenizer), "top_logprobs": top}


def _one(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    raw = token_text_bytes(token_id, tokenizer)
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


def token_text_bytes(token_id: int, tokenizer: Tokenizer) -> bytes:
    """A token's bytes; a control token's name."""
    return tokenizer.token_bytes(token_id) or tokenizer.decode([token_id], skip_special=False).encode()


def usage(finishes: list[Finish], cached_tokens: int | None = None, reasoning_tokens: int = 0) -> dict[str, Any]:
    """OpenAI's usage object for all choices of one prompt."""
    prompt = finishes[0].prompt_tokens if finishes else 0
    completion = sum(finish.completion_tokens for finish in finishes)
    cached = cached_tokens if cached_tokens is not None else (finishes[0].cached_tokens if finishes else 0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }
