"""What a conversation calls its tools: usual names, other ones, made-up ones; descriptions; tools nobody trained on."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from caesura.runtime.embedded.skills.task import Call
from caesura.runtime.embedded.skills.world import wild_word
from caesura.runtime.embedded.tasks import Split
from caesura.runtime.embedded.tools.encyclopedia import made_up_word

# In training most tools have other names: a model that knows the usual ones by heart writes them where others are on
# offer, and reads a name off the prompt only if that is what mostly helps.
OTHER_NAME_SHARE = {Split.TRAIN: 0.88, Split.HELD_OUT: 0.3}
MADE_UP_SHARE = 0.8  # of the other names in training, so that a name is read off the prompt and not known
SERVER_SHARE = 0.1  # of the toolsets in training are one server's, whose name stands before all of theirs
_JSON_TYPES = {("convert", "value"): "number", ("add_days", "days"): "integer"}  # all others are strings


_PARTS = (  # what programs call their tools
    *("get", "set", "list", "create", "delete", "update", "add", "remove", "find", "check", "run", "make", "show"),
    *("ask", "do", "try", "use", "start", "stop", "load", "save", "edit", "write", "parse", "sort", "count", "call"),
    *("user", "order", "customer", "account", "payment", "ticket", "issue", "page", "table", "row", "image", "video"),
    *("city", "country", "place", "town", "job", "person", "teacher", "room", "office", "shop", "server", "system"),
    *("code", "shell", "python", "command", "folder", "path", "url", "web", "query", "data", "base", "record", "event"),
    *("email", "calendar", "date", "time", "number", "value", "unit", "amount", "price", "total", "answer", "question"),
    *("quick", "old", "new", "big", "local", "main", "remote", "safe", "all", "any", "next", "last", "info", "item"),
    *("box", "book", "line", "map", "card", "desk", "tool", "help", "point", "up", "of", "to", "by", "for", "with"),
)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a tool may be called and how it may be described. ``arguments`` are its own names with others for each."""

    arguments: Mapping[str, tuple[str, ...]]
    description: str  # the usual one
    others: tuple[str, ...]
    names: tuple[str, ...]
    held_out_names: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "calculator": Kind(
        {"expression": ("formula", "query", "text")},
        "Evaluate an arithmetic expression.",
        (
            "Evaluates arithmetic.",
            "Compute the value of an expression such as 2 + 3.",
            "A calculator for + - * and /.",
            "Work out a sum, exactly.",
            "Does arithmetic.",
        ),
        ("calc", "calculate", "compute", "evaluate", "slow_calculator", "math", "remote_calculator", "colleague"),
        ("arithmetic", "reckoner", "sums"),
    ),
    "lookup": Kind(
        {"name": ("entry", "title", "entity"), "field": ("property", "key", "attribute")},
        "Look a field of an entry up in the encyclopedia.",
        (
            "Encyclopedia of people, towns and rivers.",
            "Get a property of a person, town or river.",
            "Facts about people, towns and rivers.",
            "Find a fact in the encyclopedia.",
        ),
        ("fetch", "encyclopedia", "get_fact", "wiki", "facts", "find_fact"),
        ("almanac", "reference", "look_up_fact"),
    ),
    "weekday": Kind(
        {"date": ("day", "when")},
        "Day of the week of a date.",
        ("The weekday of a date.", "Tells on which day of the week a date falls."),
        ("day_of_week", "get_weekday", "which_day"),
        ("weekday_of", "dow"),
    ),
    "add_days": Kind(
        {"date": ("start", "day"), "days": ("n", "count")},
        "Date some days later.",
        ("Add days to a date.", "The date a number of days after a date."),
        ("date_add", "shift_date", "plus_days"),
        ("later_date", "move_date"),
    ),
    "days_between": Kind(
        {"start": ("first", "date1"), "end": ("second", "date2")},
        "Days from one date to another.",
        ("Number of days between two dates.", "Count the days from a date to another."),
        ("date_diff", "count_days", "day_difference"),
        ("days_from_to", "date_distance"),
    ),
    "convert": Kind(
        {"value": ("amount", "number"), "from_unit": ("source", "unit"), "to_unit": ("target", "into")},
        "Convert a value between units.",
        (
            "Unit conversion.",
            "Converts units of length, mass, volume, time and temperature.",
            "Change a measurement to other units.",
        ),
        ("convert_units", "unit_converter", "units", "change_unit"),
        ("conversion", "measure_in"),
    ),
    "put_note": Kind(
        {"key": ("title", "name"), "value": ("text", "content")},
        "Save a note.",
        ("Store a value under a key.", "Write a note.", "Put a note into the notebook."),
        ("save_note", "remember", "store", "write_note"),
        ("keep_note", "memorize"),
    ),
    "get_note": Kind(
        {"key": ("title", "name")},
        "Read a note.",
        ("Get the value stored under a key.", "Read a note by its key.", "Recall a note."),
        ("read_note", "recall", "load_note"),
        ("fetch_note", "open_note"),
    ),
    "list_notes": Kind(
        {},
        "List the keys of all notes.",
        ("Names of all notes.", "Show which notes there are."),
        ("all_notes", "notes", "show_notes"),
        ("note_names", "index_notes"),
    ),
    "act": Kind(
        {"command": ("action", "text")},
        "Act in the adventure.",
        ("Do something in the game.", "Give the game a command."),
        ("play", "do", "game"),
        ("step", "perform"),
    ),
    # Tools that only answer what they are asked for by one argument or two.
    "weather": Kind(
        {"city": ("place",)},
        "Current weather of a city.",
        ("The weather somewhere.",),
        ("get_weather",),
        ("weather_now",),
    ),
    "clock": Kind(
        {"zone": ("place",)}, "The time in a zone.", ("What time it is somewhere.",), ("get_time",), ("time_in",)
    ),
    "translate": Kind(
        {"text": ("phrase",), "language": ("into",)},
        "Translate a text.",
        ("Translates words.",),
        ("translator",),
        ("to_language",),
    ),
    "read_file": Kind({"path": ("file",)}, "Read a file.", ("The content of a file.",), ("open_file",), ("cat_file",)),
    "send_mail": Kind(
        {"to": ("recipient",), "text": ("body",)}, "Send a mail.", ("Mails a text.",), ("mail",), ("send_message",)
    ),
    "stock": Kind(
        {"symbol": ("ticker",)}, "Price of a share.", ("The price of a stock.",), ("stock_price",), ("share_price",)
    ),
    "define": Kind({"word": ("term",)}, "Meaning of a word.", ("A dictionary.",), ("dictionary",), ("meaning",)),
    "search": Kind(
        {"query": ("text",)}, "Search the passages.", ("Look a topic up.",), ("find", "web_search"), ("search_text",)
    ),
    "ask_person": Kind(
        {"question": ("text",)}, "Ask a person.", ("Asks somebody.",), ("ask_human", "confirm"), ("ask_boss",)
    ),
}
DISTRACTORS = tuple(KINDS)
HELD_OUT_NAMES = frozenset(name for kind in KINDS.values() for name in kind.held_out_names)
_WORDS = sorted(  # that descriptions and names are made of
    {
        word
        for kind in KINDS.values()
        for text in (kind.description, *kind.others, *kind.names, *kind.arguments)
        for word in re.findall("[a-z]{2,}", text.lower())
    }.union(_PARTS)
)


