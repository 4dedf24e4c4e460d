"""Operating a server: what its metrics say of pauses and times, CORS, keys that change, and a process's own log."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from caesura.runtime.server.metrics import MAX_TOOL_LABELS
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from tests.integration.server_client import QUESTION, TOOLS, answered, post, run

KEY, ADMIN = "sk-operation-000001", "sk-operation-admin1"
CHAT = "/v1/chat/completions"
ASK = {"messages": [QUESTION], "tools": TOOLS, "temperature": 0}


async def scrape(client: httpx.AsyncClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of /metrics, by name and labels; a parser of Prometheus' own reads it."""
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def value(found: Any, name: str, **labels: str) -> float:
    return float(found[name, tuple(sorted(labels.items()))])


def test_metrics_follow_a_tool_call_from_its_pause_to_its_end() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        before = await scrape(client)
        message = (await post(client, CHAT, ASK))["choices"][0]["message"]
        paused = await scrape(client)
        name = message["tool_calls"][0]["function"]["name"]
        assert value(paused, "caesura_paused_contexts", mode="preserved", tool=name) == 1
        assert value(paused, "caesura_contexts", phase="paused") == 1
        assert value(paused, "caesura_kept_contexts") == 1
        usage = (await post(client, CHAT, {**ASK, "messages": [QUESTION, *answered(message)]}))["usage"]
        after = await scrape(client)

        def grown(metric: str, **labels: str) -> float:
            key = (metric, tuple(sorted(labels.items())))
            return after[key] - before.get(key, 0.0)

        assert value(after, "caesura_paused_contexts", mode="preserved", tool="other") == 0
        assert ("caesura_paused_contexts", (("mode", "preserved"), ("tool", name))) not in after
        assert grown("caesura_tool_seconds_count", tool=name) == 1
        assert grown("caesura_tool_seconds_sum", tool=name) > 0
        assert grown("caesura_tool_seconds_bucket", tool=name, le="+Inf") == 1
        assert grown("caesura_tool_rounds_total", how="continued") == 1
        assert grown("caesura_engine_requests_total") == 2
        for histogram in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
            assert grown(f"caesura_{histogram}_count") == 2
        tokens = grown("caesura_generation_tokens_total")
        assert grown("caesura_inter_token_latency_seconds_count") >= tokens - 2 > 0
        assert grown("caesura_prefix_cache_hit_tokens_total") == usage["prompt_tokens_details"]["cached_tokens"]
        assert grown("caesura_generations_total", reason="tool_calls") == 1
        assert grown("caesura_http_requests_total", route=CHAT, status="200") == 2
        assert value(after, "caesura_engine_up") == 1
        states = {
            state: value(after, "caesura_kv_pages", state=state) for state in ("free", "cached", "paused", "running")
        }
        assert sum(states.values()) == (1 << 15) / 16
        assert 0 <= value(after, "caesura_kv_usage_ratio") < 1
        assert value(after, "caesura_swap_bytes_total", direction="out") >= 0
        kinds = [
            value(after, "caesura_waste_token_seconds_total", kind=kind) for kind in ("preserve", "recompute", "swap")
        ]
        assert all(kind >= 0 for kind in kinds)
        assert not any(metric.startswith("vllm:") for metric, _ in after)

    run(test)


def test_the_same_figures_under_the_names_that_dashboards_know() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        await post(client, CHAT, {"messages": [QUESTION], "max_tokens": 4})
        found = await scrape(client)
        labels = {"model_name": "embedded", "engine": "0"}
        for ours, theirs in {
            "caesura_requests_running": "vllm:num_requests_running",
            "caesura_requests_waiting": "vllm:num_requests_waiting",
            "caesura_kv_usage_ratio": "vllm:kv_cache_usage_perc",
            "caesura_prompt_tokens_total": "vllm:prompt_tokens_total",
            "caesura_generation_tokens_total": "vllm:generation_tokens_total",
            "caesura_prefix_cache_hit_tokens_total": "vllm:prefix_cache_hits_total",
            "caesura_preemptions_total": "vllm:num_preemptions_total",
            "caesura_time_to_first_token_seconds_count": "vllm:time_to_first_token_seconds_count",
            "caesura_inter_token_latency_seconds_sum": "vllm:inter_token_latency_seconds_sum",
            "caesura_e2e_request_latency_seconds_count": "vllm:e2e_request_latency_seconds_count",
            "caesura_request_queue_time_seconds_count": "vllm:request_queue_time_seconds_count",
        }.items():
            assert value(found, ours) == value(found, theirs, **labels), theirs
        assert value(found, "vllm:prefix_cache_queries_total", **labels) == value(found, "caesura_prompt_tokens_total")
        ended = [
            value(found, "vllm:request_success_total", **labels, finished_reason=why) for why in ("stop", "length")
        ]
        assert sum(ended) == 1
        assert value(found, "vllm:time_to_first_token_seconds_bucket", **labels, le="+Inf") > 0

    run(test, metrics_compat="vllm")


