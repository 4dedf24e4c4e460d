"""How conversations become tokens for training: what decides whether a small model can copy a name."""

from __future__ import annotations

import random

import pytest
from caesura.runtime.embedded.chat import CHAT_TEMPLATE, TURN_END, render
from caesura.runtime.embedded.data import ConversationMaker
from caesura.runtime.embedded.examples import Example, batches, letter_tokens, train_tokenizer
from caesura.runtime.embedded.skills.world import World
from caesura.runtime.embedded.tasks import Split
from caesura.runtime.text.template import ChatTemplate
from tokenizers import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(1, conversations=400)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


@pytest.mark.parametrize("split", Split)
def test_a_name_is_the_same_tokens_wherever_it_stands(tokenizer: Tokenizer, split: Split) -> None:
    world = World("names", split)
    for name in (world.word(2) for _ in range(50)):
        alone = ids(tokenizer, name)
        for before, after in (
            ("Where is ", "?"), ("Where is ", " now?"), ("<tool_response>\n", "\n</tool_response>"),
            ('{"city": "', '"}'), ('"a", "', '", "b"'), ("Tools:\n-", "(city)"), ("north locked (", " key), west"),
            ("The answer is ", ".<|im_end|>"), ("The answers are 4 and ", ", too"), ("from_", "_to"),
        ):  # fmt: skip
            assert ids(tokenizer, before + name + after) == [*ids(tokenizer, before), *alone, *ids(tokenizer, after)]


def test_templates_and_contents_tokenize_alike_apart_and_as_a_whole(tokenizer: Tokenizer) -> None:
    """Engine and servers tokenize them apart, and arrive at what the model was trained on."""
    template = ChatTemplate(CHAT_TEMPLATE, eos_token=TURN_END)
    maker = ConversationMaker(random.Random(3), letter_tokens(tokenizer))
    for _ in range(150):
        messages, tools = maker.make(1.0)
        whole = render(messages, tools)
        pieces = template.pieces(messages, tools=tools or None)
        assert "".join(piece.text for piece in pieces) == whole
        assert [token for piece in pieces for token in ids(tokenizer, piece.text)] == ids(tokenizer, whole)
        assert tokenizer.decode(ids(tokenizer, whole), skip_special_tokens=False) == whole


@pytest.mark.parametrize(
    "pieces",
    [
        ("Thought:", " I need 48 * 39.", "\nAction:", " calculator[48 * 39]", "\nObservation: ", "1872", "\n"),
        ("Q: Where is Gar?\nA:", " In Tolmen."),
        ('{"customer": "', "Gar", '", "quantity": ', "48", "}"),
    ],
)
def test_what_a_program_writes_and_what_it_leaves_to_the_model_tokenize_alike_apart(
    tokenizer: Tokenizer, pieces: tuple[str, ...]
) -> None:
    assert [token for piece in pieces for token in ids(tokenizer, piece)] == ids(tokenizer, "".join(pieces))


def test_what_surrounds_a_call_is_few_tokens(tokenizer: Tokenizer) -> None:
    call = '<tool_call>\n{"name": "act", "arguments": {"command": "go north"}}\n</tool_call>'
    assert len(ids(tokenizer, call)) <= 14


def test_every_piece_of_a_word_comes_to_be_written(tokenizer: Tokenizer) -> None:
    """A token that is never to be written cannot be copied."""
    pieces = letter_tokens(tokenizer)
    assert {"a", "ing"} < set(pieces)
    assert all(piece.isascii() and piece.isalpha() for piece in pieces)
    drawn = batches(tokenizer, random.Random(2), 1.0, [], batch_tokens=2000, pool=600, max_tokens=1792)
    examples = [example for batch in drawn for micro in batch for example in micro]
    written = {id_ for e in examples for id_, own in zip(e.ids, e.learn, strict=True) if own}
    assert len(written & {tokenizer.token_to_id(piece) for piece in pieces}) > 0.9 * len(pieces)


def test_a_pool_has_what_is_to_be_learned_again_in_place_of_new_conversations(tokenizer: Tokenizer) -> None:
    old = [Example([7] * length, [True] * length, asked=1) for length in range(5, 15)]
    sizes = {"batch_tokens": 600, "pool": 60, "max_tokens": 300}
    drawn = list(batches(tokenizer, random.Random(1), 1.0, old, **sizes))
    examples = [example for batch in drawn for micro in batch for example in micro]
    new = [example for example in examples if not example.asked]
    assert len(new) <= 50
    assert len(examples) - len(new) <= len(old)
    assert all(example in old for example in examples if example.asked)
    assert all(len(example.ids) <= 300 for example in examples)
    # what is left over is too little for a batch
    left = 60 - len(examples)
    assert left < max(len(micro) for batch in drawn for micro in batch) * max(len(batch) for batch in drawn)
    assert len(new) >= 50 - left
    assert len(examples) - len(new) >= len(old) - left
    again = list(batches(tokenizer, random.Random(1), 1.0, old, **sizes))
    assert again == drawn
