"""Incremental detokenization and stop checking: whole characters, and nothing that may be part of a stop."""

from __future__ import annotations

import pytest
from caesura.runtime.errors import InvalidRequest
from caesura.runtime.text.detokenizer import IncrementalDetokenizer, StopChecker
from caesura.runtime.text.tokenizer import Tokenizer, load_tokenizer

from tests.text_builders import TEXTS, byte_level_bpe, sentencepiece_bpe


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    (byte_level_bpe if request.param == "byte_level" else sentencepiece_bpe)(folder)
    return load_tokenizer(folder)


def test_pushed_text_equals_decode(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        for continuation in (False, True):
            ids = [*tokenizer.hidden_ids, *tokenizer.encode(text)]
            for skip in (True, False):
                stream = IncrementalDetokenizer(tokenizer, skip, continuation=continuation)
                parts = [stream.push(token_id) for token_id in ids]
                assert "\ufffd" in text or not any("\ufffd" in part for part in parts)
                whole = "".join(parts) + stream.flush()
                assert whole == tokenizer.decode(ids, skip_special=skip, continuation=continuation)


def test_half_a_character_waits(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f9ff", continuation=True)  # not in the corpus: several tokens
    waiting = [""] * (len(ids) - 1)
    assert waiting
    stream = IncrementalDetokenizer(tokenizer, continuation=True)
    assert [stream.push(token_id) for token_id in ids] == [*waiting, "\U0001f9ff"]
    cut = IncrementalDetokenizer(tokenizer, continuation=True)
    assert [cut.push(token_id) for token_id in ids[:-1]] == waiting
    assert cut.flush() == "\ufffd" == tokenizer.decode(ids[:-1], continuation=True)


def test_invalid_bytes_are_decoded_as_a_whole_text_would_be(tokenizer: Tokenizer) -> None:
    by_byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if i not in tokenizer.hidden_ids}
    for raw in (b"\xff\xfe", b"\xe6\x97a", b"\xf0\x9f\x98", b"\xc0\x80", b"a\x80b", b"\xed\xa0\x80"):
        ids = [by_byte[bytes([byte])] for byte in raw]
        stream = IncrementalDetokenizer(tokenizer, continuation=True)
        text = "".join(map(stream.push, ids)) + stream.flush()
        assert text == raw.decode("utf-8", errors="replace") == tokenizer.decode(ids, continuation=True)


def run(checker: StopChecker, parts: list[str]) -> tuple[str, str | None]:
    shown = ""
    for part in parts:
        text, matched = checker.push(part)
        shown += text
        if matched is not None:
            return shown, matched
    return shown + checker.flush(), None


STOP_CASES: list[tuple[tuple[str, ...], tuple[str, ...], str, str, str | None]] = [
    (("END",), (), "hello END more", "hello ", "END"),
    (("END",), (), "hello EN", "hello EN", None),
    (("aab",), (), "aaaab", "aa", "aab"),
    (("\n\n", "\n"), (), "a\nb", "a", "\n"),
    (("bcd", "abcde"), (), "xabcde", "xa", "bcd"),
    (("cd", "abcd"), (), "xabcd", "x", "abcd"),
    (("日本",), (), "これは日本語", "これは", "日本"),
    ((), (r"[0-9]{3}",), "a12b1234", "a12b", r"[0-9]{3}"),
    ((), (r"(?i)stop\s*here",), "x SToP  here", "x ", r"(?i)stop\s*here"),
    ((), (r"^Q:", r"x+y"), "Q: xxy", "", r"^Q:"),
    ((), (r"(?m)^Q:",), "aQ:\nQ:", "aQ:\n", r"(?m)^Q:"),
    ((), (r"a(b|cd)*e",), "zabcdbe", "z", r"a(b|cd)*e"),
    ((), (r"[^\n]\n{2,3}",), "ab\n\n", "a", r"[^\n]\n{2,3}"),
    (("!",), (r"\w+\?",), "who? me!", "", r"\w+\?"),
]


@pytest.mark.parametrize(("stop", "patterns", "text", "shown", "matched"), STOP_CASES)
def test_stops_are_found_for_every_cut(
    stop: tuple[str, ...], patterns: tuple[str, ...], text: str, shown: str, matched: str | None
) -> None:
    for cut in range(len(text) + 1):
        assert run(StopChecker(stop, patterns), [text[:cut], text[cut:]]) == (shown, matched)
    assert run(StopChecker(stop, patterns), list(text)) == (shown, matched)


def test_text_that_may_begin_a_stop_is_held() -> None:
    checker = StopChecker(("<|end|>",))
    assert checker.push("text <|e") == ("text ", None)
    assert checker.push("x <") == ("<|ex ", None)
    assert checker.push("|end|> tail") == ("", "<|end|>")
    assert checker.push("more") == ("", "<|end|>")


def test_without_stops_text_passes() -> None:
    assert StopChecker(()).push("anything") == ("anything", None)


def test_hostile_patterns_cost_no_more_than_any() -> None:
    checker = StopChecker((), (r"(a+)+b", r"(a|a)*c", r"(.*)*d"))
    shown = "".join(checker.push("a" * 50)[0] for _ in range(100))
    assert len(shown) >= 5_000 - 4_096  # what may still be a match is held, up to a bound


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "not a valid pattern"),
        ("a*", "empty text"),
        (r"(a)\1", "groupref"),
        (r"a(?=b)", "assert"),
        (r"\bword", "at"),
        ("x{3000}", "repetition"),
        ("(x{100}){100}", "states"),
        ("a" * 2000, "characters"),
        ("(" * 500 + "a" + ")" * 500, "deep|valid"),
    ],
)
def test_patterns_that_cannot_be_searched_are_refused(pattern: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        StopChecker((), (pattern,))
