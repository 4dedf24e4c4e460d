"""Rank files through ``tiktoken``: Qwen's ``*.tiktoken``, cl100k's, and Llama-3's ``tokenizer.model``."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken
from caesura.runtime.errors import BrokenCheckpoint, UnsupportedModel
from caesura.runtime.text.tokenizer_base import (
    MAX_TOKENIZER_BYTES,
    clean_text,
    decode_bytes,
    read_json_if_there,
    stop_and_start_ids,
)

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_PATTERN = rf"{_LETTERS}|\p{{N}}|{_REST}"
CL100K_PATTERN = rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"

# tiktoken's regex engine may exhaust its stack on one enormous run of a single character class
_MAX_CHUNK_CHARS = 200_000


class TiktokenTokenizer:
    """A tokenizer made of byte ranks, a split pattern and control tokens.

    Raises BrokenCheckpoint for a file that is missing, malformed or lacks one of the 256 single bytes.
    """

    strips_leading_space = False

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        pattern: str,
        special_ids: Mapping[str, int],
        *,
        eos_ids: frozenset[int],
        bos_id: int | None,
        visible: frozenset[str] = frozenset(),
    ) -> None:
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise BrokenCheckpoint(f"the rank file lacks {len(missing)} single bytes, the first is {missing[0]:#04x}")
        taken = set(ranks.values())
        clash = next((name for name, i in special_ids.items() if i in taken or i < 0), None)
        if clash is not None or len(set(special_ids.values())) != len(special_ids):
            raise BrokenCheckpoint(f"control token {clash!r} has an id that another token uses")
        self.special_ids: dict[str, int] = dict(special_ids)
        self.hidden_ids: frozenset[int] = frozenset(i for text, i in special_ids.items() if text not in visible)
        self.eos_ids = eos_ids
        self.bos_id = bos_id
        self._encoding = tiktoken.Encoding(
            "checkpoint", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=self.special_ids
        )
        self._bytes = [b""] * (max([*taken, *special_ids.values()]) + 1)
        for raw, rank in ranks.items():
            self._bytes[rank] = raw
        for text, token_id in special_ids.items():
            self._bytes[token_id] = text.encode("utf-8")

    @classmethod
    def from_file(cls, path: Path) -> TiktokenTokenizer:
        """Read a rank file and the configs beside it; the layout is known by its name and its configs."""
        ranks = read_ranks(path)
        config = read_json_if_there(path.parent / "tokenizer_config.json")
        base = max(ranks.values()) + 1
        if path.name == "tokenizer.model":
            pattern, special = CL100K_PATTERN, _llama3_tokens(base)
        elif "qwen" in path.name.lower() or "qwen" in str(config.get("tokenizer_class", "")).lower():
            pattern, special = QWEN_PATTERN, _qwen_tokens(base)
        else:
            pattern, special = CL100K_PATTERN, _cl100k_tokens(base)
        visible: set[str] = set()
        for text, token_id, hidden in _configured_tokens(config):
            special = {name: i for name, i in special.items() if i != token_id and name != text}
            special[text] = token_id
            if not hidden:
                visible.add(text)
        size = max([base - 1, *special.values()]) + 1
        eos_ids, bos_id = stop_and_start_ids(path.parent, special, {}, size)
        if not eos_ids:
            ends = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
            eos_ids = frozenset(special[name] for name in ends if name in special)
        if bos_id is None:
            bos_id = special.get("<|begin_of_text|>")
        return cls(ranks, pattern, special, eos_ids=eos_ids, bos_id=bos_id, visible=frozenset(visible))

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    def encode(self, text: str, *, allow_special: bool = False, continuation: bool = False) -> list[int]:
        del continuation  # byte-level: a text is the same tokens wherever it stands
        text = clean_text(text)
        ids: list[int] = []
        for start in range(0, len(text), _MAX_CHUNK_CHARS):
            part = text[start : start + _MAX_CHUNK_CHARS]
            if allow_special:
                ids += self._encoding.encode(part, allowed_special="all", disallowed_special=())
            else:
                ids += self._encoding.encode_ordinary(part)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        return decode_bytes(self, ids, skip_special=skip_special, continuation=continuation)

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""


def read_ranks(path: Path) -> dict[bytes, int]:
    """Lines of ``base64 rank``. Raises BrokenCheckpoint with the line's number."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_TOKENIZER_BYTES:
            raise BrokenCheckpoint(f"{path.name} has {size_bytes} bytes; the limit is {MAX_TOKENIZER_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise BrokenCheckpoint(f"{path.name} cannot be read from {path.parent}: {error.strerror}") from error
    if path.name == "tokenizer.model" and data[:1] == b"\n":  # how a sentencepiece protobuf begins
        raise UnsupportedModel(
            "tokenizer.model is a sentencepiece model; put the checkpoint's tokenizer.json beside it (or convert it)"
        )
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank_text = line.split()
            raw, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except (ValueError, binascii.Error) as error:
            raise BrokenCheckpoint(f"{path.name}, line {number}: expected 'base64 rank'") from error
        if raw in ranks or rank in seen or not 0 <= rank < 1 << 24 or not raw:
            raise BrokenCheckpoint(f"{path.name}, line {number}: rank {rank} or its bytes are repeated or out of range")
        ranks[raw] = rank
        seen.add(rank)
    if not ranks:
        raise BrokenCheckpoint(f"{path.name} holds no ranks")
    return ranks


def _llama3_tokens(base: int) -> dict[str, int]:
    """256 control tokens, as Llama 3.1 names them; most are reserved."""
    names = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    ]
    reserved = 256 - len(names)
    names += [f"<|reserved_special_token_{i}|>" for i in range(3, 3 + reserved)]
    return {name: base + i for i, name in enumerate(names)}


def _qwen_tokens(base: int) -> dict[str, int]:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    return {name: base + i for i, name in enumerate(names)}


def _cl100k_tokens(base: int) -> dict[str, int]:
    # base is 100256 for the published file: ids 100257 to 100260, then 100276
    names = {"<|endoftext|>": 1, "<|fim_prefix|>": 2, "<|fim_middle|>": 3, "<|fim_suffix|>": 4, "<|endofprompt|>": 20}
    return {name: base + offset for name, offset in names.items()}


def _configured_tokens(config: Mapping[str, Any]) -> list[tuple[str, int, bool]]:
    """(text, id, hidden) of ``added_tokens_decoder`` in tokenizer_config.json."""
    table = config.get("added_tokens_decoder") or {}
    out: list[tuple[str, int, bool]] = []
    for key, token in table.items() if isinstance(table, dict) else ():
        if not (key.isdigit() and isinstance(token, dict) and isinstance(token.get("content"), str)):
            raise BrokenCheckpoint(f"tokenizer_config.json: added_tokens_decoder entry {key!r:.40} is malformed")
        out.append((token["content"], int(key), bool(token.get("special", True))))
    return out
