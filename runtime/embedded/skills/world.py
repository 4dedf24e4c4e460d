"""The world of one conversation: its encyclopedia, its notebook, and tools that may fail or say odd things."""

from __future__ import annotations

import json
import random
import zlib
from collections import Counter
from collections.abc import Callable, Sequence, Set

from caesura.runtime.embedded.skills.task import Call
from caesura.runtime.embedded.tasks import Split, split_of
from caesura.runtime.embedded.tools import (
    Encyclopedia,
    Notebook,
    ToolFault,
    add_days,
    calculate,
    convert,
    days_between,
    weekday,
)
from caesura.runtime.embedded.tools.dates import WEEKDAYS
from caesura.runtime.embedded.tools.encyclopedia import made_up_word

TRANSIENT = ("timed out, try again", "busy, try again", "connection reset, try again", "too many requests, try again")
FATAL = (
    "timed out", "the tool failed", "no answer after {n} seconds", "connection lost", "cancelled",
    "ConnectionError: no route to host", "permission denied",
)  # fmt: skip
WILD_SHARE = 0.5  # of the invented words in training, how many are any letters, so that all of them are copied well
PIECES = (  # of which no word of the held-out adventures can be made
    *("able", "ace", "age", "am", "an", "ance", "ang", "ant", "ape", "ard", "ark", "ate", "ave", "ay", "ble", "cle"),
    *("eam", "ear", "eck", "ed", "el", "ell", "en", "ence", "ent", "ery", "ess", "est", "et", "ever", "ful", "ght"),
    *("ible", "ice", "ide", "ight", "ile", "ine", "ing", "ion", "ip", "ish", "ist", "ity", "ive", "ks"),
    *("land", "less", "ly", "ment", "ness", "ock", "old", "ond", "ool", "oon", "op", "ore", "ort", "ory", "oss", "ot"),
    *("ound", "our", "ous", "out", "ow", "own", "que", "sion", "th", "ting", "tle", "ty", "ue", "ule", "ult"),
    *("ump", "und", "unt", "up", "ure", "urn", "ust", "ward", "way", "wn", "wood", "xi", "yl", "zz"),
)
FIRST_LETTERS: tuple[str, ...] = ("", *"bcdfghjklmnprstvwz")
STATEFUL = frozenset({"put_note", "list_notes"})  # results that are never replaced by odd ones


def split_of_text(text: str) -> Split:
    """The split a name or a number in writing belongs to; about one in ten is held out."""
    digits = text.replace(".", "").replace("-", "")
    if digits.isdecimal():
        return split_of(int(digits))
    return Split.HELD_OUT if zlib.crc32(text.encode()) % 10 == 0 else Split.TRAIN


