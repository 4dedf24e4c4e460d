"""Train the embedded model from nothing: ``python -m caesura.runtime.embedded.train --out FOLDER --seed 0``.

CPU, float32, 11.5 million tokens: half an hour at 7,000 tokens/s. The schedule is counted in steps, so that a seed
and a thread count give the same model on the same kind of machine; ``--minutes`` only cuts a run short on a slow one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from caesura.runtime.embedded.chat import CHAT_TEMPLATE, END_OF_TEXT, TURN_END
from caesura.runtime.embedded.data import Example, batches, token_id, train_tokenizer
from caesura.runtime.embedded.evaluate import Score, evaluate
from caesura.runtime.embedded.net import Shape, TinyLlama, hf_config, save_weights
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

WARMUP_STEPS = 100
FINAL_LR_SHARE = 0.02
POOL = 600  # conversations drawn and sorted by length at a time
MAX_TOKENS = 1024
EVAL_SEED = 2025


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train."""

    seed: int = 0
    steps: int = 3000
    batch_tokens: int = 4096
    lr: float = 3e-3
    weight_decay: float = 0.05
    minutes: float = 38.0


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if step < WARMUP_STEPS:
        return recipe.lr * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, recipe.steps - WARMUP_STEPS)
    return recipe.lr * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * done)))


def collate(examples: list[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """ids [batch, length], right-padded, and the flat indices in [batch, length - 1] whose successor is learned."""
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad_id, dtype=torch.long)
    learn = torch.zeros((len(examples), length), dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        learn[row, : len(example.ids)] = torch.tensor(example.learn)
    return ids, learn[:, 1:].flatten().nonzero().squeeze(1)


def loss_of(model: TinyLlama, ids: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the learned tokens, and the share of them predicted right."""
    hidden = model.hidden_states(ids[:, :-1]).flatten(0, 1)  # [batch * (length - 1), hidden]
    logits = model.logits(hidden.index_select(0, learned))
    targets = ids[:, 1:].flatten().index_select(0, learned)
    right = (logits.detach().argmax(-1) == targets).float().mean()
    return F.cross_entropy(logits, targets), right


def optimizers(model: TinyLlama, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embedding and norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def endless_batches(tokenizer: Tokenizer, recipe: Recipe) -> Iterator[list[Example]]:
    """Batches for every step of the schedule, longer ones later."""
    rng = random.Random(f"{recipe.seed}/train")
    step = 0
    while True:
        progress = step / recipe.steps
        for batch in batches(
            tokenizer, rng, progress, batch_tokens=recipe.batch_tokens, pool=POOL, max_tokens=MAX_TOKENS
        ):
            step += 1
            yield batch


def train(recipe: Recipe, shape: Shape, tokenizer: Tokenizer, console: Console) -> TinyLlama:
    """Train from scratch; returns the model in evaluation mode."""
    torch.manual_seed(recipe.seed)
    model = TinyLlama(shape)
    updates = optimizers(model, recipe)
    pad_id = token_id(tokenizer, END_OF_TEXT)
    started_s = time.monotonic()
    console.print(f"{model.num_parameters():,} parameters, {recipe.steps} steps of {recipe.batch_tokens} tokens")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    seen_tokens = 0
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=recipe.steps)
        for step, batch in zip(range(recipe.steps), endless_batches(tokenizer, recipe), strict=False):
            rate = learning_rate(step, recipe)
            ids, learned = collate(batch, pad_id)
            loss, right = loss_of(model, ids, learned)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for update in updates:
                for group in update.param_groups:
                    group["lr"] = rate
                update.step()
                update.zero_grad(set_to_none=True)
            seen_tokens += ids.numel()
            elapsed_s = time.monotonic() - started_s
            progress.update(bar, completed=step + 1)
            if step % 50 == 49:
                console.print(
                    f"step {step + 1:5d}  loss {loss.item():.4f}  tokens right {right.item():.2%}  "
                    f"{seen_tokens / elapsed_s:,.0f} tokens/s  {elapsed_s:,.0f} s"
                )
            if elapsed_s > recipe.minutes * 60:
                console.print(f"cut short by --minutes {recipe.minutes} at step {step + 1} of {recipe.steps}")
                break
    return model.eval()


def export(model: TinyLlama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    eos_id, pad_id = token_id(tokenizer, TURN_END), token_id(tokenizer, END_OF_TEXT)
    save_weights(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", hf_config(model.shape, eos_id=eos_id, pad_id=pad_id))
    _write_json(
        folder / "generation_config.json",
        {"do_sample": False, "eos_token_id": [eos_id, pad_id], "pad_token_id": pad_id, "max_new_tokens": 256},
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.shape.max_positions,
            "clean_up_tokenization_spaces": False,
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": TURN_END,
            "pad_token": END_OF_TEXT,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _arguments() -> argparse.Namespace:
    recipe = Recipe()
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and eval.json")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--lr", type=float, default=recipe.lr)
    parser.add_argument("--batch-tokens", type=int, default=recipe.batch_tokens)
    parser.add_argument("--minutes", type=float, default=recipe.minutes, help="stop training after this long")
    parser.add_argument("--threads", type=int, default=1, help="the shipped model was trained with 1")
    parser.add_argument("--eval-tasks", type=int, default=300, help="held-out tasks per row of the report")
    return parser.parse_args()


def main() -> None:
    """Train, export, evaluate, report."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    console = Console()
    recipe = Recipe(
        seed=arguments.seed,
        steps=arguments.steps,
        batch_tokens=arguments.batch_tokens,
        lr=arguments.lr,
        minutes=arguments.minutes,
    )
    started_s = time.monotonic()
    tokenizer = train_tokenizer(recipe.seed)
    model = train(recipe, Shape(vocab=tokenizer.get_vocab_size()), tokenizer, console)
    export(model, tokenizer, arguments.out)
    train_s = time.monotonic() - started_s
    console.print(f"trained in {train_s / 60:.1f} minutes; checkpoint in {arguments.out}")
    scores = evaluate(model, tokenizer, seed=EVAL_SEED, tasks=arguments.eval_tasks)
    report(scores, model, arguments, train_s, console)


def report(
    scores: list[Score], model: TinyLlama, arguments: argparse.Namespace, train_s: float, console: Console
) -> None:
    """Print the scores and write ``eval.json`` beside the checkpoint."""
    table = Table(title="held-out numbers and names, greedy")
    for heading in ("tasks", "right", "of", "share", "longest context"):
        table.add_column(heading, justify="left" if heading == "tasks" else "right")
    for score in scores:
        table.add_row(score.name, str(score.right), str(score.total), f"{score.share:.1%}", str(score.context_tokens))
    console.print(table)
    _write_json(
        arguments.out / "eval.json",
        {
            "scores": [asdict(score) | {"share": round(score.share, 4)} for score in scores],
            "seed": arguments.seed,
            "steps": arguments.steps,
            "threads": arguments.threads,
            "train_minutes": round(train_s / 60, 1),
            "parameters": model.num_parameters(),
        },
    )


if __name__ == "__main__":
    main()
