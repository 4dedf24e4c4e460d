"""Tasks of one tool: arithmetic, the encyclopedia, dates, units, notes."""

from __future__ import annotations

from collections.abc import Sequence

from caesura.runtime.embedded.chat import answer_text
from caesura.runtime.embedded.skills.task import Call, Task, Teacher
from caesura.runtime.embedded.skills.world import World
from caesura.runtime.embedded.tasks import Kind, TaskMaker
from caesura.runtime.embedded.tools.units import DIMENSIONS, WORDS

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)

# field -> questions about {name}
FACTS: dict[str, dict[str, tuple[str, ...]]] = {
    "people": {
        "birthplace": ("Where was {name} born?", "In which town was {name} born?", "What is the birthplace of {name}?"),
        "birth_year": ("When was {name} born?", "In which year was {name} born?", "What is the birth year of {name}?"),
        "job": ("What is the job of {name}?", "What does {name} do for a living?", "What did {name} work as?"),
        "teacher": ("Who taught {name}?", "Who was the teacher of {name}?", "Name the teacher of {name}."),
    },
    "towns": {
        "country": ("In which country is {name}?", "What country does {name} lie in?", "Where is {name}?"),
        "population": (
            "What is the population of {name}?",
            "How many people live in {name}?",
            "How many inhabitants does {name} have?",
        ),
        "river": ("Which river flows through {name}?", "On which river is {name}?", "What is the river of {name}?"),
        "founded": (
            "When was {name} founded?",
            "In which year was {name} founded?",
            "How old is the town charter of {name}?",
        ),
        "mayor": ("Who is the mayor of {name}?", "Name the mayor of {name}.", "Who governs {name}?"),
    },
    "rivers": {
        "length_km": (
            "How long is the {name} in km?",
            "What is the length of the river {name}?",
            "How long is the river {name}?",
        ),
        "source": (
            "Where does the {name} rise?",
            "What is the source of the {name}?",
            "Where does the river {name} begin?",
        ),
        "mouth": (
            "Where does the {name} end?",
            "What is the mouth of the {name}?",
            "In which town does the river {name} end?",
        ),
    },
}
KEYS = ("rent", "milk", "door code", "dentist", "train", "size", "password", "parking", "budget", "meeting", "birthday")


def one(call: Call) -> Teacher:
    """Make one call and answer with its result."""
    (value,) = yield [call]
    return answer_text([value])


def arithmetic(world: World, *kinds: Kind, small: bool = False) -> Task:
    """One or two steps, or two parallel ones. ``kinds`` limits the mixture, ``small`` the numbers to two digits."""
    task = TaskMaker(world.rng, world.split, kinds, small=small).make()

    def solve() -> Teacher:
        rounds = [task.steps] if task.kind is Kind.PARALLEL else [(step,) for step in task.steps]
        values: list[str] = []
        for steps in rounds:
            previous = values[0] if values else ""
            values = yield [Call("calculator", {"expression": step.expression(previous)}) for step in steps]
        return answer_text(values)

    return Task(task.question, ("calculator",), solve)


def fact(world: World) -> Task:
    """One field of one entry."""
    kind = world.rng.choice(("people", "towns", "rivers"))
    field = world.rng.choice(tuple(FACTS[kind]))
    name = entity(world, kind)
    question = world.rng.choice(FACTS[kind][field]).format(name=name)
    return Task(question, ("lookup",), lambda: one(Call("lookup", {"name": name, "field": field})))


def entity(world: World, kind: str) -> str:
    """The name of an entry of the encyclopedia."""
    names: Sequence[str] = getattr(world.encyclopedia, kind)
    return world.rng.choice(names)


def draw_date(world: World) -> str:
    """An ISO date of the world's split."""
    rng = world.rng
    return world.draw(lambda: f"{rng.randrange(1900, 2100)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}")


def written(world: World, date: str) -> str:
    """A date as people write it."""
    year, month, day = date.split("-")
    name = MONTHS[int(month) - 1]
    forms = (date, date, f"{int(day)} {name} {year}", f"{name} {int(day)}, {year}")
    return world.rng.choice(forms)


