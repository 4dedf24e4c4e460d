"""What a program will do next, learned as means over what came before: for policies whose papers train a predictor."""

from __future__ import annotations

from caesura.scheduler.context import Context
from caesura.scheduler.estimate import keep_latest
from caesura.scheduler.types import ContextId

NEWEST = 0.05  # weight of the newest value in a running mean
FIRST_TOKENS, FIRST_S = 100.0, 0.5  # before anything was seen


class Foresight:
    """Running means of the tokens generated until the next pause and of the seconds it takes.

    Both are kept per tool of the pause before ("" at a program's beginning), on the observation that a program goes on
    as it began. The papers' predictors read the prompt instead, with a trained model; a scheduler cannot.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._after: dict[ContextId, str] = {}  # the last tool of a context
        self._since: dict[ContextId, float] = {}
        self._had: dict[ContextId, int] = {}  # tokens when it was queued

    def saw_queued(self, context: Context, now: float) -> None:
        """A stretch begins; a pause, if there was one, has ended."""
        since = self._since.pop(context.id, None)
        if since is not None:
            _learn(self._seconds, self._after.get(context.id, ""), now - since)
        self._had[context.id] = context.num_tokens

    def saw_paused(self, context: Context, now: float) -> None:
        """A stretch has ended (no calls), or a pause begins (calls)."""
        had = self._had.pop(context.id, None)
        if had is not None:
            _learn(self._tokens, self._after.get(context.id, ""), context.num_tokens - had)
        if context.pause.calls:
            self._after[context.id] = context.pause.tool
            self._since[context.id] = now

    def saw_closed(self, context: Context) -> None:
        """Forget it."""
        for book in (self._after, self._since, self._had):
            book.pop(context.id, None)

    def tokens(self, context: Context) -> float:
        """Expected tokens until the next pause."""
        return self._tokens.get(self._after.get(context.id, ""), FIRST_TOKENS)

    def seconds(self, context: Context) -> float:
        """Expected seconds of that pause."""
        return self._seconds.get(self._after.get(context.id, ""), FIRST_S)


def _learn(means: dict[str, float], key: str, value: float) -> None:
    before = means.get(key, value)
    keep_latest(means, key, before + NEWEST * (value - before))
