"""Making Prometheus' metric families from plain figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

MAX_LABEL_CHARS = 64
_NOT_A_LABEL = re.compile(r"[^A-Za-z0-9_.:-]")


def label(text: str) -> str:
    """Text as a label value that needs no escaping: bounded, and never empty."""
    return _NOT_A_LABEL.sub("_", text[:MAX_LABEL_CHARS]) or "_"


def kv_usage(stats: Mapping[str, Any]) -> float:
    """Share of the device pool that is neither free nor free for the taking."""
    device = stats.get("device_pages", 0)
    return 1 - (stats.get("free_pages", 0) + stats.get("cached_pages", 0)) / device if device else 0.0


def gauge(name: str, text: str, value: float, **labels: str) -> Metric:
    """One gauge."""
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def gauges(name: str, text: str, values: Mapping[str, float], kind: str) -> Metric:
    """Gauges that one label tells apart."""
    family = GaugeMetricFamily(name, text, labels=[kind])
    for value_label, value in values.items():
        family.add_metric([value_label], value)
    return family


def counter(name: str, text: str, values: Mapping[str, float], kind: str) -> Metric:
    """Counters that one label tells apart."""
    family = CounterMetricFamily(name, text, labels=[kind])
    for value_label, value in values.items():
        family.add_metric([value_label], value)
    return family


def add_distribution(family: HistogramMetricFamily, labels: list[str], snapshot: Mapping[str, Any]) -> None:
    """Add what ``telemetry.Distribution.snapshot`` gave."""
    total, buckets = 0, []
    for bound, count in zip([*map(float, snapshot["bounds"]), None], snapshot["counts"], strict=True):
        total += count
        buckets.append(("+Inf" if bound is None else str(bound), total))
    family.add_metric(labels, buckets, snapshot["sum"])
