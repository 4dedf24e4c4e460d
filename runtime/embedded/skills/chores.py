"""Formats beside tool calls that programs use: extraction, passages, cards, next items, splitting, ReAct in text.

Each maker returns messages and tools of one conversation. What stands between UNLEARNED marks in an assistant turn
is put there by the program and not learned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from caesura.runtime.embedded.chat import Message
from caesura.runtime.embedded.phrases import NAMES, THINGS
from caesura.runtime.embedded.skills.offers import usual
from caesura.runtime.embedded.skills.several import compare_facts, fact_times
from caesura.runtime.embedded.skills.single import MONTHS, arithmetic, fact, units
from caesura.runtime.embedded.skills.task import Call, Task
from caesura.runtime.embedded.skills.world import World

UNLEARNED = ("\ue000", "\ue001")
Conversation = tuple[list[Message], list[Mapping[str, Any]]]

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _name(world: World) -> str:
    return world.rng.choice(NAMES[world.split]) if world.rng.random() < 0.6 else world.word()


def _things(world: World) -> str:
    return world.rng.choice(THINGS[world.split]) if world.rng.random() < 0.6 else world.word().lower() + "s"


def extraction(world: World) -> Conversation:
    """An order in prose, as JSON."""
    rng = world.rng
    name, town, things, n = _name(world), world.word(), _things(world), world.integer(2, 1000)
    day = f"{rng.randrange(1, 29)} {rng.choice(MONTHS)}"
    text = rng.choice(
        (
            "{name} from {town} ordered {n} {things} on {day}, to be paid in {currency}.",
            "Hello, this is {name}. Could you send me {n} {things} by {day}? We are in {town} now.",
            "On {day} {town} called: {n} {things} for {name}, please.",
            "{name} in {town} wants {n} {things}, delivery on {day}.",
            "Please send {n} {things} to {name}, {town}, until {day}.",
        )
    ).format(name=name, town=town, n=n, things=things, day=day, currency=rng.choice(("crowns", "euros", "francs")))
    ask = rng.choice(("Extract the order as JSON.", "Extract the order as JSON.", "Give me the order as JSON."))
    answer = f'{{"customer": "{name}", "town": "{town}", "quantity": {n}, "item": "{things}", "day": "{day}"}}'
    return [_user(f"{ask}\n\n{text}"), _assistant(answer)], []


def passages(world: World) -> Conversation:
    """A question answered from what a search finds, or not."""
    rng = world.rng
    names = [
        f"{world.word(rng.choice((1, 2)))} {rng.choice(('Tower', 'Museum', 'Bridge', 'Garden', 'Market', 'Library'))}"
        for _ in range(4)
    ]
    kinds = {
        "open": ("When does the {p} open?", "it opens at {n} and closes at {m}.", "The {p} opens at {n}."),
        "close": ("When does the {p} close?", "it opens at {n} and closes at {m}.", "The {p} closes at {m}."),
        "built": ("Who built the {p}?", "{w} built it in {y}.", "{w} built the {p}."),
        "year": ("When was the {p} built?", "{w} built it in {y}.", "The {p} was built in {y}."),
        "cost": ("What does the {p} cost?", "a ticket costs {n} crowns.", "The {p} costs {n} crowns."),
    }
    kind = rng.choice(tuple(kinds))
    there = rng.random() < 0.75
    lines, facts = [], {}
    for index, place in enumerate(names[: rng.randint(1, 3)]):
        facts = {
            "p": place,
            "n": world.integer(2, 30),
            "m": world.integer(10, 100),
            "w": _name(world),
            "y": world.integer(1200, 2000),
        }
        said = (
            kind
            if index == 0 and there
            else rng.choice([k for k in kinds if not (index == 0 and kinds[k][1] == kinds[kind][1])])
        )
        if index == 0:
            asked, answer = (
                kinds[kind][0].format(**facts),
                kinds[kind][2].format(**facts) if there else "I do not know.",
            )
        lines.append(f"{place}: {kinds[said][1].format(**facts)}")
    rng.shuffle(lines)
    word = "built" if kind == "year" else kind
    call = usual("search").shown(Call("search", {"query": f"{names[0]} {word}"}))
    spec = usual("search").spec
    if rng.random() < 0.2:  # the passages stand in the question
        return [_user("\n".join((*lines, asked))), _assistant(answer)], []
    return [
        _user(asked),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "search", "content": "\n".join(lines)},
        _assistant(answer),
    ], [spec]


_CARDS: dict[str, tuple[str, ...]] = {
    "delivery": (
        "my parcel has not arrived, it should have come on {d}",
        "where is my order {n}?",
        "the courier never came on {d}",
    ),
    "refund": ("I was charged {n} crowns twice", "I want my money back for order {n}", "you took {n} crowns too much"),
    "password": ("I cannot log in", "I forgot my password", "the site does not accept my password"),
    "invoice": (
        "I need the bill for order {n} again",
        "please send me the invoice of {d}",
        "where do I find my invoice?",
    ),
    "cancel": ("I want to end my plan", "please cancel my subscription", "I do not want to be a customer any more"),
}
_IDLE = (
    "Customer: hello, this is {w}",
    "Customer: I have a question",
    "Agent: how can I help you?",
    "Customer: one moment please",
    "Customer: my parcel {n} has",
    "Customer: thank you, bye",
)


def cards(world: World) -> Conversation:
    """The pieces of a call, and which card each calls for."""
    rng = world.rng
    system = "You listen to a call and choose a card: delivery, refund, password, invoice, cancel, wait."
    messages: list[Message] = [{"role": "system", "content": system}]
    for _ in range(rng.randint(3, 8)):
        card = rng.choice((*_CARDS, "wait"))
        said = (
            rng.choice(_IDLE)
            if card == "wait"
            else rng.choice(("Customer: ", "Customer: and ", "")) + rng.choice(_CARDS[card])
        )
        said = said.format(d=rng.choice(_DAYS), n=world.integer(10, 10_000), w=_name(world))
        messages += [{"role": "tool", "content": said}, _assistant(card)]
    return messages, []


_CATEGORIES = (
    "tea",
    "mug",
    "lamp",
    "chess",
    "boots",
    "tent",
    "book",
    "pen",
    "bike",
    "hat",
    "radio",
    "rug",
    "vase",
    "drum",
    "ball",
    "kite",
    "soap",
    "scarf",
    "clock",
    "chair",
    "knife",
    "plant",
    "film",
    "game",
)


def next_item(world: World) -> Conversation:
    """A user's history and what comes next: an unseen item of a category liked lately."""
    rng = world.rng
    liked = rng.sample(_CATEGORIES, rng.randint(2, 4))
    count = rng.choice((6, 8, 12, 20, 40)) if rng.random() < 0.93 else rng.randint(60, 240)
    items: list[tuple[str, int]] = []
    for _ in range(count):
        late = [category for category, _ in items[-4:] if category in liked]
        category = rng.choice(late) if late and rng.random() < 0.5 else rng.choice(liked)
        if rng.random() < 0.1:
            category = rng.choice(_CATEGORIES)
        items.append((category, rng.randrange(1, 61)))
    recent = [category for category, _ in items[-4:] if category in liked] or liked
    category = max(recent, key=recent.count)
    number = rng.choice([n for n in range(1, 61) if (category, n) not in items] or [1])
    history = ", ".join(f"{category}-{number}" for category, number in items)
    return [_user(f"History: {history}. Next?"), _assistant(f"{category}-{number}")], []


