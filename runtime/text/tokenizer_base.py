"""The tokenizer contract and what its two implementations share. Everything is bytes underneath."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from caesura.runtime.errors import BrokenCheckpoint

MAX_CONFIG_BYTES = 16 << 20
MAX_TOKENIZER_BYTES = 256 << 20


class Tokenizer(Protocol):
    """Text to token ids and back.

    ``special_ids`` maps the text of every control token (role markers, end marks, tool marks) to its id; plain
    text can never yield one of these. ``hidden_ids`` is the part of them that ``skip_special`` leaves out of
    decoded text (tool marks such as ``<tool_call>`` are control tokens that stay visible).
    ``strips_leading_space`` says that the vocabulary marks word starts, so a text's first space is not shown.
    """

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a generation."""

    @property
    def bos_id(self) -> int | None:
        """The token a sequence starts with, if the checkpoint names one."""

    @property
    def special_ids(self) -> dict[str, int]:
        """Control tokens by their text."""

    @property
    def hidden_ids(self) -> frozenset[int]:
        """Control tokens that ``skip_special`` leaves out."""

    @property
    def strips_leading_space(self) -> bool:
        """Whether ``decode`` drops one space at the very start of a text."""

    def encode(self, text: str, *, allow_special: bool = False, continuation: bool = False) -> list[int]:
        """Tokenize. Never adds BOS.

        With ``allow_special`` False no id of ``special_ids`` comes out, whatever the text says. ``continuation``
        says that other text goes before, so no word-start mark is put in front.
        """

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD. ``continuation`` keeps a leading space."""

    def token_bytes(self, token_id: int) -> bytes:
        """The raw bytes of one token; empty for an id without a token (padding of the embedding)."""


def decode_bytes(
    tokenizer: Tokenizer, ids: Iterable[int], *, skip_special: bool = True, continuation: bool = False
) -> str:
    """``Tokenizer.decode`` in terms of ``token_bytes``; the incremental detokenizer does the same step by step."""
    hidden = tokenizer.hidden_ids if skip_special else frozenset()
    raw = b"".join(tokenizer.token_bytes(i) for i in ids if i not in hidden)
    if tokenizer.strips_leading_space and not continuation and raw.startswith(b" "):
        raw = raw[1:]
    return raw.decode("utf-8", errors="replace")


def clean_text(text: str) -> str:
    """Lone surrogates cannot be written as UTF-8; each becomes U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def read_json(path: Path, *, limit_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object from a checkpoint file. Raises BrokenCheckpoint with the file's name."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes > limit_bytes:
            raise BrokenCheckpoint(f"{path.name} has {size_bytes} bytes; the limit is {limit_bytes}")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise BrokenCheckpoint(f"{path.name} cannot be read from {path.parent}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise BrokenCheckpoint(f"{path.name} must hold a JSON object, not {type(data).__name__}")
    return data


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As ``read_json``; an absent file is an empty object."""
    return read_json(path) if path.is_file() else {}


def token_text(value: object) -> str | None:
    """A token named in a config: a string, or an object with ``content``."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def stop_and_start_ids(
    folder: Path, special_ids: Mapping[str, int], other_ids: Mapping[str, int], vocab_size: int
) -> tuple[frozenset[int], int | None]:
    """End-of-sequence ids (all that any config names) and the BOS id of a checkpoint folder."""
    tokenizer_config = read_json_if_there(folder / "tokenizer_config.json")
    special_map = read_json_if_there(folder / "special_tokens_map.json")
    model_configs = [read_json_if_there(folder / name) for name in ("generation_config.json", "config.json")]

    def named(key: str) -> list[int]:
        found = []
        for config in (tokenizer_config, special_map):
            text = token_text(config.get(key))
            token_id = None if text is None else special_ids.get(text, other_ids.get(text))
            if token_id is not None:
                found.append(token_id)
        return found

    def numbered(key: str) -> list[int]:
        for config in model_configs:
            value = config.get(key)
            values = value if isinstance(value, list) else [value]
            ids = [i for i in values if isinstance(i, int) and not isinstance(i, bool)]
            bad = [i for i in ids if not 0 <= i < vocab_size]
            if bad:
                raise BrokenCheckpoint(f"{key} {bad[0]} is outside the tokenizer's {vocab_size} tokens")
            if ids:
                return ids
        return []

    bos = [*named("bos_token"), *numbered("bos_token_id")]
    return frozenset([*named("eos_token"), *numbered("eos_token_id")]), (bos[0] if bos else None)
