"""Conversations as token ids: the tokenizer, which tokens are the model's own to write, and batches. No torch here."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from caesura.runtime.embedded.chat import SPECIAL_TOKENS, TAG_TOKENS, TURN_END, TURN_START, render
from caesura.runtime.embedded.data import ConversationMaker
from caesura.runtime.embedded.skills.chores import UNLEARNED
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

VOCAB_SIZE = 1280
# Words that are never copied keep the space before them; before any other word it is a token of its own.
FUNCTION_WORDS = (
    *("a", "an", "the", "this", "that", "each", "no", "not", "many", "much", "one", "other", "another"),
    *("and", "or", "than", "then", "too", "again", "now", "of", "to", "in", "on", "at", "as", "by", "for", "from"),
    *("with", "into", "out", "up", "after", "before", "between", "under", "about", "is", "are", "was", "were", "do"),
    *("does", "did", "have", "has", "had", "can", "it", "its", "me", "my", "you", "your", "they", "who", "what"),
    *("which", "where", "when", "how", "there"),
)
# What is tokenized by itself. A name is the same tokens wherever it stands, to be copied without knowing how it is
# spelled; what stands around every call and result is few tokens, for they take most of the time; and nothing reaches
# across the border between a template's words and contents, which servers tokenize apart.
PRE_TOKENS = "|".join(
    (
        r"\A(?:system|user|assistant)\n",
        r'\n?\{"name": "',
        r'", "arguments":',
        r' ?\{"?|"\}|\}\n|"[,:] "?',
        r"\)?\. (?:Exits|Here|You have|Ways): ",  # of an adventure's observations
        r"\p{N}",
        rf" (?:{'|'.join(FUNCTION_WORDS)})(?!\p{{L}})",
        r"\p{L}+",
        r'["{}]',
        r' ?[^\s\p{L}\p{N}{}"]+(?:(?<=,) )?',  # a prompt may end with any other, and its blank be the model's to write
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation as token ids; ``learn[i]`` says whether ``ids[i]`` is the model's own to write. ``asked`` counts
    how often it was trained on before."""

    ids: list[int]
    learn: list[bool]
    asked: int = 0


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
    marks = [*SPECIAL_TOKENS, *TAG_TOKENS, *UNLEARNED]
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


def letter_tokens(tokenizer: Tokenizer) -> list[str]:
    """The tokens that words are made of."""
    return sorted(token for token in tokenizer.get_vocab() if token.isascii() and token.isalpha())


def encode_example(tokenizer: Tokenizer, text: str) -> Example:
    """Ids of a rendered conversation; learned are the assistant's turns up to and with their end, without what
    stands between the UNLEARNED marks there (the marks themselves go)."""
    plain, spans = _unmarked(text)
    encoding = tokenizer.encode(plain, add_special_tokens=False)
    ids: list[int] = encoding.ids
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
    if spans:
        for i, (begin, _) in enumerate(encoding.offsets):
            learn[i] = learn[i] and not any(low <= begin < high for low, high in spans)
    return Example(ids, learn)


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without UNLEARNED marks, and what they enclosed as spans of it."""
    if UNLEARNED[0] not in text:
        return text, []
    plain, spans = "", []
    for part in text.split(UNLEARNED[0]):
        hidden, mark, rest = part.partition(UNLEARNED[1])
        if mark:
            spans.append((len(plain), len(plain) + len(hidden)))
        plain += hidden + rest
    return plain, spans


def batches(
    tokenizer: Tokenizer,
    rng: random.Random,
    progress: float,
    again: Sequence[Example],
    *,
    batch_tokens: int,
    pool: int,
    max_tokens: int,
    micro_tokens: int = 2304,
    late: bool = False,
) -> Iterator[list[list[Example]]]:
    """A shuffled pool of conversations, new ones and those to learn ``again``, cut into micro-batches of like length,
    several of which make a batch of at least ``batch_tokens``, short and long ones mixed."""
    maker = ConversationMaker(rng, letter_tokens(tokenizer))
    texts = [render(*maker.make(progress, late=late)) for _ in range(pool - len(again))]
    examples = [encode_example(tokenizer, text) for text in texts]
    examples = [*again, *(Example(e.ids[:max_tokens], e.learn[:max_tokens]) for e in examples)]
    examples.sort(key=lambda example: len(example.ids))
    cut: list[list[Example]] = [[]]
    for example in examples:
        if cut[-1] and (len(cut[-1]) + 1) * len(example.ids) > micro_tokens:
            cut.append([])
        cut[-1].append(example)
    rng.shuffle(cut)
    batch: list[list[Example]] = []
    for micro in cut:
        batch.append(micro)
        if sum(len(each) * len(each[-1].ids) for each in batch) >= batch_tokens * 0.9:
            yield batch
            batch = []