def splitting(world: World) -> Conversation:
    """A request split into its questions; then the answers put together."""
    rng = world.rng
    count = rng.randint(2, 4)
    questions = [_short(world).question for _ in range(count)]
    if rng.random() < 0.4:
        request = " ".join(questions)
        parts = questions
    else:
        stripped = [question.rstrip("?.") for question in questions]
        small = [stripped[0], *(text[0].lower() + text[1:] for text in stripped[1:])]
        request = f"{', '.join(small[:-1])}, and {small[-1]}?"
        parts = [f"{text}{question[-1]}" for text, question in zip(stripped, questions, strict=True)]
    lines = "\n".join(f"{i}. {part}" for i, part in enumerate(parts, 1))
    messages: list[Message] = [_user(f"Split this into separate questions: {request}"), _assistant(lines)]
    if rng.random() < 0.5:
        answers = [f"The answer is {_value(world)}." for _ in parts]
        told = "\n".join(f"{i}. {answer}" for i, answer in enumerate(answers, 1))
        messages += [{"role": "tool", "content": told}, _assistant(" ".join(answers))]
    return messages, []


def _value(world: World) -> str:
    kind = world.rng.random()
    if kind < 0.25:
        return world.word()
    number = str(world.integer(10, 100_000))
    return number if kind < 0.65 else f"{number}.{world.rng.randrange(1, 1000)}"


