"""How conversations become tokens for training: what decides whether a small model can copy a name."""

from __future__ import annotations

import random

import pytest
from caesura.runtime.embedded.examples import Example, batches, letter_tokens, train_tokenizer
from caesura.runtime.embedded.skills.world import World
from caesura.runtime.embedded.tasks import Split
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
    """Servers tokenize them apart, and arrive at what the model was trained on."""
    to_model, to_user = "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n"
    pieces = (
        "<|im_start|>system\n", "Be short.", "\n\nTools, called as JSON in <tool_call></tool_call>:\n-", "add",
        "(", "a", ",", "b", "): ", "Add two numbers.", to_user, "What is 48 + 39?", to_model,
        '<tool_call>\n{"name": "', "add", '", "arguments": ', '{"a": 48, "b": -39}', "}\n</tool_call>",
        '\n<tool_call>\n{"name": "', "list_notes", '", "arguments": ', "{}", "}\n</tool_call>",
        '\n<tool_call>\n{"name": "', "say", '", "arguments": ', '{"name": "Gar.", "x": {"y": []}}', "}\n</tool_call>",
        to_user + "<tool_response>\n", "Hall. Exits: north locked (kin key). Here: nothing. You have: a user",
        "\n</tool_response>\n<tool_response>\n", "1872", "\n</tool_response>" + to_model, "Done.",
        to_user, "{1}", to_model,
    )  # fmt: skip
    apart = [token for piece in pieces for token in ids(tokenizer, piece)]
    assert apart == ids(tokenizer, "".join(pieces))
    assert tokenizer.decode(apart, skip_special_tokens=False) == "".join(pieces)


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
