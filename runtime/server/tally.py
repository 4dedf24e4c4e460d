"""What this server counts by itself: of one request, for its line in the log, and of all of them, for the metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from caesura.runtime.generation import Finish, TokenChunk
from starlette.types import Scope

TALLY = "caesura.tally"


@dataclass(slots=True)
class ServerCounts:
    """Sums over the server's life; ``connections`` is how many are open."""

    connections: int = 0
    finishes: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class RequestTally:
    """What a request used. Choices of one prompt count its tokens once; ``pauses`` are answers that wait for tools."""

    server: ServerCounts = field(default_factory=ServerCounts)
    tokens_in: int = 0
    tokens_out: int = 0
    cached_tokens: int = 0
    pauses: int = 0
    finishes: list[str] = field(default_factory=list)
    _prompts: set[int] = field(default_factory=set)

    def chunk(self, chunk: TokenChunk) -> None:
        """Tokens that came out."""
        self.tokens_out += len(chunk.token_ids)

    def prompt(self, number: int, finish: Finish) -> None:
        """A prompt has been computed; the first of its choices tells what was cached."""
        if number not in self._prompts:
            self._prompts.add(number)
            self.tokens_in += finish.prompt_tokens
            self.cached_tokens += finish.cached_tokens

    def finish(self, reason: str) -> None:
        """A choice has ended."""
        self.finishes.append(reason)
        self.server.finishes[reason] += 1
        self.pauses += reason == "tool_calls"


def tally_of(scope: Scope) -> RequestTally | None:
    """The tally of a request that has done any work."""
    found = scope.get(TALLY)
    return found if isinstance(found, RequestTally) else None
