"""Heads that are told where to look learn it, and a network too small for it is left alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from caesura.runtime.embedded.chat import calls_message, render
from caesura.runtime.embedded.examples import Example, encode_example, train_tokenizer
from caesura.runtime.embedded.guide import Guide
from caesura.runtime.embedded.net import Shape, TinyLlama
from caesura.runtime.embedded.trainer import collate
from tokenizers import Tokenizer


@cache
def known() -> Tokenizer:
    return train_tokenizer(1, conversations=300)


def tool(name: str, description: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"text": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def conversation(called: str) -> Example:
    """A call of one of three tools."""
    tools = [tool("alpha", "Add numbers."), tool("bravo", "Send a mail."), tool("chair", "Draw a tree.")]
    messages = [{"role": "user", "content": "Do it."}, calls_message(["all of it"], name=called, argument="text")]
    return encode_example(known(), render(messages, tools))


def network(**sizes: int) -> TinyLlama:
    torch.manual_seed(5)
    return TinyLlama(Shape(vocab=known().get_vocab_size(), **sizes)).train()


def guided(model: TinyLlama, guide: Guide, examples: list[Example]) -> torch.Tensor:
    ids, learned = collate(examples, pad_id=0)
    model.hidden_states(ids[:, :-1], wanted=learned)
    return guide.loss(examples, ids, learned)


def test_heads_learn_to_look_where_they_are_told() -> None:
    model = network()
    guide = Guide(model, known())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    before = float(guided(model, guide, [conversation("bravo")]).detach())
    for _ in range(30):
        loss = guided(model, guide, [conversation("bravo")])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = float(guided(model, guide, [conversation("bravo")]).detach())
    assert before > 4
    assert after < 0.2 * before


def test_the_line_to_look_at_is_that_of_the_tool_called() -> None:
    """What was learned for one tool is wrong for another."""
    model = network()
    guide = Guide(model, known())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        guided(model, guide, [conversation("bravo")]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        same, other = (float(guided(model, guide, [conversation(name)])) for name in ("bravo", "alpha"))
    assert other > same + 2


def test_a_conversation_without_tools_has_little_to_look_at() -> None:
    model = network()
    guide = Guide(model, known())
    messages = [{"role": "user", "content": "17 19"}, {"role": "assistant", "content": "23"}]
    loss = guided(model, guide, [encode_example(known(), render(messages))])
    assert float(loss.detach()) == 0.0


@pytest.mark.parametrize(
    "sizes", [{"layers": 4}, {"heads": 2, "kv_heads": 2}, {"hidden": 128, "heads": 4, "kv_heads": 2}], ids=str
)
def test_a_network_too_small_is_told_nothing(sizes: dict[str, int]) -> None:
    model = network(**sizes)
    assert float(guided(model, Guide(model, known()), [conversation("bravo")]).detach()) == 0.0
