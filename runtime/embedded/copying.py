"""Copying, planted before the training: a network from noise needs a sixth of it to find that what followed a token
before will follow it again, and learns little else until then.

The first layer's first two heads look back one and two positions and write down which tokens stand there. In the
second layer heads seek the positions that were preceded by what stands here, half of them also by what stands before
it, and copy what they find: an induction circuit (Olsson et al., arXiv 2209.11895), set up in the way of mimetic
initialization (Trockman & Kolter, arXiv 2305.09828). It is rough, its parts are added to or of the size of random
weights, and training does with it what it likes.
"""

from __future__ import annotations

import math

import torch
from caesura.runtime.embedded.net import INIT_STD, Attention, TinyLlama
from torch import Tensor

COMMON = 0.7  # of every embedding, in units of its random part: what looking at positions alone can hold on to
LOOK_BACK_NATS = 5.0  # by which the wanted distance is ahead of its neighbours
SEEK_NATS = 6.0  # about what a position that fits is ahead by
WRITTEN, COPIED = 1.5, 2.0  # how large, beside the embeddings, what the two layers add is
FASTEST = (1.0, 1.0, 0.7, 0.5)  # shares of the fastest rotations in looking back; the slow ones cannot tell neighbours


@torch.no_grad()
def plant(model: TinyLlama, seed: int) -> None:
    """Set up copying in a network's first two layers. One with fewer, or with under four heads of their own keys and
    values, stays as it is."""
    shape = model.shape
    if shape.layers < 2 or shape.heads < 4 or shape.heads != shape.kv_heads:
        return
    noise = torch.Generator().manual_seed(seed)
    heads = [slice(at, at + shape.head_dim) for at in range(0, shape.hidden, shape.head_dim)]
    tokens, *places = (_directions(shape.hidden, noise) for _ in range(3))
    common = _directions(shape.hidden, noise)[0]
    embeddings = model.model.embed_tokens.weight
    embeddings -= torch.outer(embeddings @ common, common)
    embeddings += COMMON * INIT_STD * shape.hidden**0.5 * common
    first, second, *_ = (module for module in model.modules() if isinstance(module, Attention))
    parts = tokens[: shape.head_dim]
    before = [place[: shape.head_dim] for place in places]  # where the tokens one and two back are written
    for distance, (head, written) in enumerate(zip(heads, before, strict=False), 1):
        _look_back(first, head, common, distance)
        _carry(first, head, parts, written, WRITTEN)
    seeking = heads[:-1]
    for number, head in enumerate(seeking):
        _seek(second, head, parts, before, noise, both=2 * number >= len(seeking))
        _carry(second, head, tokens[head], tokens[head], COPIED)


def _directions(size: int, noise: torch.Generator) -> Tensor:
    """[size, size]: random orthonormal rows."""
    basis: Tensor = torch.linalg.qr(torch.randn(size, size, generator=noise))[0]
    return basis.T


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


def _seek(
    attention: Attention, head: slice, parts: Tensor, before: list[Tensor], noise: torch.Generator, *, both: bool
) -> None:
    """Attend to where the token before is the one that is here, and for ``both`` the one before it too. In the slowest
    rotations, which hold over some hundred positions."""
    shape = attention.shape
    half = shape.head_dim // 2
    slow = [*range(half // 2, half), *range(half + half // 2, shape.head_dim)]
    size = (SEEK_NATS * shape.head_dim**0.5 * (1 + COMMON**2) / len(slow)) ** 0.5
    picked = torch.randperm(shape.head_dim, generator=noise)[: len(slow)]
    query, key = torch.zeros(shape.head_dim, shape.hidden), torch.zeros(shape.head_dim, shape.hidden)
    query[slow], key[slow] = parts[picked] * size, before[0][picked] * size
    if both:
        query[slow[1::2]], key[slow[1::2]] = before[0][picked[1::2]] * size, before[1][picked[1::2]] * size
    attention.q_proj.weight[head] += query
    attention.k_proj.weight[head] += key


def _carry(attention: Attention, head: slice, read: Tensor, written: Tensor, gain: float) -> None:
    """What is attended to lies along ``read`` and is added along ``written``, both [head_dim, hidden]."""
    size = INIT_STD * math.sqrt(attention.shape.hidden)
    attention.v_proj.weight[head] = read * size
    attention.o_proj.weight[:, head] = written.T * (gain * INIT_STD / size)
