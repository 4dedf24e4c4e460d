"""Tokenizers of a checkpoint folder, behind one contract. Nothing is downloaded and no remote code runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from caesura.runtime.errors import BrokenCheckpoint
from caesura.runtime.text.template_pieces import Piece
from caesura.runtime.text.tokenizer_base import Tokenizer
from caesura.runtime.text.tokenizer_hf import HFTokenizer
from caesura.runtime.text.tokenizer_tiktoken import TiktokenTokenizer

__all__ = ["HFTokenizer", "TiktokenTokenizer", "Tokenizer", "encode_pieces", "load_tokenizer"]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Looks for ``tokenizer.json``, then ``tokenizer.model`` (Llama-3 ranks), then one ``*.tiktoken`` file.
    Raises BrokenCheckpoint or UnsupportedModel with the file's name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BrokenCheckpoint(f"{folder} is not a folder")
    if (folder / "tokenizer.json").is_file():
        return HFTokenizer.from_folder(folder)
    if (folder / "tokenizer.model").is_file():
        return TiktokenTokenizer.from_file(folder / "tokenizer.model")
    ranks = sorted(folder.glob("*.tiktoken"))
    if len(ranks) > 1:
        raise BrokenCheckpoint(f"{folder} holds {len(ranks)} rank files; keep the one that belongs to the model")
    if ranks:
        return TiktokenTokenizer.from_file(ranks[0])
    raise BrokenCheckpoint(f"{folder} has no tokenizer.json, tokenizer.model or *.tiktoken")


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[Piece], *, continuation: bool = False) -> list[int]:
    """Token ids of template pieces: markers may become control tokens, content never does."""
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer.encode(piece.text, allow_special=piece.special, continuation=continuation or bool(ids))
    return ids
