"""The end of a generation on a stop: what of its tokens stays, at a cost that does not depend on how long it was."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from caesura.runtime.executors.base import SampledToken
from caesura.runtime.generation import Ending, Generation
from caesura.runtime.sampling import SamplerState, SamplingParams
from caesura.runtime.text.detokenizer import StopChecker


class Bytes:
    """One token a byte; counts the tokens it decodes."""

    bos_id = None
    eos_ids: frozenset[int] = frozenset()
    hidden_ids: frozenset[int] = frozenset()
    strips_leading_space = False
    vocab_size = 256
    special_ids: dict[str, int] = {}
    decoded = 0

    def encode(self, text: str, *, allow_special: bool = False, continuation: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        self.decoded += len(ids)
        return bytes(ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def generated(text: str, tokenizer: Bytes, pattern: str) -> tuple[Generation, Ending]:
    """A generation that was fed ``text`` until it ended."""
    params = SamplingParams(max_new_tokens=100_000, stop_regex=(pattern,))
    stops = StopChecker((), (pattern,))
    generation = Generation(params, SamplerState(params, 0), tokenizer, frozenset(), 0, lambda _: None, stops=stops)
    for byte in text.encode():
        ending = generation.push(SampledToken(byte))
        if ending is not None:
            return generation, ending
    raise AssertionError("nothing stopped it")


@pytest.mark.parametrize("before", ["", "plain ", "na\u00efve \u65e5\u672c ", "\U0001f600"])
@pytest.mark.parametrize("match", ["<>", "<\u65e5>", "<" + "x" * 50 + ">"])
def test_what_stays_is_the_text_before_the_match(before: str, match: str) -> None:
    tokenizer = Bytes()
    generation, ending = generated(before + match, tokenizer, "<[^>]*>")
    kept, rest = generation.kept_tokens(ending)
    assert tokenizer.decode([*generation.token_ids[:kept], *rest]) == before
    assert rest == []


def test_a_long_match_after_a_long_text_costs_one_look() -> None:
    tokenizer = Bytes()
    generation, ending = generated("word " * 1000 + "<" + "x" * 2000 + ">", tokenizer, "<[^>]*>")
    tokenizer.decoded = 0
    assert generation.kept_tokens(ending) == (5000, [])
    assert tokenizer.decoded <= 2 * 5000
