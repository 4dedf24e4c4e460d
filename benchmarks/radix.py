"""Radix tree and ledger: probing a long prompt, eviction at growing sizes, rates of the everyday verbs."""

from __future__ import annotations

import random

from caesura.runtime.kv.ledger import KVLedger
from caesura.scheduler.types import ContextId

from benchmarks.common import Bench

PAGE = 16
VOCABULARY = 50_000


def _compute(ledger: KVLedger, context: ContextId, tokens: list[int]) -> None:
    """Run a whole context in one step, as an engine without a model would."""
    ledger.open(context, "")
    ledger.acquire(context, tokens, len(tokens) - 1)
    if not ledger.extend(context, len(tokens)):
        raise RuntimeError(f"context {context}: {ledger.free_pages} free pages are too few for {len(tokens)} tokens")
    ledger.commit(context, tokens, len(tokens))


def _leaves(ledger: KVLedger, count: int, rng: random.Random, first: int = 0) -> None:
    """``count`` cached runs of one page each, one tick apart."""
    for number in range(first, first + count):
        ledger.advance(number)
        tokens = [rng.randrange(VOCABULARY) for _ in range(PAGE)]
        _compute(ledger, ContextId(number), tokens)
        ledger.close(ContextId(number))


def _probe(bench: Bench, prompt_tokens: int, num_nodes: int, rng: random.Random) -> None:
    """A prompt that lies in the tree in pieces, because other prompts branch off along all of it."""
    ledger = KVLedger(PAGE, prompt_tokens // PAGE + num_nodes + PAGE)
    prompt = [rng.randrange(VOCABULARY) for _ in range(prompt_tokens)]
    _compute(ledger, ContextId(0), prompt)
    ledger.close(ContextId(0))
    whole = list(prompt)
    bench.time("compare slices", lambda: prompt[:] == whole, repeats=31, baseline="compare slices")
    bench.time("probe, 1 of 1 node", lambda: ledger.tree.probe("", prompt), repeats=31, baseline="compare slices")
    branches = (num_nodes - 2) // 2  # each cuts the run once more and hangs a leaf of its own on it
    for number, page in enumerate(sorted(rng.sample(range(1, prompt_tokens // PAGE), branches)), start=1):
        branch = [*prompt[: page * PAGE], *(rng.randrange(VOCABULARY) for _ in range(PAGE))]
        _compute(ledger, ContextId(number), branch)
        ledger.close(ContextId(number))
    found = ledger.tree.probe("", prompt)
    if found.device_tokens != prompt_tokens - prompt_tokens % PAGE:
        raise RuntimeError(f"probe found {found} of {prompt_tokens} tokens")
    details = {"nodes": len(ledger.tree.nodes), "nodes_on_the_way": branches + 1, "prompt_tokens": prompt_tokens}
    bench.time(
        f"probe, {branches + 1:,} of {len(ledger.tree.nodes):,} nodes",
        lambda: ledger.tree.probe("", prompt),
        repeats=31,
        baseline="compare slices",
        details=details,
    )
    other = KVLedger(PAGE, prompt_tokens // PAGE + num_nodes + PAGE)
    _compute(other, ContextId(0), prompt)
    _leaves(other, num_nodes - 2, rng, first=1)
    bench.time(
        f"probe, 1 of {len(other.tree.nodes):,} nodes",
        lambda: other.tree.probe("", prompt),
        repeats=31,
        baseline="compare slices",
        details={"nodes": len(other.tree.nodes), "nodes_on_the_way": 1, "prompt_tokens": prompt_tokens},
    )


def _eviction(bench: Bench, sizes: list[int], rng: random.Random, *, repeats: int) -> None:
    """One page wanted, all pages cached: evict the least recently used leaf, again and again."""
    batch, baseline = 200, f"evict a page, {sizes[0]:,} nodes"
    for size in sizes:
        ledger = KVLedger(PAGE, size)
        _leaves(ledger, size, rng)
        taken: list[int] = []
        count = size

        def refill(ledger: KVLedger = ledger, taken: list[int] = taken) -> None:
            nonlocal count
            ledger.device.free(taken)
            _leaves(ledger, len(taken), rng, first=count)
            count += len(taken)
            taken.clear()
            if ledger.evictable_pages != ledger.num_device_pages:
                raise RuntimeError(f"{ledger.evictable_pages} of {ledger.num_device_pages} pages evictable")

        def evict(ledger: KVLedger = ledger, taken: list[int] = taken) -> None:
            for _ in range(batch):
                taken.extend(ledger.tiers.allocate(1) or ())

        bench.time(
            f"evict a page, {size:,} nodes",
            evict,
            setup=refill,
            repeats=repeats,
            per=batch,
            baseline=baseline,
            details={"nodes": size},
        )


def _everyday(bench: Bench, rng: random.Random, *, contexts: int, repeats: int) -> None:
    """What a step costs per context: a decode, and a context that comes, finds its prefix cached, and goes."""
    shared = [rng.randrange(VOCABULARY) for _ in range(1024)]
    ledger = KVLedger(PAGE, contexts * 80 + 200)
    tokens = {}
    for number in range(contexts):
        context = ContextId(number)
        tokens[context] = [*shared, *(rng.randrange(VOCABULARY) for _ in range(PAGE))]
        _compute(ledger, context, tokens[context])

    def decode() -> None:
        for context, mine in tokens.items():
            mine.append(7)
            ledger.extend(context, len(mine))
            ledger.table(context)
            ledger.commit(context, mine, len(mine))

    visitor = [*shared, *range(VOCABULARY, VOCABULARY + 40)]

    def visit() -> None:
        for number in range(100):
            _compute(ledger, ContextId(contexts + number), visitor)
            ledger.close(ContextId(contexts + number))

    decode_name = f"decode a token, {contexts} contexts"
    bench.time(decode_name, decode, repeats=repeats, per=contexts, baseline=decode_name)
    bench.time(
        "open, acquire 1,024, publish 32, close",
        visit,
        repeats=repeats,
        per=100,
        baseline=decode_name,
    )


def run(bench: Bench, *, quick: bool) -> None:
    """Measure all of it."""
    rng = random.Random(bench.seed)
    prompt, nodes, sizes = (100_000, 10_000, [1_000, 10_000, 100_000])
    if quick:
        prompt, nodes, sizes = (10_000, 1_000, [1_000, 5_000])
    bench.configure(page_size=PAGE, prompt_tokens=prompt, quick=quick)
    _probe(bench, prompt, nodes, rng)
    _eviction(bench, sizes, rng, repeats=5 if quick else 15)
    _everyday(bench, rng, contexts=64, repeats=15)
