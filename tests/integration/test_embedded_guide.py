"""Heads that are told where to look learn it, and a network too small for it is left alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from caesura.runtime.embedded.chat import calls_message, render
from caesura.runtime.embedded.examples import Example, encode_example, train_tokenizer
from caesura.runtime.embedded.guide import LINE, OFFER, POINT, QUESTION, SEEK, Guide, Heads, Places
from caesura.runtime.embedded.net import Shape, TinyLlama
from caesura.runtime.embedded.trainer import collate
from tokenizers import Tokenizer


@cache
def known() -> Tokenizer:
    return train_tokenizer(1, conversations=300)


def tool(name: str, description: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"text": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def conversation(*called: str) -> Example:
    """Calls of some of three tools in one turn, and an answer."""
    tools = [tool("alpha", "Add numbers."), tool("bravo", "Send a mail."), tool("chair", "Draw a tree.")]
    calls = [{"function": {"name": name, "arguments": {"text": "all of it"}}} for name in called]
    messages = [
        {"role": "user", "content": "Do it."},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", "content": "done"} for _ in called),
        {"role": "assistant", "content": "Done."},
    ]
    return encode_example(known(), render(messages, tools))


def network(**sizes: int) -> TinyLlama:
    torch.manual_seed(5)
    return TinyLlama(Shape(vocab=known().get_vocab_size(), **sizes)).train()


def guided(model: TinyLlama, guide: Guide, examples: list[Example]) -> torch.Tensor:
    ids, learned = collate(examples, pad_id=0)
    model.hidden_states(ids[:, :-1], wanted=learned)
    return guide.loss(examples, ids, learned)


def taught(called: str) -> tuple[TinyLlama, Guide]:
    """A network after thirty steps on its attention alone."""
    model = network()
    guide = Guide(model, known())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        guided(model, guide, [conversation(called)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, guide


def told(example: Example, by: Heads) -> list[tuple[str, list[str]]]:
    """For each position that these heads are told about: its token, and those to look at with the one before each."""
    ids, learned = collate([example], pad_id=0)

    def text(start: int, end: int) -> str:
        return str(known().decode(example.ids[start:end], skip_special_tokens=False))

    return [
        (text(at, at + 1), [text(place - 1, place + 1) for place in wanted.nonzero()[:, 0].tolist()])
        for looks in Places(known()).looks([example], ids, learned)
        if looks.by == by
        for at, wanted in zip(looks.positions.tolist(), looks.wanted, strict=True)
    ]


def talk(*turns: str) -> Example:
    roles = ("user", "assistant")
    return encode_example(known(), render([{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]))


def test_heads_learn_to_look_where_they_are_told() -> None:
    untaught = network()
    before = float(guided(untaught, Guide(untaught, known()), [conversation("bravo")]).detach())
    after = float(guided(*taught("bravo"), [conversation("bravo")]).detach())
    assert before > 4
    assert after < 0.2 * before


def test_the_line_to_look_at_is_that_of_the_tool_called() -> None:
    """What was learned for one tool is wrong for another."""
    model, guide = taught("bravo")
    with torch.no_grad():
        same, other = (float(guided(model, guide, [conversation(name)])) for name in ("bravo", "alpha"))
    assert other > same + 2


def test_a_call_looks_at_its_tools_line_and_points_at_the_name_there() -> None:
    _, line = told(conversation("bravo"), OFFER)[0]
    assert line[0] == "-br"
    assert line[-1] == "mail."
    before_name, name = told(conversation("bravo"), POINT)[0]
    assert before_name.endswith('{"name": "')
    assert [token[0] for token in name] == ["-"]


def test_another_call_is_decided_on_where_one_ends_and_no_call_looks_nowhere() -> None:
    looks = told(conversation("bravo", "chair"), OFFER)
    ends = [line for token, line in looks if token == "</tool_call>"]
    assert [line[0] for line in ends] == ["-c", ""]  # at the line of the second, and after that at nothing
    begins = looks[0], looks[-1]
    assert [line[0] for _, line in begins] == ["-br", ""]


def test_a_turn_looks_at_the_last_question() -> None:
    looks = told(talk("17", "5", "42", "6"), QUESTION)
    assert [[token[-1] for token in question] for _, question in looks] == [["1", "7"], ["4", "2"]]


def test_copies_are_pointed_at_in_the_last_turn_and_go_on_where_most_before_is_the_same() -> None:
    example = talk("91 and 92", "91", "92 or 93", "92 or 91")
    first, then = told(example, POINT), told(example, SEEK)
    numbers = [[where for where in wanted if where[-1] == "9"] for _, wanted in first]
    assert [len(wanted) for wanted in numbers if wanted] == [2, 2, 3]  # not among those of turns before the last
    assert [wanted[-1][-2:] for _, wanted in then if wanted[-1][-1] in "12"] == ["91", "92", "91"]


def test_a_command_of_an_adventure_looks_at_what_it_follows_from() -> None:
    room = "Cellar. Exits: north new, south. Here: broom, iron key. You have: brass key. Ways: hall south."
    messages = [
        {"role": "user", "content": f"Play the adventure: bring the lamp to the hall.\n{room}"},
        calls_message(["take iron key"], name="act", argument="command"),
    ]
    example = encode_example(known(), render(messages, [tool("act", "Act.")]))
    wanted = {
        by: [looks.wanted for looks in Places(known()).looks([example], *collate([example], 0)) if looks.by == by][-1]
        for by in (OFFER, QUESTION, LINE)
    }

    def seen(by: Heads) -> list[str]:
        return [known().decode([i for i, yes in zip(example.ids, row, strict=False) if yes]) for row in wanted[by]]

    assert seen(OFFER) == ["iron key"] * 2  # before the verb, and before the thing
    assert seen(QUESTION) == ["lamphallbrass key"] * 2
    assert {"north", "south"} < set(seen(LINE))


def test_a_conversation_with_nothing_to_write_has_nothing_to_look_at() -> None:
    model = network()
    messages = [{"role": "system", "content": "17 19"}, {"role": "user", "content": "17"}]
    assert float(guided(model, Guide(model, known()), [encode_example(known(), render(messages))]).detach()) == 0.0


@pytest.mark.parametrize(
    "sizes", [{"layers": 4}, {"heads": 2, "kv_heads": 2}, {"hidden": 128, "heads": 4, "kv_heads": 2}], ids=str
)
def test_a_network_too_small_is_told_nothing(sizes: dict[str, int]) -> None:
    model = network(**sizes)
    assert float(guided(model, Guide(model, known()), [conversation("bravo")]).detach()) == 0.0
