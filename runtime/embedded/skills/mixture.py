"""The skills by name, and held-out tasks of each for the evaluation."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from caesura.runtime.embedded.skills.adventures import adventure
from caesura.runtime.embedded.skills.offers import Offer, toolset, usual
from caesura.runtime.embedded.skills.services import choice, unanswerable
from caesura.runtime.embedded.skills.several import HOPS, at_once
from caesura.runtime.embedded.skills.single import arithmetic, calendar, fact, notes, units
from caesura.runtime.embedded.skills.task import Call, Task, Teacher, careful
from caesura.runtime.embedded.skills.world import World
from caesura.runtime.embedded.tasks import Split


@dataclass(frozen=True, slots=True)
class Exam:
    """A held-out task: the question, the tools on offer, the world they act on, and the answer to be found."""

    skill: str
    task: Task
    offers: tuple[Offer, ...]
    world: World
    answer: str
    notes: Mapping[str, str]  # as the teacher leaves them

    def right(self, text: str) -> bool:
        """Whether a final answer is right and the world is as it should be."""
        found = self.world.notebook.notes
        noted = all(found.get(key) == self.notes.get(key) for key in self.task.writes)
        return text.strip() == self.answer and noted and self.task.solved()


@dataclass(frozen=True, slots=True)
class Skill:
    """How tasks of one skill are drawn, and what is special about their world and tools."""

    make: Callable[[World], Task]
    share: float  # of the training conversations that are about tools
    odd_share: float = 0.0
    fault_share: float = 0.0
    distractors: tuple[int, ...] = (0, 1, 2, 3)


def hop(world: World) -> Task:
    """A task of several calls that build on each other, across tools."""
    return world.rng.choice(HOPS)(world)


def any_single(world: World) -> Task:
    """A task of one tool whose result can be anything."""
    return world.rng.choice((arithmetic, fact, calendar, units, hop))(world)


def misspelled(world: World) -> Task:
    """A question with a word that the tool knows in another spelling, or calls that fail."""
    task = world.rng.choice((arithmetic, fact, fact, calendar, units, units, hop))(world)
    return task if world.rng.random() < 0.4 else misspell(world, task)


SKILLS: dict[str, Skill] = {
    "calculator": Skill(arithmetic, 12),
    "lookup": Skill(fact, 6),
    "calendar": Skill(calendar, 6),
    "units": Skill(units, 7),
    "notebook": Skill(notes, 12),
    "choice": Skill(choice, 18, distractors=(3, 4, 5, 6, 7)),
    "no_tool": Skill(lambda world: unanswerable(world)[0], 9, distractors=(1, 2, 3, 4)),
    "multi_hop": Skill(hop, 16),
    "parallel": Skill(at_once, 24),
    "surprise": Skill(any_single, 4, odd_share=1.0),
    "recovery": Skill(misspelled, 8, fault_share=0.4),
    "adventure": Skill(adventure, 23, distractors=(0,)),
}


def misspell(world: World, task: Task) -> Task:
    """The task with one letter of a name or key wrong: the first call fails, and the error knows the right word."""
    known = [*world.encyclopedia.entries, *world.notebook.notes]
    names = [name for name in known if len(name) >= 6 and name in task.question]
    if not names:
        return task
    name = max(names, key=len)
    at = world.rng.randrange(1, len(name))
    letter = world.rng.choice("bdfglmnprstaeiou")
    wrong = name[:at] + letter + name[at + world.rng.choice((0, 1)) :]
    if wrong == name or wrong in known or not world.may_say(wrong):
        return task

    def solve() -> Teacher:
        teacher = task.solve()
        calls = next(teacher)
        while True:
            arguments = [{k: wrong if v == name else v for k, v in call.arguments.items()} for call in calls]
            results = yield [Call(call.tool, given) for call, given in zip(calls, arguments, strict=True)]
            try:
                calls = teacher.send(results)
            except StopIteration as stop:
                return str(stop.value)

    return replace(task, question=task.question.replace(name, wrong), solve=solve)


def held_out_task(seed: int, number: int, skill: str) -> Exam:
    """One task of the evaluation. The same arguments give the same task, in a world as new."""
    world = _world(seed, number, skill)
    offers, task = _drawn(world, skill)
    twin = _world(seed, number, skill)
    _, rehearsed = _drawn(twin, skill)
    answer = run(careful(rehearsed.solve()), twin)
    return Exam(skill, task, tuple(offers), world, answer, twin.notebook.notes)


def run(teacher: Teacher, world: World) -> str:
    """Let a teacher solve its task in a world; its answer."""
    try:
        calls = next(teacher)
        while True:
            calls = teacher.send([world.run(call) for call in calls])
    except StopIteration as stop:
        return str(stop.value)


def _world(seed: int, number: int, skill: str) -> World:
    what = SKILLS[skill]
    return World(
        f"exam/{seed}/{skill}/{number}", Split.HELD_OUT, odd_share=what.odd_share, fault_share=what.fault_share
    )


def _drawn(world: World, skill: str) -> tuple[list[Offer], Task]:
    what = SKILLS[skill]
    without: tuple[str, ...] = ()
    if skill == "no_tool":
        task, without = unanswerable(world)
    else:
        task = what.make(world)
    rng = random.Random(f"{world.seed}/offers")
    if skill == "adventure":
        return [usual("act")], task
    return toolset(task.needs, rng, Split.HELD_OUT, distractors=rng.choice(what.distractors), without=without), task
