"""``/metrics``: the engine's figures and this server's own counts, in Prometheus' text format."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from caesura.runtime.errors import EngineStopped
from caesura.runtime.server.guard import route_of
from caesura.runtime.server.info import Info, package_version
from caesura.runtime.server.metric_families import add_distribution, counter, gauge, gauges, kv_usage, label
from caesura.runtime.server.state import ServerState
from caesura.runtime.server.vllm_metrics import vllm_metrics
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_TOOL_LABELS = 32
OTHER = "other"
_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_COUNTERS = {
    "steps": ("steps", "Engine steps"),
    "busy_s": ("busy_seconds", "Seconds the engine was stepping"),
    "tokens_computed": ("tokens_computed", "Tokens computed"),
    "tokens_recomputed": ("tokens_recomputed", "Tokens computed again after their KV was given up"),
    "preemptions": ("preemptions", "Contexts preempted for memory"),
    "evicted_pages": ("evicted_pages", "Cached pages given up"),
    "idle_token_s": ("idle_token_seconds", "Token-seconds held by paused contexts, wanted by others or not"),
}
_REQUEST_COUNTERS = {
    "requests": ("engine_requests", "Requests the engine has begun"),
    "prompt_tokens": ("prompt_tokens", "Tokens of contexts as requests began, cached ones included"),
    "cached_tokens": ("prefix_cache_hit_tokens", "Of the prompt tokens, those found computed"),
    "generated_tokens": ("generation_tokens", "Tokens generated"),
}
_DISTRIBUTIONS = {
    "queue_s": ("request_queue_time_seconds", "From a request to its first step"),
    "first_token_s": ("time_to_first_token_seconds", "From a request to its first token, in the engine"),
    "between_tokens_s": ("inter_token_latency_seconds", "Between two tokens of a request, in the engine"),
    "request_s": ("e2e_request_latency_seconds", "From a request to its last token, in the engine"),
}


class ToolLabels:
    """Tool names as label values: harmless characters, and no more than so many of them, since clients choose them.

    A tool that once has a label keeps it, or counters would go back; places go to the most used ones first.
    """

    def __init__(self, places: int = MAX_TOOL_LABELS) -> None:
        self._places = places
        self._given: set[str] = set()

    def admit(self, tools: Iterable[str]) -> None:
        """Give out the places that are left, in this order."""
        for tool in tools:
            if len(self._given) >= self._places:
                return
            self._given.add(label(tool))

    def of(self, tool: str) -> str:
        """The label of a tool: its own if it has one."""
        found = label(tool)
        return found if found in self._given else OTHER


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
        self._collector = _Figures(state)
        self._registry.register(self._collector)

    async def show(self, _: Request) -> Response:
        """All metrics. Without an engine, those of this server alone."""
        try:
            self._collector.stats = await self._info.stats()
        except EngineStopped:
            self._collector.stats = {}
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class _Figures(Collector):
    """Figures read from the engine and the server's stores for one scrape."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._tools = ToolLabels()
        self.stats: dict[str, Any] = {}

    def collect(self) -> Iterator[Metric]:
        yield gauge("caesura_engine_up", "Whether the engine answers", float(bool(self.stats)))
        yield from self._of_server()
        if not self.stats:
            return
        telemetry = self.stats.get("telemetry", {})
        yield from _of_engine(self.stats, telemetry)
        yield from _of_memory(self.stats, telemetry)
        yield from self._of_tools(telemetry)
        yield from _of_link(self.stats.get("ipc", {}))
        if self._state.config.metrics_compat == "vllm":
            yield from vllm_metrics(self.stats, telemetry, self._state)

    def _of_server(self) -> Iterator[Metric]:
        state, kept = self._state, self._state.kept
        yield gauge("caesura_build_info", "The version that runs", 1.0, version=package_version())
        yield gauge("caesura_draining", "Whether the server takes no new requests any more", float(state.draining))
        yield gauge("caesura_requests_at_work", "Requests at work", len(state.board))
        yield gauge("caesura_kept_contexts", "Answers that called tools, kept to go on from", len(kept))
        yield gauge("caesura_named_contexts", "Contexts of /v1/contexts", len(state.contexts))
        yield gauge("caesura_connections", "Open connections", state.counts.connections)
        yield counter("caesura_generations", "Generations ended", state.counts.finishes, "reason")
        yield counter("caesura_refused", "Refused before any work", state.counts.refused, "reason")
        rounds = {"continued": kept.continued, "rebuilt": kept.rebuilt}
        yield counter("caesura_tool_rounds", "Conversations gone on with by tool results", rounds, "how")

    def _of_tools(self, telemetry: Mapping[str, Any]) -> Iterator[Metric]:
        tools: dict[str, Any] = telemetry.get("tools", {})
        paused: dict[str, dict[str, int]] = telemetry.get("paused", {})
        self._tools.admit(sorted(tools, key=lambda tool: -sum(tools[tool]["counts"])))
        self._tools.admit(tool for by_tool in paused.values() for tool in by_tool)
        merged: dict[str, dict[str, Any]] = {}
        for tool, times in tools.items():
            name = self._tools.of(tool)
            merged[name] = _merged(merged[name], times) if name in merged else times
        seconds = HistogramMetricFamily("caesura_tool_seconds", "Seconds that tool calls took", labels=["tool"])
        for tool, times in merged.items():
            add_distribution(seconds, [tool], times)
        yield seconds
        contexts: dict[tuple[str, str], int] = {}
        for mode in ("preserved", "swapping", "swapped", "discarded", *paused):
            contexts.setdefault((mode, OTHER), 0)
        for mode, by_tool in paused.items():
            for tool, count in by_tool.items():
                place = (mode, self._tools.of(tool))
                contexts[place] = contexts.get(place, 0) + count
        family = GaugeMetricFamily(
            "caesura_paused_contexts",
            "Contexts waiting for a tool, by what became of their KV",
            labels=["mode", "tool"],
        )
        for place, count in contexts.items():
            family.add_metric(place, count)
        yield family


