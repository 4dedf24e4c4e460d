"""A small encyclopedia of people, towns and rivers that do not exist, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from caesura.runtime.embedded.tools.fault import ToolFault, unknown

JOBS = (
    "baker", "painter", "pilot", "farmer", "teacher", "tailor", "miner", "sailor", "lawyer", "singer", "doctor",
    "gardener", "poet", "judge", "potter", "weaver",
)  # fmt: skip
_START = (*"bdfghklmnprstvz", "br", "dr", "gr", "st", "tr")
_VOWEL = (*"aeiou", "a", "e", "i", "o", "u", "ei", "au")
_END = ("", "", "", "l", "n", "r", "s", "m", "x", "nd")
_TOWN_ENDS = ("", "", "", "ford", "berg", "ham", "port")

Entry = Mapping[str, str]


def made_up_word(rng: random.Random, *, syllables: int) -> str:
    """A word that can be spoken, capitalised."""
    return "".join(rng.choice(_START) + rng.choice(_VOWEL) + rng.choice(_END) for _ in range(syllables)).capitalize()


class Encyclopedia:
    """People, towns and rivers that refer to each other; ``lookup`` is the tool.

    ``accepts`` says which invented names and which numbers may be used: training and evaluation share none.
    """

    def __init__(
        self, seed: int | str, *, people: int = 12, towns: int = 8, rivers: int = 4,
        accepts: Callable[[str], bool] = lambda text: True,
    ) -> None:  # fmt: skip
        rng = random.Random(f"encyclopedia/{seed}")
        taken: set[str] = set()

        def draw(make: Callable[[], str]) -> str:
            while True:
                name = make()
                if name not in taken and accepts(name):
                    taken.add(name)
                    return name

        def number(low: int, high: int) -> str:
            while True:
                text = str(rng.randrange(low, high))
                if accepts(text):
                    return text

        self.people = tuple(draw(lambda: _person(rng)) for _ in range(people))
        self.towns = tuple(draw(lambda: _town(rng)) for _ in range(towns))
        self.rivers = tuple(draw(lambda: made_up_word(rng, syllables=1)) for _ in range(rivers))
        countries = [draw(lambda: made_up_word(rng, syllables=2) + rng.choice(("ia", "land"))) for _ in range(3)]
        mountains = [f"Mount {draw(lambda: made_up_word(rng, syllables=1))}" for _ in range(3)]
        self.entries: dict[str, Entry] = {}
        for name in self.people:
            self.entries[name] = {
                "birthplace": rng.choice(self.towns),
                "birth_year": number(1600, 2000),
                "job": rng.choice(JOBS),
                "teacher": rng.choice([other for other in self.people if other != name]),
            }
        for name in self.towns:
            self.entries[name] = {
                "country": rng.choice(countries),
                "population": number(10 ** rng.randint(2, 5), 10**6),
                "river": rng.choice(self.rivers),
                "founded": number(800, 1900),
                "mayor": rng.choice(self.people),
            }
        for name in self.rivers:
            self.entries[name] = {
                "length_km": number(20, 4000),
                "source": rng.choice(mountains),
                "mouth": rng.choice(self.towns),
            }

    def lookup(self, name: str, field: str) -> str:
        """Look a field of an entry up in the encyclopedia."""
        entry = self.entries.get(name)
        if entry is None:
            raise unknown("entry", name, self.entries)
        if field not in entry:
            raise ToolFault(f"{name} has no {field}; it has {', '.join(entry)}")
        return entry[field]


def _person(rng: random.Random) -> str:
    return f"{made_up_word(rng, syllables=rng.choice((1, 2, 2)))} {made_up_word(rng, syllables=rng.choice((1, 2)))}"


def _town(rng: random.Random) -> str:
    return made_up_word(rng, syllables=rng.choice((1, 2, 2))) + rng.choice(_TOWN_ENDS)
