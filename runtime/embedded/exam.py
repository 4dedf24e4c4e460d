"""Held-out tasks answered by the bare network: a task counts as right when every token of its solution is the one
that the network would write. Quick enough to be run while training; `caesura eval embedded` asks the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from caesura.runtime.embedded.chat import Message, render
from caesura.runtime.embedded.data import rounds_of, shown_turns
from caesura.runtime.embedded.examples import Example, encode_example
from caesura.runtime.embedded.net import TinyLlama
from caesura.runtime.embedded.skills.mixture import SKILLS, Exam, held_out_task
from tokenizers import Tokenizer

BATCH_TOKENS = 4096


def solved_exam(exam: Exam) -> list[Message]:
    """A held-out task with its right solution, as a conversation."""
    by_tool = {offer.tool: offer for offer in exam.offers}
    return shown_turns(exam.task.question, *rounds_of(exam.task, exam.world), by_tool)


def exam_examples(tokenizer: Tokenizer, skill: str, *, seed: int, count: int) -> list[Example]:
    """Solved held-out tasks of one skill as token ids."""
    examples = []
    for number in range(count):
        exam = held_out_task(seed, number, skill)
        examples.append(encode_example(tokenizer, render(solved_exam(exam), [offer.spec for offer in exam.offers])))
    return examples


@torch.inference_mode()
def written_right(model: TinyLlama, examples: Sequence[Example]) -> list[bool]:
    """For each solution, whether the network writes all of it, given what came before each token."""
    right = [False] * len(examples)
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
    while order:
        length = len(examples[order[-1]].ids)
        batch = order[-max(1, BATCH_TOKENS // length) :]
        del order[-len(batch) :]
        ids = torch.zeros((len(batch), length), dtype=torch.long)
        for row, index in enumerate(batch):
            ids[row, : len(examples[index].ids)] = torch.tensor(examples[index].ids)
        choices = model.logits(model.hidden_states(ids[:, :-1])).argmax(-1)
        for row, index in enumerate(batch):
            learn = torch.tensor(examples[index].learn[1:])
            wrong = choices[row, : len(learn)] != ids[row, 1 : len(learn) + 1]
            right[index] = not bool((wrong & learn).any())
    return right


def scores(model: TinyLlama, tokenizer: Tokenizer, *, seed: int, tasks: int) -> dict[str, float]:
    """Share of held-out tasks solved, per skill."""
    shares = {}
    for skill in SKILLS:
        right = written_right(model, exam_examples(tokenizer, skill, seed=seed, count=tasks))
        shares[skill] = sum(right) / len(right)
    return shares
