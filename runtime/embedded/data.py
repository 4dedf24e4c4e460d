"""Training conversations for the embedded model: what the chat template renders, with the tokens to learn marked.

No torch here: this yields token ids and spans. The conversations vary in what must not matter: the system
prompt's words and length, the tools beside the calculator, how many questions came before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from caesura.runtime.embedded.chat import (
    FAILED_TEXT,
    SPECIAL_TOKENS,
    TAG_TOKENS,
    TURN_END,
    TURN_START,
    Message,
    answer_text,
    calls_message,
    render,
)
from caesura.runtime.embedded.tasks import CalculatorError, Kind, Split, Task, TaskMaker, calculate
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

VOCAB_SIZE = 1024
# A digit is a token; braces never merge with neighbours, so that JSON tokenizes alike whole and in pieces.
PRE_TOKENS = r"\p{N}| ?\p{L}+|[{}]| ?[^\s\p{L}\p{N}{}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
ODD_RESULT_SHARE = 0.12  # results that are wrong on purpose, so that the model copies and does not compute
NO_TOOL_SHARE = 0.05
ERROR_SHARE = 0.02
OTHER_NAME_SHARE = 0.15  # the tool is called what the prompt calls it
SMALL_TALK_SHARE = 0.03

_RULES = (
    "You are a helpful assistant.",
    "You are a careful assistant that answers arithmetic questions.",
    "Answer briefly.",
    "Use the calculator for every calculation.",
    "Always check numbers with the tool before answering.",
    "You help with sums.",
    "Be exact and short.",
    "Never guess a number.",
    "You work for a small shop and help its staff with the books.",
    "Reply in one sentence.",
    "The user may ask several questions in a row.",
    "Today is a quiet day, so take your time.",
    "Treat every question on its own.",
    "If the user greets you, greet back.",
    "Prices are in cents unless stated otherwise.",
    "You are agent {n} of a fleet.",
    "Your working day ends at {n} o'clock.",
    "Rule {n}: write plain sentences.",
)
_SYLLABLES = (
    *("ba", "ce", "di", "fo", "gu", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "zo", "an", "er"),
    *("in", "or", "ul", "st", "tr", "ch", "sh", "ing", "tion", "ment", "ly"),
)
_DESCRIPTIONS = (
    "Evaluate an arithmetic expression.",
    "Evaluate an arithmetic expression.",
    "Evaluates arithmetic.",
    "Compute the value of an expression such as 2 + 3.",
    "A calculator for + - * and /.",
    "Work out a sum, exactly.",
    "",
)
_CALCULATORS = (
    ("calc", "expression"),
    ("calculate", "expression"),
    ("compute", "formula"),
    ("evaluate", "text"),
    ("slow_calculator", "expression"),
    ("math", "query"),
)
_ERRORS = (
    "error: timed out",
    "error: the tool failed",
    "error: no answer after {n} seconds",
    "Error: connection lost",
    "error: expression: division by zero",
    "error: cancelled",
)
_OTHER_TOOLS = (
    ("search", "query", "Look a topic up."),
    ("weather", "city", "Current weather of a city."),
    ("clock", "zone", "The time in a zone."),
    ("translate", "text", "Translate a text."),
    ("read_file", "path", "Read a file."),
)
_SMALL_TALK = (
    ("Hello!", "Hello! Ask me a question about numbers."),
    ("Hi", "Hello! Ask me a question about numbers."),
    ("Hi there", "Hello! Ask me a question about numbers."),
    ("Good morning", "Hello! Ask me a question about numbers."),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Who are you?", "I am a small model that answers questions about numbers with a calculator."),
    ("What can you do?", "I am a small model that answers questions about numbers with a calculator."),
    ("Bye", "Goodbye!"),
)


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation as token ids; ``learn[i]`` says whether ``ids[i]`` is the model's own to write."""

    ids: list[int]
    learn: list[bool]


