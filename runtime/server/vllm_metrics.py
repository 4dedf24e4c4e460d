"""The figures under the names that dashboards and gateways made for vLLM read. Same meaning, same bounds; what we do
not have is left out rather than made up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from caesura.runtime.server.metric_families import add_distribution, kv_usage
from caesura.runtime.server.state import ServerState
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

_COUNTERS = {
    "prefix_cache_queries": ("prompt_tokens", "Tokens looked up in the prefix cache"),
    "prefix_cache_hits": ("cached_tokens", "Of these, tokens found"),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens"),
    "generation_tokens": ("generated_tokens", "Generated tokens"),
}
_DISTRIBUTIONS = {
    "time_to_first_token_seconds": ("first_token_s", "Time to the first token"),
    "inter_token_latency_seconds": ("between_tokens_s", "Time between two tokens"),
    "time_per_output_token_seconds": ("between_tokens_s", "Older name of the time between two tokens"),
    "e2e_request_latency_seconds": ("request_s", "Time from a request to its last token"),
    "request_queue_time_seconds": ("queue_s", "Time in the queue"),
    "request_prompt_tokens": ("prompts", "Prompt tokens of a request"),
    "request_generation_tokens": ("answers", "Generated tokens of a request"),
    "iteration_tokens_total": ("step_tokens", "Tokens of an engine step"),
}
_REASONS = {"stop": "stop", "tool_calls": "stop", "length": "length", "abort": "abort"}


def vllm_metrics(stats: Mapping[str, Any], telemetry: Mapping[str, Any], state: ServerState) -> Iterator[Metric]:
    """All of them, labelled with the model's name and the engine's number (there is one)."""
    names, values = ["model_name", "engine"], [state.model_name, "0"]
    phases: Mapping[str, int] = stats.get("contexts", {})
    gauges = {
        "num_requests_running": (phases.get("running", 0), "Requests being computed"),
        "num_requests_waiting": (phases.get("queued", 0), "Requests in the queue"),
        "kv_cache_usage_perc": (kv_usage(stats), "Share of the KV pool in use, 0 to 1"),
        "gpu_cache_usage_perc": (kv_usage(stats), "Older name of the KV pool's use"),
    }
    for name, (value, text) in gauges.items():
        gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=names)
        gauge.add_metric(values, value)
        yield gauge
    counters = {name: (telemetry.get(key, 0), text) for name, (key, text) in _COUNTERS.items()}
    counters["num_preemptions"] = (stats.get("preemptions", 0), "Requests preempted for memory")
    for name, (value, text) in counters.items():
        counter = CounterMetricFamily(f"vllm:{name}", text, labels=names)
        counter.add_metric(values, value)
        yield counter
    for name, (key, text) in _DISTRIBUTIONS.items():
        if key in telemetry:
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=names)
            add_distribution(family, values, telemetry[key])
            yield family
    yield _successes(state, names, values)
    info = GaugeMetricFamily("vllm:cache_config_info", "The KV pool", labels=["block_size", "num_gpu_blocks", *names])
    info.add_metric([str(stats.get("page_size", 0)), str(stats.get("device_pages", 0)), *values], 1.0)
    yield info


def _successes(state: ServerState, names: list[str], values: list[str]) -> Metric:
    ended = dict.fromkeys(_REASONS.values(), 0)
    for reason, count in state.counts.finishes.items():
        name = _REASONS.get(reason, "abort")
        ended[name] += count
    family = CounterMetricFamily("vllm:request_success", "Requests ended", labels=[*names, "finished_reason"])
    for name, count in ended.items():
        family.add_metric([*values, name], count)
    return family
