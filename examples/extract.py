"""Extraction: letters in, pydantic objects out.

`gen(type=Order)` makes a grammar of the model's fields, so that whatever the model writes is an order: the right
keys, an int for the quantity, a date among the months. What the fields hold is up to the model, and is checked here.

    python examples/extract.py
"""

import typer
from caesura.lang import Engine, assistant, connect, function, gen, user
from pydantic import BaseModel, Field
from rich import print
from rich.markup import escape
from rich.table import Table

MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
LETTERS = (
    "Wanda from Ostby ordered 48 lanterns on 14 May, to be paid in crowns.",
    "Hello, this is Dario. Could you send me 312 tulips by 3 October? We are in Velmar now.",
    "On 21 June Karsund called: 95 pebbles for Signe, please.",
    "Tobias from Velmar ordered 1207 magnets on 9 January, to be paid in francs.",
    "Hello, this is Laila. Could you send me 66 whistles by 30 April? We are in Ostby now.",
)


class Order(BaseModel):
    customer: str = Field(max_length=30)
    town: str = Field(max_length=30)
    quantity: int = Field(ge=1, le=100_000)
    item: str = Field(max_length=30)
    day: str = Field(pattern=rf"^[1-9]\d? ({MONTHS})$")


@function
def read(s, letter: str):
    s += user(f"Extract the order as JSON.\n\n{letter}")
    s += assistant(gen("order", type=Order, max_tokens=128, temperature=0))
    return s["order"]


def missing(order: Order, letter: str) -> list[str]:
    """The fields whose value does not stand in the letter: a model can be held to a form, not to the truth."""
    return [name for name, value in order if str(value) not in letter]


def main(url: str = "", model: str = ""):
    """Read the letters; --url names a server, --model a checkpoint, otherwise the embedded model answers."""
    with connect(url) if url else Engine(model or None) as backend:
        states = read.run_batch([(letter,) for letter in LETTERS], backend=backend)
        orders: list[Order] = [state.ret_value for state in states]
    table = Table(*Order.model_fields, box=None, header_style="bold", padding=(0, 3, 0, 0))
    for order, letter in zip(orders, LETTERS, strict=True):
        wrong = missing(order, letter)
        table.add_row(*(f"[{'red' if name in wrong else 'green'}]{escape(str(value))}[/]" for name, value in order))
    print(table)
    print(f"{sum(order.quantity for order in orders):,} pieces ordered. [dim](red: does not stand in the letter)[/]")
    return states


if __name__ == "__main__":
    typer.run(main)
