"""The text adventure as a task, and how to play it: everything to decide on stands in the last observation."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from caesura.runtime.embedded.skills.chores import UNLEARNED
from caesura.runtime.embedded.skills.task import Call, Task, Teacher
from caesura.runtime.embedded.skills.world import World
from caesura.runtime.embedded.tasks import Split
from caesura.runtime.embedded.tools import Adventure
from caesura.runtime.embedded.tools.adventure import DECOYS, MAX_STEPS, METALS, ROOMS, TREASURES, Words

STEPS = range(10, 23)
MADE_UP_SHARE = 0.75  # of the words in training: with 0.3, words never seen before were copied badly
PIECEWISE_SHARE = 0.7  # of those: a key is known again by its first token, and syllables begin with few
MISTAKE_SHARE = 0.3  # of the commands where one can be refused
RESERVED = {"nothing", "none", "new", "door", "key", "locked", "north", "south", "east", "west"}
SIZES = ((5, 1), (6, 1), (7, 1), (6, 2), (7, 2))  # rooms, locked doors
SIZES_OF = {Split.TRAIN: SIZES[:3] + 4 * SIZES[3:], Split.HELD_OUT: SIZES}  # keys that do not fit are hard to learn
HELD_OUT = Words(
    rooms=("vault", "bakery", "cabin", "porch", "dungeon", "terrace", "crypt", "nursery", "shed", "parlor", "barn"),
    treasures=("diamond", "violin", "amulet", "statue", "chalice", "medal"),
    metals=("nickel", "zinc", "pewter", "cobalt"),
    decoys=("pillow", "hammer", "teapot", "carpet", "saddle", "anchor"),
)
_SEEN = re.compile(r"(\w+)\. Exits: ([^.]*)\. Here: ([^.]*)\. You have: ([^.]*)\. Ways: ([^.]*)\.")
_GOAL = re.compile(r"bring the (\w+) to the (\w+)")
_LOCKED = re.compile(r"(\w+) locked \((.*)\)")
_ITEM = re.compile(r"[^, ][^,]*")
Span = tuple[int, int]  # of a text, as positions of characters


def adventure(world: World, *, begun: bool = False, hard: bool = False, mistakes: bool = False) -> Task:
    """A game of 10 to 22 steps when it is played well; ``begun`` starts it somewhere on the way. In a ``hard`` one the
    treasure is to be told from something that lies beside it. ``mistakes`` are made on the way and not learned, so that
    the model learns to go on from its own."""
    while True:
        rooms, locks = world.rng.choice(SIZES_OF[world.split])
        seed, words = f"{world.seed}/{world.rng.random()}", _words(world)
        rehearsal = Adventure(seed, rooms=rooms, locks=locks, words=words)
        among = _rehearse(rehearsal)
        if rehearsal.steps in STEPS and (among or not hard):
            break
    game = Adventure(seed, rooms=rooms, locks=locks, words=words)
    if begun:
        _rehearse(game, world.rng.randrange(rehearsal.steps - 3))
    world.extra["act"] = lambda command: game.act(command.strip("".join(UNLEARNED)))
    question = f"Play the adventure: {game.goal}.\n{game.observe()}"
    first, treasure, home = game.observe(), game.treasure, game.home
    chance = random.Random(f"{seed}/mistakes") if mistakes else None
    return Task(question, ("act",), lambda: _play(first, treasure, home, chance), lambda: game.solved)


def command_for(observation: str, treasure: str, home: str) -> str:
    """The next command: carry the treasure home, else take it, else keys, open doors, and go where nobody was."""
    match = _SEEN.search(observation)
    if match is None:
        raise ValueError(f"not an observation: {observation!r}")
    return _Seen(match).decide(treasure, home)[0]


class _Seen:
    """An observation: its lists, and where in the text each thing stands."""

    def __init__(self, match: re.Match[str]) -> None:
        self.room = match[1].lower()
        self.exits, self.here, self.have, leads = (_items(match, group) for group in (2, 3, 4, 5))
        parts = ((lead.rpartition(" "), end) for lead, (_, end) in leads.items())
        self.ways = {name: (way, (end - len(way), end)) for (name, _, way), end in parts}

    def decide(self, treasure: str, home: str) -> tuple[str, Span]:
        """The next command, and what it follows from."""
        if treasure in self.have:
            if self.room == home:
                return f"drop {treasure}", self.have[treasure]
            return f"go {self.ways[home][0]}", self.ways[home][1]
        for item in sorted(self.here, key=lambda item: item != treasure):
            if item == treasure or item.endswith(" key"):
                return f"take {item}", self.here[item]
        for exit_, span in self.exits.items():
            locked = _LOCKED.match(exit_)
            if locked and locked[2] in self.have:
                return f"unlock {locked[1]}", span
        for exit_, span in self.exits.items():
            if exit_.endswith(" new"):
                return f"go {exit_.split()[0]}", span
        way, span = self.ways.get("new") or self.ways["door"]
        return f"go {way}", span


def _items(match: re.Match[str], group: int) -> dict[str, Span]:
    """The things of a list, and where they stand."""
    start = match.start(group)
    return {item[0]: (start + item.start(), start + item.end()) for item in _ITEM.finditer(match[group])}


def _play(observation: str, treasure: str, home: str, chance: random.Random | None = None) -> Teacher:
    while observation.endswith("."):
        if observation == "You have done it.":
            return f"Done: the {treasure} is in the {home}."
        if observation == "You are out of time.":
            break
        command = command_for(observation, treasure, home)
        refused = _refused(observation)
        if refused and chance and chance.random() < MISTAKE_SHARE:
            command = chance.choice(refused).join(UNLEARNED)
        (observation,) = yield [Call("act", {"command": command})]
    return "I have failed."


def _refused(observation: str) -> list[str]:
    """Commands that will be refused: to unlock what no key is there for."""
    match = _SEEN.search(observation)
    if match is None:
        return []
    seen = _Seen(match)
    locks = [locked for exit_ in seen.exits if (locked := _LOCKED.match(exit_))]
    return [f"unlock {locked[1]}" for locked in locks if locked[2] not in seen.have]


@dataclass(frozen=True, slots=True)
class Move:
    """A command in a conversation's text, and what it follows from there: spans of characters."""

    command: Span
    thing: Span  # in the command
    reason: Span
    known: tuple[Span, ...]  # what the adventure is about, and what is carried
    things: tuple[Span, ...]  # on all lists of the observation; of a way, its direction


