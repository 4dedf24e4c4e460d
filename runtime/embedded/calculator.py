"""The calculator, where programs have always imported it from; it lies with the other tools."""

from __future__ import annotations

from caesura.runtime.embedded.tools.calculator import (
    MAX_EXPRESSION_CHARS,
    MAX_NESTING,
    MAX_NUMBER_CHARS,
    CalculatorError,
    calculate,
)

__all__ = ["MAX_EXPRESSION_CHARS", "MAX_NESTING", "MAX_NUMBER_CHARS", "CalculatorError", "calculate"]
