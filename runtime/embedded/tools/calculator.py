"""The calculator the embedded model calls: exact arithmetic over a tiny grammar, with limits, without eval.

sum     := product (("+" | "-") product)*
product := signed (("*" | "/") signed)*
signed  := "-" signed | "+" signed | atom
atom    := number | "(" sum ")"
"""

from __future__ import annotations

import re
from fractions import Fraction

from caesura.runtime.embedded.tools.fault import ToolFault

MAX_EXPRESSION_CHARS = 200
MAX_NUMBER_CHARS = 30
MAX_NESTING = 20
DECIMAL_PLACES = 6

_TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+|[-+*/()])", re.ASCII)


class CalculatorError(ToolFault):
    """The expression is malformed, beyond a limit, or divides by zero."""


def calculate(expression: str) -> str:
    """Value of an expression of numbers, ``+ - * /`` and parentheses.

    Exact in rationals; a result that is no integer is rounded to six decimal places.
    Raises CalculatorError.
    """
    value = _Parser(_tokens(expression)).parse()
    if value.denominator == 1:
        return str(value.numerator)
    scaled = round(value * 10**DECIMAL_PLACES)
    digits = str(abs(scaled)).rjust(DECIMAL_PLACES + 1, "0")
    text = f"{digits[:-DECIMAL_PLACES]}.{digits[-DECIMAL_PLACES:]}".rstrip("0").rstrip(".")
    return f"-{text}" if scaled < 0 else text


def _tokens(expression: str) -> list[str]:
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise CalculatorError(
            f"expression has {len(expression)} characters; the limit is {MAX_EXPRESSION_CHARS}: split it"
        )
    tokens: list[str] = []
    position = 0
    text = expression.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            at = position + len(text[position:]) - len(text[position:].lstrip())
            raise CalculatorError(
                f"expression: unexpected {text[at]!r} at position {at}; write numbers, + - * / and parentheses alone"
            )
        if len(match[1]) > MAX_NUMBER_CHARS:
            raise CalculatorError(
                f"expression: a number of {len(match[1])} characters; the limit is {MAX_NUMBER_CHARS}"
            )
        tokens.append(match[1])
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent over the token list; depth is bounded by MAX_NESTING."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._next = 0
        self._depth = 0

    def parse(self) -> Fraction:
        if not self._tokens:
            raise CalculatorError("expression is empty; write for example 12 * 7")
        value = self._sum()
        if self._next < len(self._tokens):
            raise CalculatorError(f"expression: unexpected {self._tokens[self._next]!r} after a complete value")
        return value

    def _take(self, *wanted: str) -> str | None:
        if self._next < len(self._tokens) and self._tokens[self._next] in wanted:
            self._next += 1
            return self._tokens[self._next - 1]
        return None

    def _sum(self) -> Fraction:
        value = self._product()
        while operator := self._take("+", "-"):
            right = self._product()
            value = value + right if operator == "+" else value - right
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while operator := self._take("*", "/"):
            right = self._signed()
            if operator == "/" and right == 0:
                raise CalculatorError("expression: division by zero")
            value = value * right if operator == "*" else value / right
        return value

    def _signed(self) -> Fraction:
        sign = 1
        while operator := self._take("+", "-"):
            sign = -sign if operator == "-" else sign
        return sign * self._atom()

    def _atom(self) -> Fraction:
        if self._take("("):
            self._depth += 1
            if self._depth > MAX_NESTING:
                raise CalculatorError(f"expression: parentheses nested deeper than {MAX_NESTING}")
            value = self._sum()
            if not self._take(")"):
                raise CalculatorError("expression: a parenthesis is not closed")
            self._depth -= 1
            return value
        if self._next >= len(self._tokens):
            raise CalculatorError("expression ends where a number should follow")
        token = self._tokens[self._next]
        if token in "+-*/)":
            raise CalculatorError(f"expression: a number should stand where {token!r} is")
        self._next += 1
        return Fraction(token)
