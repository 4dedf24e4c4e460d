"""A text adventure: find a treasure behind locked doors and bring it home. One command a step, one line to read.

An observation says all that a player needs to remember: where it is, which exits nobody has taken yet, what lies
here, what it carries, and the way to known places: home, the nearest untried exit, a locked door whose key it has.

    Taken. Cellar. Exits: north new, south, east locked (brass key). Here: lamp. You have: brass key. Ways: hall
    south, new south, door east.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_STEPS = 30
MAX_CARRIED = 3
_MOVES = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
_BACK = {"north": "south", "south": "north", "east": "west", "west": "east"}

ROOMS = (
    "hall", "cellar", "kitchen", "attic", "library", "stable", "garden", "chapel", "tower", "workshop", "pantry",
    "gallery", "laundry", "bedroom", "armory", "study",
)  # fmt: skip
TREASURES = ("crown", "ruby", "harp", "sword", "mirror", "goblet", "ring", "scroll", "pearl", "mask")
METALS = ("brass", "iron", "silver", "copper", "golden", "bronze", "tin", "steel")
DECOYS = ("lamp", "rope", "bucket", "shovel", "candle", "basket", "ladder", "blanket", "kettle", "broom")


@dataclass(frozen=True, slots=True)
class Words:
    """What things are called in an adventure."""

    rooms: Sequence[str] = ROOMS
    treasures: Sequence[str] = TREASURES
    metals: Sequence[str] = METALS
    decoys: Sequence[str] = DECOYS


@dataclass(slots=True)
class _Room:
    name: str
    exits: dict[str, int] = field(default_factory=dict)  # direction -> index of the room there
    locks: dict[str, str] = field(default_factory=dict)  # direction -> the key that opens it
    items: list[str] = field(default_factory=list)


class Adventure:
    """One game, drawn from a seed; ``act`` is the tool. The same seed and words give the same game."""

    def __init__(self, seed: int | str, *, rooms: int = 6, locks: int = 1, words: Words | None = None) -> None:
        rng = random.Random(f"adventure/{seed}")
        words = words or Words()
        names = rng.sample(list(words.rooms), rooms)
        self.treasure = rng.choice(list(words.treasures))
        self._rooms = _map(rng, names)
        self._place(rng, words, locks)
        self.home = names[0]
        self.steps = 0
        self.solved = False
        self._at = 0
        self._seen = {0}
        self._carried: list[str] = []

    @property
    def goal(self) -> str:
        """What is to be done."""
        return f"bring the {self.treasure} to the {self.home}"

    @property
    def done(self) -> bool:
        """Whether the game has ended, solved or not."""
        return self.solved or self.steps >= MAX_STEPS

    def act(self, command: str) -> str:
        """Act in the adventure."""
        if self.done:
            return "The adventure is over."
        self.steps += 1
        verb, _, what = command.strip().lower().partition(" ")
        told = {"go": self._go, "take": self._take, "drop": self._drop, "unlock": self._unlock}.get(verb, _refuse)(what)
        if self.solved:
            return "You have done it."
        return "You are out of time." if self.done else f"{told}{self.observe()}"

    def observe(self) -> str:
        """What there is to see now, and the known ways."""
        room = self._rooms[self._at]
        exits = ", ".join(self._exit_text(room, direction) for direction in room.exits)
        ways = ", ".join(f"{name} {direction}" for name, direction in self._ways().items())
        return (
            f"{room.name.capitalize()}. Exits: {exits}. Here: {', '.join(room.items) or 'nothing'}. "
            f"You have: {', '.join(self._carried) or 'nothing'}. Ways: {ways or 'none'}."
        )

    # -- commands --------------------------------------------------------------------------------------------

    def _go(self, direction: str) -> str:
        room = self._rooms[self._at]
        if direction not in room.exits or direction in room.locks:
            return "You cannot. "
        self._at = room.exits[direction]
        self._seen.add(self._at)
        return ""

    def _take(self, item: str) -> str:
        room = self._rooms[self._at]
        if item not in room.items or len(self._carried) >= MAX_CARRIED:
            return "You cannot. "
        room.items.remove(item)
        self._carried.append(item)
        return "Taken. "

    def _drop(self, item: str) -> str:
        if item not in self._carried:
            return "You cannot. "
        self._carried.remove(item)
        self._rooms[self._at].items.append(item)
        self.solved = item == self.treasure and self._at == 0
        return "Dropped. "

    def _unlock(self, direction: str) -> str:
        room = self._rooms[self._at]
        key = room.locks.get(direction)
        if key is None or key not in self._carried:
            return "You cannot. "
        self._carried.remove(key)  # it stays in the lock
        del room.locks[direction]
        return "Unlocked. "

    # -- what is known ---------------------------------------------------------------------------------------

    def _exit_text(self, room: _Room, direction: str) -> str:
        if direction in room.locks:
            return f"{direction} locked ({room.locks[direction]})"
        return f"{direction} new" if room.exits[direction] not in self._seen else direction

    def _ways(self) -> dict[str, str]:
        """First step towards home, the nearest other room with an untried exit, and the nearest other room with a
        locked door whose key is carried."""
        ways: dict[str, str] = {}
        queue = deque([(self._at, "")])
        visited = {self._at}
        while queue:
            at, first = queue.popleft()
            room = self._rooms[at]
            if first:
                if at == 0:
                    ways[self.home] = first
                if any(there not in self._seen and d not in room.locks for d, there in room.exits.items()):
                    ways.setdefault("new", first)
                if any(key in self._carried for key in room.locks.values()):
                    ways.setdefault("door", first)
            for direction, there in room.exits.items():
                if direction not in room.locks and there in self._seen and there not in visited:
                    visited.add(there)
                    queue.append((there, first or direction))
        return {name: ways[name] for name in (self.home, "new", "door") if name in ways}

    # -- making the world ------------------------------------------------------------------------------------

    def _place(self, rng: random.Random, words: Words, locks: int) -> None:
        """Put the treasure far from home, locks on the way to it, keys before their locks, and things of no use."""
        paths = _paths(self._rooms)
        goal = max(range(len(self._rooms)), key=lambda index: (len(paths[index]), index))
        self._rooms[goal].items.append(self.treasure)
        doors = sorted(rng.sample(range(len(paths[goal])), min(locks, len(paths[goal]))))
        metals = rng.sample(list(words.metals), len(doors))
        for door, metal in zip(doors, metals, strict=True):
            at, direction = paths[goal][door]
            self._rooms[at].locks[direction] = f"{metal} key"
            before = [i for i, path in enumerate(paths) if (at, direction) not in path]
            rng.choice([self._rooms[i] for i in before]).items.append(f"{metal} key")
        for decoy in rng.sample(list(words.decoys), 2):
            rng.choice(self._rooms).items.append(decoy)
        for room in self._rooms:
            rng.shuffle(room.items)


def _refuse(what: str) -> str:
    return "You cannot. "


def _map(rng: random.Random, names: Sequence[str]) -> list[_Room]:
    """Rooms on a grid, joined as a tree: each new one leads off an older one."""
    rooms, places = [_Room(names[0])], {(0, 0): 0}
    while len(rooms) < len(names):
        (x, y), index = rng.choice(list(places.items()))
        direction, (dx, dy) = rng.choice(list(_MOVES.items()))
        if (x + dx, y + dy) in places or len(rooms[index].exits) >= 3:
            continue
        places[x + dx, y + dy] = len(rooms)
        rooms[index].exits[direction] = len(rooms)
        rooms.append(_Room(names[len(rooms)], {_BACK[direction]: index}))
    for room in rooms:
        room.exits = {direction: room.exits[direction] for direction in _MOVES if direction in room.exits}
    return rooms


def _paths(rooms: Sequence[_Room]) -> list[list[tuple[int, str]]]:
    """For each room, the steps from home as (room, direction)."""
    paths: dict[int, list[tuple[int, str]]] = {0: []}
    queue = deque([0])
    while queue:
        at = queue.popleft()
        for direction, there in rooms[at].exits.items():
            if there not in paths:
                paths[there] = [*paths[at], (at, direction)]
                queue.append(there)
    return [paths[index] for index in range(len(rooms))]
