"""What a caller may ask of a generation, and the state one generation carries between its tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from caesura.runtime.errors import InvalidRequest

GRAMMAR_FAULT = "the grammar"  # how the reason of a failed generation begins when its own grammar is to blame


class ConstraintKind(StrEnum):
    """The grammar languages a generation can be held to."""

    REGEX = "regex"
    JSON_SCHEMA = "json_schema"
    EBNF = "ebnf"  # Lark syntax, as llguidance reads it
    CHOICES = "choices"  # a JSON list of strings


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar the output must match."""

    kind: ConstraintKind
    source: str


# JSON between tokens: enough to indent, never enough to loop in
JSON_SPACE = r"[\x20\x0A\x0D\x09]{1,32}"


def spaced(schema: Any) -> Any:
    """A JSON schema with bounded whitespace between tokens, unless its layout (``x-guidance``) allows none at all."""
    if not isinstance(schema, dict):
        return schema
    layout = schema.get("x-guidance")
    layout = layout if isinstance(layout, dict) else {}
    if layout.get("whitespace_flexible") is False:
        return schema
    return {**schema, "x-guidance": {**layout, "whitespace_pattern": JSON_SPACE}}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling arguments of one generation. Limits are checked once, here.

    ``temperature`` 0 is greedy. ``top_k`` -1 is off. ``logprobs`` is the number of alternatives to report with
    every token (0: the chosen token's only), None for no logprobs at all.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_regex: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    constraint: Constraint | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _bounded("max_new_tokens", self.max_new_tokens, 0, 1_000_000)
        _bounded("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        _bounded("temperature", self.temperature, 0.0, 100.0)
        _bounded("top_p", self.top_p, 0.0, 1.0)
        _bounded("top_k", self.top_k, -1, 1 << 31)
        _bounded("min_p", self.min_p, 0.0, 1.0)
        _bounded("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _bounded("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _bounded("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _bounded("len(stop)", len(self.stop), 0, 16)
        _bounded("len(stop_regex)", len(self.stop_regex), 0, 16)
        if self.logprobs is not None:
            _bounded("logprobs", self.logprobs, 0, 20)
        if self.seed is not None:
            _bounded("seed", self.seed, 0, (1 << 63) - 1)
        for text in self.stop:
            _bounded("len(stop[i])", len(text), 1, 256)


def _bounded(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}; it must lie between {low} and {high}")


class Matcher(Protocol):
    """A grammar's position: which tokens may follow, and what was taken."""

    def fill_mask(self, row: npt.NDArray[np.int32]) -> None:
        """Write the allowed tokens as a bit mask (int32 words, least significant bit first)."""

    def accept(self, token_id: int) -> None:
        """Advance by one token, which the last mask allowed."""

    @property
    def stopped(self) -> bool:
        """The grammar is complete and nothing may follow."""


@dataclass(slots=True)
class SamplerState:
    """One generation's sampling state. Survives preemption: it depends on tokens alone, never on the batch.

    ``prompt_ids`` feed the repetition penalty; ``counts`` are of generated tokens (frequency, presence).
    The random number for output position i is a hash of (seed, i), so a rerun from any state draws the same.
    """

    params: SamplingParams
    seed: int
    prompt_ids: frozenset[int] = frozenset()
    matcher: Matcher | None = None
    num_generated: int = 0
    counts: Counter[int] = field(default_factory=Counter)

    @property
    def needs_history(self) -> bool:
        """The next token depends on what was sampled before it in ways that only the host works out."""
        params = self.params
        return (
            self.matcher is not None
            or params.logprobs is not None
            or params.repetition_penalty != 1.0
            or params.frequency_penalty != 0.0
            or params.presence_penalty != 0.0
            or bool(params.logit_bias)
            or (bool(params.stop_token_ids) and self.num_generated < params.min_new_tokens)
        )

    def accept(self, token_id: int) -> None:
        """Record a sampled token."""
        self.num_generated += 1
        self.counts[token_id] += 1
        if self.matcher is not None:
            self.matcher.accept(token_id)
