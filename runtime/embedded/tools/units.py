"""Conversion between units of length, mass, volume, time and temperature."""

from __future__ import annotations

from fractions import Fraction

from caesura.runtime.embedded.tools.fault import ToolFault

SIGNIFICANT_DIGITS = 6

# How many of the dimension's base unit one unit is.
_SIZES: dict[str, dict[str, str]] = {
    "length": {
        "km": "1000", "m": "1", "cm": "0.01", "mm": "0.001",
        "mi": "1609.344", "yd": "0.9144", "ft": "0.3048", "in": "0.0254",
    },
    "mass": {"t": "1000", "kg": "1", "g": "0.001", "lb": "0.45359237", "oz": "0.028349523125"},
    "volume": {"l": "1", "dl": "0.1", "ml": "0.001", "gal": "3.785411784"},
    "time": {"d": "86400", "h": "3600", "min": "60", "s": "1"},
}  # fmt: skip
# Kelvin = value * scale + offset
_TEMPERATURES = {"K": ("1", "0"), "C": ("1", "273.15"), "F": ("5/9", "45967/180")}

DIMENSIONS: dict[str, tuple[str, ...]] = {
    **{name: tuple(sizes) for name, sizes in _SIZES.items()},
    "temperature": tuple(_TEMPERATURES),
}
WORDS: dict[str, str] = {
    "kilometers": "km", "meters": "m", "centimeters": "cm", "millimeters": "mm", "miles": "mi", "yards": "yd",
    "feet": "ft", "inches": "in", "tonnes": "t", "kilograms": "kg", "grams": "g", "pounds": "lb", "ounces": "oz",
    "liters": "l", "deciliters": "dl", "milliliters": "ml", "gallons": "gal", "days": "d", "hours": "h",
    "minutes": "min", "seconds": "s", "degrees Celsius": "C", "degrees Fahrenheit": "F", "kelvin": "K",
}  # fmt: skip


def convert(value: float, from_unit: str, to_unit: str) -> str:
    """Convert a value between units."""
    source, target = _dimension(from_unit), _dimension(to_unit)
    if source != target:
        raise ToolFault(f"{from_unit} is {source} and {to_unit} is {target}")
    try:
        exact = Fraction(str(value))
    except ValueError:
        raise ToolFault(f"value is {value}; give a finite number") from None
    if source == "temperature":
        kelvin = exact * Fraction(_TEMPERATURES[from_unit][0]) + Fraction(_TEMPERATURES[from_unit][1])
        scale, offset = (Fraction(part) for part in _TEMPERATURES[to_unit])
        return _short((kelvin - offset) / scale)
    sizes = _SIZES[source]
    return _short(exact * Fraction(sizes[from_unit]) / Fraction(sizes[to_unit]))


def _dimension(unit: str) -> str:
    for name, units in DIMENSIONS.items():
        if unit in units:
            return name
    if unit in WORDS:
        raise ToolFault(f'unknown unit "{unit}"; use "{WORDS[unit]}"')
    raise ToolFault(f'unknown unit "{unit}"; there are {", ".join(u for units in DIMENSIONS.values() for u in units)}')


def _short(value: Fraction) -> str:
    """Six significant digits, never with an exponent, without zeros at the end."""
    if value.denominator == 1 and abs(value) < 10**12:
        return str(value.numerator)
    digits = 0
    size = abs(value)
    while size >= 1:
        size, digits = size / 10, digits + 1
    while size and size < Fraction(1, 10):
        size, digits = size * 10, digits - 1
    places = max(0, min(12, SIGNIFICANT_DIGITS - digits))
    text = f"{float(round(value, places)):.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
