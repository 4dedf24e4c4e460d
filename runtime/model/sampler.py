"""From logits to tokens: penalties, grammar masks, temperature, truncation, one uniform number per token.

A row's outcome depends on its logits and its own state alone. The uniform number is a hash of (seed, position in the
output), and a token is drawn by inverting the cumulative distribution, so a rerun in any batch draws the same token.
Order of operations: repetition penalty, frequency and presence penalties, logit bias, grammar mask, bans before
``min_new_tokens``, temperature; logprobs are taken here; then top-k, top-p and min-p, each judged on the same full
distribution (a token must pass all three).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from caesura.runtime.executors.base import SampledToken
from caesura.runtime.sampling import GRAMMAR_FAULT, SamplerState
from torch import Tensor

_COLD, _COLDEST = 1e-3, 1e-30
_CANDIDATES = 256  # most truncated rows are decided by so few tokens; the others pay for a full sort


@dataclass(frozen=True, slots=True)
class SampleFailure:
    """Why one row has no token; the other rows do."""

    reason: str


Outcome = SampledToken | SampleFailure


def sample(logits: Tensor, states: Sequence[SamplerState], eos_ids: Iterable[int]) -> list[Outcome]:
    """Draw one token per row of ``logits`` [rows, vocab] float32 (overwritten). Advances no state."""
    if all(_is_plain_greedy(state) for state in states):
        return _greedy(logits)
    eos = frozenset(eos_ids)
    outcomes: list[Outcome | None] = [None] * len(states)
    for row, state in enumerate(states):
        failure = _shape_row(logits[row], state, eos)
        if failure is not None:
            outcomes[row] = SampleFailure(failure)
            logits[row].zero_()
    logits.div_(torch.tensor([[_temperature(logits[row], state)] for row, state in enumerate(states)]))
    top, greedy_ids = logits.max(dim=-1)
    finite = torch.isfinite(top).tolist()
    drawn = greedy_ids.tolist()
    random_rows = [
        row for row, state in enumerate(states) if state.params.temperature > 0 and finite[row] and not outcomes[row]
    ]
    if random_rows:
        for row, token in zip(random_rows, _draw(logits[random_rows], [states[r] for r in random_rows]), strict=True):
            drawn[row] = token
    for row, state in enumerate(states):
        if outcomes[row] is None:
            outcomes[row] = _report(logits[row], state, drawn[row]) if finite[row] else _NOT_FINITE
    return [outcome for outcome in outcomes if outcome is not None]


def uniform(seed: int, position: int) -> float:
    """The random number of output position ``position``: in [0, 1), with 53 random bits."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


_NOT_FINITE = SampleFailure("the model produced logits that are not finite numbers")
_NOTHING_ALLOWED = f"{GRAMMAR_FAULT} allows no further token"


def _temperature(row: Tensor, state: SamplerState) -> float:
    """What to divide a row [vocab] by. Near zero the quotients would overflow, so the row is shifted: its top is 0."""
    temperature = state.params.temperature or 1.0
    if temperature >= _COLD:
        return temperature
    row.sub_(row.max().clone())
    return max(temperature, _COLDEST)


def _is_plain_greedy(state: SamplerState) -> bool:
    params = state.params
    return (
        params.temperature == 0.0
        and state.matcher is None
        and params.logprobs is None
        and params.repetition_penalty == 1.0
        and params.frequency_penalty == 0.0
        and params.presence_penalty == 0.0
        and not params.logit_bias
        and state.num_generated >= params.min_new_tokens
    )


def _greedy(logits: Tensor) -> list[Outcome]:
    """By numpy, on one thread: torch's threads would spin for milliseconds afterwards, on cores the decoder wants."""
    values = logits.numpy()
    ids = values.argmax(axis=-1)
    finite = np.isfinite(values[np.arange(len(ids)), ids]).tolist()
    return [SampledToken(token) if ok else _NOT_FINITE for token, ok in zip(ids.tolist(), finite, strict=True)]


def _shape_row(row: Tensor, state: SamplerState, eos_ids: frozenset[int]) -> str | None:
    """Apply penalties, bias, mask and bans to one row [vocab] in place; the reason when nothing is left."""
    params, vocab = state.params, row.shape[0]
    if params.repetition_penalty != 1.0:
        seen = _ids(state.prompt_ids | state.counts.keys(), vocab)
        values = row[seen]
        factor = params.repetition_penalty
        row[seen] = torch.where(values > 0, values / factor, values * factor)
    if (params.frequency_penalty or params.presence_penalty) and state.counts:
        counts = {token: count for token, count in state.counts.items() if 0 <= token < vocab and count > 0}
        lowered = [params.frequency_penalty * count + params.presence_penalty for count in counts.values()]
        row[torch.tensor(list(counts), dtype=torch.int64)] -= torch.tensor(lowered, dtype=row.dtype)
    if params.logit_bias:
        ids, values = _bias(params.logit_bias, vocab)
        row[ids] += values.to(row)
    if state.matcher is not None:
        failure = _apply_mask(row, state)
        if failure is not None:
            return failure
    if state.num_generated < params.min_new_tokens:
        _ban(row, eos_ids | frozenset(params.stop_token_ids))
    return None


