"""The upper bound: the shipped rule with the durations of all pauses known."""

from __future__ import annotations

from caesura.scheduler.policies.min_waste import MinWaste


class Oracle(MinWaste):
    """``min_waste`` told the truth: every pause's end is known from its beginning, so the next use of every run is.

    What it still does not know is what comes after the next use, and who will arrive. Only a simulation can tell it.
    """

    name = "oracle"
    estimator_name = "oracle"