def _of_engine(stats: Mapping[str, Any], telemetry: Mapping[str, Any]) -> Iterator[Metric]:
    for source, names in ((stats, _COUNTERS), (telemetry, _REQUEST_COUNTERS)):
        for key, (name, text) in names.items():
            if key in source:
                yield CounterMetricFamily(f"caesura_{name}", text, value=source[key])
    phases: dict[str, int] = stats.get("contexts", {})
    yield gauges("caesura_contexts", "Contexts by phase", phases, "phase")
    yield gauge("caesura_requests_running", "Contexts being computed", phases.get("running", 0))
    yield gauge("caesura_requests_waiting", "Contexts in the queue", phases.get("queued", 0))
    decisions = CounterMetricFamily("caesura_decisions", "Pause decisions", labels=["policy", "action"])
    for key, value in stats.items():
        if key.startswith("decisions_"):
            decisions.add_metric([label(str(stats.get("policy", ""))), key.removeprefix("decisions_")], value)
    yield decisions
    waste = {kind: stats.get(f"{kind}_token_s", 0.0) for kind in ("preserve", "recompute", "swap")}
    yield counter("caesura_waste_token_seconds", "Token-seconds of KV memory that did no work", waste, "kind")
    for key, (name, text) in _DISTRIBUTIONS.items():
        if key in telemetry:
            family = HistogramMetricFamily(f"caesura_{name}", text)
            add_distribution(family, [], telemetry[key])
            yield family


def _of_memory(stats: Mapping[str, Any], telemetry: Mapping[str, Any]) -> Iterator[Metric]:
    device, host = stats.get("device_pages", 0), stats.get("host_pages", 0)
    free, cached, paused = (stats.get(key, 0) for key in ("free_pages", "cached_pages", "paused_pages"))
    pages = {"free": free, "cached": cached, "paused": paused, "running": max(0, device - free - cached - paused)}
    yield gauges("caesura_kv_pages", "Pages of the device pool by use", pages, "state")
    yield gauge("caesura_kv_usage_ratio", "Share of the device pool that contexts hold", kv_usage(stats))
    free_host = telemetry.get("free_host_pages", host)
    host_pages = {"free": free_host, "used": host - free_host}
    yield gauges("caesura_host_kv_pages", "Pages of the host pool by use", host_pages, "state")
    disk = stats.get("disk_pages", 0)
    free_disk = telemetry.get("free_disk_pages", disk)
    yield gauges(
        "caesura_disk_kv_pages", "Pages of the file by use", {"free": free_disk, "used": disk - free_disk}, "state"
    )
    yield gauge("caesura_copying_pages", "Pages on their way between the pools", telemetry.get("copying_pages", 0))
    page_bytes = stats.get("page_bytes", 0)
    yield gauge("caesura_kv_page_bytes", "Bytes of one page", page_bytes)
    moved = {way: stats.get(f"pages_{way}", 0) * page_bytes for way in ("out", "in")}
    yield counter("caesura_swap_bytes", "Bytes copied off the device (out) and back (in)", moved, "direction")
    filed = {"out": stats.get("pages_to_disk", 0) * page_bytes, "in": stats.get("pages_from_disk", 0) * page_bytes}
    yield counter("caesura_disk_bytes", "Bytes written to the file (out) and read from it (in)", filed, "direction")
    failed = stats.get("copies_failed", 0)
    yield CounterMetricFamily("caesura_disk_faults", "Copies that the disk failed; computed again", value=failed)


def _of_link(ipc: Mapping[str, Any]) -> Iterator[Metric]:
    yield CounterMetricFamily("caesura_engine_restarts", "Engines that were replaced", value=ipc.get("restarts", 0))
    dropped = CounterMetricFamily(
        "caesura_dropped_frames", "Frames between server and engine that were not taken", labels=["end", "reason"]
    )
    for end in ("engine", "client"):
        for reason in ("unauthentic", "malformed", "repeated", "foreign"):
            count = (ipc.get(end) or {}).get(reason)
            if count is not None:
                dropped.add_metric([end, reason], count)
    yield dropped


def _merged(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    counts = [left + right for left, right in zip(one["counts"], two["counts"], strict=True)]
    return {"bounds": one["bounds"], "counts": counts, "sum": one["sum"] + two["sum"]}


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
            route = route_of(scope)
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)