@functools.lru_cache(maxsize=256)
def _bias(pairs: tuple[tuple[int, float], ...], vocab: int) -> tuple[Tensor, Tensor]:
    """Ids [n] and what is added to their logits [n], each id once; those beyond the vocabulary are left out."""
    total: dict[int, float] = {}
    for token, bias in pairs:
        if 0 <= token < vocab:
            total[token] = total.get(token, 0.0) + bias
    return torch.tensor(list(total), dtype=torch.int64), torch.tensor(list(total.values()), dtype=torch.float32)


def _apply_mask(row: Tensor, state: SamplerState) -> str | None:
    words = np.zeros((row.shape[0] + 31) // 32, dtype=np.int32)
    try:
        assert state.matcher is not None
        state.matcher.fill_mask(words)
    except Exception as error:  # a matcher is a grammar at work: its fault is its own context's, not the batch's
        return f"{GRAMMAR_FAULT} failed: {error}"
    allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: row.shape[0]].astype(bool)
    if not allowed.any():
        return _NOTHING_ALLOWED
    row.masked_fill_(torch.from_numpy(~allowed), -math.inf)
    return None


def _ban(row: Tensor, tokens: Iterable[int]) -> None:
    """Forbid tokens, unless that would leave none: a finished grammar ends the output even before its minimum."""
    ids = _ids(tokens, row.shape[0])
    kept = row[ids].clone()
    row[ids] = -math.inf
    if bool(torch.isneginf(row.max())):
        row[ids] = kept


def _ids(tokens: Iterable[int], vocab: int) -> Tensor:
    return torch.tensor([token for token in tokens if 0 <= token < vocab], dtype=torch.int64)


def _draw(logits: Tensor, states: Sequence[SamplerState]) -> list[int]:
    """Inverse-CDF samples of ``logits`` [rows, vocab] after truncation."""
    probs = torch.softmax(logits, dim=-1)
    min_p = torch.tensor([[state.params.min_p] for state in states])
    if bool((min_p > 0).any()):
        probs = torch.where(probs >= min_p * probs.amax(dim=-1, keepdim=True), probs, 0.0)
    drawn = [0] * len(states)
    truncated = [row for row, state in enumerate(states) if _truncates(state, logits.shape[1])]
    chosen = frozenset(truncated)
    whole = [row for row in range(len(states)) if row not in chosen]
    if whole:
        uniforms = [_next_uniform(states[row]) for row in whole]
        for row, index in zip(whole, _invert(probs[whole], uniforms), strict=True):
            drawn[row] = index
    for row in truncated:
        drawn[row] = _draw_truncated(torch.softmax(logits[row], dim=-1), probs[row], states[row])
    return drawn


def _truncates(state: SamplerState, vocab: int) -> bool:
    return state.params.top_p < 1.0 or 0 < state.params.top_k < vocab


def _next_uniform(state: SamplerState) -> float:
    return uniform(state.seed, state.num_generated)


def _draw_truncated(full: Tensor, kept: Tensor, state: SamplerState) -> int:
    """One row: ``full`` is the distribution that top-k and top-p judge, ``kept`` the same with min-p applied."""
    top_k, top_p = state.params.top_k, state.params.top_p
    limit = full.shape[0] if top_k < 1 else min(top_k, full.shape[0])
    values, ids = torch.topk(full, min(_CANDIDATES, full.shape[0]))
    if limit > _CANDIDATES and float(values.double().sum()) < top_p:
        values, ids = torch.sort(full, descending=True, stable=True)
    before = values.double().cumsum(0) - values.double()  # mass of likelier tokens; the likeliest always stays
    passes = before < top_p
    passes[0] = True
    passes[limit:] = False
    probs = torch.where(passes, kept[ids], 0.0)
    return int(ids[_invert(probs[None], [_next_uniform(state)])[0]])


def _invert(probs: Tensor, uniforms: Sequence[float]) -> list[int]:
    """For each row, the first index whose cumulative mass exceeds uniform * total: never one of zero mass."""
    cumulative = probs.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = torch.tensor(uniforms, dtype=torch.float64)[:, None] * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    indices: list[int] = torch.searchsorted(cumulative, target, right=True)[:, 0].tolist()
    return indices


def _report(row: Tensor, state: SamplerState, token: int) -> SampledToken:
    """Attach logprobs when asked for. ``row`` is after temperature, before truncation."""
    if state.params.logprobs is None:
        return SampledToken(token)
    logprobs = torch.log_softmax(row, dim=-1)
    count = min(state.params.logprobs, row.shape[0])
    values, ids = torch.topk(logprobs, count)
    alternatives = tuple(
        (index, value) for index, value in zip(ids.tolist(), values.tolist(), strict=True) if value > -math.inf
    )
    return SampledToken(token, float(logprobs[token]), alternatives)
