"""``/metrics``: the engine's account and this server's own counts, in Prometheus' text format."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from caesura.runtime.server.info import Info
from caesura.runtime.server.state import ServerState
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_COUNTERS = {
    "steps": "Engine steps",
    "busy_s": "Seconds the engine was stepping",
    "tokens_computed": "Tokens computed",
    "tokens_recomputed": "Tokens computed again after their KV was discarded",
    "pages_out": "Pages copied to the host tier",
    "pages_in": "Pages copied back to the device",
    "preemptions": "Contexts preempted for memory",
    "evicted_pages": "Cached pages given up",
    "preserve_token_s": "Waste of preserving, in token-seconds",
    "recompute_token_s": "Waste of recomputing, in token-seconds",
    "swap_token_s": "Waste of swapping, in token-seconds",
    "idle_token_s": "Token-seconds held by paused contexts",
}
_GAUGES = {
    "device_pages": "Pages of the device pool",
    "free_pages": "Free pages of the device pool",
    "cached_pages": "Cached pages that could be given up",
    "paused_pages": "Pages held by paused contexts",
    "host_pages": "Pages of the host pool",
}


class Metrics:
    """The route, its registry, and the middleware that counts requests."""

    def __init__(self, state: ServerState, info: Info) -> None:
        self._info = info
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "caesura_http_requests", "HTTP requests by route and status", ["route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "caesura_http_request_seconds",
            "Seconds from request to the answer's last byte",
            ["route"],
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._engine = _EngineCollector(state)
        self._registry.register(self._engine)

    async def show(self, _: Request) -> Response:
        """All metrics."""
        self._engine.stats = await self._info.stats()
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class _EngineCollector(Collector):
    """Figures read from the engine for one scrape."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self.stats: dict[str, Any] = {}

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        for name, text in _COUNTERS.items():
            if name in stats:
                yield CounterMetricFamily(f"caesura_{_unit(name)}", text, value=stats[name])
        decisions = CounterMetricFamily("caesura_decisions", "Pause decisions by action", labels=["action"])
        for name, value in stats.items():
            if name.startswith("decisions_"):
                decisions.add_metric([name.removeprefix("decisions_")], value)
        yield decisions
        for name, text in _GAUGES.items():
            if name in stats:
                yield GaugeMetricFamily(f"caesura_{name}", text, value=stats[name])
        contexts = GaugeMetricFamily("caesura_contexts", "Contexts by phase", labels=["phase"])
        for phase, count in stats.get("contexts", {}).items():
            contexts.add_metric([phase], count)
        yield contexts
        kept = self._state.kept
        yield GaugeMetricFamily("caesura_requests_at_work", "Requests at work", value=len(self._state.board))
        yield GaugeMetricFamily("caesura_kept_contexts", "Contexts waiting for tool results", value=len(kept))
        yield GaugeMetricFamily("caesura_named_contexts", "Contexts of /v1/contexts", value=len(self._state.contexts))
        continued = CounterMetricFamily(
            "caesura_tool_rounds", "Conversations gone on with by tool results", labels=["how"]
        )
        continued.add_metric(["continued"], kept.continued)
        continued.add_metric(["rebuilt"], kept.rebuilt)
        yield continued


def _unit(name: str) -> str:
    return name.replace("_token_s", "_token_seconds").replace("busy_s", "busy_seconds")


class Counting:
    """Counts requests by route. Paths that match none are one label, so that nobody can make up new ones."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)
