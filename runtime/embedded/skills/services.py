"""Tasks for tools that are no skill of their own, and questions that no tool on offer can answer."""

from __future__ import annotations

from caesura.runtime.embedded.chat import NO_TOOL_TEXT, answer_text
from caesura.runtime.embedded.skills.single import arithmetic, calendar, fact, notes, units
from caesura.runtime.embedded.skills.task import Call, Task, Teacher
from caesura.runtime.embedded.skills.world import World

_LANGUAGES = ("French", "German", "Spanish", "Dutch", "Greek", "Latin")
_ASKED: dict[str, tuple[str, ...]] = {
    "weather": ("What is the weather in {a}?", "How is the weather in {a} today?", "Will I need a coat in {a}?"),
    "clock": ("What time is it in {a}?", "Tell me the time in {a}."),
    "translate": ("Translate {a} into {l}.", "How do you say {a} in {l}?"),
    "read_file": ("Read the file {a}.txt.", "What does the file {a}.txt say?"),
    "send_mail": ("Mail {a} to {b}.", "Send {b} the text {a}."),
    "stock": ("What is the share price of {a}?", "How much is a share of {a}?"),
    "define": ("What does the word {a} mean?", "Define {a}."),
}
_ABSENT = (
    "Play the song {a}.",
    "Book a flight to {a}.",
    "Draw me a picture of {a}.",
    "Call {a} on the phone.",
    "Order a pizza for {a}.",
    "Turn off the lights.",
    "Who won the game last night?",
    "Write a poem about {a}.",
    "Tell me a joke.",
    "What is the password of {a}?",
    "Take a photo of {a}.",
    "Start the car.",
)
# Tools that could pass for another one, which is therefore not missing while they are there.
NEAR: dict[str, tuple[str, ...]] = {
    "lookup": ("search",),
    "get_note": ("list_notes",),
    "send_mail": ("ask_person",),
    "define": ("search", "lookup"),
}


def service(world: World) -> Task:
    """A question for the weather, a clock, a translator, ...: a word or two to hand over, a result to pass on."""
    rng = world.rng
    tool = rng.choice(tuple(_ASKED))
    a, b, language = world.word(rng.choice((1, 2))), world.word(1), rng.choice(_LANGUAGES)
    if tool in ("translate", "define", "read_file"):
        a = a.lower()
    result = world.word(rng.randint(1, 3)).lower() if rng.random() < 0.6 else str(world.integer(1, 10_000))
    arguments = {
        "weather": {"city": a},
        "clock": {"zone": a},
        "translate": {"text": a, "language": language},
        "read_file": {"path": f"{a}.txt"},
        "send_mail": {"to": b, "text": a},
        "stock": {"symbol": a},
        "define": {"word": a},
    }[tool]
    world.extra[tool] = lambda **given: result

    def solve() -> Teacher:
        (value,) = yield [Call(tool, arguments)]
        return answer_text([value])

    return Task(rng.choice(_ASKED[tool]).format(a=a, b=b, l=language), (tool,), solve)


def choice(world: World) -> Task:
    """One call of any tool: the right one must be found among many."""
    maker = world.rng.choice((service, service, service, arithmetic, fact, calendar, units, notes))
    return maker(world)


def unanswerable(world: World) -> tuple[Task, tuple[str, ...]]:
    """A question, and the tools that must not be on offer because they could answer it."""
    rng = world.rng
    if rng.random() < 0.3:
        return Task(rng.choice(_ABSENT).format(a=world.word()), (), no_tool), ("search", "ask_person")
    task = rng.choice((service, service, arithmetic, fact, calendar, units, notes))(world)
    spared = [other for need in task.needs for other in NEAR.get(need, ())]
    return Task(task.question, (), no_tool), (*task.needs, *spared)


def no_tool() -> Teacher:
    """What to say without a tool that fits."""
    return NO_TOOL_TEXT
    yield []  # a generator all the same
