"""The words of the arithmetic tasks: names, things and phrasings. ``{a} {b} {c} {d}`` are numbers.

Names and things of the evaluation split never occur in training.
"""

from __future__ import annotations

NAMES: dict[str, tuple[str, ...]] = {
    "train": (
        *("Mara", "Jonas", "Aiko", "Ravi", "Lena", "Tom", "Ines", "Omar", "Freya", "Paul", "Nadia"),
        *("Hugo", "Elif", "Sam", "Greta", "Luis", "Amara", "Finn", "Chloe", "Igor", "Zoe", "Ben"),
        *("Yara", "Nils", "Rosa", "Kofi", "Ada", "Emil", "Tara", "Leo", "Mina", "Oskar"),
    ),
    "held_out": ("Bruno", "Salma", "Viktor", "Keiko", "Dario", "Wanda", "Farid", "Signe", "Tobias", "Laila"),
}

THINGS: dict[str, tuple[str, ...]] = {
    "train": (
        *("pens", "apples", "books", "stamps", "marbles", "coins", "stickers", "cards"),
        *("bricks", "bottles", "eggs", "nails", "seeds", "tickets", "beads", "cookies"),
        *("shells", "screws", "candles", "lemons", "buttons", "postcards"),
    ),
    "held_out": ("walnuts", "magnets", "ribbons", "tulips", "whistles", "pebbles", "lanterns", "muffins"),
}

HOLDERS: dict[str, tuple[str, ...]] = {
    "train": ("boxes", "bags", "shelves", "crates", "trays", "baskets", "drawers", "packets", "jars", "cartons"),
    "held_out": ("chests", "barrels", "folders", "sacks", "racks"),
}

# A wrapper round an expression written with symbols or words.
ASK = (
    "What is {e}?",
    "What is {e}?",
    "Compute {e}.",
    "Calculate {e}.",
    "{e} = ?",
    "How much is {e}?",
    "Please work out {e}.",
    "Could you tell me what {e} is?",
    "I need the value of {e}.",
    "Evaluate {e} for me.",
    "Work out {e}",
    "{name} asks: what is {e}?",
    "Tell me the result of {e}.",
    "What do you get for {e}?",
    "What does {e} make?",
)

SYMBOLS = {
    "+": ("+", "+", "plus"),
    "-": ("-", "-", "minus"),
    "*": ("*", "*", "x", "\u00d7", "times", "multiplied by"),
    "/": ("/", "/", "÷", "divided by"),
}

# Phrases of one step by operator: they name a before b unless the name says reversed.
IN_WORDS = {
    "+": (
        "What is the sum of {a} and {b}?",
        "Add {a} and {b}.",
        "Add {b} to {a}.",
        "Find the total of {a} and {b}.",
    ),
    "-": (
        "What is the difference between {a} and {b}?",
        "Subtract {b} from {a}.",
        "Take {b} away from {a}.",
        "How much is {a} less {b}?",
    ),
    "*": (
        "What is the product of {a} and {b}?",
        "Multiply {a} by {b}.",
        "Multiply {a} and {b}.",
        "How much is {a} taken {b} times?",
    ),
    "/": (
        "Divide {a} by {b}.",
        "How often does {b} go into {a}?",
        "What is the quotient of {a} and {b}?",
        "Split {a} into {b} equal parts: how much is one part?",
    ),
}

STORIES = {
    "+": (
        "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
        "{name} collected {a} {thing} and {other} collected {b}. How many {thing} did they collect together?",
        "There are {a} {thing} in one of the {holder} and {b} in another. How many {thing} are there in total?",
        "A shop sold {a} {thing} on Monday and {b} on Tuesday. How many {thing} were sold?",
        "{name} drove {a} km in spring and {b} km in summer. How far is that altogether?",
    ),
    "-": (
        "{name} had {a} {thing} and gave {b} of them to {other}. How many {thing} are left?",
        "Of {a} {thing}, {b} were broken. How many {thing} are still whole?",
        "A shop ordered {a} {thing} and has sold {b}. How many {thing} remain?",
        "{name} has {a} {thing}, {other} has {b}. How many more {thing} does {name} have?",
        "{name} wants to save {a} euros and has {b}. How many euros are missing?",
    ),
    "*": (
        "{name} has {a} {holder} with {b} {thing} each. How many {thing} are there in total?",
        "One of the {thing} costs {a} cents. {name} buys {b} of them. How many cents does {name} pay?",
        "There are {a} rows of {b} {thing}. How many {thing} are there?",
        "A machine makes {a} {thing} an hour. How many {thing} does it make in {b} hours?",
        "Each of {a} {holder} holds {b} {thing}. How many {thing} do they hold together?",
    ),
    "/": (
        "{name} shares {a} {thing} equally among {b} friends. How many {thing} does each friend get?",
        "{a} {thing} are packed into {b} {holder} evenly. How many {thing} are in each?",
        "{name} pays {a} cents for {b} {thing}. How many cents does one cost?",
        "A farm packs {a} {thing} in {holder} of {b}. How many {holder} are needed?",
    ),
}

# Two steps. The key names both operators; the second step is `first <op2> c`, or `c - first` for "r-".
TWO_STEPS = {
    ("+", "*"): (
        "What is ({a} + {b}) * {c}?",
        "Add {a} and {b}, then multiply the result by {c}.",
        "{name} has {a} red and {b} blue {thing}. {other} has {c} times as many. How many {thing} does {other} have?",
    ),
    ("-", "*"): (
        "What is ({a} - {b}) * {c}?",
        "Subtract {b} from {a}, then multiply the result by {c}.",
        "{name} had {a} {thing} and lost {b}. Each of the rest sells for {c} cents. How many cents is that?",
    ),
    ("*", "+"): (
        "What is {a} * {b} + {c}?",
        "Multiply {a} by {b}, then add {c}.",
        "{name} has {a} {holder} with {b} {thing} each, and {c} loose {thing}. How many {thing} is that in total?",
    ),
    ("*", "-"): (
        "What is {a} * {b} - {c}?",
        "Multiply {a} by {b}, then subtract {c}.",
        "{name} has {a} {holder} with {b} {thing} each and gives away {c} {thing}. How many {thing} are left?",
    ),
    ("+", "-"): (
        "What is {a} + {b} - {c}?",
        "Add {a} and {b}, then subtract {c}.",
        "{name} had {a} {thing}, bought {b} more and sold {c}. How many {thing} are left?",
    ),
    ("-", "+"): (
        "What is {a} - {b} + {c}?",
        "Subtract {b} from {a}, then add {c}.",
        "{name} had {a} {thing}, sold {b} and bought {c} more. How many {thing} does {name} have now?",
    ),
    ("*", "/"): ("What is {a} * {b} / {c}?", "Multiply {a} by {b}, then divide the result by {c}."),
    ("*", "r-"): (
        "What is {c} - {a} * {b}?",
        "{name} had {c} {thing} and filled {a} {holder} with {b} {thing} each. How many {thing} are left over?",
    ),
    ("+", "r-"): (
        "What is {c} - ({a} + {b})?",
        "Of {c} {thing}, {name} takes {a} and {other} takes {b}. How many {thing} are left?",
    ),
}

PARALLEL = (
    "What is {e}, and what is {f}?",
    "What are {e} and {f}?",
    "Compute {e} and {f}.",
    "Two sums for {name}: {e} and {f}.",
    "Calculate both {e} and {f}.",
    "Tell me {e}, and also {f}.",
)