def test_tools_that_clients_make_up_cannot_flood_or_break_the_metrics() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        made = (await post(client, "/v1/contexts", {"pieces": [{"text": "a"}]}))["id"]
        for number in range(MAX_TOOL_LABELS + 20):
            call = {"calls": [{"tool": f'x"}}\n# TYPE evil{number} \u00e9' + "y" * 40}]}
            await post(client, f"/v1/contexts/{made}/pause", call)
            await post(client, f"/v1/contexts/{made}/resume", {})
        found = await scrape(client)
        tools = {dict(labels)["tool"] for name, labels in found if name == "caesura_tool_seconds_count"}
        assert len(tools) == MAX_TOOL_LABELS + 1 and "other" in tools
        assert all(re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", tool) for tool in tools)
        assert "evil" not in str(sorted(name for name, _ in found))
        text = (await client.get("/server_info")).text
        assert "evil" not in text, "any key may ask for that, and tools are another key's words"
        await client.delete(f"/v1/contexts/{made}")

    run(test)


def test_metrics_need_an_admin_key_and_answer_without_an_engine(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"ann:{KEY}\nroot:{ADMIN}:admin\n")

    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        async def status(path: str, key: str | None) -> int:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            return (await client.get(path, headers=headers)).status_code

        assert [await status("/metrics", key) for key in (None, KEY, ADMIN)] == [401, 403, 200]
        assert [await status("/v1/models", key) for key in (None, KEY, ADMIN)] == [401, 200, 200]
        ring = app.state.server.keys
        keys.write_text(f"bob:{KEY}9\nroot:{ADMIN}:admin\n")
        ring._checked_at = float("-inf")  # the file is looked at once a second
        assert [await status("/v1/models", key) for key in (KEY, KEY + "9", ADMIN)] == [401, 200, 200]

        async def gone() -> dict[str, Any]:
            raise TimeoutError

        app.state.server.service = type("Gone", (), {"read_stats": staticmethod(gone), "ready": False})()
        text = (await client.get("/metrics", headers={"authorization": f"Bearer {ADMIN}"})).text
        assert "caesura_engine_up 0.0" in text and "caesura_http_requests_total" in text

    run(test, key_file=keys)


ORIGIN = "https://app.example"


def test_cors_is_off_unless_an_origin_is_named_and_never_with_credentials() -> None:
    asked = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }

    async def off(client: httpx.AsyncClient, app: FastAPI) -> None:
        for answer in (await client.options(CHAT, headers=asked), await client.get("/health", headers=asked)):
            assert answer.status_code == 403
            assert not [name for name in answer.headers if name.startswith("access-control")]

    async def on(client: httpx.AsyncClient, app: FastAPI) -> None:
        before = await client.options(CHAT, headers=asked)
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in before.headers["access-control-allow-methods"]
        assert "authorization" in before.headers["access-control-allow-headers"]
        refused = await client.post(CHAT, headers={"origin": ORIGIN}, json={})
        assert refused.status_code == 401
        for answer in (await client.get("/health", headers={"origin": ORIGIN}), refused):
            assert answer.headers["access-control-allow-origin"] == ORIGIN
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
            assert "access-control-allow-credentials" not in answer.headers
        for other in ("https://evil.example", "null", "http://app.example", f"{ORIGIN}.evil.example"):
            answer = await client.get("/health", headers={"origin": other})
            assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
            answer = await client.options(CHAT, headers={**asked, "origin": other})
            assert answer.status_code == 400 and "access-control-allow-origin" not in answer.headers

    async def anyone(client: httpx.AsyncClient, app: FastAPI) -> None:
        answer = await client.get("/health", headers={"origin": "https://any.example"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers

    run(off)
    run(on, cors_origins=(ORIGIN,), api_keys=(KEY,))
    run(anyone, cors_origins=("*",), api_keys=(KEY,))


# -- a process of its own -----------------------------------------------------------------------------------------


@contextmanager
def served(log: Path, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """``caesura serve`` with its log in a file."""
    command = [sys.executable, "-c", "from caesura.lang.cli import main; main()", "serve", "--port", "0"]
    with log.open("wb") as stream:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
        process = subprocess.Popen([*command, "--log-format", "json"], env=environment, stderr=stream)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def until(log: Path, true: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """The log's events as soon as they are enough. Every line must be JSON."""
    for _ in range(600):
        events = [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if true(events):
            return events
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def named(events: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [one for one in events if one["event"] == event]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ends the engine by a signal")
def test_a_process_configured_by_its_environment_logs_its_life_and_its_requests(tmp_path: Path) -> None:
    log = tmp_path / "log"
    environ = {"CAESURA_KV_TOKENS": "8192", "CAESURA_NUM_THREADS": "1", "CAESURA_ADMIN_KEYS": ADMIN}
    with served(log, **environ) as process:
        events = until(log, lambda events: bool(named(events, "listening")))
        (port,) = named(events, "listening")[0]["ports"]
        url, headers = f"http://127.0.0.1:{port}", {"authorization": f"Bearer {ADMIN}"}
        with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=60) as client:
            text = "the canary sings"
            body = {**ASK, "messages": [{"role": "user", "content": text}, QUESTION]}
            message = client.post(CHAT, json=body).json()["choices"][0]
            assert client.get("/server_info").json()["internal_states"][0]["device_pages"] == 512
            os.kill(named(events, "engine_started")[0]["pid"], signal.SIGKILL)
            events = until(log, lambda events: len(named(events, "engine_ready")) == 2)
            assert "caesura_engine_restarts_total 1.0" in client.get("/metrics").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        events = until(log, lambda events: bool(named(events, "stopped")))
    assert "canary" not in log.read_text() and ADMIN not in log.read_text()
    request = next(one for one in named(events, "request") if one["route"] == CHAT)
    assert request["status"] == 200 and request["finish"] == [message["finish_reason"]]
    assert request["tokens_in"] > 0 and request["tokens_out"] > 0 and request["cached_tokens"] == 0
    assert request["pauses"] == int(message["finish_reason"] == "tool_calls")
    assert "SIGKILL" in named(events, "engine_died")[0]["reason"]
    assert named(events, "engine_restarting")[0]["restarts"] == 1
    order = [one["event"] for one in events if one["event"] in ("engine_ready", "listening", "draining", "stopped")]
    assert order == ["engine_ready", "listening", "engine_ready", "draining", "stopped"]
    assert named(events, "draining")[0]["signal"] == "SIGTERM"
