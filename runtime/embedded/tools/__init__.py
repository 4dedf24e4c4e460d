"""The tools the embedded model is trained on: plain functions, and objects whose methods are tools.

A tool that cannot answer raises `ToolFault`; `caesura.lang` tells the model its message.
"""

from __future__ import annotations

from caesura.runtime.embedded.tools.adventure import Adventure
from caesura.runtime.embedded.tools.calculator import CalculatorError, calculate
from caesura.runtime.embedded.tools.dates import add_days, days_between, weekday
from caesura.runtime.embedded.tools.encyclopedia import Encyclopedia
from caesura.runtime.embedded.tools.fault import ToolFault
from caesura.runtime.embedded.tools.notebook import Notebook
from caesura.runtime.embedded.tools.units import convert

__all__ = [
    "Adventure", "CalculatorError", "Encyclopedia", "Notebook", "ToolFault",
    "add_days", "calculate", "convert", "days_between", "weekday",
]  # fmt: skip
