"""The text adventure as a task, and how to play it: everything to decide on stands in the last observation."""

from __future__ import annotations

import re
from collections.abc import Sequence

from caesura.runtime.embedded.skills.task import Call, Task, Teacher
from caesura.runtime.embedded.skills.world import World
from caesura.runtime.embedded.tasks import Split
from caesura.runtime.embedded.tools import Adventure
from caesura.runtime.embedded.tools.adventure import DECOYS, MAX_STEPS, METALS, ROOMS, TREASURES, Words

STEPS = range(10, 23)
MADE_UP_SHARE = 0.75  # of the words in training: with 0.3, words never seen before were copied badly
SIZES = ((5, 1), (6, 1), (7, 1), (6, 2), (7, 2))  # rooms, locked doors
SIZES_OF = {Split.TRAIN: SIZES[:3] + 4 * SIZES[3:], Split.HELD_OUT: SIZES}  # keys that do not fit are hard to learn
HELD_OUT = Words(
    rooms=("vault", "bakery", "cabin", "porch", "dungeon", "terrace", "crypt", "nursery", "shed", "parlor", "barn"),
    treasures=("diamond", "violin", "amulet", "statue", "chalice", "medal"),
    metals=("nickel", "zinc", "pewter", "cobalt"),
    decoys=("pillow", "hammer", "teapot", "carpet", "saddle", "anchor"),
)
_SEEN = re.compile(r"(\w+)\. Exits: (.*?)\. Here: (.*?)\. You have: (.*?)\. Ways: (.*?)\.$")
_LOCKED = re.compile(r"(\w+) locked \((.*)\)")


def adventure(world: World, *, begun: bool = False) -> Task:
    """A game of 10 to 22 steps when it is played well; ``begun`` starts it somewhere on the way."""
    while True:
        rooms, locks = world.rng.choice(SIZES_OF[world.split])
        seed, words = f"{world.seed}/{world.rng.random()}", _words(world)
        rehearsal = Adventure(seed, rooms=rooms, locks=locks, words=words)
        _rehearse(rehearsal)
        if rehearsal.steps in STEPS:
            break
    game = Adventure(seed, rooms=rooms, locks=locks, words=words)
    if begun:
        _rehearse(game, world.rng.randrange(rehearsal.steps - 3))
    world.extra["act"] = game.act
    question = f"Play the adventure: {game.goal}.\n{game.observe()}"
    first, treasure, home = game.observe(), game.treasure, game.home
    return Task(question, ("act",), lambda: _play(first, treasure, home), lambda: game.solved)


def command_for(observation: str, treasure: str, home: str) -> str:
    """The next command: carry the treasure home, else take it, else keys, open doors, and go where nobody was."""
    match = _SEEN.search(observation)
    if match is None:
        raise ValueError(f"not an observation: {observation!r}")
    room, exits, here, have = match[1].lower(), match[2].split(", "), match[3].split(", "), match[4].split(", ")
    ways = dict(way.rsplit(" ", 1) for way in match[5].split(", ") if " " in way)
    if treasure in have:
        return f"drop {treasure}" if room == home else f"go {ways[home]}"
    wanted = [item for item in here if item == treasure] + [item for item in here if item.endswith(" key")]
    if wanted:
        return f"take {wanted[0]}"
    for exit_ in exits:
        locked = _LOCKED.match(exit_)
        if locked and locked[2] in have:
            return f"unlock {locked[1]}"
    for exit_ in exits:
        if exit_.endswith(" new"):
            return f"go {exit_.split()[0]}"
    return f"go {ways.get('new') or ways['door']}"


def _play(observation: str, treasure: str, home: str) -> Teacher:
    while observation.endswith("."):
        if observation == "You have done it.":
            return f"Done: the {treasure} is in the {home}."
        if observation == "You are out of time.":
            break
        (observation,) = yield [Call("act", {"command": command_for(observation, treasure, home)})]
    return "I have failed."


def _rehearse(game: Adventure, steps: int = MAX_STEPS) -> None:
    observation = game.observe()
    while not game.done and game.steps < steps:
        observation = game.act(command_for(observation, game.treasure, game.home))


def _words(world: World) -> Words:
    if world.split is Split.HELD_OUT:
        return HELD_OUT

    def mixed(known: Sequence[str]) -> tuple[str, ...]:
        """Known words, some replaced by invented ones, so that words are read and not known."""
        made = (
            world.word(world.rng.choice((1, 2))).lower() if world.rng.random() < MADE_UP_SHARE else word
            for word in known
        )
        return tuple(dict.fromkeys(made))

    return Words(mixed(ROOMS), mixed(TREASURES), mixed(METALS), mixed(DECOYS))