def moves(text: str) -> Iterator[Move]:
    """The commands in a conversation that are those of `command_for`."""
    goal = _GOAL.search(text)
    if goal is None:
        return
    for match in _SEEN.finditer(text, goal.end()):
        seen = _Seen(match)
        command, reason = seen.decide(*goal.groups())
        start = text.find(f'"{command}"', match.end()) + 1
        if start == 0 or _SEEN.search(text, match.end(), start):
            continue
        end, have = start + len(command), seen.have.values()
        things = (*seen.exits.values(), *seen.here.values(), *have, *(span for _, span in seen.ways.values()))
        known = (goal.span(1), goal.span(2), *have)
        yield Move((start, end), (start + command.index(" ") + 1, end), reason, known, things)


def _rehearse(game: Adventure, steps: int = MAX_STEPS) -> bool:
    """Play well; whether the treasure was taken from among other things."""
    observation, among = game.observe(), False
    while not game.done and game.steps < steps:
        command = command_for(observation, game.treasure, game.home)
        among |= command == f"take {game.treasure}" and f"Here: {game.treasure}." not in observation
        observation = game.act(command)
    return among


def _words(world: World) -> Words:
    if world.split is Split.HELD_OUT:
        return HELD_OUT

    def mixed(known: Sequence[str]) -> tuple[str, ...]:
        """Known words, some replaced by invented ones, so that words are read and not known."""
        drawn = (made() if world.rng.random() < MADE_UP_SHARE else word for word in known)
        return tuple(dict.fromkeys(word for word in drawn if word not in RESERVED))

    def made() -> str:
        if world.pieces and world.rng.random() < PIECEWISE_SHARE:
            return world.piecewise(world.rng.choice((2, 2, 3))).lower()
        return world.word(world.rng.choice((1, 2))).lower()

    return Words(mixed(ROOMS), mixed(TREASURES), mixed(METALS), mixed(DECOYS))
