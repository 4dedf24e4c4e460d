"""What an operator asks of a running engine beside its waste account: how long requests wait and take, how much of them
was cached, how long tools take, and what became of paused contexts.

An observer of steps: constant work per slice, no memory that grows. Whoever exports the figures chooses the names.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from caesura.runtime.engine import Engine
from caesura.runtime.trace import state_of
from caesura.scheduler.context import Context, Pause
from caesura.scheduler.types import ContextId, Phase, Slice, StepPlan, StepResult

MAX_TOOLS = 256  # tool names come from clients; what goes beyond is counted as OTHER
MAX_PAUSED_TOOLS = 64
OTHER, SEVERAL = "other", "several"
# The bounds that dashboards made for other servers know, so that figures can be compared.
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
BETWEEN_TOKENS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOOL_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
TOKENS = tuple(float(base * 10**power) for power in range(6) for base in (1, 2, 5))
STEP_TOKENS = tuple(float(1 << power) for power in (0, *range(3, 15)))


class Distribution:
    """Values counted in buckets: each bound's count is of the values up to it and above the bound before it; one more
    count is of those above all bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def snapshot(self) -> dict[str, Any]:
        """Bounds, counts of each bucket alone, and the sum of all values."""
        return {"bounds": list(self._bounds), "counts": list(self._counts), "sum": self._sum}


@dataclass(slots=True)
class _Request:
    """A request that the engine has begun. Moments on the engine's clock."""

    submitted: float
    last_token: float | None = None
    num_tokens: int = 0


class Telemetry:
    """Figures since the engine was made. Lives on the engine's thread."""

    def __init__(self, engine: Engine) -> None:
        self._requests: dict[ContextId, _Request] = {}
        self._num_requests = self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._queue_s, self._request_s = Distribution(REQUEST_S), Distribution(REQUEST_S)
        self._first_token_s, self._between_tokens_s = Distribution(FIRST_TOKEN_S), Distribution(BETWEEN_TOKENS_S)
        self._prompts, self._answers = Distribution(TOKENS), Distribution(TOKENS)
        self._steps = Distribution(STEP_TOKENS)
        self._tools: dict[str, Distribution] = {}
        engine.scheduler.on_resumed = self._resumed
        engine.observers.append(self)

    def _resumed(self, pause: Pause, duration_s: float) -> None:
        """A pause has ended. One without calls was a program thinking, and no tool's time."""
        for call in pause.calls:
            name = call.tool if call.tool in self._tools or len(self._tools) < MAX_TOOLS else OTHER
            self._tools.setdefault(name, Distribution(TOOL_S)).add(duration_s)

    def on_step(self, engine: Engine, plan: StepPlan, result: StepResult) -> None:
        """Account for one step."""
        contexts, end = engine.scheduler.contexts, plan.now + result.duration_s
        if plan.slices:
            self._steps.add(plan.num_query_tokens)
        for piece in plan.slices:
            state = contexts.get(piece.context_id)
            heard = piece.context_id in result.tokens or piece.context_id in result.finished
            if state is None or (piece.samples and not heard):  # it ended while this step was under way
                continue
            request = self._begun(state, piece, plan.now)
            if piece.samples:
                self._sampled(piece.context_id, request, result, end)
            if state.phase is Phase.PAUSED:
                del self._requests[state.id]
        if len(self._requests) > 64 + 2 * len(contexts):
            self._requests = {context: kept for context, kept in self._requests.items() if context in contexts}

    def _begun(self, state: Context, piece: Slice, now: float) -> _Request:
        """The request that a slice belongs to; its first slice says how long it queued and what it found cached."""
        request = self._requests.get(state.id)
        if request is not None and request.submitted == state.submitted:
            return request
        request = self._requests[state.id] = _Request(state.submitted)
        # A slice that samples may have ended the request already, and with it have changed the context.
        num_tokens = piece.start + piece.num_tokens if piece.samples else state.num_tokens
        self._num_requests += 1
        self._prompt_tokens += num_tokens
        self._cached_tokens += min(num_tokens, max(0, state.cached_tokens))
        self._prompts.add(num_tokens)
        self._queue_s.add(max(0.0, now - state.submitted))
        return request

    def _sampled(self, context: ContextId, request: _Request, result: StepResult, end: float) -> None:
        if context in result.tokens:
            request.num_tokens += 1
            self._generated_tokens += 1
        if request.last_token is None:
            self._first_token_s.add(end - request.submitted)
        else:
            self._between_tokens_s.add(end - request.last_token)
        request.last_token = end
        if context in result.finished:
            self._request_s.add(end - request.submitted)
            self._answers.add(request.num_tokens)

    def account(self, engine: Engine) -> dict[str, Any]:
        """All figures as plain data."""
        return {
            "requests": self._num_requests,
            "prompt_tokens": self._prompt_tokens,
            "cached_tokens": self._cached_tokens,
            "generated_tokens": self._generated_tokens,
            "free_host_pages": engine.ledger.free_host_pages,
            "free_disk_pages": engine.ledger.free_disk_pages,
            "copying_pages": engine.ledger.copying_pages,
            "queue_s": self._queue_s.snapshot(),
            "first_token_s": self._first_token_s.snapshot(),
            "between_tokens_s": self._between_tokens_s.snapshot(),
            "request_s": self._request_s.snapshot(),
            "prompts": self._prompts.snapshot(),
            "answers": self._answers.snapshot(),
            "step_tokens": self._steps.snapshot(),
            "tools": {name: times.snapshot() for name, times in self._tools.items()},
            "paused": paused_by_mode(engine),
        }


def paused_by_mode(engine: Engine) -> dict[str, dict[str, int]]:
    """How many contexts wait for a tool: by what became of their KV (preserved, swapping, swapped, discarded, released)
    and by tool. A context that waits for different tools at once counts under SEVERAL."""
    found: dict[str, dict[str, int]] = {}
    tools: set[str] = set()
    for state in engine.scheduler.contexts.values():
        if state.phase is not Phase.PAUSED or not state.pause.calls:
            continue
        names = {call.tool for call in state.pause.calls}
        tool = names.pop() if len(names) == 1 else SEVERAL
        if tool not in tools and len(tools) >= MAX_PAUSED_TOOLS:
            tool = OTHER
        tools.add(tool)
        mode = "swapping" if _is_copying(engine, state.id) else state_of(state)
        by_tool = found.setdefault(mode, {})
        by_tool[tool] = by_tool.get(tool, 0) + 1
    return found


def _is_copying(engine: Engine, context: ContextId) -> bool:
    """Part of what the context holds is on its way between the tiers."""
    lease = engine.ledger.leases.get(context) if engine.ledger.transfers else None
    return lease is not None and any(node.transfer is not None for node in lease.node.path())


def stats_of(engine: Engine) -> dict[str, Any]:
    """Contexts by phase, the pools, the policy, and the waste account."""
    scheduler, ledger = engine.scheduler, engine.ledger
    phases = [state.phase.value for state in scheduler.contexts.values()]
    return {
        "contexts": {phase: phases.count(phase) for phase in ("queued", "running", "paused")},
        "device_pages": ledger.num_device_pages,
        "free_pages": ledger.free_pages,
        "cached_pages": ledger.evictable_pages,
        "paused_pages": ledger.paused_pages,
        "host_pages": ledger.num_host_pages,
        "disk_pages": ledger.num_disk_pages,
        "page_size": ledger.page_size,
        "page_bytes": engine.executor.page_bytes,
        "policy": scheduler.policy.name,
        "max_context_tokens": engine.max_context_tokens,
        **scheduler.meter.snapshot(),
    }
