"""Sampling arguments as programs and runs give them: checked once, and laid over each other."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from caesura.lang.errors import DefinitionError

_BOUNDS: dict[str, tuple[float, float]] = {
    "max_tokens": (0, 1_000_000),
    "min_tokens": (0, 1_000_000),
    "n": (1, 128),
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, 1 << 31),
    "min_p": (0.0, 1.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),
    "top_logprobs_num": (0, 20),
    "seed": (0, (1 << 63) - 1),
}


def _tuple_of(kind: type, name: str, values: object) -> tuple[Any, ...]:
    if isinstance(values, Iterable):
        items = tuple(values)
        if kind is int:
            with contextlib.suppress(TypeError):
                items = tuple(map(operator.index, items))  # numpy's ints, too
        if all(isinstance(item, kind) for item in items):
            return items
    raise DefinitionError(f"{name} is {values!r}; it must be a list of {kind.__name__}")


def check_pattern(name: str, pattern: object) -> None:
    """Raise DefinitionError for what is no regular expression."""
    if not isinstance(pattern, str):
        raise DefinitionError(f"{name} is {pattern!r}; it must be a str")
    try:
        re.compile(pattern)
    except re.error as error:
        raise DefinitionError(f"{name} {pattern!r} cannot be compiled: {error}") from None


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling arguments; None means "as the run says", and what the run leaves open has a fixed default."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    stop_regex: tuple[str, ...] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    return_text_in_logprobs: bool | None = None

    @staticmethod
    def of(values: Mapping[str, Any]) -> Sampling:
        """Check and normalise arguments as a caller writes them."""
        clean = dict(values)
        for name in ("stop", "stop_regex"):
            if isinstance(clean.get(name), str):
                clean[name] = (clean[name],)
        for name, kind in (("stop", str), ("stop_regex", str), ("stop_token_ids", int)):
            if clean.get(name) is not None:
                clean[name] = _tuple_of(kind, name, clean[name])
        if clean.get("logit_bias") is not None:
            try:
                clean["logit_bias"] = tuple((int(k), float(v)) for k, v in dict(clean["logit_bias"]).items())
            except (TypeError, ValueError):
                raise DefinitionError(
                    f"logit_bias is {clean['logit_bias']!r}; it must map token ids to numbers"
                ) from None
        for name, (low, high) in _BOUNDS.items():
            value = clean.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int if isinstance(low, int) else (int, float)):
                wanted = "an int" if isinstance(low, int) else "a number"
                raise DefinitionError(f"{name} is {value!r}; it must be {wanted}")
            if not low <= value <= high:
                raise DefinitionError(f"{name} is {value}; it must lie between {low} and {high}")
        if not all(clean.get("stop") or ()):
            raise DefinitionError(f"stop is {clean['stop']!r}; no stop string may be empty")
        for pattern in clean.get("stop_regex") or ():
            check_pattern("stop_regex", pattern)
        return Sampling(**clean)

    def over(self, defaults: Sampling) -> Sampling:
        """These arguments, with what is None taken from ``defaults``."""
        taken = {
            item.name: getattr(defaults, item.name)
            for item in fields(self)
            if getattr(self, item.name) is None and getattr(defaults, item.name) is not None
        }
        return replace(self, **taken) if taken else self
