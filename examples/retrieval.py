"""Retrieval: the model searches a folder of yours and answers from what it reads there.

A search tool of twenty lines finds, in each text file, the sentence that shares most words with the query, rare words
first. The answer names its source, and a question that no file answers gets no answer.

    python examples/retrieval.py --folder examples/town
"""

import math
import re
from collections import Counter
from pathlib import Path
from textwrap import indent
from typing import Annotated

import typer
from caesura.lang import Engine, Tool, assistant, connect, function, gen, user
from rich import print
from rich.markup import escape

TOWN = Path(__file__).with_name("town")
QUESTIONS = [
    "When does the Harbour Tower open?",
    "Who built the Fish Market?",
    "What does the Palm Garden cost?",
    "When was the Town Library built?",
    "What does the Town Library cost?",
]


class Folder:
    """The sentences of a folder's text files, each under the heading of its file."""

    def __init__(self, path: Path) -> None:
        self.passages: list[tuple[str, str]] = []  # (file, "Heading: sentence.")
        for file in sorted([*path.glob("*.md"), *path.glob("*.txt")]):
            heading, *lines = [line.strip() for line in file.read_text().splitlines() if line.strip()] or [""]
            self.passages += [(file.name, f"{heading.lstrip('# ')}: {inner(line)}") for line in lines]
        self._words = [Counter(words(passage)) for _, passage in self.passages]
        self._found_in = Counter(word for found in self._words for word in found)
        self.read: list[str] = []  # the files that the last search showed

    def search(self, query: str) -> str:
        """Search the passages."""
        rarity = {word: math.log(1 + len(self._words) / (1 + self._found_in[word])) for word in words(query)}
        best: dict[str, tuple[float, str]] = {}  # of each file the sentence that fits best
        for (file, passage), found in zip(self.passages, self._words, strict=True):
            score = sum(rarity[word] for word in rarity if word in found)
            if score > best.get(file, (0.0, ""))[0]:
                best[file] = (score, passage)
        shown = sorted(best, key=lambda file: -best[file][0])[:3]
        self.read = shown
        return "\n".join(best[file][1] for file in shown) or "error: nothing found"


def inner(sentence: str) -> str:
    """A sentence as it stands after a colon."""
    return sentence[0].lower() + sentence[1:] if sentence.startswith(("It ", "A ", "The ", "There ")) else sentence


def words(text: str) -> list[str]:
    """Words in lower case, without their endings."""
    return [word[:4] for word in re.findall(r"\w+", text.lower())]


@function
def ask(s, question: str, search: Tool):
    s += user(question)
    s += assistant(gen("answer", tools=[search], max_tokens=64, temperature=0))


def main(
    folder: Annotated[Path, typer.Option(exists=True, file_okay=False)] = TOWN,
    question: list[str] = QUESTIONS,
    url: str = "",
    model: str = "",
):
    """Ask about a folder; --url names a server, --model a checkpoint, otherwise the embedded model answers."""
    states = []
    with connect(url) if url else Engine(model or None) as backend:
        for asked in question:
            notes = Folder(folder)
            state = ask.run(asked, Tool(notes.search), backend=backend)
            print(f"[bold]{escape(asked)}[/]")
            for call, result in state.tool_calls("answer"):
                print(f"  [dim]{escape(f'{call.tool} {call.arguments}')}")
                print("[dim]" + escape(indent(result.text, "    ")))
            print(f"  [green]{escape(state['answer'])}[/] [dim]({escape(', '.join(notes.read)) or 'nothing read'})")
            states.append(state)
    return states


if __name__ == "__main__":
    typer.run(main)
