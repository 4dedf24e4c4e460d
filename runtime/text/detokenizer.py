"""Token ids to text as they come: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

import codecs
from collections import deque

from caesura.runtime.errors import InvalidRequest
from caesura.runtime.text.stop_regex import MAX_STATES, StopRegex
from caesura.runtime.text.tokenizer_base import Tokenizer


class IncrementalDetokenizer:
    """Decodes one generation, token by token.

    The pushed texts plus the flushed one equal ``tokenizer.decode`` of all ids. A character whose bytes are not all
    there yet is held back; U+FFFD stands only for bytes that can never become a character. Work per token
    is proportional to the token's bytes.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, *, continuation: bool = False) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.hidden_ids if skip_special else frozenset()
        self._at_start = tokenizer.strips_leading_space and not continuation
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that is now certain."""
        if token_id in self._hidden:
            return ""
        raw = self._tokenizer.token_bytes(token_id)
        if self._at_start and raw:
            raw = raw.removeprefix(b" ")
            self._at_start = False
        return self._decoder.decode(raw)

    def flush(self) -> str:
        """What is left at the end: U+FFFD if a character was cut off."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class StopChecker:
    """Looks for stop strings and stop patterns in a stream of text, in time linear in the text.

    ``push`` returns the text that may be shown and the stop that was found. Text that may be the beginning of a stop
    is held back until it is decided. The first stop to be complete wins; of several that end together, the one
    that begins first. After a match nothing more is emitted; the stop itself is never part of the text.
    """

    def __init__(self, stop: tuple[str, ...], stop_regex: tuple[str, ...] = ()) -> None:
        self._strings = _Automaton(stop) if stop else None
        self._patterns = [(source, StopRegex(source)) for source in stop_regex]
        num_states = sum(pattern.num_states for _, pattern in self._patterns)
        if num_states > MAX_STATES:
            raise InvalidRequest(
                f"stop_regex: the patterns need {num_states} states together; the limit is {MAX_STATES}; simplify them"
            )
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be shown, the stop string or pattern found)."""
        if self.matched is not None:
            return "", self.matched
        if self._strings is None and not self._patterns:
            return text, None
        window = self._held + text
        offset = len(self._held)
        hold = offset
        for i, char in enumerate(text):
            hold = 0
            best: tuple[int, str] | None = None  # (length of the stop, its name)
            if self._strings is not None:
                found = self._strings.step(char)
                hold = self._strings.depth
                if found is not None:
                    best = (len(found), found)
            for source, pattern in self._patterns:
                length = pattern.step(char)
                hold = max(hold, pattern.pending_chars)
                if length is not None and (best is None or length > best[0]):
                    best = (length, source)
            if best is not None:
                self.matched = best[1]
                self._held = ""
                return window[: max(0, offset + i + 1 - best[0])], self.matched
        keep = min(hold, len(window))
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep], None

    def flush(self) -> str:
        """The text held back, at the end of a generation that found no stop."""
        text, self._held = self._held, ""
        return text


class _Automaton:
    """Aho-Corasick over the stop strings: one step a character, the depth is what must be held back."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth: list[int] = [0]
        self._fail: list[int] = [0]
        self._match: list[str | None] = [None]
        for word in words:
            self._insert(word)
        self._link()
        self._node = 0

    @property
    def depth(self) -> int:
        return self._depth[self._node]

    def step(self, char: str) -> str | None:
        """The longest stop string that ends with this character."""
        node = self._node
        while node and char not in self._next[node]:
            node = self._fail[node]
        self._node = self._next[node].get(char, 0)
        return self._match[self._node]

    def _insert(self, word: str) -> None:
        node = 0
        for char in word:
            child = self._next[node].get(char)
            if child is None:
                child = len(self._next)
                self._next[node][char] = child
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._fail.append(0)
                self._match.append(None)
            node = child
        if node:
            self._match[node] = word

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self._next[node].items():
                back = self._fail[node]
                while back and char not in self._next[back]:
                    back = self._fail[back]
                self._fail[child] = self._next[back].get(char, 0)
                if self._match[child] is None:
                    self._match[child] = self._match[self._fail[child]]
                queue.append(child)
