"""Calendar arithmetic over ISO dates."""

from __future__ import annotations

from datetime import date, timedelta

from caesura.runtime.embedded.tools.fault import ToolFault

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def weekday(date: str) -> str:
    """Day of the week of a date."""
    return WEEKDAYS[_parsed(date, "date").weekday()]


def add_days(date: str, days: int) -> str:
    """Date some days later."""
    try:
        return (_parsed(date, "date") + timedelta(days=days)).isoformat()
    except OverflowError:
        raise ToolFault(f"{days} days from {date} leaves the years 1 to 9999") from None


def days_between(start: str, end: str) -> str:
    """Days from one date to another."""
    return str((_parsed(end, "end") - _parsed(start, "start")).days)


def _parsed(text: str, field: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ToolFault(f'{field} is "{text}"; write an existing day as YYYY-MM-DD') from None
