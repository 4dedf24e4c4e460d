"""A batch: two hundred rows at once, a progress bar, and every failure beside its row.

Real data has bad rows. Here one has no question, one is far longer than the model's context, and the calculator's
service refuses some calls. Nothing of that stops the others or hides among them.

    python examples/batch.py --rows 200
"""

import time
from collections import Counter
from typing import Annotated

import typer
from caesura.lang import Engine, ProgramState, assistant, connect, function, gen, tool, user
from caesura.runtime.embedded.tasks import Split, check, make_tasks
from caesura.runtime.embedded.tools import calculate
from rich import print
from rich.markup import escape
from rich.table import Table


@tool(timeout_s=5, retries=1, on_error="raise")
async def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    if expression.endswith("7"):
        raise ConnectionError(f"the service has no line for {expression}")
    return calculate(expression)


@function
def solve(s, question: str):
    s += user(question)
    s += assistant(gen("answer", tools=[calculator], max_tokens=96, temperature=0))


def main(rows: Annotated[int, typer.Option(min=1)] = 200, seed: int = 1, url: str = "", model: str = ""):
    """Answer ROWS questions; --url names a server, --model a checkpoint, otherwise the embedded model answers."""
    tasks = make_tasks(seed, rows, Split.HELD_OUT)
    batch: list[dict] = [{"question": task.question} for task in tasks]
    batch[rows // 3] = {}  # a row that lacks its question
    batch[rows // 2] = {"question": "What is 2 + 2? " * 2000}  # and one that is longer than the context
    with connect(url) if url else Engine(model or None) as backend:
        started = time.perf_counter()
        outcomes = solve.run_batch(batch, backend=backend, progress_bar=True, return_exceptions=True)
        seconds = time.perf_counter() - started
    done = [(task, state) for task, state in zip(tasks, outcomes, strict=True) if isinstance(state, ProgramState)]
    right = sum(check(task, state["answer"]) for task, state in done)
    causes = {i: getattr(error, "root", error) for i, error in enumerate(outcomes) if isinstance(error, Exception)}
    failures = Counter(type(cause).__name__ for cause in causes.values())

    tokens = sum(state.usage().completion_tokens for _, state in done)
    print(f"{rows} rows in {seconds:.1f} s, {tokens / seconds:,.0f} tokens a second")
    print(f"[green]{right} right[/], [yellow]{len(done) - right} wrong[/], [red]{failures.total()} failed[/]")
    table = Table("kind", "rows", "the first of them", box=None, header_style="dim", padding=(0, 2, 0, 0))
    for kind, count in failures.most_common():
        row, cause = next((i, cause) for i, cause in causes.items() if type(cause).__name__ == kind)
        table.add_row(f"[red]{kind}[/]", str(count), escape(f"row {row}: {cause}"))
    print(table)
    return outcomes


if __name__ == "__main__":
    typer.run(main)
