"""Copying, planted before the training: a network from noise needs a sixth of it to find that what followed a token
before will follow it again, and learns little else until then.

Heads of the first layer look back one and two positions and write down which tokens stand there; further up, heads seek
the positions that were preceded by what stands here, and copy what they find: an induction circuit (Olsson et al.,
arXiv 2209.11895), set up in the way of mimetic initialization (Trockman & Kolter, arXiv 2305.09828). The heads that a
`Guide` tells where to look are given what to do with what they find: a line on offer knows its name, a call hears the
question's words, then the name of the line that fits, and copies it from where it stands. Only the last of
these layers adds to the part of the hidden space that tells tokens apart, after all the others have read it, and
everything else has parts to itself: so nothing is mistaken for a token. It is all rough, and training does with it what
it likes.
"""

from __future__ import annotations

import math

import torch
from caesura.runtime.embedded.guide import LINE, OFFER, POINT, QUESTION, SEEK, has_heads
from caesura.runtime.embedded.net import EMBEDDING_STD, INIT_STD, Attention, TinyLlama
from torch import Tensor

TOKENS_SHARE = 0.4  # of the hidden space: what tells tokens apart
COMMON = 0.7  # of every embedding, in units of its random part: what looking at positions alone can hold on to
LOOK_BACK_NATS = 5.0  # by which the wanted distance is ahead of its neighbours
SEEK_NATS = 6.0  # about what a position that fits is ahead by
WRITTEN, COPIED, POINTED, HEARD = 1.5, 2.0, 4.0, 3.0  # how large, beside the embeddings, what heads add is
FASTEST = (1.0, 1.0, 0.7, 0.5)  # shares of the fastest rotations in looking back; the slow ones cannot tell neighbours


@torch.no_grad()
def plant(model: TinyLlama, seed: int) -> None:
    """Set up copying. A network without the heads for it stays as it is."""
    shape = model.shape
    if not has_heads(shape):
        return
    noise = torch.Generator().manual_seed(seed)
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    heads = [slice(at, at + shape.head_dim) for at in range(0, shape.hidden, shape.head_dim)]
    common, tokens, one_back, two_back, of_line, of_call, asked = _spaces(shape.hidden, noise)
    embeddings = model.model.embed_tokens.weight
    embeddings.copy_((embeddings @ tokens.T @ tokens) * TOKENS_SHARE**-0.5)
    embeddings += COMMON * EMBEDDING_STD * shape.hidden**0.5 * common

    for distance, (head, written) in enumerate(zip(heads, (one_back, two_back), strict=False), 1):
        _look_back(layers[0], head, common[0], distance)
        _carry(layers[0], head, tokens, written, WRITTEN)
    line, question, offer, point = (layers[each.layer] for each in (LINE, QUESTION, OFFER, POINT))
    half = len(asked) // 2
    heard = [(asked[:half], tokens[:half]), (asked[half:], tokens[half:])]
    for number, (written, read) in zip(QUESTION.heads, heard, strict=True):
        _carry(question, heads[number], read, written, HEARD)
    _match(offer, heads[OFFER.heads[0]], heard)
    _carry(line, heads[LINE.heads[0]], tokens, of_line, WRITTEN)
    _carry(offer, heads[OFFER.heads[0]], of_line, of_call, WRITTEN)
    for number, head in enumerate(heads):
        if number in POINT.heads:
            copied = tokens.roll(-number * len(tokens) // len(POINT.heads), 0)
            _match(point, head, [(of_call, tokens)])
            _carry(point, head, copied, copied, POINTED)
        else:
            copied = tokens.roll(-number * len(tokens) // (len(heads) - len(POINT.heads)), 0)
            one, two = (tokens, one_back), (one_back, two_back)
            _match(point, head, [one, two] if number in SEEK.heads else [one])
            _carry(point, head, copied, copied, COPIED)


def _spaces(hidden: int, noise: torch.Generator) -> list[Tensor]:
    """Parts of the hidden space at right angles, [size, hidden] each: what all embeddings share, what tells them apart,
    where the tokens one and two back are written, whose line this is, which tool's name is wanted here, and the
    words of the question."""
    basis: Tensor = torch.linalg.qr(torch.randn(hidden, hidden, generator=noise))[0].T
    sizes = [1, *(int(share * hidden) for share in (TOKENS_SHARE, 0.15, 0.1, 0.1, 0.1))]
    return list(torch.split(basis, [*sizes, hidden - sum(sizes)]))


def _look_back(attention: Attention, head: slice, common: Tensor, distance: int) -> None:
    """Attend to the position ``distance`` back, by rotation alone: its key, turned back so far, is the query."""
    shape = attention.shape
    half = shape.head_dim // 2
    shares = torch.zeros(half)
    shares[: len(FASTEST)] = torch.tensor(FASTEST)[:half]
    angles = shape.rope_theta ** -(torch.arange(half) / half)
    ahead = float(shares @ (1 - angles.cos()))
    held = shape.hidden * COMMON**2 / (1 + COMMON**2)  # the common part of a normalized state, squared
    size = (shares * LOOK_BACK_NATS * shape.head_dim**0.5 / ahead / held).sqrt()
    query = torch.cat((size, torch.zeros(half)))
    key = torch.cat((size * (angles * distance).cos(), size * (angles * distance).sin()))
    attention.q_proj.weight[head] += torch.outer(query, common)
    attention.k_proj.weight[head] += torch.outer(key, common)


def _match(attention: Attention, head: slice, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Attend to where the same lies along the second of each pair as here along the first. In the slowest rotations,
    which hold over some hundred positions."""
    shape = attention.shape
    half = shape.head_dim // 2
    slow = [*range(half // 2, half), *range(half + half // 2, shape.head_dim)]
    size = (SEEK_NATS * shape.head_dim**0.5 * (1 + COMMON**2) * TOKENS_SHARE / len(slow)) ** 0.5
    for number, (here, there) in enumerate(pairs):
        rows = slow[number :: len(pairs)]
        count = min(len(rows), len(here), len(there))
        query, key = torch.zeros(shape.head_dim, shape.hidden), torch.zeros(shape.head_dim, shape.hidden)
        query[rows[:count]], key[rows[:count]] = here[:count] * size, there[:count] * size
        attention.q_proj.weight[head] += query
        attention.k_proj.weight[head] += key


def _carry(attention: Attention, head: slice, read: Tensor, written: Tensor, gain: float) -> None:
    """What is attended to lies along ``read`` and is added along ``written``, as far as the head is wide."""
    count = min(head.stop - head.start, len(read), len(written))
    rows = slice(head.start, head.start + count)
    size = INIT_STD * math.sqrt(attention.shape.hidden)
    attention.v_proj.weight[rows] = read[:count] * size
    attention.o_proj.weight[:, rows] = written[:count].T * (gain * EMBEDDING_STD / size)