class World:
    """Draws what tasks are about (``rng``) and runs calls. Everything follows from the seed.

    ``odd_share`` of the results are replaced by other plausible ones, ``fault_share`` of the calls fail at first.
    ``pieces`` are what `piecewise` makes words of, and the words ``never`` to be said are in small letters.
    """

    def __init__(
        self,
        seed: str,
        split: Split,
        *,
        odd_share: float = 0.0,
        fault_share: float = 0.0,
        pieces: Sequence[str] = (),
        never: Set[str] = frozenset(),
    ) -> None:
        self.seed, self.split = seed, split
        self.pieces, self.never = pieces, never
        self.odd_share, self.fault_share = odd_share, fault_share
        self.rng = random.Random(f"{seed}/tasks")
        self.notebook = Notebook()
        self.extra: dict[str, Callable[..., str]] = {}  # tools of one task alone
        self.prefix = self.rng.choice(("error: ", "Error: ", "Error: ToolFault: "))
        self._encyclopedia: Encyclopedia | None = None
        self._times: Counter[str] = Counter()

    @property
    def encyclopedia(self) -> Encyclopedia:
        if self._encyclopedia is None:
            self._encyclopedia = Encyclopedia(self.seed, people=5, towns=4, rivers=2, accepts=self.accepts)
        return self._encyclopedia

    def accepts(self, text: str) -> bool:
        """Whether a name or number belongs to this world's split."""
        return split_of_text(text) is self.split and self.may_say(text)

    def may_say(self, text: str) -> bool:
        """Whether a text that nobody is asked about may occur: in training, when no word of it is held out."""
        if self.split is Split.HELD_OUT or text in WEEKDAYS:
            return True
        words = [word.capitalize() for word in text.split()]  # as they were drawn
        trained = all(split_of_text(word) is Split.TRAIN for word in [text, *words])
        return trained and self.never.isdisjoint(text.lower().split())

    def draw(self, make: Callable[[], str]) -> str:
        """What ``make`` gives, of this world's split."""
        while True:
            text = make()
            if self.accepts(text):
                return text

    def word(self, syllables: int = 2) -> str:
        """An invented word."""
        if self.split is Split.TRAIN and self.rng.random() < WILD_SHARE:
            return self.draw(lambda: wild_word(self.rng).capitalize())
        return self.draw(lambda: made_up_word(self.rng, syllables=syllables))

    def piecewise(self, pieces: int) -> str:
        """A word of so many pieces: a token that is hardly ever written cannot be copied, nor found again."""
        return self.draw(lambda: "".join(self.rng.choices(self.pieces, k=pieces)))

    def integer(self, low: int, high: int) -> int:
        """An integer from low to below high."""
        return int(self.draw(lambda: str(self.rng.randrange(low, high))))

    def run(self, call: Call) -> str:
        """The result of a call as the model reads it."""
        key = json.dumps([call.tool, call.arguments], sort_keys=True, default=str)
        self._times[key] += 1
        rng = random.Random(f"{self.seed}/{key}")
        if rng.random() < self.fault_share:
            transient = rng.random() < 0.6
            if not transient:
                return self.prefix + rng.choice(FATAL).format(n=rng.randrange(1, 100))
            if self._times[key] == 1 or rng.random() < 0.25:
                return self.prefix + rng.choice(TRANSIENT)
        try:
            result = self._function(call.tool)(**call.arguments)
        except ToolFault as fault:
            return f"{self.prefix}{fault}"
        if call.tool not in STATEFUL and rng.random() < self.odd_share:
            while not self.may_say(odd := odd_result(rng, result)):
                pass
            return odd
        return result

    def _function(self, tool: str) -> Callable[..., str]:
        known: dict[str, Callable[..., str]] = {
            "calculator": calculate,
            "lookup": lambda **given: self.encyclopedia.lookup(**given),  # made when it is first asked
            "weekday": weekday,
            "add_days": add_days,
            "days_between": days_between,
            "convert": convert,
            "put_note": self.notebook.put_note,
            "get_note": self.notebook.get_note,
            "list_notes": self.notebook.list_notes,
            **self.extra,
        }
        if tool not in known:  # on offer beside what the task needs
            raise ToolFault(f"{tool} is not connected")
        return known[tool]


def wild_word(rng: random.Random) -> str:
    """Pieces of English words, or two to nine letters, as frequent as in English; it need not be speakable."""
    if rng.random() < 0.5:
        first = rng.choice(FIRST_LETTERS)
        return first + "".join(rng.choices(PIECES, k=rng.randint(1, 2)))
    letters = "eeeeeetttttaaaaoooiiinnnsssrrrhhlllddcccuummwwffggyyppbbvkkjxqz"
    return "".join(rng.choices(letters, k=rng.randint(2, 9)))


def odd_result(rng: random.Random, result: str) -> str:
    """Another result of the same kind."""
    if result in WEEKDAYS:
        return rng.choice(WEEKDAYS)
    if result.count("-") == 2 and result.replace("-", "").isdecimal():
        return f"{rng.randrange(1900, 2100)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}"
    try:
        float(result)
    except ValueError:
        return made_up_word(rng, syllables=rng.randint(1, 3))
    digits = rng.randint(1, 9)
    value = str(rng.randrange(10 ** (digits - 1), 10**digits))
    if rng.random() < 0.15:
        value = f"{value}.{rng.randrange(1, 1000)}"
    return f"-{value}" if rng.random() < 0.1 else value
