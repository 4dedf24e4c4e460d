"""One training run: a schedule, and a state to resume from."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from caesura.runtime.embedded.chat import END_OF_TEXT
from caesura.runtime.embedded.copying import plant
from caesura.runtime.embedded.examples import Example, batches, token_id
from caesura.runtime.embedded.guide import Guide
from caesura.runtime.embedded.muon import Muon
from caesura.runtime.embedded.net import Shape, TinyLlama
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

CURRICULUM_STEPS = 600  # conversations grow longer until then
POOL = 600  # conversations drawn and sorted by length at a time
MAX_TOKENS = 1792
MOST_AGAIN = 2  # times that a conversation comes again while a token of it is wrong: late in a training one in seven is
EASY = 0.25  # of the usual loss: what is below has little of the gradient, and is nearly half of the work in the end
USUAL_STEPS = 50  # that the usual loss is a mean over


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. The learning rate follows straight lines between ``rates``, pairs of a step and a share of
    ``lr``; the last step ends the training."""

    seed: int = 0
    rates: tuple[tuple[int, float], ...] = ((0, 0.0), (60, 1.0), (1500, 1.0), (7000, 0.01), (7050, 0.4), (8600, 0.01))
    late_steps: int = 7000  # from then on there is more of what is learned last
    batch_tokens: int = 4608
    lr: float = 3e-3
    weight_decay: float = 0.05
    guidance: float = 0.3  # how much the loss of heads that are told where to look counts
    guided_steps: int = 1500  # until then; later it would outweigh the other loss, and what is left of it is noise

    @property
    def steps(self) -> int:
        return self.rates[-1][0]


def learning_rate(step: int, recipe: Recipe) -> float:
    """The rate of the update that follows ``step`` updates."""
    for (start, low), (end, high) in pairwise(recipe.rates):
        if step < end:
            return recipe.lr * (low + (high - low) * (step + 1 - start) / (end - start))
    return recipe.lr * recipe.rates[-1][1]


