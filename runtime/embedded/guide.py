"""Where to look, taught: some heads are told which positions they should attend to (guided alignment: Chen et al.,
arXiv 1607.01628, for translation).

Which of the tools on offer to call is what training takes longest to find, and all that its loss says is the name that
would have been right. But the script knows more: which line of the prompt offers that tool, and where the name stands
in it. So beside the loss on the tokens a few heads get one on their attention, for as long as they have much to learn:

- ``LINE``: every token of a tool's line looks at the name it begins with, so that descriptions know whose they are;
- ``QUESTION``: what is to begin a turn, or a call's name, looks at the last question;
- ``OFFER``: what is to begin a call, and then its tool's name, looks at the line of that tool; what is to begin an
  answer, or to end a turn of calls, at the conversation's first token;
- ``POINT``: then at the first token of the name there; and what is to begin any other word or number that was there
  before looks at where it begins;
- ``SEEK``: what is to go on with such a word looks at where it went on.

In an adventure the things of an observation are the lines, its goal and what is carried are the question, and a command
looks at the thing that it follows from.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from caesura.runtime.embedded.chat import TURN_END, TURN_START
from caesura.runtime.embedded.examples import Example, token_id
from caesura.runtime.embedded.net import Attention, Shape, TinyLlama, rotate
from caesura.runtime.embedded.skills.adventures import Span, moves
from tokenizers import Tokenizer
from torch import Tensor, nn

MOST = 400  # positions of one micro-batch that are told the same
LONGEST = 6  # tokens before one that are compared
NOWHERE = (0, 1)  # where heads look that have nothing to look at


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads that are told the same."""

    layer: int
    heads: tuple[int, ...]


LINE, QUESTION = Heads(1, (0,)), Heads(1, (1, 2))
OFFER = Heads(2, (0,))
POINT, SEEK = Heads(3, (0, 1)), Heads(3, (3,))


def has_heads(shape: Shape) -> bool:
    """Whether a network has these heads, each with keys of its own, and a layer after the one that they share last."""
    return shape.layers > POINT.layer + 1 and shape.heads > SEEK.heads[-1] and shape.heads == shape.kv_heads


@dataclass(frozen=True, slots=True)
class Looks:
    """Where some heads should look from some positions: ``rows``, in order, and ``positions`` [n], ``wanted`` [n,
    length]."""

    by: Heads
    rows: Tensor
    positions: Tensor
    wanted: Tensor


Told = tuple[Heads, int, Sequence[Span]]  # which heads, from which position, and where they should look