def _short(world: World) -> Task:
    while True:
        task = world.rng.choice((arithmetic, arithmetic, fact, units))(world)
        if task.question[-1] in "?." and len(task.question) < 60:
            return task


def react(world: World) -> Conversation:
    """Thought, action and observation as text; the observation is the program's."""
    rng = world.rng
    system = (
        "Answer with lines of Thought, Action and Observation. "
        "Actions: calculator[expression], lookup[name, what], answer[text]."
    )
    task = rng.choice((arithmetic, arithmetic, fact, compare_facts, fact_times))(world)
    teacher = task.solve()
    calls, text, value = next(teacher), "", ""
    while True:
        results = []
        for call in calls:
            told = ", ".join(str(argument) for argument in call.arguments.values())
            need = told if call.tool == "calculator" else "the {1} of {0}".format(*call.arguments.values())
            value = world.run(call)
            results.append(value)
            text += f"Thought: I need {need}.\nAction: {call.tool}[{told}]\n"
            text += f"{UNLEARNED[0]}Observation: {value}\n{UNLEARNED[1]}"
        try:
            calls = teacher.send(results)
        except StopIteration:
            break
    value = " and ".join(results)
    text += f"Thought: I know the answer.\nAction: answer[{value}]"
    return [{"role": "system", "content": system}, _user(task.question), _assistant(text)], []


def refund(world: World) -> Conversation:
    """A sum, then a person asked to agree."""
    rng = world.rng
    n, things, price, name = world.integer(2, 100), _things(world), world.integer(2, 1000), _name(world)
    expression = f"{n} * {price}"
    total = world.run(Call("calculator", {"expression": expression}))
    agreed = rng.random() < 0.5
    reason = rng.choice(("too much", "the goods were used", "after the deadline", "ask the shop", "no receipt"))
    offers = [usual("calculator"), usual("ask_person")]
    rng.shuffle(offers)
    by_tool = {offer.tool: offer for offer in offers}
    calls = (
        Call("calculator", {"expression": expression}),
        Call("ask_person", {"question": f"Refund {total} to {name}?"}),
    )
    results = (total, "yes" if agreed else f"no: {reason}")
    messages: list[Message] = [_user(f"Refund {n} {things} at {price} each to {name}.")]
    for call, result in zip(calls, results, strict=True):
        messages.append({"role": "assistant", "content": "", "tool_calls": [by_tool[call.tool].shown(call)]})
        messages.append({"role": "tool", "name": call.tool, "content": result})
    messages.append(_assistant(f"Refunded {total} to {name}." if agreed else f"Not refunded: {reason}."))
    return messages, [offer.spec for offer in offers]


def listing(world: World) -> Conversation:
    """Many words to write down as they are, each of one or two pieces."""
    rng = world.rng
    words = [world.piecewise(rng.choice((1, 2, 2))) for _ in range(rng.randint(10, 60))]
    if rng.random() < 0.3:
        return [_user(f"Repeat: {', '.join(words)}"), _assistant(", ".join(words))], []
    return [_user(f"As a JSON list: {', '.join(words)}"), _assistant(json.dumps(words))], []


CHORES: tuple[tuple[Callable[[World], Conversation], float], ...] = (
    (extraction, 2.0),
    (passages, 2.0),
    (cards, 1.0),
    (next_item, 1.0),
    (splitting, 2.5),
    (react, 3.0),
    (refund, 1.0),
)
