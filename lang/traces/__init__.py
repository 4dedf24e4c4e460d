"""What a run did, as a tree of spans, and the forms it can be had in: a terminal's tree, one HTML page, Perfetto's
JSON, OpenTelemetry's spans."""

from __future__ import annotations

from caesura.lang.traces.run_trace import RunTrace

__all__ = ["RunTrace"]