@dataclass(frozen=True, slots=True)
class Offer:
    """One tool as a conversation knows it."""

    tool: str
    name: str
    description: str
    arguments: Mapping[str, str]  # the tool's own argument names to the ones shown

    @property
    def spec(self) -> dict[str, Any]:
        """The declaration in OpenAI's shape."""
        types = {own: _JSON_TYPES.get((self.tool, own), "string") for own in self.arguments}
        properties = {shown: {"type": types[own]} for own, shown in self.arguments.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }

    def shown(self, call: Call) -> dict[str, Any]:
        """A call under the names of this conversation, as an entry of ``tool_calls``."""
        arguments = {self.arguments.get(key, key): value for key, value in call.arguments.items()}
        return {"type": "function", "function": {"name": self.name, "arguments": arguments}}


def usual(tool: str) -> Offer:
    """A tool under its own names."""
    kind = KINDS[tool]
    return Offer(tool, tool, kind.description, {argument: argument for argument in kind.arguments})


def offer(tool: str, rng: random.Random, split: Split, taken: Sequence[str] = ()) -> Offer:
    """A tool under its own names or others; ``taken`` are the names in use."""
    kind = KINDS[tool]
    name, description = tool, kind.description
    renamed = rng.random() < OTHER_NAME_SHARE[split]
    if renamed:
        name = _name(kind, rng, split)
    if name in taken:
        name = f"{name}_{rng.randrange(2, 10)}"
    if rng.random() < 0.08:
        name = rng.choice(("main", "server", "my", "local", "office", "remote")) + "_" + name
    if renamed or rng.random() < 0.15:
        description = rng.choice((kind.description, *kind.others))
    swap = rng.random() < 0.5 * renamed + 0.05
    return Offer(
        tool,
        name,
        description,
        {own: rng.choice(others) if swap and rng.random() < 0.5 else own for own, others in kind.arguments.items()},
    )


def _name(kind: Kind, rng: random.Random, split: Split) -> str:
    if split is Split.HELD_OUT:
        return rng.choice(kind.held_out_names)
    if rng.random() >= MADE_UP_SHARE:
        return rng.choice(kind.names)
    while (name := _made_up_name(rng)) in HELD_OUT_NAMES:
        pass
    return name


def _made_up_name(rng: random.Random) -> str:
    words = rng.choices(_PARTS, k=rng.randint(1, 3)) if rng.random() < 0.4 else []
    for _ in range(rng.randint(not words, 1) if words or rng.random() < 0.7 else 2):
        words.append(_made_up_part(rng))
    rng.shuffle(words)
    return "_".join(words)


def _made_up_part(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.5:
        return _spliced_word(rng)
    return wild_word(rng) if kind < 0.75 else made_up_word(rng, syllables=rng.randint(1, 3)).lower()


def _spliced_word(rng: random.Random) -> str:
    """The start of one word and the end of another. A name is copied token by token, and so a model copies well only
    tokens that it has had to write: with splices, those are all the pieces of the words around it."""
    while True:
        first, second = rng.choices(_WORDS, k=2)
        word = first[: rng.randint(1, len(first))] + second[rng.randrange(len(second)) :]
        if len(word) < 13 and word not in HELD_OUT_NAMES:
            return word


def toolset(
    needs: Sequence[str],
    rng: random.Random,
    split: Split,
    *,
    distractors: int,
    without: Sequence[str] = (),
) -> list[Offer]:
    """Offers for the tools needed and some others, in any order; never one of ``without``."""
    spare = [tool for tool in DISTRACTORS if tool not in needs and tool not in without and tool != "act"]
    chosen = [*needs, *rng.sample(spare, min(distractors, len(spare)))]
    rng.shuffle(chosen)
    offers: list[Offer] = []
    for tool in chosen:
        taken = [other.name for other in offers]
        offers.append(offer(tool, rng, split, taken))
    if split is Split.TRAIN and rng.random() < SERVER_SHARE:
        server = rng.choice((rng.choice(_PARTS), _made_up_part(rng))) + rng.choice(("_", "__"))
        offers = [replace(each, name=server + each.name) for each in offers]
    return offers