def collate(examples: list[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """ids [batch, length], right-padded, and the flat indices in [batch, length - 1] whose successor is learned."""
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad_id, dtype=torch.long)
    learn = torch.zeros((len(examples), length), dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        learn[row, : len(example.ids)] = torch.tensor(example.learn)
    return ids, learn[:, 1:].flatten().nonzero().squeeze(1)


class Trainer:
    """The weights and the optimizers: Muon for matrices, AdamW for the rest."""

    def __init__(self, recipe: Recipe, shape: Shape, tokenizer: Tokenizer) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.tokenizer = recipe, tokenizer
        self.model = TinyLlama(shape)
        plant(self.model, recipe.seed)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self._usual_loss = 0.0  # per token
        self._pool = (0, 0)  # the number of the pool in use, and the steps done before it
        self._again: list[Example] = []  # what the pool in use has from earlier ones
        self._missed: list[Example] = []  # and what later ones are to have
        self._guide = Guide(self.model, tokenizer)
        self._pad_id = token_id(tokenizer, END_OF_TEXT)
        named = list(self.model.named_parameters())
        matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
        others = [p for name, p in named if p.dim() != 2 or "embed" in name]
        self._optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay),
            torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def run(self, console: Console) -> Iterator[int]:
        """Train to the end of the schedule; yields the number of steps done after each."""
        to_come = self._batches()
        while self.step < self.recipe.steps:
            started_s = time.monotonic()
            batch = next(to_come)
            loss, right = self.update(batch)
            self.step += 1
            self.seconds += time.monotonic() - started_s
            if self.step % 20 == 0:
                console.print(
                    f"step {self.step:5d}  loss {loss:.4f}  tokens right {right:.2%}  "
                    f"{self.tokens / self.seconds:,.0f} tokens/s  {self.seconds / 60:,.1f} min"
                )
            yield self.step
        self.model.eval()

    def update(self, batch: list[list[Example]]) -> tuple[float, float]:
        """One step over several micro-batches; mean loss, share of right tokens. Of those that have become easy nothing
        is learned (after Jiang et al., arXiv 1910.00762, who choose by chance)."""
        self.model.train()
        learned_tokens = sum(sum(example.learn[1:]) for examples in batch for example in examples)
        self._guide.watching = self.step < self.recipe.guided_steps
        loss_sum, right_sum = 0.0, 0
        for examples in batch:
            ids, learned = collate(examples, self._pad_id)
            hidden = self.model.hidden_states(ids[:, :-1], wanted=learned)  # [learned, hidden]
            logits = F.linear(hidden, self.model.model.embed_tokens.weight)
            targets = ids[:, 1:].flatten().index_select(0, learned)
            loss = F.cross_entropy(logits, targets, reduction="sum")
            if loss.item() >= EASY * self._usual_loss * len(targets):
                total = loss / learned_tokens
                if self._guide.watching:
                    total = total + self.recipe.guidance / len(batch) * self._guide.loss(examples, ids, learned)
                total.backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.item()
            right = logits.detach().argmax(-1) == targets
            right_sum += int(right.sum())
            rows = set((learned[~right] // (ids.shape[1] - 1)).tolist())
            missed = (examples[row] for row in sorted(rows))
            self._missed += [replace(each, asked=each.asked + 1) for each in missed if each.asked < MOST_AGAIN]
            self.tokens += ids.numel()
        self._usual_loss += (loss_sum / learned_tokens - self._usual_loss) / USUAL_STEPS
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = learning_rate(self.step, self.recipe)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss_sum / learned_tokens, right_sum / learned_tokens

    def _batches(self) -> Iterator[list[list[Example]]]:
        """What each step from here on trains on. A pool's conversations follow from its number alone."""
        number, done = self._pool
        while True:
            self._pool = (number, done)
            rng = random.Random(f"{self.recipe.seed}/train/{number}")
            progress = done / CURRICULUM_STEPS
            pool = batches(
                self.tokenizer,
                rng,
                progress,
                self._again,
                batch_tokens=self.recipe.batch_tokens,
                pool=POOL,
                max_tokens=MAX_TOKENS,
                late=done >= self.recipe.late_steps,
            )
            for batch in pool:
                done += 1
                if done > self.step:
                    yield batch
            number += 1
            self._again = rng.sample(self._missed, min(len(self._missed), POOL // 2))
            self._missed = []

    # -- state -----------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write everything that `load` needs to go on as if nothing had been: one file, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"weight.{name}": tensor.detach().contiguous() for name, tensor in self.model.named_parameters()}
        for index, optimizer in enumerate(self._optimizers):
            for number, state in optimizer.state_dict()["state"].items():
                tensors |= {f"state.{index}.{number}.{key}": torch.as_tensor(value) for key, value in state.items()}
        counts: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "pool": self._pool}
        counts |= {"usual_loss": self._usual_loss}
        counts |= {"again": [astuple(each) for each in self._again], "missed": [astuple(each) for each in self._missed]}
        unfinished = folder / "state.tmp"
        unfinished.write_bytes(save(tensors, {"counts": json.dumps(counts | self._drawn_by())}))
        os.replace(unfinished, folder / "state.safetensors")

    def _drawn_by(self) -> dict[str, int]:
        """What the conversations follow from."""
        return {"seed": self.recipe.seed, "batch_tokens": self.recipe.batch_tokens}

    def load(self, folder: Path) -> None:
        """Go on from a saved state. Raises ValueError for one of another seed or another size of batches."""
        with safe_open(folder / "state.safetensors", framework="pt") as file:
            counts = json.loads((file.metadata() or {}).get("counts", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it cannot be iterated
        for name, value in self._drawn_by().items():
            if counts.get(name) != value:
                raise ValueError(f"{folder} is of a training with {name} {counts.get(name)}, and this one has {value}")
        self.step, self.tokens, self.seconds = counts["step"], counts["tokens"], counts["seconds"]
        self._usual_loss, self._pool = counts["usual_loss"], (counts["pool"][0], counts["pool"][1])
        self._again, self._missed = ([Example(*each) for each in counts[name]] for name in ("again", "missed"))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"weight.{name}"])
        for index, optimizer in enumerate(self._optimizers):
            whole = optimizer.state_dict()
            for key, tensor in tensors.items():
                kind, *rest = key.split(".")
                if kind == "state" and rest[0] == str(index):
                    whole["state"].setdefault(int(rest[1]), {})[rest[2]] = tensor
            optimizer.load_state_dict(whole)
