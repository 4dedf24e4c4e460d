"""Tokenizers: plain text never becomes a control token, bytes round-trip, broken files give one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from caesura.runtime.errors import BrokenCheckpoint, ModelError, UnsupportedModel
from caesura.runtime.text.template_pieces import Piece
from caesura.runtime.text.tokenizer import Tokenizer, encode_pieces, load_tokenizer

from tests.text_builders import TEXTS, byte_level_bpe, rank_file, sentencepiece_bpe

KINDS = ["byte_level", "prefix_space", "llama2", "metaspace", "llama3_ranks", "qwen_ranks", "cl100k_ranks"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    match request.param:
        case "byte_level":
            byte_level_bpe(folder)
        case "prefix_space":
            byte_level_bpe(folder, prefix_space=True)
        case "llama2":
            sentencepiece_bpe(folder)
        case "metaspace":
            sentencepiece_bpe(folder, metaspace=True)
        case "llama3_ranks":
            rank_file(folder / "tokenizer.model")
        case "qwen_ranks":
            rank_file(folder / "qwen.tiktoken")
        case _:
            rank_file(folder / "cl100k_base.tiktoken")
    return load_tokenizer(folder)


def test_every_control_string_stays_text(tokenizer: Tokenizer) -> None:
    control = set(tokenizer.special_ids.values())
    assert control
    for name in tokenizer.special_ids:
        if name == "<unk>":
            continue
        for text in (name, f"a{name}b", name * 3, f" {name}\n", name[0] + name, name + name[1:]):
            for continuation in (False, True):
                ids = tokenizer.encode(text, continuation=continuation)
                assert control.isdisjoint(ids), (text, ids)
                assert tokenizer.decode(ids, skip_special=False, continuation=continuation).lstrip(" ") == text.lstrip(
                    " "
                )


def test_allowed_control_strings_are_one_token(tokenizer: Tokenizer) -> None:
    for name, token_id in list(tokenizer.special_ids.items())[:20]:
        assert token_id in tokenizer.encode(f"a{name}b", allow_special=True)
        assert tokenizer.token_bytes(token_id) == name.encode()


def test_text_round_trips(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)).lstrip(" ") == text.lstrip(" ")
        continued = tokenizer.encode(text, continuation=True)
        assert tokenizer.decode(continued, continuation=True) == text
        assert b"".join(map(tokenizer.token_bytes, continued)).decode() == text


def test_hidden_tokens_are_left_out(tokenizer: Tokenizer) -> None:
    hidden = next(iter(tokenizer.hidden_ids))
    ids = [hidden, *tokenizer.encode("hello"), hidden]
    assert tokenizer.decode(ids).strip() == "hello"
    assert tokenizer.decode(ids, skip_special=False).count(tokenizer.token_bytes(hidden).decode()) == 2


def test_ids_without_a_token_are_empty(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""
    assert tokenizer.token_bytes(-1) == b""
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == ""


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b", continuation=True), continuation=True) == "a\ufffdb"


def test_pieces_join_without_extra_blanks(tokenizer: Tokenizer) -> None:
    pieces = [Piece("hello", special=True), Piece(" world", special=False), Piece("!", special=True)]
    assert tokenizer.decode(encode_pieces(tokenizer, pieces)).lstrip(" ") == "hello world!"
    assert tokenizer.decode(encode_pieces(tokenizer, pieces, continuation=True), continuation=True) == "hello world!"


def test_a_vocabulary_that_spells_control_tokens_is_cut_apart(tmp_path: Path) -> None:
    byte_level_bpe(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    control = "<|im_end|>"
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    merges, left = [], control[0]
    for char in control[1:]:  # the model itself can merge its way to the control token
        merges.append([left, char])
        left += char
        vocabulary.setdefault(left, max(vocabulary.values()) + 1000)
    spec["added_tokens"] = spec["added_tokens"][:3]
    spec["model"]["merges"] = merges + spec["model"]["merges"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(tmp_path)
    token_id = tokenizer.special_ids[control]
    for text in (control, f"x{control}{control}y"):
        ids = tokenizer.encode(text)
        assert token_id not in ids
        assert tokenizer.decode(ids) == text
    assert token_id in tokenizer.encode(control, allow_special=True)


def test_added_words_that_are_no_markers_stay_usable(tmp_path: Path) -> None:
    from tokenizers import AddedToken

    tokenizer = byte_level_bpe(tmp_path)
    tokenizer.add_tokens([AddedToken("        ", special=False), AddedToken("<mark>", special=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert "<mark>" in loaded.special_ids and "        " not in loaded.special_ids
    assert loaded.encode("        ") == [tokenizer.token_to_id("        ")]


def test_end_ids_come_from_every_config(tmp_path: Path) -> None:
    byte_level_bpe(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2], "bos_token_id": 1}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_ids == {0, 2}
    assert loaded.bos_id == 1
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 10_000}))
    with pytest.raises(BrokenCheckpoint, match="eos_token_id 10000"):
        load_tokenizer(tmp_path)


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    tokenizer = byte_level_bpe(tmp_path)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode(loaded.encode("hello world " * 5)) == "hello world " * 5
    assert len(loaded.encode("h")) == 1


def test_rank_files_have_their_control_tokens(tmp_path: Path) -> None:
    count = rank_file(tmp_path / "tokenizer.model")
    llama = load_tokenizer(tmp_path)
    assert llama.vocab_size == count + 256
    assert llama.bos_id == llama.special_ids["<|begin_of_text|>"] == count
    assert llama.special_ids["<|eot_id|>"] == count + 9
    assert llama.special_ids["<|reserved_special_token_247|>"] <= count + 255
    assert {llama.special_ids["<|end_of_text|>"], llama.special_ids["<|eot_id|>"]} <= llama.eos_ids
    (tmp_path / "tokenizer.model").unlink()
    count = rank_file(tmp_path / "qwen.tiktoken")
    config = {
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {str(count + 3): {"content": "<tool_call>", "special": False}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    qwen = load_tokenizer(tmp_path)
    assert qwen.special_ids["<|im_start|>"] == count + 1
    assert qwen.eos_ids == {count + 2}
    assert qwen.special_ids["<tool_call>"] == count + 3 and count + 3 not in qwen.hidden_ids
    assert qwen.encode("1234") == [ord(c) for c in "1234"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "BPE"}}'),
        ("tokenizer.json", b'{"added_tokens": [{"content": 3}]}'),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15"),
        ("tokenizer.model", b"not base64! 1\n"),
        ("tokenizer.model", b"YQ== x\n"),
        ("tokenizer.model", b"YQ== 1\nYQ== 2\n"),
        ("tokenizer.model", b"YQ== 0\n"),
        ("tokenizer.model", b""),
        ("x.tiktoken", b"YQ== -1\n"),
    ],
)
def test_broken_files_give_one_clear_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError):
        load_tokenizer(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(BrokenCheckpoint, match="not a folder"):
        load_tokenizer(tmp_path / "absent")
    rank_file(tmp_path / "a.tiktoken")
    rank_file(tmp_path / "b.tiktoken")
    with pytest.raises(BrokenCheckpoint, match="2 rank files"):
        load_tokenizer(tmp_path)


def test_other_decoders_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_level_bpe(tmp_path)
    from tokenizers import decoders

    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        load_tokenizer(tmp_path)