class ConversationMaker:
    """Draws conversations. ``progress`` in [0, 1] is the training's: contexts grow longer with it."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._tasks = TaskMaker(rng, Split.TRAIN)

    def make(self, progress: float) -> tuple[list[Message], list[Mapping[str, Any]]]:
        """Messages and the tools on offer (none: the model has to guess)."""
        rng = self._rng
        long = progress > 0.4 and rng.random() < 0.15
        messages: list[Message] = []
        system = system_prompt(rng, sentences=rng.randrange(6, 40) if long else rng.choice((0, 1, 1, 2, 3)))
        if system or rng.random() < 0.1:
            messages.append({"role": "system", "content": system})
        if rng.random() < NO_TOOL_SHARE:
            # A few at a time: one alone would be so short that whole batches of like length were guesses.
            for task in (self._tasks.make() for _ in range(rng.randint(2, 4))):
                messages += [
                    {"role": "user", "content": task.question},
                    {"role": "assistant", "content": answer_text(task.answer.split(" and "))},
                ]
            return messages, []
        name, argument = "calculator", "expression"
        if rng.random() < OTHER_NAME_SHARE:
            name, argument = rng.choice(_CALCULATORS)
        most = 1 if progress < 0.15 else 3 if progress < 0.5 else 6
        for _ in range(rng.randint(1, most)):
            if rng.random() < SMALL_TALK_SHARE:
                asked, reply = rng.choice(_SMALL_TALK)
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
            else:
                messages += solved_turns(self._tasks.make(), rng, tool=(name, argument))
        return messages, self._toolset(name, argument)

    def _toolset(self, name: str, argument: str) -> list[Mapping[str, Any]]:
        rng = self._rng
        tools = [_tool(name, argument, rng.choice(_DESCRIPTIONS))]
        tools += [_tool(*other) for other in rng.sample(_OTHER_TOOLS, rng.choice((0, 0, 0, 1, 2)))]
        rng.shuffle(tools)
        return tools


def system_prompt(rng: random.Random, *, sentences: int) -> str:
    """Rules mixed with sentences of made-up words and stray numbers."""
    parts = []
    for _ in range(sentences):
        if rng.random() < 0.65:
            parts.append(rng.choice(_RULES).format(n=rng.randrange(2, 10_000)))
        else:
            words = ["".join(rng.choices(_SYLLABLES, k=rng.randint(1, 3))) for _ in range(rng.randint(2, 9))]
            parts.append(" ".join(words).capitalize() + ".")
    return rng.choice((" ", " ", "\n")).join(parts)


def _tool(name: str, argument: str, description: str) -> Mapping[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def solved_turns(
    task: Task,
    rng: random.Random,
    *,
    tool: tuple[str, str] = ("calculator", "expression"),
    odd_share: float = ODD_RESULT_SHARE,
    error_share: float = ERROR_SHARE,
) -> list[Message]:
    """The turns of a right solution; odd tool results are used all the same, a failed call ends the attempt."""
    messages: list[Message] = [{"role": "user", "content": task.question}]
    rounds = [task.steps] if task.kind is Kind.PARALLEL else [(step,) for step in task.steps]
    values: list[str] = []
    for steps in rounds:
        calls = [step.expression(values[0] if values else "") for step in steps]
        values = [_result(call, rng, odd_share) for call in calls]
        if rng.random() < error_share:
            values[rng.randrange(len(values))] = rng.choice(_ERRORS).format(n=rng.randrange(1, 100))
        messages.append(calls_message(calls, name=tool[0], argument=tool[1]))
        messages += [{"role": "tool", "name": tool[0], "content": value} for value in values]
        if any(value.lower().startswith("error") for value in values):
            return [*messages, {"role": "assistant", "content": FAILED_TEXT}]
    return [*messages, {"role": "assistant", "content": answer_text(values)}]


def _result(call: str, rng: random.Random, odd_share: float) -> str:
    if rng.random() >= odd_share:
        try:
            return calculate(call)
        except CalculatorError as error:  # an odd earlier result led to a division by zero
            return f"error: {error}"
    digits = rng.randint(1, 10)
    value = str(rng.randrange(10 ** (digits - 1), 10**digits))
    if rng.random() < 0.1:
        value = f"{value}.{rng.randrange(1, 1000)}"
    return f"-{value}" if rng.random() < 0.1 else value


def train_tokenizer(seed: int, *, conversations: int = 4000) -> Tokenizer:
    """A byte-level BPE over rendered conversations."""
    maker = ConversationMaker(random.Random(f"{seed}/tokenizer"))
    texts = (render(*maker.make(index / conversations)) for index in range(conversations))
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    marks = [*SPECIAL_TOKENS, *TAG_TOKENS]
    pieces = (_without(text, marks) for text in texts)
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE - len(TAG_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_tokens(list(TAG_TOKENS))
    return tokenizer


def _without(text: str, marks: list[str]) -> str:
    for mark in marks:
        text = text.replace(mark, "")
    return text


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a token that must exist; raises ValueError when it does not."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token!r}; train it with train_tokenizer")
    return int(found)


def encode_example(tokenizer: Tokenizer, text: str) -> Example:
    """Ids of a rendered conversation; learned are the assistant's turns up to and with their end."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    start, end = token_id(tokenizer, TURN_START), token_id(tokenizer, TURN_END)
    header = tokenizer.encode(f"{TURN_START}assistant\n", add_special_tokens=False).ids
    learn = [False] * len(ids)
    position = 0
    while position < len(ids):
        if ids[position] == start and ids[position : position + len(header)] == header:
            position += len(header)
            while position < len(ids):
                learn[position] = True
                if ids[position] == end:
                    break
                position += 1
        position += 1
    return Example(ids, learn)


def batches(
    tokenizer: Tokenizer, rng: random.Random, progress: float, *, batch_tokens: int, pool: int, max_tokens: int
) -> Iterator[list[Example]]:
    """A shuffled pool of conversations cut into batches of like length, each of at most ``batch_tokens``."""
    maker = ConversationMaker(rng)
    texts = [render(*maker.make(progress)) for _ in range(pool)]
    examples = [encode_example(tokenizer, text) for text in texts]
    examples = [Example(e.ids[:max_tokens], e.learn[:max_tokens]) for e in examples]
    examples.sort(key=lambda example: len(example.ids))
    cut: list[list[Example]] = [[]]
    for example in examples:
        if cut[-1] and (len(cut[-1]) + 1) * len(example.ids) > batch_tokens:
            cut.append([])
        cut[-1].append(example)
    rng.shuffle(cut)
    yield from cut
