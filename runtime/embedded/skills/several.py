"""Tasks of several calls: one's result is another's argument, or several at once, across tools."""

from __future__ import annotations

from collections.abc import Callable

from caesura.runtime.embedded.chat import answer_text
from caesura.runtime.embedded.skills.single import (
    FACTS,
    arithmetic,
    calendar,
    draw_date,
    draw_key,
    entity,
    fact,
    units,
    written,
)
from caesura.runtime.embedded.skills.task import Call, Task, Teacher
from caesura.runtime.embedded.skills.world import World


def _lookup(name: str, field: str) -> Call:
    return Call("lookup", {"name": name, "field": field})


def _sum(expression: str) -> Call:
    return Call("calculator", {"expression": expression})


def two_facts(world: World) -> Task:
    """A field of the entry that another entry's field names."""
    rng = world.rng
    kind, via, fields = rng.choice(
        (
            (
                "people",
                ("birthplace", "town where {n} was born"),
                ("population", "country", "river", "founded", "mayor"),
            ),
            ("people", ("teacher", "teacher of {n}"), ("birthplace", "birth_year", "job", "teacher")),
            ("towns", ("mayor", "mayor of {n}"), ("birthplace", "birth_year", "job", "teacher")),
            ("towns", ("river", "river of {n}"), ("length_km", "source", "mouth")),
        )
    )
    name, field = entity(world, kind), rng.choice(fields)
    there = via[1].format(n=name)
    question = {
        "population": ("How many people live in the {t}?", "What is the population of the {t}?"),
        "country": ("In which country is the {t}?", "What is the country of the {t}?"),
        "river": ("Which river flows through the {t}?", "What is the river of the {t}?"),
        "founded": ("When was the {t} founded?", "In which year was the {t} founded?"),
        "mayor": ("Who is the mayor of the {t}?", "Name the mayor of the {t}."),
        "birthplace": ("Where was the {t} born?", "What is the birthplace of the {t}?"),
        "birth_year": ("When was the {t} born?", "In which year was the {t} born?"),
        "job": ("What is the job of the {t}?", "What does the {t} do for a living?"),
        "teacher": ("Who taught the {t}?", "Name the teacher of the {t}."),
        "length_km": ("How long is the {t}?", "What is the length of the {t}?"),
        "source": ("Where does the {t} rise?", "What is the source of the {t}?"),
        "mouth": ("Where does the {t} end?", "What is the mouth of the {t}?"),
    }[field]

    def solve() -> Teacher:
        (found,) = yield [_lookup(name, via[0])]
        (value,) = yield [_lookup(found, field)]
        return answer_text([value])

    return Task(rng.choice(question).format(t=there), ("lookup",), solve)


def compare_facts(world: World) -> Task:
    """Two lookups at once, then the calculator."""
    rng = world.rng
    kind = rng.choice(("people", "towns", "towns", "rivers"))
    a, b = rng.sample(getattr(world.encyclopedia, kind), 2)
    if kind == "people":
        field, sign = "birth_year", "-"
        question = rng.choice(("How old was {b} when {a} was born?", "How many years older is {b} than {a}?"))
    elif kind == "rivers":
        field, sign = "length_km", rng.choice("+-")
        question = (
            rng.choice(
                ("How many km are the {a} and the {b} together?", "How long are the rivers {a} and {b} together?")
            )
            if sign == "+"
            else rng.choice(
                ("How much longer is the {a} than the {b}?", "By how many km is the {a} longer than the {b}?")
            )
        )
    else:
        field, sign = "population", rng.choice("+-")
        question = (
            rng.choice(
                ("How many people live in {a} and {b} together?", "What is the population of {a} and {b} in total?")
            )
            if sign == "+"
            else rng.choice(
                (
                    "How many more people live in {a} than in {b}?",
                    "By how much is the population of {a} larger than that of {b}?",
                )
            )
        )

    def solve() -> Teacher:
        first, second = yield [_lookup(a, field), _lookup(b, field)]
        (value,) = yield [_sum(f"{first} {sign} {second}")]
        return answer_text([value])

    return Task(question.format(a=a, b=b), ("lookup", "calculator"), solve)


def fact_times(world: World) -> Task:
    """A looked-up number in a calculation."""
    rng = world.rng
    kind, field = rng.choice((("towns", "population"), ("rivers", "length_km"), ("towns", "founded")))
    name, n = entity(world, kind), world.integer(2, 100)
    sign, question = rng.choice(
        (
            ("*", "What is {n} times the {f} of {x}?"),
            ("*", "Multiply the {f} of {x} by {n}."),
            ("/", "Divide the {f} of {x} by {n}."),
            ("+", "Add {n} to the {f} of {x}."),
            ("-", "Subtract {n} from the {f} of {x}."),
        )
    )
    words = {"population": "population", "length_km": "length", "founded": "founding year"}

    def solve() -> Teacher:
        (found,) = yield [_lookup(name, field)]
        (value,) = yield [_sum(f"{found} {sign} {n}")]
        return answer_text([value])

    return Task(question.format(n=n, f=words[field], x=name), ("lookup", "calculator"), solve)


