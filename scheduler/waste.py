"""Waste in token-seconds: memory that sits idle, is filled twice, or waits for a copy (arXiv 2402.01869, section 4).

The paper multiplies everything by M, the KV bytes of a token; it is one factor of all and drops out here.
"""

from __future__ import annotations

from caesura.scheduler.profile import CostProfile
from caesura.scheduler.types import ActionCosts


def preserve_token_s(remaining_s: float, held_tokens: int) -> float:
    """Equation 2: W_P = T_int * C. What is held idles for the whole pause."""
    return remaining_s * held_tokens


def discard_token_s(profile: CostProfile, start: int, num_tokens: int, other_tokens: int) -> float:
    """Equation 4, chunked: W_CD = T_fwd(C) * C / 2 + n * T_fwd(C/n) * C_other.

    The context's own memory fills linearly while it is recomputed (half of it idles), and the others wait for the time
    the chunks add. ``start`` is the depth of the run: attention makes deep tokens dearer.
    """
    added_s = profile.recompute_s(start, num_tokens)
    return added_s * num_tokens / 2 + added_s * other_tokens


def swap_blocking_token_s(profile: CostProfile, num_tokens: int, batch_tokens: int) -> float:
    """Equation 3: W_S = 2 * T_swap(C) * C_batch, when all wait for the copies."""
    return 2 * profile.copy_s(num_tokens) * batch_tokens


def swap_hidden_token_s(profile: CostProfile, num_tokens: int, *, on_host: bool) -> float:
    """Copies beside compute: only the tokens being copied are idle, on the way out (unless a host copy is
    there already) and on the way back in."""
    directions = 1 if on_host else 2
    return directions * profile.copy_s(num_tokens) * num_tokens


def swap_exposed_token_s(profile: CostProfile, num_tokens: int, waiting_tokens: int, *, on_host: bool) -> float:
    """What a copy costs that nobody but its own context waits for.

    On return all of the context (``waiting_tokens``) idles until the ``num_tokens`` are back; on the way out they
    themselves idle, unless a host copy was made beforehand.
    """
    copy_s = profile.copy_s(num_tokens)
    return copy_s * waiting_tokens + (0.0 if on_host else copy_s * num_tokens)


def discard_contended_token_s(profile: CostProfile, start: int, num_tokens: int, used_tokens: int) -> float:
    """Recomputing while memory is short: everything in memory (``used_tokens``) stays there that much longer.

    Equation 4 counts the running batch alone. But those who wait for memory wait for whoever holds it, so a second of
    everybody's compute is worth the whole pool; with little running, equation 4 would discard where a copy is free.
    """
    return profile.recompute_s(start, num_tokens) * max(num_tokens, used_tokens)


def action_costs(
    profile: CostProfile, remaining_s: float, start: int, num_tokens: int, other_tokens: int, *, on_host: bool = False
) -> ActionCosts:
    """The waste of all three actions for tokens ``[start, start + num_tokens)`` of a paused context."""
    return ActionCosts(
        preserve_token_s=preserve_token_s(remaining_s, num_tokens),
        swap_token_s=swap_hidden_token_s(profile, num_tokens, on_host=on_host),
        discard_token_s=discard_token_s(profile, start, num_tokens, other_tokens),
    )


def triangular_token_s(profile: CostProfile, num_tokens: int, other_tokens: int, chunk_tokens: int) -> float:
    """Equation 4 as InferCept's code sums it: f(S) c n (n+1) / 2 + a c n R + a l (R + l).

    ``chunk_tokens`` c is the part of S that is free, n the chunks before the last one, a the seconds of a token, R the
    tokens of the running batch. l is C mod c as it is there: where C is a multiple, the last chunk is not counted.
    """
    chunk = max(1, chunk_tokens)
    chunks = max(0, -(-num_tokens // chunk) - 1)
    last = num_tokens % chunk
    own = profile.forward_s(profile.saturation_tokens) * chunk * chunks * (chunks + 1) / 2
    others = profile.token_s * chunk * chunks * other_tokens
    return own + others + profile.token_s * last * (other_tokens + last)
