"""Grammars that hold a generation: regex, JSON schema, Lark EBNF or a list of choices, compiled by llguidance.

No torch here. Compiling happens outside the engine loop, on two worker threads, with limits on the source's size and
depth, on the compiler's work and on the time a caller waits. A compiled grammar is kept in a bounded LRU; every
generation gets its own copy of the matcher.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
from caesura.runtime.errors import GrammarError, Overloaded
from caesura.runtime.futures import shielded
from caesura.runtime.model.grammar_limits import check_lark, check_schema
from caesura.runtime.sampling import Constraint, ConstraintKind, Matcher, spaced
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

MAX_SOURCE_BYTES = 256 << 10
MAX_JSON_DEPTH = 64
MAX_CHOICES = 4096
MAX_COMPILED = 256
LEXER_FUEL = 100_000  # a tenth of the compiler's own limit
_COMPILERS = 2
_MAX_REASON_CHARS = 400


class GrammarTokenizer(Protocol):
    """What a grammar needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one."""

    @property
    def eos_ids(self) -> Set[int]:
        """Tokens that end a generation."""

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Control tokens by their text; a Lark grammar names one as ``<name>``, plain text never matches it."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Tokenize."""

    def token_bytes(self, token_id: int) -> bytes:
        """The raw bytes of one token."""


