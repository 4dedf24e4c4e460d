"""The tools the embedded model is trained on: right values, errors that say how to go on, a game that can be won."""

from __future__ import annotations

import random
import re
from datetime import date

import pytest
from caesura.runtime.embedded.skills.adventures import command_for
from caesura.runtime.embedded.tools import (
    Adventure,
    Encyclopedia,
    Notebook,
    ToolFault,
    add_days,
    convert,
    days_between,
    weekday,
)
from caesura.runtime.embedded.tools.adventure import MAX_CARRIED, MAX_STEPS


def test_dates() -> None:
    assert weekday("2031-04-17") == "Thursday"
    assert add_days("2024-02-28", 2) == "2024-03-01"
    assert add_days("2024-03-01", -2) == "2024-02-28"
    assert days_between("2031-04-17", "2031-06-01") == "45"
    assert days_between("2031-06-01", "2031-04-17") == "-45"
    rng = random.Random(1)
    for _ in range(200):
        start, days = date.fromordinal(rng.randrange(1, 3_000_000)), rng.randrange(-700, 700)
        end = add_days(start.isoformat(), days) if start.toordinal() + days >= 1 else start.isoformat()
        assert days_between(start.isoformat(), end) in (str(days), "0")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weekday("17 April 2031"), "write an existing day as YYYY-MM-DD"),
        (lambda: weekday("2023-02-29"), "write an existing day"),
        (lambda: days_between("2023-01-01", "soon"), 'end is "soon"'),
        (lambda: add_days("9999-12-31", 1), "leaves the years"),
        (lambda: convert(1, "kilometers", "m"), 'unknown unit "kilometers"; use "km"'),
        (lambda: convert(1, "parsec", "m"), 'unknown unit "parsec"; there are km'),
        (lambda: convert(1, "kg", "m"), "kg is mass and m is length"),
        (lambda: convert(float("nan"), "kg", "g"), "give a finite number"),
        (lambda: Notebook({"shopping": "x"}).get_note("shoping"), 'no note "shoping"; did you mean "shopping"?'),
        (lambda: Notebook().get_note("x"), 'no note "x"$'),
        (lambda: Notebook().put_note("", "x"), "needs a key"),
    ],
)
def test_tools_say_what_is_wrong(call, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ToolFault, match=re.escape(message).replace(r"\$", "$")):
        call()


@pytest.mark.parametrize(
    ("value", "source", "target", "result"),
    [
        (12.5, "km", "mi", "7.76714"),
        (3, "km", "m", "3000"),
        (98.6, "F", "C", "37"),
        (-40, "C", "F", "-40"),
        (0, "C", "K", "273.15"),
        (3, "ml", "gal", "0.000792516"),
        (0, "kg", "g", "0"),
        (1, "d", "s", "86400"),
        (5, "lb", "kg", "2.26796"),
    ],
)
def test_conversions(value: float, source: str, target: str, result: str) -> None:
    assert convert(value, source, target) == result


def test_notebook_keeps_the_order_of_first_writing() -> None:
    book = Notebook()
    assert book.list_notes() == "none"
    assert book.put_note("rent", "950") == "saved"
    book.put_note("milk", "two")
    book.put_note("rent", "980")
    assert book.list_notes() == "rent, milk"
    assert book.get_note("rent") == "980"


def test_encyclopedia_is_drawn_from_its_seed_and_refers_to_itself() -> None:
    book = Encyclopedia(5)
    assert book.entries == Encyclopedia(5).entries
    assert book.entries.keys().isdisjoint(Encyclopedia(6).entries)
    for name in book.people:
        assert book.lookup(name, "birthplace") in book.towns
        assert book.lookup(name, "teacher") in set(book.people) - {name}
    for name in book.towns:
        assert book.lookup(name, "river") in book.rivers
        assert book.lookup(name, "mayor") in book.people
    assert all(book.lookup(name, "mouth") in book.towns for name in book.rivers)


def test_encyclopedia_knows_near_names_and_its_fields() -> None:
    book = Encyclopedia(5)
    name = max(book.people, key=len)
    with pytest.raises(ToolFault, match=f'no entry "{name}x"; did you mean "{name}"'):
        book.lookup(f"{name}x", "job")
    with pytest.raises(ToolFault, match="has no mayor; it has birthplace, birth_year, job, teacher"):
        book.lookup(name, "mayor")
    with pytest.raises(ToolFault, match=r'no entry "12345"$'):
        book.lookup("12345", "job")


@pytest.mark.parametrize(("rooms", "locks"), [(5, 1), (6, 1), (7, 2), (9, 3)])
def test_adventures_can_be_won_by_reading(rooms: int, locks: int) -> None:
    for seed in range(60):
        game = Adventure(seed, rooms=rooms, locks=locks)
        observation = game.observe()
        while not game.done:
            observation = game.act(command_for(observation, game.treasure, game.home))
        if rooms < 9:
            assert game.solved, seed
        assert not game.solved or observation == "You have done it."


def test_adventures_are_not_won_by_chance() -> None:
    rng, won = random.Random(1), 0
    for seed in range(200):
        game = Adventure(seed, rooms=6, locks=1)
        observation = game.observe()
        while not game.done:
            observation = game.act(rng.choice(sensible_commands(observation)))
        won += game.solved
    assert won <= 10


def sensible_commands(observation: str) -> list[str]:
    """Every command that does something."""
    match = re.search(r"Exits: (.*?)\. Here: (.*?)\. You have: (.*?)\. Ways", observation)
    assert match is not None
    exits, here, have = (part.split(", ") for part in match.groups())
    commands = [f"{'unlock' if 'locked' in way else 'go'} {way.split()[0]}" for way in exits]
    commands += [f"take {item}" for item in here if item != "nothing"]
    return commands + [f"drop {item}" for item in have if item != "nothing"]


def test_adventure_refuses_what_cannot_be_done_and_ends() -> None:
    game = Adventure(3, rooms=7, locks=2)
    before = game.observe()
    for command in ("go up", "take moon", "drop moon", "unlock north", "dance", ""):
        assert game.act(command) == f"You cannot. {before}"
    assert game.steps == 6
    while not game.done:
        last = game.act("dance")
    assert (last, game.steps, game.solved) == ("You are out of time.", MAX_STEPS, False)
    assert game.act("go north") == "The adventure is over."


def test_adventure_lets_nobody_carry_everything() -> None:
    game = Adventure(1)
    game._rooms[0].items[:] = [f"stone {number}" for number in range(MAX_CARRIED + 1)]
    told = [game.act(f"take stone {number}") for number in range(MAX_CARRIED + 1)]
    assert [text.split(".")[0] for text in told] == ["Taken"] * MAX_CARRIED + ["You cannot"]
