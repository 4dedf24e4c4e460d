"""One generation from its first token to its finish: text, stops, tool calls. No torch, no scheduling."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from caesura.runtime.errors import GrammarError
from caesura.runtime.executors.base import SampledToken
from caesura.runtime.sampling import GRAMMAR_FAULT, SamplerState, SamplingParams
from caesura.runtime.text.detokenizer import IncrementalDetokenizer, StopChecker
from caesura.runtime.text.tokenizer import Tokenizer
from caesura.runtime.text.tool_parser import ParsedCall, ToolCallParser, ToolFormat, collect

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


@dataclass(frozen=True, slots=True)
class Finish:
    """How a generation ended, with its token counts. ``cut_off``: by its limit, also where it has called tools."""

    reason: FinishReason
    matched: str | int | None
    tool_calls: tuple[ParsedCall, ...]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    error: str | None = None
    cut_off: bool = False


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """A piece of output. ``text`` may be empty while a stop string or a character is incomplete."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[SampledToken, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class ToolCalling:
    """Tools the model may call (function specs with name, description, parameters), and how."""

    tools: tuple[dict[str, object], ...]
    choice: str = "auto"
    parallel: bool = True


@dataclass(slots=True)
class Ending:
    """What a token did to its generation. ``keep`` says whether the token belongs to the context."""

    reason: FinishReason
    matched: str | int | None
    keep: bool


@dataclass(slots=True)
class Generation:
    """State of one ``generate`` call, fed with sampled tokens by the engine."""

    params: SamplingParams
    sampler: SamplerState
    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    prompt_tokens: int
    sink: Callable[[TokenChunk], None]
    tool_format: ToolFormat | None = None
    tool_names: tuple[str, ...] = ()
    stops: StopChecker | None = None  # made by the caller: compiling patterns takes a while
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    cut_in_call: bool = False  # the token limit came in the middle of a call
    _sampled: list[SampledToken] = field(default_factory=list)
    _unsent: list[int] = field(default_factory=list)
    _num_sent: int = 0  # characters
    _detokenizer: IncrementalDetokenizer = field(init=False)
    _shown_at: list[int] = field(default_factory=list)  # characters decoded up to and with each token

    def __post_init__(self) -> None:
        self._detokenizer = IncrementalDetokenizer(self.tokenizer, self.params.skip_special_tokens, continuation=True)

    def push(self, sampled: SampledToken) -> Ending | None:
        """Take one sampled token; send what it completes; return how it ends the generation, if it does.

        What fails here, as a grammar does that outgrows its matcher, fails this generation and not the step.
        """
        try:
            return self._take(sampled)
        except Exception as error:
            what = GRAMMAR_FAULT if isinstance(error, GrammarError) else "reading the token"
            return Ending("abort", f"{what} failed: {error}", keep=False)

    def _take(self, sampled: SampledToken) -> Ending | None:
        token = sampled.token_id
        self.sampler.accept(token)
        if self._is_terminal(token):
            return self._end(Ending("stop", token, keep=False))
        self.token_ids.append(token)
        self._unsent.append(token)
        if self.params.logprobs is not None:
            self._sampled.append(sampled)
        decoded = self._detokenizer.push(token)
        self._shown_at.append((self._shown_at[-1] if self._shown_at else 0) + len(decoded))
        text, matched = self._visible(decoded)
        self.text += text
        if matched is not None:
            return self._end(Ending("stop", matched, keep=True))
        if self.sampler.matcher is not None and self.sampler.matcher.stopped:
            return self._end(Ending("stop", None, keep=True))
        if len(self.token_ids) >= self.params.max_new_tokens:
            return self._end(Ending("length", None, keep=True))
        if text:
            self._send(None)
        return None

    def _is_terminal(self, token: int) -> bool:
        if len(self.token_ids) < self.params.min_new_tokens:
            return False
        return token in self.params.stop_token_ids or (token in self.eos_ids and not self.params.ignore_eos)

    def _visible(self, text: str) -> tuple[str, str | None]:
        if self.stops is None:
            return text, None
        return self.stops.push(text)

    def _end(self, ending: Ending) -> Ending:
        if not isinstance(ending.matched, str):
            text, matched = self._visible(self._detokenizer.flush())
            if matched is None and self.stops is not None:
                text += self.stops.flush()
            self.text += text
            if matched is not None:
                ending.matched = matched
                ending.reason = "stop"
        return ending

    def kept_tokens(self, ending: Ending) -> tuple[int, list[int]]:
        """After a stop string: how many generated tokens stay, and the re-tokenized rest of the kept text."""
        if not isinstance(ending.matched, str):
            return len(self.token_ids), []
        keep = bisect_right(self._shown_at, len(self.text))
        while keep:
            head = self.tokenizer.decode(
                self.token_ids[:keep], skip_special=self.params.skip_special_tokens, continuation=True
            )
            if self.text.startswith(head):
                return keep, self.tokenizer.encode(self.text[len(head) :], continuation=True)
            keep -= 1
        return 0, self.tokenizer.encode(self.text, continuation=True)

    def calls(self, ending: Ending) -> tuple[ParsedCall, ...]:
        """Tool calls in the finished text; one that the token limit cut off is none, and those before it are no end."""
        if self.tool_format is None:
            return ()
        parser, cut_off = ToolCallParser(self.tool_format, self.tool_names), ending.reason == "length"
        _, found = collect([*parser.push(self.text), *parser.finish(cut_off=cut_off)])
        self.cut_in_call = cut_off and (parser.was_cut or not all(call.complete for call in found))
        return tuple(call for call in found if call.complete or not cut_off)

    def finish(self, ending: Ending, calls: tuple[ParsedCall, ...], cached_tokens: int) -> None:
        """Send the last chunk."""
        finish = Finish(
            reason="tool_calls" if calls and not self.cut_in_call else ending.reason,
            matched=ending.matched,
            tool_calls=calls,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self.token_ids),
            cached_tokens=cached_tokens,
            cut_off=ending.reason == "length",
        )
        self._send(finish)

    def abort(self, error: str) -> None:
        """End without a token, saying why."""
        counts = (self.prompt_tokens, len(self.token_ids), 0)
        self._send(Finish("abort", None, (), *counts, error=error))

    def _send(self, finish: Finish | None) -> None:
        text, self._num_sent = self.text[self._num_sent :], len(self.text)
        chunk = TokenChunk(text, tuple(self._unsent), tuple(self._sampled), finish)
        self._unsent, self._sampled = [], []
        self.sink(chunk)