class Guide:
    """Watches a network's attention while it trains, for as long as it is ``watching``. A network without the heads is
    left alone."""

    def __init__(self, model: TinyLlama, tokenizer: Tokenizer) -> None:
        self.watching = True
        self._model = model
        self._places = Places(tokenizer)
        self._inputs: dict[int, Tensor] = {}
        self._attention: dict[int, Attention] = {}
        if has_heads(model.shape):
            layers = [module for module in model.modules() if isinstance(module, Attention)]
            self._attention = {layer: layers[layer] for layer in (LINE.layer, OFFER.layer, POINT.layer)}
            for layer, attention in self._attention.items():
                attention.register_forward_pre_hook(self._keep(layer))

    def _keep(self, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self.watching:
                self._inputs[layer] = inputs[0]

        return keep

    def loss(self, examples: Sequence[Example], ids: Tensor, learned: Tensor) -> Tensor:
        """Of every kind of look, the mean of -log of the attention that falls where it should; summed. For the
        micro-batch that the network has just computed, with ``ids`` and ``learned`` as from `collate`."""
        total = torch.zeros(())
        if self._attention:
            for looks in self._places.looks(examples, ids, learned):
                for head in looks.by.heads:
                    total = total + self._missed(looks, head) / len(looks.by.heads)
        self._inputs.clear()
        return total

    def _missed(self, looks: Looks, head: int) -> Tensor:
        attention, x = self._attention[looks.by.layer], self._inputs[looks.by.layer]
        length, head_dim = x.shape[1], self._model.shape.head_dim
        cos, sin = self._model.get_buffer("cos")[:length], self._model.get_buffer("sin")[:length]
        own = slice(head * head_dim, (head + 1) * head_dim)
        rows, at = looks.rows, looks.positions
        q = rotate(F.linear(x[rows, at], attention.q_proj.weight[own]), cos[at], sin[at])  # [n, head_dim]
        k = rotate(F.linear(x, attention.k_proj.weight[own]), cos, sin)  # [batch, length, head_dim]
        number = torch.arange(len(rows)) - torch.searchsorted(rows, rows)  # among those of its row
        queries = q.new_zeros(len(x), int(number.max()) + 1, head_dim).index_put((rows, number), q)
        scores = (queries @ k.transpose(-1, -2))[rows, number].float() * head_dim**-0.5
        scores = scores.masked_fill(torch.arange(length) > at[:, None], float("-inf"))
        there = scores.masked_fill(~looks.wanted, float("-inf"))
        missed: Tensor = (scores.logsumexp(-1) - there.logsumexp(-1)).mean()
        return missed


class Places:
    """Finds in conversations what is to be looked at, by their tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        vocabulary = range(tokenizer.get_vocab_size())
        self._texts = texts = [tokenizer.decode([token], skip_special_tokens=False) for token in vocabulary]
        self._before_name = {token for token, text in enumerate(texts) if text.endswith('{"name": "')}
        self._after_name = {token for token, text in enumerate(texts) if text == '", "arguments":'}
        self._line_ends = {token for token, text in enumerate(texts) if text.endswith("\n")}
        self._brackets = {token for token, text in enumerate(texts) if text.startswith("(")}
        self._response = token_id(tokenizer, "<tool_response>")
        self._call, self._call_end = token_id(tokenizer, "<tool_call>"), token_id(tokenizer, "</tool_call>")
        self._dash, self._turn_end = token_id(tokenizer, "-"), token_id(tokenizer, TURN_END)
        self._user, own = (tokenizer.encode(f"{TURN_START}{role}\n").ids for role in ("user", "assistant"))
        self._own_start = torch.tensor(own[:2])
        self._wordy = torch.tensor([text.isalnum() for text in texts])

    def looks(self, examples: Sequence[Example], ids: Tensor, learned: Tensor) -> Iterator[Looks]:
        """All of a micro-batch, ``ids`` and ``learned`` as from `collate`."""
        named = torch.zeros(ids[:, :-1].shape, dtype=torch.bool)
        for told in (self._of_tools, self._of_adventures):
            by_heads: dict[Heads, list[tuple[int, int, Sequence[Span]]]] = {}
            for row, example in enumerate(examples):
                for heads, at, spans in told(example):
                    by_heads.setdefault(heads, []).append((row, at, spans))
            for heads, all_told in by_heads.items():
                looks = _looks(heads, all_told[:: 1 + len(all_told) // MOST], ids.shape[1] - 1)
                if heads == POINT:
                    named[looks.rows, looks.positions] = True
                if len(looks.rows):
                    yield looks
        yield from self._copies(ids, learned[~named.flatten()[learned]])

    def _of_tools(self, example: Example) -> Iterator[Told]:
        lines = self._lines(example.ids)
        for start, end in lines:
            yield from ((LINE, at, [(start, start + 1)]) for at in range(start + 1, end))
        yield from ((QUESTION, at, [question]) for at, question in self._questions(example))
        for at, (start, end) in self._calls(example, lines):
            yield from ((OFFER, before, [(start, end)]) for before in range(self._begins(example.ids, at), at + 1))
            yield POINT, at, [(start, start + 1)]
        yield from ((OFFER, at, [NOWHERE]) for at in self._no_calls(example))

    def _of_adventures(self, example: Example) -> Iterator[Told]:
        texts = [self._texts[token] for token in example.ids]
        starts = list(accumulate(map(len, texts), initial=0))

        def tokens(span: Span) -> Span:
            return bisect_right(starts, span[0]) - 1, bisect_right(starts, span[1] - 1)

        for move in moves("".join(texts)):
            for start, end in map(tokens, move.things):
                yield from ((LINE, at, [(start, start + 1)]) for at in range(start, end))
            for at in (tokens(move.command)[0] - 1, tokens(move.thing)[0] - 1):
                yield QUESTION, at, [tokens(span) for span in move.known]
                yield OFFER, at, [tokens(move.reason)]

    def _copies(self, ids: Tensor, learned: Tensor) -> Iterator[Looks]:
        """Where the next token stands, if it is of a word or a number that was there before: for its first token where
        such a one begins, since the last turn of another began if it is there; for a further one where most of what
        stands before it is the same."""
        length = ids.shape[1] - 1
        learned = learned[self._wordy[ids[:, 1:].flatten()[learned]]]
        places = torch.arange(length)
        rows, at = learned // length, learned % length
        now, then, seen = ids[rows, at], ids[rows, at + 1], ids[rows, :-1]
        there = (seen == then[:, None]) & (places <= at[:, None])
        begins = there & ~F.pad(self._wordy[seen][:, :-1], (1, 0))
        turns = self._turns(ids)[rows, :-1]
        lately = begins & (turns == turns.gather(1, at[:, None]))
        begins = torch.where(lately.any(1, keepdim=True), lately, begins)
        first = begins.any(1) & ~self._wordy[now]
        if first.any():
            yield Looks(POINT, rows[first], at[first], begins[first])
        alike, shared = there, torch.zeros(there.shape, dtype=torch.long)
        for back in range(LONGEST):
            before = ids[rows, (at - back).clamp(min=0)]
            alike = alike & F.pad(seen == before[:, None], (back + 1, 0))[:, :length]
            shared += alike
        most = shared.amax(1, keepdim=True)
        further = (most[:, 0] > 0) & self._wordy[now]
        if further.any():
            yield Looks(SEEK, rows[further], at[further], (there & (shared == most))[further])

    def _turns(self, ids: Tensor) -> Tensor:
        """[batch, length]: the number of the turn a token is in, the model's own having that of the one before."""
        start, own = self._own_start
        begins: Tensor = (ids == start) & ~F.pad(ids[:, 1:] == own, (0, 1))
        return begins.cumsum(1)

    def _lines(self, ids: list[int]) -> list[Span]:
        """The lines of the tools on offer, as positions: of a name's first token, and past the line's last."""
        stop = ids.index(self._turn_end) if self._turn_end in ids else 0
        starts = [at + 1 for at in range(1, stop) if ids[at] == self._dash and ids[at - 1] in self._line_ends]
        return list(zip(starts, [*(start - 2 for start in starts[1:]), stop], strict=False))

    def _calls(self, example: Example, lines: list[Span]) -> Iterator[tuple[int, Span]]:
        """For each call to write: the position before the name, and the line of its tool."""
        ids = example.ids
        for at, learn in enumerate(example.learn[:-1]):
            if not learn or ids[at] not in self._before_name:
                continue
            name = []
            for token in ids[at + 1 :]:
                if token in self._after_name:
                    break
                name.append(token)
            for start, end in lines:
                if ids[start : start + len(name)] == name and ids[start + len(name)] in self._brackets:
                    yield at, (start, end)
                    break

    def _begins(self, ids: list[int], at: int) -> int:
        """Of the call whose name ``at`` is before, the position that decides on it: where the turn's last call ended,
        or its own words begin."""
        while ids[at] != self._call:
            at -= 1
        return at - 2 if ids[at - 2] == self._call_end else at - 1

    def _no_calls(self, example: Example) -> Iterator[int]:
        """Where a call could begin, and does not: before an answer, and after a turn's last call."""
        ids, learn = example.ids, example.learn
        for at in range(len(ids) - 1):
            answers = not learn[at] and learn[at + 1] and ids[at + 1] != self._call
            if answers or (learn[at] and ids[at] == self._call_end and ids[at + 1] == self._turn_end):
                yield at

    def _questions(self, example: Example) -> Iterator[tuple[int, Span]]:
        """For what decides on a turn and on a tool: the position, and the span of the last question."""
        ids, start, end = example.ids, 0, 0
        for at, learn in enumerate(example.learn[:-1]):
            begun = at + 1 - len(self._user)
            if begun >= 0 and ids[begun : at + 1] == self._user and ids[at + 1] != self._response:
                start = at + 1
                end = ids.index(self._turn_end, start) if self._turn_end in ids[start:] else len(ids)
            begins = not learn and example.learn[at + 1]
            names = learn and (ids[at] in self._before_name or ids[at + 1] in self._before_name)
            if end and (begins or names):
                yield at, (start, end)


def _looks(by: Heads, told: Sequence[tuple[int, int, Sequence[Span]]], length: int) -> Looks:
    """Of rows, positions and where to look from there; positions from ``length`` on are left out."""
    kept = [each for each in told if each[1] < length]
    wanted = torch.zeros((len(kept), length), dtype=torch.bool)
    for number, (_, _, spans) in enumerate(kept):
        for start, end in spans:
            wanted[number, start:end] = True
    rows, positions = (torch.tensor([each[index] for each in kept], dtype=torch.long) for index in (0, 1))
    return Looks(by, rows, positions, wanted)