def river_in_miles(world: World) -> Task:
    """A length in other units: lookup (once or twice), then convert."""
    rng = world.rng
    unit, word = rng.choice((("mi", "miles"), ("m", "meters"), ("ft", "feet"), ("yd", "yards")))
    through = rng.random() < 0.4
    name = entity(world, "towns" if through else "rivers")
    question = rng.choice(("How long is the {r} in {u}?", "What is the length of the {r} in {u}?"))

    def solve() -> Teacher:
        river = name
        if through:
            (river,) = yield [_lookup(name, "river")]
        (length,) = yield [_lookup(river, "length_km")]
        number = float(length) if "." in length else int(length) if length.lstrip("-").isdecimal() else 0
        (value,) = yield [Call("convert", {"value": number, "from_unit": "km", "to_unit": unit})]
        return answer_text([value])

    shown = f"river of {name}" if through else f"river {name}"
    return Task(question.format(r=shown, u=word), ("lookup", "convert"), solve)


def journey(world: World) -> Task:
    """add_days, then weekday; or days_between, then the calculator."""
    rng, date = world.rng, draw_date(world)
    shown = written(world, date)
    if rng.random() < 0.6:
        days = world.integer(2, 400)
        question = rng.choice(
            (
                "On which day of the week does a journey of {n} days end that starts on {d}?",
                "What day of the week is {n} days after {d}?",
                "Which weekday comes {n} days after {d}?",
            )
        )

        def ends() -> Teacher:
            (end,) = yield [Call("add_days", {"date": date, "days": days})]
            (value,) = yield [Call("weekday", {"date": end})]
            return answer_text([value])

        return Task(question.format(n=days, d=shown), ("add_days", "weekday"), ends)
    end, n = draw_date(world), world.integer(2, 1000)
    question = rng.choice(
        (
            "{who} earns {n} euros a day. How much is that from {a} to {b}?",
            "A hall costs {n} euros a day. What does it cost from {a} to {b}?",
        )
    )

    def costs() -> Teacher:
        (days,) = yield [Call("days_between", {"start": date, "end": end})]
        (value,) = yield [_sum(f"{days} * {n}")]
        return answer_text([value])

    return Task(
        question.format(who=world.word(), n=n, a=shown, b=written(world, end)), ("days_between", "calculator"), costs
    )


def note_and(world: World) -> Task:
    """Read a number from a note and reckon with it, or look a fact up and note it."""
    rng, book = world.rng, world.notebook
    key = draw_key(world)
    if rng.random() < 0.5:
        book.notes[key] = str(world.integer(10, 10_000))
        n = world.integer(2, 1000)
        sign, question = rng.choice(
            (
                ("*", "Multiply my note {k} by {n}."),
                ("+", "Add {n} to my note {k}."),
                ("-", "Subtract {n} from my note {k}."),
            )
        )

        def reckon() -> Teacher:
            (noted,) = yield [Call("get_note", {"key": key})]
            (value,) = yield [_sum(f"{noted} {sign} {n}")]
            return answer_text([value])

        return Task(question.format(k=key, n=n), ("get_note", "calculator"), reckon)
    kind, field, word = rng.choice(
        (
            ("towns", "population", "population"),
            ("towns", "mayor", "mayor"),
            ("people", "job", "job"),
            ("people", "birthplace", "birthplace"),
        )
    )
    name = entity(world, kind)
    question = rng.choice(
        ("Note the {f} of {x} as {k}.", "Save the {f} of {x} under {k}.", "Look up the {f} of {x} and note it as {k}.")
    )

    def keep() -> Teacher:
        (value,) = yield [_lookup(name, field)]
        yield [Call("put_note", {"key": key, "value": value})]
        return "Noted."

    return Task(question.format(f=word, x=name, k=key), ("lookup", "put_note"), keep, writes=(key,))


def at_once(world: World) -> Task:
    """Two or three questions that have nothing to do with each other, called at once."""
    rng = world.rng
    makers: tuple[Callable[[World], Task], ...] = (_plain_sum, fact, calendar, units)
    count = rng.choice((2, 2, 2, 3))
    tasks = [maker(world) for maker in rng.choices(makers, k=count)]
    asked = [task.question.rstrip(".?") for task in tasks]
    asked = [asked[0], *(text[0].lower() + text[1:] for text in asked[1:])]
    if rng.random() < 0.3:
        question = " ".join(task.question for task in tasks)
    else:
        question = f"{', '.join(asked[:-1])}{',' if rng.random() < 0.5 else ''} and {asked[-1]}?"

    def solve() -> Teacher:
        calls = [next(task.solve())[0] for task in tasks]
        values = yield calls
        return answer_text(values)

    return Task(question, tuple(dict.fromkeys(need for task in tasks for need in task.needs)), solve)


def _plain_sum(world: World) -> Task:
    while True:
        task = arithmetic(world)
        if len(task.question) < 40:
            calls = next(task.solve())
            if len(calls) == 1 and _single(task, calls[0]):
                return task


def _single(task: Task, call: Call) -> bool:
    """Whether one call solves the task."""
    teacher = task.solve()
    next(teacher)
    try:
        teacher.send(["1"])
    except StopIteration:
        return True
    return False


HOPS: tuple[Callable[[World], Task], ...] = (
    two_facts,
    two_facts,
    compare_facts,
    fact_times,
    river_in_miles,
    journey,
    note_and,
)
__all__ = ["FACTS", "HOPS", "at_once"]
