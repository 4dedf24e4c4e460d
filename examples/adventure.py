"""A text adventure: twenty short pauses in one context, which a stateless API would pay for twenty times.

The model plays: each step is a tool call, each call a pause, each observation a line that is appended to the context.
Compare what was computed with what the prompts of all steps add up to.

    python examples/adventure.py --seed 3
"""

import typer
from caesura.lang import Engine, Tool, assistant, connect, function, gen, user
from caesura.runtime.embedded.tools import Adventure
from rich import print
from rich.markup import escape


@function
def play(s, game: Adventure, act: Tool):
    s += user(f"Play the adventure: {game.goal}.\n{game.observe()}")
    s += assistant(gen("end", tools=[act], max_tokens=64, max_tool_rounds=32, temperature=0))


def narrated(game: Adventure) -> Tool:
    """The game's own tool, which also tells us what happens."""

    def act(command: str) -> str:
        """Act in the adventure."""
        seen = game.act(command)
        place, _, rest = seen.partition(" Exits")
        here = rest.partition("Here: ")[2].partition(".")[0]
        found = f"here: {here}" if here not in ("", "nothing") else ""
        print(f"{game.steps:>3}. [bold cyan]{escape(command):<20}[/] {escape(place):<22} [dim]{escape(found)}[/]")
        return seen

    return Tool(act)


def main(seed: int = 3, url: str = "", model: str = ""):
    """Play the adventure of SEED; --url names a server, --model a checkpoint."""
    game = Adventure(seed)
    print(f"[bold]{escape(game.goal.capitalize())}.[/] {escape(game.observe())}")
    with connect(url) if url else Engine(model or None) as backend:
        state = play.run(game, narrated(game), backend=backend)
        print(f"[bold {'green' if game.solved else 'red'}]{escape(state['end'])}[/]")
        usage = state.usage()
    computed = usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens
    print(
        f"[dim]{usage.tool_calls} pauses; the prompts of all steps add up to {usage.prompt_tokens:,} tokens, "
        f"{computed:,} were computed ({usage.completion_tokens:,} of them generated)[/]"
    )
    return state, game


if __name__ == "__main__":
    typer.run(main)