class GrammarCompiler:
    """Compiles constraints for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: GrammarTokenizer, *, max_compiled: int = MAX_COMPILED) -> None:
        if not tokenizer.eos_ids:
            raise GrammarError("the tokenizer names no end-of-sequence token, so no grammar could ever end")
        self._tokenizer = tokenizer
        self._max_compiled = max_compiled
        self._lock = threading.Lock()
        self._vocabulary_lock = threading.Lock()  # of its own: reading a large vocabulary takes a second
        self._compiled: OrderedDict[Constraint, Future[LLMatcher]] = OrderedDict()
        self._vocabulary: LLTokenizer | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._limits = LLParserLimits(initial_lexer_fuel=LEXER_FUEL, verbose_errors=False)

    def compile(self, constraint: Constraint, *, deadline_s: float = 5.0) -> Matcher:
        """A fresh matcher at the grammar's start.

        Raises GrammarError: over a limit, not parsable, unsatisfiable, or not compiled within ``deadline_s``; and
        Overloaded when others kept the compilers busy for that long.
        """
        future = self._begin(constraint)
        try:
            return self._matcher_of(future.result(timeout=deadline_s))
        except FutureTimeout:
            raise _late(constraint, future, deadline_s) from None
        except Exception as error:
            raise _failed(constraint, error) from None

    async def compile_async(self, constraint: Constraint, *, deadline_s: float = 5.0) -> Matcher:
        """As `compile`, without holding a thread while it waits."""
        future = self._begin(constraint)
        try:
            return self._matcher_of(await asyncio.wait_for(shielded(future), deadline_s))
        except TimeoutError:
            raise _late(constraint, future, deadline_s) from None
        except Exception as error:
            raise _failed(constraint, error) from None

    def _begin(self, constraint: Constraint) -> Future[LLMatcher]:
        size_bytes = len(constraint.source.encode("utf-8", "replace"))
        if size_bytes > MAX_SOURCE_BYTES:
            raise GrammarError(f"{constraint.kind} has {size_bytes} bytes; at most {MAX_SOURCE_BYTES} are compiled")
        with self._lock:
            future = self._compiled.get(constraint)
            if future is None:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(_COMPILERS, thread_name_prefix="caesura-grammar")
                future = self._compiled[constraint] = self._pool.submit(self._build, constraint)
            self._compiled.move_to_end(constraint)
            while len(self._compiled) > self._max_compiled:
                self._compiled.popitem(last=False)
        return future

    def _matcher_of(self, prototype: LLMatcher) -> GrammarMatcher:
        with self._lock:
            return GrammarMatcher(prototype.deep_copy(), self._tokenizer.vocab_size)

    def close(self) -> None:
        """Stop the worker threads once their current work is done."""
        with self._lock:
            pool, self._pool = self._pool, None
            self._compiled.clear()
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def _build(self, constraint: Constraint) -> LLMatcher:
        grammar = _translate(constraint)
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._tokenizer)
            vocabulary = self._vocabulary
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise GrammarError(f"{constraint.kind} cannot be compiled: {_short(matcher.get_error())}")
        probe = GrammarMatcher(matcher.deep_copy(), self._tokenizer.vocab_size)
        row = np.zeros((self._tokenizer.vocab_size + 31) // 32, dtype=np.int32)
        probe.fill_mask(row)
        if not row.any():
            raise GrammarError(f"{constraint.kind} cannot be satisfied: no output matches it")
        return matcher


class GrammarMatcher:
    """One generation's position in a grammar; implements :class:`caesura.runtime.sampling.Matcher`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._words = (vocab_size + 31) // 32

    def fill_mask(self, row: npt.NDArray[np.int32]) -> None:
        """See the protocol. ``row`` may be longer than the tokenizer's vocabulary (the rest is forbidden) or shorter.

        EOS is allowed exactly when the text so far matches the whole grammar. Raises GrammarError when the grammar
        fails at work (a limit of the parser).
        """
        fits = row.shape[0] >= self._words and row.flags["C_CONTIGUOUS"]
        target = row[: self._words] if fits else np.zeros(self._words, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(target.ctypes.data, target.nbytes)
        if self._matcher.is_stopped() and not self._matcher.is_accepting():
            # a dead end is an empty mask; llguidance reports it as an error and offers EOS
            if self._matcher.is_error() and not self._matcher.get_error().startswith("NoExtension"):
                raise GrammarError(_short(self._matcher.get_error()))
            target[:] = 0
        if not fits:
            count = min(self._words, row.shape[0])
            row[:count] = target[:count]
        row[self._words :] = 0

    def accept(self, token_id: int) -> None:
        """See the protocol. Raises GrammarError for a token that the grammar does not allow here."""
        if not self._matcher.consume_token(token_id):
            raise GrammarError(f"token {token_id} does not fit the grammar: {_short(self._matcher.get_error())}")

    def fork(self) -> GrammarMatcher:
        """An independent matcher at the same position."""
        copy = GrammarMatcher.__new__(GrammarMatcher)
        copy._matcher, copy._words = self._matcher.deep_copy(), self._words
        return copy

    @property
    def stopped(self) -> bool:
        """See the protocol."""
        return bool(self._matcher.is_stopped())


def _late(constraint: Constraint, future: Future[LLMatcher], deadline_s: float) -> Exception:
    if future.running():
        return GrammarError(f"{constraint.kind} was not compiled within {deadline_s} s; simplify it")
    return Overloaded(f"{constraint.kind} was not begun within {deadline_s} s: other grammars are being compiled")


def _failed(constraint: Constraint, error: Exception) -> GrammarError:
    """A new error for each caller: the kept one would gather the frames of all of them."""
    error.__traceback__ = None
    if isinstance(error, GrammarError):
        return GrammarError(str(error))
    return GrammarError(f"{constraint.kind} cannot be compiled: {_short(str(error))}")


class _Vocabulary:
    """The tokenizer as llguidance's wrapper protocol wants it."""

    def __init__(self, tokenizer: GrammarTokenizer) -> None:
        self.is_tokenizer_wrapper = True
        self.bos_token_id = None
        self.eos_token_id = min(tokenizer.eos_ids)
        by_id = {token_id: text for text, token_id in tokenizer.special_ids.items()}
        self.special_token_ids = sorted(by_id.keys() | set(tokenizer.eos_ids))
        self.tokens = [
            by_id[token_id].encode() if token_id in by_id else tokenizer.token_bytes(token_id)
            for token_id in range(tokenizer.vocab_size)
        ]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode(text)


def _vocabulary(tokenizer: GrammarTokenizer) -> LLTokenizer:
    wrapper = cast(TokenizerWrapper, _Vocabulary(tokenizer))  # llguidance asks for its attributes, not its class
    return LLTokenizer(wrapper, eos_token=sorted(tokenizer.eos_ids))


def _translate(constraint: Constraint) -> str:
    """llguidance's form of a constraint. Raises GrammarError for what it would misread or choke on."""
    source = constraint.source
    match constraint.kind:
        case ConstraintKind.REGEX:
            return str(LLMatcher.grammar_from_regex(source))
        case ConstraintKind.EBNF:
            check_lark(source)
            return str(LLMatcher.grammar_from_lark(source))
        case ConstraintKind.JSON_SCHEMA:
            schema = _parse_json(source, "json_schema")
            if schema is False:
                raise GrammarError("json_schema cannot be satisfied: false matches nothing")
            if not isinstance(schema, dict) and schema is not True:
                raise GrammarError("json_schema must be an object, true or false")
            schema = {} if schema is True else schema
            check_schema(schema, "json_schema")
            return str(LLMatcher.grammar_from_json_schema(json.dumps(spaced(schema))))
        case ConstraintKind.CHOICES:
            return str(LLMatcher.grammar_from_lark(_choices(_parse_json(source, "choices"))))


def _choices(values: Any) -> str:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise GrammarError("choices must be a JSON list of strings")
    if not 1 <= len(values) <= MAX_CHOICES:
        raise GrammarError(f"choices has {len(values)} entries; it must have between 1 and {MAX_CHOICES}")
    # one terminal, so that a choice which is another's beginning stays possible
    return "start: CHOICE\nCHOICE: " + " | ".join(map(_quoted, values))


def _quoted(text: str) -> str:
    """A string of a grammar. It takes no control character as it is, and DEL is one that JSON does not escape."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _parse_json(source: str, name: str) -> Any:
    try:
        value = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"{name} is not valid JSON: {error}") from error
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise GrammarError(f"{name} is nested deeper than {MAX_JSON_DEPTH} levels")
        children: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                children += item.values()
            elif isinstance(item, list):
                children += item
        level = children
    return value


def _short(message: str) -> str:
    text = " ".join(message.split())
    return text if len(text) <= _MAX_REASON_CHARS else text[:_MAX_REASON_CHARS] + "..."
