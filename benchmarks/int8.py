"""8-bit weights against float32: quality on the embedded model and a random one, and the time of a step."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from caesura.runtime.embedded import checkpoint_path
from caesura.runtime.embedded.chat import CALCULATOR_TOOL, Message, answer_text, render
from caesura.runtime.embedded.data import solved_turns
from caesura.runtime.embedded.evaluate import ask_each
from caesura.runtime.embedded.examples import Example, encode_example
from caesura.runtime.embedded.net import Cache, Shape, TinyLlama
from caesura.runtime.embedded.tasks import Split, make_tasks
from caesura.runtime.model import load_model
from caesura.runtime.model.batch import Batch, Piece
from caesura.runtime.model.config import parse_config
from caesura.runtime.model.weights import Model, dummy_model
from caesura.runtime.native.decoder import NativeDecoder, unsupported
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.common import Bench
from benchmarks.dummy import llama_config

PAGE = 16
QUANTIZATIONS = (None, "int8")


@dataclass(frozen=True, slots=True)
class Quality:
    """Of the tokens that were scored: how likely the model found them, and how near it came to another model."""

    perplexity: float
    agreement: float  # share of rows with the same likeliest token
    logit_error: float  # norm of the difference over the norm of the reference


class Sequences:
    """One decoder with a cache of its own, for one sequence after the other."""

    def __init__(self, model: Model, quantization: str | None, *, max_tokens: int = 2048) -> None:
        config = model.config
        self.decoder = NativeDecoder(model, quantization=quantization)
        self._num_pages = -(-max_tokens // PAGE)
        shape = (2, self._num_pages, PAGE, config.num_kv_heads, config.head_dim)
        self._cache = [torch.zeros(shape) for _ in range(config.num_layers)]

    def logits(self, ids: Sequence[int], start: int = 0) -> Tensor:
        """[len(ids), vocab]; positions before ``start`` are those of the calls before."""
        return self.decoder.logits(self.hidden(ids, start))

    def hidden(self, ids: Sequence[int], start: int = 0) -> Tensor:
        """[len(ids), hidden], good until the next call."""
        positions = torch.arange(start, start + len(ids))
        pages = np.arange(-(-(start + len(ids)) // PAGE))
        piece = Piece(0, len(ids), start, pages)
        batch = Batch(torch.tensor(ids), positions, positions, (piece,), PAGE, start + len(ids) - 1)
        return self.decoder.forward(batch, self._cache)


class NativeNet(TinyLlama):
    """The embedded model's own interface on the C decoder, for its evaluation. One conversation at a time."""

    def __init__(self, model: Model, quantization: str | None) -> None:
        config = model.config
        super().__init__(Shape(vocab=config.vocab_size, max_positions=config.max_context_tokens))
        self._sequences = Sequences(model, quantization, max_tokens=config.max_context_tokens)

    def hidden_states(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """[1, length] ids -> [1, length, hidden]; ``cache`` counts positions, nothing more."""
        start = cache.length_tokens if cache is not None else 0
        if cache is not None:
            cache.keys = cache.values = [torch.empty(1, 0, start + ids.shape[1], 0)]
        return self._sequences.hidden(ids[0].tolist(), start)[None].clone()

    def logits(self, hidden: Tensor) -> Tensor:
        """[hidden] -> [vocab]."""
        return self._sequences.decoder.logits(hidden[None])[0]


def conversations(count: int, seed: int = 5) -> list[Example]:
    """Held-out tasks as the embedded model's token ids: solved with the calculator and, every other one, without it,
    where it has to guess and is not sure of itself. Scored is what the model writes."""
    tokenizer = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
    draw = random.Random(seed)
    found = []
    for number, task in enumerate(make_tasks(seed, count, Split.HELD_OUT)):
        messages, tools = solved_turns(task, draw, odd_share=0.0, error_share=0.0), [CALCULATOR_TOOL]
        if number % 2:
            answer: Message = {"role": "assistant", "content": answer_text(task.answer.split(" and "))}
            messages, tools = [{"role": "user", "content": task.question}, answer], []
        found.append(encode_example(tokenizer, render(messages, tools, add_generation_prompt=False)))
    return found


def chance(vocab_size: int, count: int, tokens: int, seed: int = 5) -> list[Example]:
    """Random ids, all of them scored."""
    draw = random.Random(seed)
    return [Example([draw.randrange(vocab_size) for _ in range(tokens)], [True] * tokens) for _ in range(count)]


@torch.inference_mode()
def compare(model: Model, examples: Iterable[Example]) -> dict[str | None, Quality]:
    """Each quantization's quality on the scored tokens, measured against float32."""
    decoders = {name: Sequences(model, name) for name in QUANTIZATIONS}
    losses: dict[str | None, float] = dict.fromkeys(QUANTIZATIONS, 0.0)
    same = dict.fromkeys(QUANTIZATIONS, 0)
    apart: dict[str | None, float] = dict.fromkeys(QUANTIZATIONS, 0.0)
    total, size = 0, 0.0
    for example in examples:
        rows = [row for row in range(len(example.ids) - 1) if example.learn[row + 1]]
        targets = torch.tensor([example.ids[row + 1] for row in rows])
        found = {name: decoder.logits(example.ids)[rows] for name, decoder in decoders.items()}
        reference = found[None]
        total, size = total + len(targets), size + float(reference.square().sum())
        for name, logits in found.items():
            losses[name] += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            same[name] += int((logits.argmax(-1) == reference.argmax(-1)).sum())
            apart[name] += float((logits - reference).square().sum())
    return {
        name: Quality(float(np.exp(losses[name] / total)), same[name] / total, (apart[name] / size) ** 0.5)
        for name in QUANTIZATIONS
    }


@torch.inference_mode()
def _seconds(decoder: Sequences, rows: int) -> float:
    """A prompt of ``rows`` tokens, and the logits of its last one."""
    ids = [7 * row % 1000 for row in range(rows)]
    begun = time.perf_counter()
    decoder.decoder.logits(decoder.hidden(ids)[-1:])
    return time.perf_counter() - begun


def run(bench: Bench, *, quick: bool) -> None:
    """Perplexity, agreement and solved tasks; milliseconds of a step by its rows."""
    model = load_model(checkpoint_path())
    if (reason := unsupported(model, PAGE)) is not None:
        raise SystemExit(f"int8 cannot be measured here: {reason}")
    shape = "15M" if quick else "135M"
    large = dummy_model(parse_config(llama_config(shape)))
    count = 20 if quick else 200
    bench.configure(threads=torch.get_num_threads(), conversations=count, tasks=count)
    drawn = chance(large.config.vocab_size, 1 if quick else 4, 128)
    solved = conversations(count)
    for name, examples, subject in (("embedded", solved, model), (f"random {shape}", drawn, large)):
        quality = compare(subject, examples)
        for kind, unit in (("perplexity", ""), ("agreement", "of tokens"), ("logit_error", "of the norm")):
            baseline = f"{name}: {kind}, float32"
            for quantization in QUANTIZATIONS if kind == "perplexity" else QUANTIZATIONS[1:]:
                value = getattr(quality[quantization], kind)
                label = f"{name}: {kind}, {quantization or 'float32'}"
                bench.record(label, [value], unit=unit, baseline=baseline if baseline in bench.samples else None)
    tokenizer = Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))
    tasks = make_tasks(77, count, Split.HELD_OUT)
    for quantization in QUANTIZATIONS:
        score = ask_each(NativeNet(model, quantization), tokenizer, tasks, "held-out")
        bench.record(f"embedded: solved, {quantization or 'float32'}", [score.share], unit="of tasks")
    decoders = {name: Sequences(large, name) for name in QUANTIZATIONS}
    for rows in (1, 4, 16, 128):
        times: dict[str | None, list[float]] = {name: [] for name in QUANTIZATIONS}
        for _ in range(3 if quick else 15):  # in turns: both see the same neighbours on the machine
            for quantization, decoder in decoders.items():
                times[quantization].append(_seconds(decoder, rows))
        base = f"{shape}: step of {rows} rows, float32"
        bench.record(base, times[None], unit="s")
        bench.record(f"{shape}: step of {rows} rows, int8", times["int8"], unit="s", baseline=base)
