"""Train a model on all skills from nothing: ``python -m caesura.runtime.embedded.train --out FOLDER --seed 0``.

The schedule is counted in steps, so that a seed and a thread count give the same model on the same kind of machine.
Every evaluation saves the state; ``--resume`` goes on from it, also with other ``--rates``. ``caesura eval embedded
--model FOLDER`` asks the result through the engine.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from caesura.runtime.embedded.chat import CHAT_TEMPLATE, END_OF_TEXT, TURN_END
from caesura.runtime.embedded.exam import scores
from caesura.runtime.embedded.examples import token_id, train_tokenizer
from caesura.runtime.embedded.net import Shape, TinyLlama, hf_config, save_weights
from caesura.runtime.embedded.trainer import Recipe, Trainer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

EVAL_SEED = 2025


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
    parser.add_argument(
        "--rates",
        type=_rates,
        default=recipe.rates,
        metavar="STEP:SHARE,...",
        help="points of the learning rate's curve",
    )
    parser.add_argument("--lr", type=float, default=recipe.lr)
    parser.add_argument("--batch-tokens", type=int, default=recipe.batch_tokens)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eval-every", type=int, default=200, help="steps between evaluations")
    parser.add_argument("--eval-tasks", type=int, default=300, help="held-out tasks per skill at the end")
    parser.add_argument("--resume", action="store_true", help="go on from the state in OUT/state")
    return parser.parse_args()


def _rates(text: str) -> tuple[tuple[int, float], ...]:
    pairs = (point.split(":") for point in text.split(","))
    return tuple((int(step), float(share)) for step, share in pairs)


def main() -> None:
    """Train, export, evaluate, report."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    console = Console()
    recipe = Recipe(
        seed=arguments.seed,
        rates=arguments.rates,
        batch_tokens=arguments.batch_tokens,
        lr=arguments.lr,
    )
    known = arguments.out / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(known)) if arguments.resume else train_tokenizer(recipe.seed)
    trainer = Trainer(recipe, Shape(vocab=tokenizer.get_vocab_size()), tokenizer)
    state = arguments.out / "state"
    if arguments.resume:
        trainer.load(state)
    console.print(
        f"{trainer.model.num_parameters():,} parameters, {recipe.steps} steps of {recipe.batch_tokens} tokens"
    )
    for step in trainer.run(console):
        if step % arguments.eval_every == 0:
            trainer.save(state)
            export(trainer.model, tokenizer, arguments.out)
            found = scores(trainer.model.eval(), tokenizer, seed=EVAL_SEED, tasks=25)
            console.print("  ".join(f"{skill} {share:.0%}" for skill, share in found.items()))
    export(trainer.model, tokenizer, arguments.out)
    found = scores(trainer.model, tokenizer, seed=EVAL_SEED + 1, tasks=arguments.eval_tasks)
    report(found, trainer, arguments, console)


def report(found: dict[str, float], trainer: Trainer, arguments: argparse.Namespace, console: Console) -> None:
    """Print the shares and write ``eval.json`` beside the checkpoint."""
    table = Table(title=f"{arguments.eval_tasks} held-out tasks of each skill, greedy")
    table.add_column("skill")
    table.add_column("solved", justify="right")
    for skill, share in found.items():
        table.add_row(skill, f"{share:.1%}")
    console.print(table)
    console.print(f"trained in {trainer.seconds / 60:.1f} minutes; checkpoint in {arguments.out}")
    _write_json(
        arguments.out / "eval.json",
        {
            "solved": {skill: round(share, 4) for skill, share in found.items()},
            "tasks_per_skill": arguments.eval_tasks,
            "seed": arguments.seed,
            "steps": trainer.step,
            "tokens": trainer.tokens,
            "threads": arguments.threads,
            "cores": os.cpu_count(),
            "train_minutes": round(trainer.seconds / 60, 1),
            "parameters": trainer.model.num_parameters(),
        },
    )


if __name__ == "__main__":
    main()
