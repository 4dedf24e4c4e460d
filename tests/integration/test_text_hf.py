"""Against transformers: templates render the same text, tokenizers give the same ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from caesura.runtime.text.template import ChatTemplate, load_template
from caesura.runtime.text.template_default import DEFAULT_TEMPLATE
from caesura.runtime.text.tokenizer import encode_pieces, load_tokenizer

from tests.text_builders import ADD, STYLES, TEXTS, byte_level_bpe, sentencepiece_bpe

SYSTEM = {"role": "system", "content": "  You are <b>'careful'</b>.\n"}
USER = {"role": "user", "content": "  Was ist 1 + 2? \n\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 3. "}
ADDING = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [ADDING]}
RESULT = {"role": "tool", "name": "add", "content": "3", "tool_call_id": "call00000"}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER, USER],
    [SYSTEM, USER, ANSWER, USER, ANSWER],
    [USER, CALL, RESULT],
    [SYSTEM, USER, CALL, RESULT, ANSWER, USER],
]


@pytest.fixture(scope="module", params=["byte_level", "llama2", "metaspace"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "byte_level":
        byte_level_bpe(path)
    else:
        sentencepiece_bpe(path, metaspace=request.param == "metaspace")
    return path


def reference(folder: Path) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("style", [*STYLES, "default"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [ADD]])
@pytest.mark.parametrize("generate", [False, True])
def test_templates_render_alike(
    style: str, conversation: list[dict[str, Any]], tools: list[Any] | None, generate: bool, tmp_path_factory: Any
) -> None:
    if style == "chatml" and any("tool_calls" in message for message in conversation):
        pytest.skip("the plain template knows no calls")
    source = DEFAULT_TEMPLATE if style == "default" else STYLES[style]
    hf = _plain_reference(tmp_path_factory)
    ours = ChatTemplate(source, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    kwargs: dict[str, Any] = {"tools": tools, "add_generation_prompt": generate}
    theirs = hf.apply_chat_template(conversation, chat_template=source, tokenize=False, **kwargs)
    assert ours.render(conversation, **kwargs) == theirs
    assert "".join(piece.text for piece in ours.pieces(conversation, **kwargs)) == theirs


_references: list[Any] = []


def _plain_reference(tmp_path_factory: Any) -> Any:
    if not _references:
        path = tmp_path_factory.mktemp("reference")
        byte_level_bpe(path)
        _references.append(transformers.PreTrainedTokenizerFast.from_pretrained(path, bos_token="<|endoftext|>"))
    return _references[0]


def test_tokenizers_agree(folder: Path) -> None:
    hf, ours = reference(folder), load_tokenizer(folder)
    assert ours.vocab_size == len(hf)
    assert ours.eos_ids == {hf.eos_token_id} and ours.bos_id == hf.bos_token_id
    for text in TEXTS:
        expected = hf.encode(text, add_special_tokens=False)
        assert ours.encode(text, allow_special=True) == expected
        if not any(name in text for name in ours.special_ids):
            assert ours.encode(text) == expected
        for skip in (True, False):
            assert ours.decode(expected, skip_special=skip) == hf.decode(
                expected, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


def test_pieces_tokenize_as_the_whole_text_does(folder: Path) -> None:
    """Content and markers are tokenized apart; where nothing is forged the ids are those of the rendered text."""
    hf, tokenizer = reference(folder), load_tokenizer(folder)
    source = STYLES["mistral" if tokenizer.strips_leading_space else "qwen"]
    named = load_template(folder, tokenizer)
    template = ChatTemplate(source, bos_token=named.bos_token, eos_token=named.eos_token)
    conversation = [
        {"role": "user", "content": "hello world, this is a test"},
        {"role": "assistant", "content": "hello world"},
        {"role": "user", "content": "this is a test"},
    ]
    ids = encode_pieces(tokenizer, template.pieces(conversation, add_generation_prompt=True))
    assert ids == hf.encode(template.render(conversation, add_generation_prompt=True), add_special_tokens=False)
