"""``tokenizer.json`` through the ``tokenizers`` library: byte-level BPE and sentencepiece-style BPE."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from caesura.runtime.errors import BrokenCheckpoint, InvalidRequest, UnsupportedModel
from caesura.runtime.text.tokenizer_base import (
    MAX_TOKENIZER_BYTES,
    clean_text,
    decode_bytes,
    read_json,
    stop_and_start_ids,
)

_WORD_START = "\u2581"


class HFTokenizer:
    """A tokenizer read from ``tokenizer.json``.

    Two encoders are kept: one that knows every added token (for text a template wrote) and one from whose
    vocabulary the control tokens were taken out (for everything else), so that plain text has no way to
    name a control token. Where the vocabulary itself can still spell one by merges, the text is cut inside it.

    Raises BrokenCheckpoint for a missing or malformed file, UnsupportedModel for a decoder that is neither
    byte-level nor sentencepiece-style.
    """

    def __init__(self, spec: Mapping[str, Any], *, eos_ids: frozenset[int], bos_id: int | None) -> None:
        self._spec = _without_truncation(spec)
        self.eos_ids = eos_ids
        self.bos_id = bos_id
        added = _added_tokens(self._spec)
        control = [token for token in added if _is_control(token)]
        self.special_ids: dict[str, int] = {token["content"]: token["id"] for token in control}
        self.hidden_ids: frozenset[int] = frozenset(token["id"] for token in control if token.get("special"))
        self._full = _build(self._spec)
        wrong = next((t for t in added if self._full.token_to_id(t["content"]) != t["id"]), None)
        if wrong is not None:
            raise BrokenCheckpoint(f"tokenizer.json: added token {wrong['content']!r} cannot have id {wrong['id']}")
        self._plain = _build(_without_control(self._spec))
        self._renumbered = self._true_ids([token for token in added if not _is_control(token)])
        self._full_next: tokenizers.Tokenizer | None = None
        self._plain_next: tokenizers.Tokenizer | None = None
        self._has_prefix = _without_prefix(self._spec) != self._spec
        model = self._spec.get("model")
        unk = model.get("unk_token") if isinstance(model, dict) else None
        unk_id = self._full.token_to_id(unk) if isinstance(unk, str) else None
        self._forbidden = frozenset(self.special_ids.values()) - {unk_id}
        self._byte_level, self.strips_leading_space = _decoder_kind(self._spec)
        self._bytes = self._vocabulary_bytes({token["id"]: token["content"] for token in added})

    @classmethod
    def from_folder(cls, folder: Path) -> HFTokenizer:
        """Read ``tokenizer.json`` and the configs beside it."""
        spec = read_json(folder / "tokenizer.json", limit_bytes=MAX_TOKENIZER_BYTES)
        tokenizer = cls(spec, eos_ids=frozenset(), bos_id=None)
        vocabulary = tokenizer._full.get_vocab(with_added_tokens=True)
        tokenizer.eos_ids, tokenizer.bos_id = stop_and_start_ids(
            folder, tokenizer.special_ids, vocabulary, tokenizer.vocab_size
        )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    def encode(self, text: str, *, allow_special: bool = False, continuation: bool = False) -> list[int]:
        text = clean_text(text)
        if not text:
            return []
        if allow_special:
            return self._encode_special(text, continuation)
        ids = self._encode_plain(self._encoder(False, continuation), text)
        if self._forbidden.isdisjoint(ids):
            return ids
        return self._encode_apart(text, continuation)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        return decode_bytes(self, ids, skip_special=skip_special, continuation=continuation)

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def _true_ids(self, kept: Sequence[Mapping[str, Any]]) -> dict[int, int]:
        """The library numbers added tokens in a row, so taking some out moves those that stay."""
        moved: dict[int, int] = {}
        for token in kept:
            here = self._plain.token_to_id(token["content"])
            if here is not None and here != token["id"]:
                moved[here] = token["id"]
        if not moved.keys().isdisjoint(self._plain.get_vocab(with_added_tokens=False).values()):
            raise BrokenCheckpoint("tokenizer.json: the ids of its added tokens collide with its vocabulary")
        return moved

    def _encode_plain(self, encoder: tokenizers.Tokenizer, text: str) -> list[int]:
        ids = _encode(encoder, text)
        return [self._renumbered.get(i, i) for i in ids] if self._renumbered else ids

    def _encode_special(self, text: str, continuation: bool) -> list[int]:
        """Some vocabularies begin words anew after each control token, so only what lies before the first continues."""
        if not (continuation and self._has_prefix):
            return _encode(self._full, text)
        found = [at for name in self.special_ids if (at := text.find(name)) >= 0]
        head = min(found, default=len(text))
        ids = _encode(self._encoder(True, True), text[:head]) if head else []
        return ids + (_encode(self._full, text[head:]) if head < len(text) else [])

    def _encoder(self, allow_special: bool, continuation: bool) -> tokenizers.Tokenizer:
        if not (continuation and self._has_prefix):
            return self._full if allow_special else self._plain
        if allow_special:
            if self._full_next is None:
                self._full_next = _build(_without_prefix(self._spec))
            return self._full_next
        if self._plain_next is None:
            self._plain_next = _build(_without_prefix(_without_control(self._spec)))
        return self._plain_next

    def _encode_apart(self, text: str, continuation: bool) -> list[int]:
        """Cut the text inside every control string, so that no merge can put one together."""
        ids: list[int] = []
        for part in _cut_inside(text, list(self.special_ids)):
            ids += self._encode_plain(self._encoder(False, continuation or bool(ids)), part)
        if not self._forbidden.isdisjoint(ids):
            shown = next(name for name, i in self.special_ids.items() if i in ids)
            raise InvalidRequest(f"the text holds {shown!r}, which this tokenizer writes as a control token only")
        return ids

    def _vocabulary_bytes(self, added: Mapping[int, str]) -> list[bytes]:
        vocabulary = self._full.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values(), default=-1) + 1)
        to_byte = _byte_alphabet() if self._byte_level else {}
        for text, token_id in vocabulary.items():
            if not self._byte_level and _is_byte_token(text):
                table[token_id] = bytes([int(text[3:5], 16)])
            elif token_id in added:
                table[token_id] = added[token_id].encode("utf-8")
            elif self._byte_level:
                try:
                    table[token_id] = bytes([to_byte[char] for char in text])
                except KeyError:
                    table[token_id] = text.encode("utf-8")
            else:
                table[token_id] = text.replace(_WORD_START, " ").encode("utf-8")
        return table


def _is_byte_token(text: str) -> bool:
    """``<0xHH>``: one byte of a character that has no token."""
    digits = "0123456789ABCDEFabcdef"
    return len(text) == 6 and text[:3] == "<0x" and text[5] == ">" and text[3] in digits and text[4] in digits


def _encode(encoder: tokenizers.Tokenizer, text: str) -> list[int]:
    ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
    return ids


def _build(spec: Mapping[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except BaseException as error:  # a panic inside the library is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise BrokenCheckpoint(f"tokenizer.json is not a usable tokenizer: {error}") from error


def _added_tokens(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    tokens = spec.get("added_tokens") or []
    if not isinstance(tokens, list):
        raise BrokenCheckpoint("tokenizer.json: added_tokens must be a list")
    for token in tokens:
        if not (isinstance(token, dict) and isinstance(token.get("content"), str) and isinstance(token.get("id"), int)):
            raise BrokenCheckpoint(f"tokenizer.json: an added token needs content and id, found {token!r:.80}")
    return tokens


def _is_control(token: Mapping[str, Any]) -> bool:
    """Special tokens, and added tokens that look like markers; runs of blanks and plain words are ordinary text."""
    text: str = token["content"]
    if _is_byte_token(text):
        return False
    if token.get("special"):
        return True
    return any(not (char.isalnum() or char.isspace() or char in f"_{_WORD_START}") for char in text)


def _without_truncation(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {**spec, "truncation": None, "padding": None}


def _without_control(spec: Mapping[str, Any]) -> dict[str, Any]:
    kept = [token for token in _added_tokens(spec) if not _is_control(token)]
    return {**spec, "added_tokens": kept, "post_processor": None}


def _without_prefix(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer without the blank it puts in front of a text."""
    out = copy.copy(dict(spec))
    out["normalizer"] = _drop_prefix(copy.deepcopy(spec.get("normalizer")))
    out["pre_tokenizer"] = _drop_prefix(copy.deepcopy(spec.get("pre_tokenizer")))
    return out