def calendar(world: World) -> Task:
    """A weekday, a date some days away, or the days between two dates."""
    rng, date = world.rng, draw_date(world)
    shown = written(world, date)
    kind = rng.choice(("weekday", "add_days", "days_between"))
    if kind == "weekday":
        question = rng.choice(
            (
                "What day of the week is {d}?",
                "Which day of the week is {d}?",
                "On which weekday does {d} fall?",
                "Tell me the weekday of {d}.",
            )
        )
        call = Call(kind, {"date": date})
        return Task(question.format(d=shown), (kind,), lambda: one(call))
    if kind == "add_days":
        days = world.integer(2, 400)
        after = rng.random() < 0.6
        question = rng.choice(
            (
                "Which date is {n} days {w} {d}?",
                "What is the date {n} days {w} {d}?",
                "What day comes {n} days {w} {d}?",
                "Give me the date {n} days {w} {d}.",
            )
        )
        call = Call(kind, {"date": date, "days": days if after else -days})
        return Task(question.format(n=days, w="after" if after else "before", d=shown), (kind,), lambda: one(call))
    end = draw_date(world)
    question = rng.choice(
        (
            "How many days are there from {a} to {b}?",
            "How many days lie between {a} and {b}?",
            "How many days pass from {a} to {b}?",
            "Count the days between {a} and {b}.",
        )
    )
    call = Call(kind, {"start": date, "end": end})
    return Task(question.format(a=shown, b=written(world, end)), (kind,), lambda: one(call))


def draw_value(world: World) -> float | int:
    """A number to convert."""
    rng = world.rng
    text = world.draw(
        lambda: rng.choice(
            (
                str(rng.randrange(2, 1000)),
                str(rng.randrange(2, 10000)),
                f"{rng.randrange(1, 200)}.{rng.randrange(1, 10)}",
            )
        )
    )
    return float(text) if "." in text else int(text)


_BY_SYMBOL = {symbol: word for word, symbol in WORDS.items()}


def units(world: World) -> Task:
    """A conversion; the units written as words or symbols."""
    rng = world.rng
    dimension = rng.choice(tuple(DIMENSIONS))
    source, target = rng.sample(DIMENSIONS[dimension], 2)
    value = draw_value(world)
    a, b = (_BY_SYMBOL[unit] if rng.random() < 0.6 else unit for unit in (source, target))
    question = rng.choice(
        (
            "What is {v} {a} in {b}?",
            "Convert {v} {a} to {b}.",
            "How much is {v} {a} in {b}?",
            "{v} {a} in {b}?",
            "Express {v} {a} in {b}.",
            "How many {b} are {v} {a}?",
        )
    )
    call = Call("convert", {"value": value, "from_unit": source, "to_unit": target})
    return Task(question.format(v=value, a=a, b=b), ("convert",), lambda: one(call))


def draw_key(world: World) -> str:
    """The key of a note."""
    rng = world.rng
    if world.split == "train" and rng.random() < 0.3:
        return rng.choice(KEYS)
    return " ".join(world.word(rng.choice((1, 2))).lower() for _ in range(rng.choice((1, 1, 2))))


def draw_note(world: World) -> str:
    """The value of a note."""
    rng = world.rng
    if rng.random() < 0.5:
        return str(world.integer(10, 100_000))
    return " ".join(world.word(rng.choice((1, 2))).lower() for _ in range(rng.choice((1, 1, 2, 3))))


def notes(world: World) -> Task:
    """Write, read or list notes; what the notebook holds is drawn beforehand."""
    rng, book = world.rng, world.notebook
    kind = rng.choice(("put_note", "put_note", "get_note", "get_note", "list_notes"))
    if kind == "put_note":
        key, value = draw_key(world), draw_note(world)
        question = rng.choice(
            (
                "Note that the {k} is {v}.",
                "Remember: {k} = {v}",
                "Save {v} as {k}.",
                "Write down {v} under {k}.",
                "Please note {k}: {v}",
                "Keep in mind that {k} is {v}.",
            )
        ).format(k=key, v=value)

        def put() -> Teacher:
            yield [Call("put_note", {"key": key, "value": value})]
            return "Noted."

        return Task(question, ("put_note",), put, writes=(key,))
    for _ in range(rng.randint(0 if kind == "list_notes" else 1, 3)):
        book.notes[draw_key(world)] = draw_note(world)
    if kind == "list_notes" or not book.notes:

        def show() -> Teacher:
            (keys,) = yield [Call("list_notes")]
            return f"Your notes: {keys}."

        asked = ("Which notes do I have?", "List my notes.", "What notes are there?", "Show me the names of my notes.")
        return Task(rng.choice(asked), ("list_notes",), show)
    key = rng.choice(tuple(book.notes))
    question = rng.choice(
        (
            "What did I note for {k}?",
            "Read me the note {k}.",
            "What is my note on {k}?",
            "What have I written under {k}?",
        )
    )
    return Task(question.format(k=key), ("get_note",), lambda: one(Call("get_note", {"key": key})))
