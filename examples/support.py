"""Live support: words of a call arrive while it goes on, and a card for the clerk must be on the screen at once.

Listening is a tool: the context is paused until the next words come. Each piece costs its own few tokens and one
`select` over the cards, however long the call has become: tens of milliseconds after the words.

    python examples/support.py --pace 4
"""

import asyncio
import math
import time

import typer
from caesura.lang import Engine, assistant, call_tool, connect, function, get_server_info, select, system
from rich import print
from rich.markup import escape

CARDS = {
    "wait": "",
    "delivery": "Ask for the parcel number, look it up, offer a new parcel after 10 days",
    "refund": "Check for double charges; refunds take 3 days",
    "password": "Send a link to the address on file",
    "invoice": "Send the invoice again as PDF",
    "cancel": "Ask why, offer a pause of the plan",
}
CALL = (  # seconds before the words, the words
    (0.6, "Customer: hello, this is Keiko"),
    (0.5, "Customer: my parcel 4821 has"),
    (0.5, "not arrived, it should have come on Monday"),
    (0.8, "Customer: one moment please"),
    (0.9, "Customer: and I was charged 75 crowns twice"),
    (0.7, "please send me the invoice of Monday"),
    (0.6, "Customer: and I cannot log in"),
    (0.9, "Customer: I want to end my plan"),
)


class Line:
    """A telephone line: the words of a recorded call, each at its time."""

    def __init__(self, pace: float) -> None:
        self._pieces = list(CALL)
        self._pace = pace
        self.heard_s = 0.0  # when the last words came

    async def next_words(self) -> str:
        """Wait for the next words of the call."""
        if not self._pieces:
            return "(the line is dead)"
        seconds, words = self._pieces.pop(0)
        await asyncio.sleep(seconds / self._pace)
        self.heard_s = time.perf_counter()
        return words


@function
def assist(s, line: Line, deadline_s: float, show):
    s += system(f"You listen to a call and choose a card: {', '.join(list(CARDS)[1:])}, wait.")
    late = 0
    for piece in range(len(CALL)):
        s.role("tool", call_tool(f"heard{piece}", line.next_words, timeout_s=30))
        s += assistant(select(f"card{piece}", list(CARDS)))
        card = s[f"card{piece}"]
        seconds = time.perf_counter() - line.heard_s
        late += seconds > deadline_s
        scores = [math.exp(score) for score in s.get_meta_info(f"card{piece}")["normalized_prompt_logprobs"]]
        show(s[f"heard{piece}"], card, max(scores) / sum(scores), seconds)
    return late


def main(pace: float = 2.0, deadline_s: float = 0.1, url: str = "", model: str = ""):
    """Follow a call at PACE times its speed; --url names a server, --model a checkpoint."""

    def show(words: str, card: str, share: float, seconds: float) -> None:
        print(f"[dim]{seconds * 1000:4.0f} ms[/]  {escape(words)}")
        if card != "wait":
            print(f"          [black on green] {card} [/] [green]{CARDS[card]}[/] [dim]{share:.0%} sure[/]")

    with connect(url) if url else Engine(model or None) as backend:
        before = get_server_info(backend).get("tokens_computed")  # other servers do not say
        state = assist.run(Line(pace), deadline_s, show, backend=backend)
        late = state.ret_value
        after = get_server_info(backend).get("tokens_computed")
    print(f"{len(CALL)} pieces, {late} later than {deadline_s * 1000:.0f} ms")
    if before is not None:
        print(f"{after - before} tokens computed in all")
    return state


if __name__ == "__main__":
    typer.run(main)