def _drop_prefix(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if node.get("type") == "Prepend":
        return None
    if node.get("type") == "Metaspace":
        node["prepend_scheme"] = "never"
        if "add_prefix_space" in node:
            node["add_prefix_space"] = False
    elif node.get("type") == "ByteLevel" and node.get("add_prefix_space"):
        node["add_prefix_space"] = False
    for key in ("normalizers", "pretokenizers"):
        if isinstance(node.get(key), list):
            node[key] = [part for part in map(_drop_prefix, node[key]) if part is not None]
    return node


def _decoder_kind(spec: Mapping[str, Any]) -> tuple[bool, bool]:
    """(byte-level, strips one leading space), read from the decoder."""
    decoder = spec.get("decoder")
    parts = list(_flat_decoders(decoder)) if isinstance(decoder, dict) else []
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        return True, False
    if not kinds & {"ByteFallback", "Metaspace", "Replace", "Fuse"}:
        found = ", ".join(sorted(map(str, kinds))) or "none"
        raise UnsupportedModel(
            f"tokenizer.json has decoder {found}; byte-level and sentencepiece-style (byte fallback, metaspace) work"
        )
    strips = any(part.get("type") == "Strip" and part.get("start", 0) > 0 for part in parts) or any(
        part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never" for part in parts
    )
    return False, strips


def _flat_decoders(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    parts = node.get("decoders")
    if node.get("type") == "Sequence" and isinstance(parts, list):
        for part in parts:
            if isinstance(part, dict):
                yield from _flat_decoders(part)
    else:
        yield node


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of every byte in byte-level vocabularies (GPT-2's table), reversed."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


def _cut_inside(text: str, strings: Sequence[str]) -> list[str]:
    """``text`` in parts, none of which holds one of ``strings`` of two or more characters."""
    cuts: set[int] = set()
    for needle in strings:
        if len(needle) < 2:
            continue
        at = text.find(needle)
        while at >= 0:
            cuts.add(at + 1)
            at = text.find(needle, at + 1)
    edges = [0, *sorted(cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges) if a < b]
