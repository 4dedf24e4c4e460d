"""How much longer will this pause last? Estimators are parts that any policy can take.

Each answers two questions about a pause that has lasted ``elapsed`` seconds, R being the rest of it:

- ``remaining_s``: E[R], the plain expectation;
- ``hold_s``: what holding costs per return, ``min over t of E[min(R, t)] / P(R <= t)``. Memory may be given up at any
  time t, and then the return is missed. A tool that answers in 0.2 s nine times of ten and in a minute otherwise has
  E[R] = 6 s, but is worth 0.22 s of holding for each return - until 0.2 s have passed, and then a minute. For an
  exponential R both are the mean.

Both are infinite (``GONE_S``) once the pause has outlasted its deadline: such a tool does not come back.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable
from itertools import accumulate
from typing import Protocol, TypeVar

from caesura.scheduler.context import Call, Pause

PRIOR_S = 0.5  # nothing known of a tool: between a shell command and a search
KEPT_CALLS = 256
KEPT_TOOLS = 512
MAX_NAME_CHARS = 256
MIN_CALLS = 3
GONE_S = 1e9  # finite, so that it can be multiplied by tokens and written as JSON
STALE_SHARE = 16
MOMENTS = 32  # at which holding on is weighed against giving up
ERROR_WEIGHT = 0.1  # of the newest call in the running errors of hints and of history
T = TypeVar("T")


def keep_latest(by_tool: dict[str, T], tool: str, value: T) -> None:
    """Set what is known of a tool; that of the one set longest ago is forgotten when there are more than KEPT_TOOLS."""
    by_tool.pop(tool, None)
    by_tool[tool] = value
    if len(by_tool) > KEPT_TOOLS:
        del by_tool[next(iter(by_tool))]


class Estimator(Protocol):
    """Expected remaining seconds of a pause."""

    def observe(self, pause: Pause, duration_s: float) -> None:
        """``pause`` has ended after this long."""

    def remaining_s(self, pause: Pause, now: float) -> float:
        """Expected seconds until the pause ends."""

    def hold_s(self, pause: Pause, now: float) -> float:
        """Seconds of holding that one return costs."""


class PerCall:
    """Base: a pause ends with the last of its calls, or with the first for ``wait_any``; a deadline bounds both.

    Subclasses say what one call costs. Durations that were seen for the same set of calls together stand for the set.
    """

    def observe(self, pause: Pause, duration_s: float) -> None:
        """Learns nothing."""

    def remaining_s(self, pause: Pause, now: float) -> float:
        return self._of_pause(pause, now, self._call_s)

    def hold_s(self, pause: Pause, now: float) -> float:
        return self._of_pause(pause, now, self._call_hold_s)

    def _of_pause(self, pause: Pause, now: float, of_call: Callable[[Pause, int, float], float]) -> float:
        deadline_at = pause.deadline_at
        if deadline_at is not None and now >= deadline_at:
            return GONE_S
        elapsed = max(0.0, now - pause.since)
        if len(pause.calls) <= 1:
            expected = of_call(pause, 0, elapsed)
        else:
            each = [of_call(pause, index, elapsed) for index in range(len(pause.calls))]
            expected = min(each) if pause.wait_any else max(each)
        return expected if deadline_at is None else min(expected, deadline_at - now)

    def _call_s(self, pause: Pause, index: int, elapsed: float) -> float:
        """Expected seconds until call ``index`` answers (0 also stands for the idle program of no calls)."""
        raise NotImplementedError

    def _call_hold_s(self, pause: Pause, index: int, elapsed: float) -> float:
        """The same as a price of holding; the expectation where no distribution is known."""
        return self._call_s(pause, index, elapsed)


class Elapsed(PerCall):
    """T_int = now - call time (InferCept, section 4.4): what has lasted long will last as long again."""

    def _call_s(self, pause: Pause, index: int, elapsed: float) -> float:
        return elapsed


class Hint(PerCall):
    """What the program said the tool takes; past that, or without a word, as :class:`Elapsed` (from a prior on)."""

    def __init__(self, prior_s: float = PRIOR_S) -> None:
        self._prior_s = prior_s

    def _call_s(self, pause: Pause, index: int, elapsed: float) -> float:
        hint_s = pause.calls[index].expected_s if pause.calls else None
        return _or_as_long_again(self._prior_s if hint_s is None else hint_s, elapsed)


class Oracle(PerCall):
    """The true duration, which only a simulation knows; where it does not, as :class:`Conditional`."""

    def __init__(self) -> None:
        self._fallback = Conditional()

    def observe(self, pause: Pause, duration_s: float) -> None:
        self._fallback.observe(pause, duration_s)

    def _call_s(self, pause: Pause, index: int, elapsed: float) -> float:
        true_s = pause.calls[index].true_s if pause.calls else None
        if true_s is None:
            return self._fallback.call_s(pause, index, elapsed)
        return max(0.0, true_s - elapsed)


Moment = tuple[float, int]  # of giving up: the time held until then, summed over the calls, and how many have ended


class History:
    """The latest durations of one tool, sorted, with what can be asked of them in O(log n).

    Answers may lag behind by one duration in sixteen.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._latest: list[float] = []  # sorted
        self._sorted: list[float] = []  # the same as of the last look
        self._sums: list[float] = [0.0]  # of its first i durations
        self._moments: dict[int, list[Moment]] = {}  # by how many are outlasted: when holding may be given up
        self._new = 0
        self.errors: tuple[float, float] | None = None  # running ones of the tool's hints and of its history

    def __len__(self) -> int:
        return len(self._latest)

    @property
    def mean_s(self) -> float:
        """Of what was kept; 0 without any."""
        self._look()
        return self._sums[-1] / len(self._sorted) if self._sorted else 0.0

    def add(self, duration_s: float) -> None:
        """Remember a duration and forget the oldest of too many."""
        self._recent.append(duration_s)
        insort(self._latest, duration_s)
        if len(self._recent) > KEPT_CALLS:
            del self._latest[bisect_right(self._latest, self._recent.popleft()) - 1]
        self._new += 1

    def _look(self) -> None:
        if self._new > len(self._sorted) // STALE_SHARE:
            self._sorted, self._new = self._latest[:], 0
            self._sums, self._moments = list(accumulate(self._sorted, initial=0.0)), {}

    def remaining_s(self, elapsed: float) -> float | None:
        """E[R | elapsed]; None when nothing seen lasted longer."""
        self._look()
        passed = bisect_right(self._sorted, elapsed)
        left = len(self._sorted) - passed
        return (self._sums[-1] - self._sums[passed]) / left - elapsed if left else None

    def hold_s(self, elapsed: float) -> float | None:
        """min over t of E[min(R, t)] / P(R <= t), t among the durations seen; None when nothing lasted longer."""
        self._look()
        passed, count = bisect_right(self._sorted, elapsed), len(self._sorted)
        if passed == count:
            return None
        moments = self._moments.get(passed)
        if moments is None:
            moments = self._moments[passed] = self._find_moments(passed)
        return min((held - (count - passed) * elapsed) / ended for held, ended in moments)

    def _find_moments(self, passed: int) -> list[Moment]:
        """When to give up, if ``passed`` durations are outlasted; which moment is best depends on the time elapsed.
        Left out are those dearer than another one from the last duration outlasted to the next."""
        durations, sums, count = self._sorted, self._sums, len(self._sorted)
        moments = [  # durations that end by then are held for, the others until then
            (sums[last + 1] - sums[passed] + (count - last - 1) * durations[last], last + 1 - passed)
            for last in [*range(passed, count - 1, 1 + (count - passed) // MOMENTS), count - 1]
        ]
        ends = (durations[passed - 1] if passed else 0.0, durations[passed])
        prices = [[(held - (count - passed) * end) / ended for end in ends] for held, ended in moments]
        best = [min(prices, key=lambda price: price[end]) for end in (0, 1)]
        dear = [any(price[0] > one[0] and price[1] > one[1] for one in best) for price in prices]
        return [moment for moment, is_dear in zip(moments, dear, strict=True) if not is_dear]


class Histories:
    """The durations of the tools that answered last: names come from clients and from models, and never end."""

    def __init__(self) -> None:
        self._by_name: dict[str, History] = {}  # the one that answered longest ago first

    def get(self, name: str) -> History | None:
        """None for a tool that was never seen, or is forgotten."""
        return self._by_name.get(name)

    def add(self, name: str, duration_s: float) -> None:
        """Remember a duration, and forget a tool when there are too many."""
        seen = self._by_name.get(name)
        if seen is None:
            seen = History()
        seen.add(duration_s)
        keep_latest(self._by_name, name, seen)


class Profiled(PerCall):
    """T_int = the mean of the tool's calls, whatever has elapsed (InferCept, section 4.4, the rule it does not use)."""

    def __init__(self, prior_s: float = PRIOR_S) -> None:
        self._prior_s = prior_s
        self._seen = Histories()

    def observe(self, pause: Pause, duration_s: float) -> None:
        for call in pause.calls:
            self._seen.add(call.tool, duration_s)

    def _call_s(self, pause: Pause, index: int, elapsed: float) -> float:
        seen = self._seen.get(pause.calls[index].tool) if pause.calls else None
        return seen.mean_s if seen is not None and len(seen) else self._prior_s


class Conditional(PerCall):
    """E[R | elapsed] from each tool's own durations; the program's hint, then a prior, until there are enough.

    A hint goes before history as long as the tool's hints have been nearer to the truth than its mean was. Past
    everything ever seen, the pause is expected to last as long again as it has lasted.
    """

    def __init__(self, prior_s: float = PRIOR_S) -> None:
        self._prior_s = prior_s
        self._seen = Histories()

    def observe(self, pause: Pause, duration_s: float) -> None:
        if len(pause.calls) == 1:
            self._score_hint(pause.calls[0], duration_s)
        self._seen.add(_name(pause), duration_s)

    def _score_hint(self, call: Call, duration_s: float) -> None:
        seen = self._seen.get(call.tool)
        if call.expected_s is None or seen is None or len(seen) < MIN_CALLS:
            return
        errors = abs(call.expected_s - duration_s), abs(seen.mean_s - duration_s)
        before = seen.errors or errors
        seen.errors = (
            before[0] + ERROR_WEIGHT * (errors[0] - before[0]),
            before[1] + ERROR_WEIGHT * (errors[1] - before[1]),
        )

    def _of_pause(self, pause: Pause, now: float, of_call: Callable[[Pause, int, float], float]) -> float:
        if len(pause.calls) > 1:
            name = _name(pause)
            together = self._seen.get(name)
            if together is not None and len(together) >= MIN_CALLS:
                pause = Pause(pause.since, (Call(name),), deadline_at=pause.deadline_at)
        return super()._of_pause(pause, now, of_call)

    def call_s(self, pause: Pause, index: int, elapsed: float) -> float:
        """Expected seconds until call ``index`` answers."""
        return self._call_s(pause, index, elapsed)

    def _call_s(self, pause: Pause, index: int, elapsed: float) -> float:
        seen = self._history(pause, index)
        if seen is None:
            return self._known_s(pause, index, elapsed)
        remaining = seen.remaining_s(elapsed)
        return elapsed if remaining is None else remaining

    def _call_hold_s(self, pause: Pause, index: int, elapsed: float) -> float:
        seen = self._history(pause, index)
        if seen is None:
            return self._known_s(pause, index, elapsed)
        price = seen.hold_s(elapsed)
        return elapsed if price is None else price

    def _history(self, pause: Pause, index: int) -> History | None:
        """The durations to go by; None when they are too few, or the tool's hints better."""
        call = pause.calls[index] if pause.calls else None
        seen = self._seen.get("" if call is None else call.tool)
        if seen is None or len(seen) < MIN_CALLS:
            return None
        if call is not None and call.expected_s is not None:
            of_hints, of_history = seen.errors or (1.0, 0.0)
            if of_hints < of_history:
                return None
        return seen

    def _known_s(self, pause: Pause, index: int, elapsed: float) -> float:
        call = pause.calls[index] if pause.calls else None
        known = call.expected_s if call is not None else None
        if known is None:
            seen = self._seen.get("" if call is None else call.tool)
            known = seen.mean_s if seen is not None else self._prior_s
        return _or_as_long_again(known, elapsed)


class Reported(Conditional):
    """What the tool itself says of its progress, where it says anything; else as :class:`Conditional`.

    A report of fraction f after a seconds means ``a (1 - f) / f`` more from then on. Past that, as long again as the
    time since the report. A fraction of 0 says nothing.
    """

    def _call_s(self, pause: Pause, index: int, elapsed: float) -> float:
        reported = self._reported_s(pause, index, elapsed)
        return super()._call_s(pause, index, elapsed) if reported is None else reported

    def _call_hold_s(self, pause: Pause, index: int, elapsed: float) -> float:
        reported = self._reported_s(pause, index, elapsed)
        return super()._call_hold_s(pause, index, elapsed) if reported is None else reported

    @staticmethod
    def _reported_s(pause: Pause, index: int, elapsed: float) -> float | None:
        report = pause.progress[index] if index < len(pause.progress) else None
        if report is None or report.fraction <= 0.0:
            return None
        after_s = report.at - pause.since
        left_s = after_s * (1.0 - report.fraction) / report.fraction
        return _or_as_long_again(left_s, max(0.0, elapsed - after_s))

    def _of_pause(self, pause: Pause, now: float, of_call: Callable[[Pause, int, float], float]) -> float:
        if any(report is not None for report in pause.progress):
            return PerCall._of_pause(self, pause, now, of_call)  # reports of the parts beat durations of the whole
        return super()._of_pause(pause, now, of_call)


def _or_as_long_again(known_s: float, elapsed: float) -> float:
    return known_s - elapsed if known_s > elapsed else elapsed


def _name(pause: Pause) -> str:
    """One tool's name, or those of a set of parallel calls in an order that does not matter."""
    if len(pause.calls) == 1:
        return pause.calls[0].tool
    together = ("|" if pause.wait_any else "+").join(sorted(call.tool for call in pause.calls))
    return together if len(together) <= MAX_NAME_CHARS else hashlib.sha256(together.encode()).hexdigest()


ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "elapsed": Elapsed,
    "profiled": Profiled,
    "conditional": Conditional,
    "hint": Hint,
    "progress": Reported,
    "oracle": Oracle,
}


def make_estimator(name: str) -> Estimator:
    """A fresh estimator; ValueError names the ones there are."""
    try:
        return ESTIMATORS[name]()
    except KeyError:
        raise ValueError(f"estimator is {name!r}; it must be one of {', '.join(ESTIMATORS)}") from None
