"""Generative recommendation: score every candidate item under one long history of a user.

The history is computed once; each candidate is a fork of a few tokens on that one prefix, all in a few steps of the
engine. `select` gives the scores, so the ranking is as long as one likes.

    python examples/recommend.py --items 96 --candidates 64
"""

import math
import random
import time
from collections import Counter

import typer
from caesura.lang import Engine, assistant, connect, function, get_server_info, select, user
from rich import print
from rich.table import Table

KINDS = ("tea", "mug", "lamp", "chess", "boots", "tent", "radio", "book", "rug", "drum", "kite", "clock")


def shopper(seed: int, items: int, candidates: int) -> tuple[list[str], list[str], list[str]]:
    """What a user bought, who likes three kinds of things; items on offer; and the kinds the user likes."""
    draw = random.Random(seed)
    liked = draw.sample(KINDS, 3)
    catalogue = [f"{kind}-{number}" for kind in KINDS for number in range(1, 61)]
    draw.shuffle(catalogue)
    wanted = [item for item in catalogue if item.split("-")[0] in liked]
    others = [item for item in catalogue if item.split("-")[0] not in liked]
    history = [wanted.pop() if draw.random() < 0.85 else others.pop() for _ in range(items)]
    offer = [wanted.pop() if i % 4 == 0 else others.pop() for i in range(candidates)]
    return history, draw.sample(offer, len(offer)), liked


@function
def rank(s, history: list[str], candidates: list[str]):
    s += user(f"History: {', '.join(history)}. Next?")
    s += assistant(select("best", candidates))
    scores = s.get_meta_info("best")["normalized_prompt_logprobs"]
    return sorted(zip(scores, candidates, strict=True), reverse=True)


def main(seed: int = 1, items: int = 96, candidates: int = 64, top: int = 10, url: str = "", model: str = ""):
    """Rank candidates; --url names a server, --model a checkpoint, otherwise the embedded model answers."""
    history, offer, liked = shopper(seed, items, candidates)
    with connect(url) if url else Engine(model or None) as backend:
        before = get_server_info(backend).get("tokens_computed")  # other servers do not say
        started = time.perf_counter()
        state = rank.run(history, offer, backend=backend)
        ranking = state.ret_value
        seconds = time.perf_counter() - started
        computed = None if before is None else get_server_info(backend)["tokens_computed"] - before
    bought = Counter(item.split("-")[0] for item in history)
    print("bought so far: " + ", ".join(f"{count} {kind}" for kind, count in bought.most_common()))
    table = Table("", "item", "score", "", box=None, header_style="dim")
    for place, (score, item) in enumerate(ranking[:top], 1):
        colour = "green" if item.split("-")[0] in liked else "white"
        table.add_row(
            str(place), f"[{colour}]{item}[/]", f"{score:.2f}", f"[{colour}]{'█' * round(40 * math.exp(score))}[/]"
        )
    print(table)
    hits = sum(item.split("-")[0] in liked for _, item in ranking[:top])
    print(f"{hits} of the first {top} are of a kind the user likes; {top / 4:.1f} would be by chance")
    print(f"[dim]{candidates} candidates in {seconds * 1000:.0f} ms")
    if computed is not None:
        own = sum(len(tokens) for tokens in state.get_meta_info("best")["input_token_logprobs"])
        alone = candidates * (computed - own) + own  # what is not the candidates' own is the history
        print(f"[dim]{computed:,} tokens computed, {alone:,} if each had come with its own history")
    return state


if __name__ == "__main__":
    typer.run(main)
