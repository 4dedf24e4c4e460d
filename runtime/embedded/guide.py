"""Where to look, taught: some heads are told which positions they should attend to (guided alignment: Chen et al.,
arXiv 1607.01628, for translation).

Which of the tools on offer to call is what training takes longest to find, and all that its loss says is the name that
would have been right. But the script knows more: which line of the prompt offers that tool, and where the name stands
in it. So beside the loss on the tokens a few heads get one on their attention, which fades with the learning rate:

- ``LINE``: every token of a tool's line looks at the name it begins with, so that descriptions know whose they are;
- ``QUESTION``: what is to begin a turn, or a call's name, looks at the last question;
- ``OFFER``: what is to write a tool's name looks at the line of that tool;
- ``POINT``: then at the first token of the name there; and what is to begin any other word or number that was there
  before looks at where it begins;
- ``SEEK``: what is to go on with such a word looks at where it went on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from caesura.runtime.embedded.chat import TURN_END, TURN_START
from caesura.runtime.embedded.examples import Example, token_id
from caesura.runtime.embedded.net import Attention, Shape, TinyLlama, rotate
from tokenizers import Tokenizer
from torch import Tensor, nn

MOST_IN_LINES = 400  # tokens of lines that are asked where they look, of one micro-batch
LONGEST = 6  # tokens before one that are compared


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
    """Where some heads should look from some positions: ``rows`` and ``positions`` [n], ``wanted`` [n, length]."""

    by: Heads
    rows: Tensor
    positions: Tensor
    wanted: Tensor


class Guide:
    """Watches a network's attention while it trains. A network without the heads is left alone."""

    def __init__(self, model: TinyLlama, tokenizer: Tokenizer) -> None:
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
        rows = slice(head * head_dim, (head + 1) * head_dim)
        q = rotate(F.linear(x, attention.q_proj.weight[rows]), cos, sin)
        k = rotate(F.linear(x, attention.k_proj.weight[rows]), cos, sin)
        scores = (q @ k.transpose(-1, -2))[looks.rows, looks.positions].float() * head_dim**-0.5
        scores = scores.masked_fill(torch.arange(length) > looks.positions[:, None], float("-inf"))
        there = scores.masked_fill(~looks.wanted, float("-inf"))
        missed: Tensor = (scores.logsumexp(-1) - there.logsumexp(-1)).mean()
        return missed


class Places:
    """Finds in conversations what is to be looked at, by their tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = [tokenizer.decode([token], skip_special_tokens=False) for token in range(tokenizer.get_vocab_size())]
        self._before_name = {token for token, text in enumerate(texts) if text.endswith('{"name": "')}
        self._after_name = {token for token, text in enumerate(texts) if text == '", "arguments": '}
        self._line_ends = {token for token, text in enumerate(texts) if text.endswith("\n")}
        self._brackets = {token for token, text in enumerate(texts) if text.startswith("(")}
        self._response = token_id(tokenizer, "<tool_response>")
        self._dash, self._turn_end = token_id(tokenizer, "-"), token_id(tokenizer, TURN_END)
        self._user, own = (tokenizer.encode(f"{TURN_START}{role}\n").ids for role in ("user", "assistant"))
        self._own_start = torch.tensor(own[:2])
        self._wordy = torch.tensor([text.isalnum() for text in texts])

    def looks(self, examples: Sequence[Example], ids: Tensor, learned: Tensor) -> Iterator[Looks]:
        """All of a micro-batch, ``ids`` and ``learned`` as from `collate`."""
        places = torch.arange(ids.shape[1] - 1)
        in_lines: list[tuple[int, int, int]] = []  # row, position, where the line's name begins
        calls: list[tuple[int, int, int, int]] = []  # row, position, where the name begins, where the line ends
        asked: list[tuple[int, int, int, int]] = []  # row, position, where the question begins and ends
        for row, example in enumerate(examples):
            lines = self._lines(example.ids)
            in_lines += [(row, at, start) for start, end in lines for at in range(start + 1, min(end, len(places)))]
            calls += [(row, *call) for call in self._calls(example, lines)]
            asked += [(row, *where) for where in self._questions(example)]
        named = torch.zeros(ids[:, :-1].shape, dtype=torch.bool)
        if in_lines:
            rows, at, start = torch.tensor(in_lines[:: 1 + len(in_lines) // MOST_IN_LINES]).unbind(1)
            yield Looks(LINE, rows, at, places == start[:, None])
        if asked:
            rows, at, start, end = torch.tensor(asked).unbind(1)
            yield Looks(QUESTION, rows, at, (places >= start[:, None]) & (places < end[:, None]))
        if calls:
            rows, at, start, end = torch.tensor(calls).unbind(1)
            named[rows, at] = True
            line = (places >= start[:, None]) & (places < end[:, None])
            before = torch.cat((at, at - 1, at - 2))  # the tokens of a turn's or a call's beginning
            yield Looks(OFFER, rows.repeat(3), before, line.repeat(3, 1))
            yield Looks(POINT, rows, at, places == start[:, None])
        yield from self._copies(ids, learned[~named.flatten()[learned]])

    def _copies(self, ids: Tensor, learned: Tensor) -> Iterator[Looks]:
        """Where the next token stands, if it is of a word or a number that was there before: for its first token where
        such a one begins, since the last turn of another began if it is there; for a further one where most of what
        stands before it is the same."""
        length = ids.shape[1] - 1
        places = torch.arange(length)
        rows, at = learned // length, learned % length
        now, then, seen = ids[rows, at], ids[rows, at + 1], ids[rows, :-1]
        there = (seen == then[:, None]) & (places <= at[:, None])
        begins = there & ~F.pad(self._wordy[seen][:, :-1], (1, 0))
        turns = self._turns(ids)[rows, :-1]
        lately = begins & (turns == turns.gather(1, at[:, None]))
        begins = torch.where(lately.any(1, keepdim=True), lately, begins)
        first = begins.any(1) & self._wordy[then] & ~self._wordy[now]
        if first.any():
            yield Looks(POINT, rows[first], at[first], begins[first])
        alike, shared = there, torch.zeros(there.shape, dtype=torch.long)
        for back in range(LONGEST):
            before = ids[rows, (at - back).clamp(min=0)]
            alike = alike & F.pad(seen == before[:, None], (back + 1, 0))[:, :length]
            shared += alike
        most = shared.amax(1, keepdim=True)
        further = (most[:, 0] > 0) & self._wordy[then] & self._wordy[now]
        if further.any():
            yield Looks(SEEK, rows[further], at[further], (there & (shared == most))[further])

    def _turns(self, ids: Tensor) -> Tensor:
        """[batch, length]: the number of the turn a token is in, the model's own having that of the one before."""
        start, own = self._own_start
        begins: Tensor = (ids == start) & ~F.pad(ids[:, 1:] == own, (0, 1))
        return begins.cumsum(1)

    def _lines(self, ids: list[int]) -> list[tuple[int, int]]:
        """The lines of the tools on offer, as positions: of a name's first token, and past the line's last."""
        stop = ids.index(self._turn_end) if self._turn_end in ids else 0
        starts = [at + 1 for at in range(1, stop) if ids[at] == self._dash and ids[at - 1] in self._line_ends]
        return list(zip(starts, [*(start - 2 for start in starts[1:]), stop], strict=False))

    def _calls(self, example: Example, lines: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
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
                    yield at, start, end
                    break

    def _questions(self, example: Example) -> Iterator[tuple[int, int, int]]:
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
                yield at, start, end
