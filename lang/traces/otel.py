"""A run as OpenTelemetry spans, named and described as the semantic conventions for generative AI want it.

https://opentelemetry.io/docs/specs/semconv/gen-ai/ ; what they have no name for is under ``caesura.``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from caesura.lang.errors import DefinitionError
from caesura.lang.spans import Span
from caesura.lang.traces.describe import decisions_of
from caesura.lang.traces.run_trace import RunTrace

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

Attributes = dict[str, Any]


def export(trace: RunTrace, provider: Any = None, *, content: bool = False) -> None:
    """See `RunTrace.export`. Spans that still last end now."""
    try:
        from opentelemetry import trace as otel
    except ImportError as error:
        raise DefinitionError(f"OpenTelemetry is not installed ({error}): pip install 'caesura[otel]'") from None
    tracer = (provider or otel.get_tracer_provider()).get_tracer("caesura")
    found: list[tuple[Span, Any]] = [(trace.root, None)]
    for span, parent in found:  # which grows meanwhile
        context = _export(trace, tracer, span, parent, content)
        found += [(child, context) for child in span.children]


def _export(trace: RunTrace, tracer: Tracer, span: Span, parent: Any, content: bool) -> Any:
    """Send a span; gives the context of its children."""
    from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

    name, attributes = _described(trace, span, content)
    made = tracer.start_span(
        name,
        context=parent,
        kind=SpanKind.CLIENT if span.kind in ("generate", "select") else SpanKind.INTERNAL,
        attributes={key: value for key, value in attributes.items() if value is not None},
        start_time=_nanos(trace, span.start_s),
    )
    for decision in decisions_of(span):
        moment = max(span.start_s, min(decision.now, span.start_s + span.duration_s))
        made.add_event("caesura.pause.decision", _decision(decision), _nanos(trace, moment))
    if span.error:
        made.set_status(Status(StatusCode.ERROR, span.error if content else None))
    made.end(end_time=_nanos(trace, span.start_s + span.duration_s))
    return set_span_in_context(made)


def _nanos(trace: RunTrace, moment_s: float) -> int:
    return round(trace.unix_s(moment_s) * 1e9)


def _described(trace: RunTrace, span: Span, content: bool) -> tuple[str, Attributes]:
    """The conventions' name and attributes for a span."""
    about = span.attributes
    error = {"error.type": span.error_type or "_OTHER"} if span.error else {}
    if span.kind == "program":
        return f"invoke_agent {span.name}", {
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.agent.name": span.name,
            "gen_ai.provider.name": "caesura",
            **error,
        }
    if span.kind == "generate":
        return f"text_completion {trace.model}", {**_generation(trace, span, content), **error}
    if span.kind == "tool":
        told = {"gen_ai.tool.call.arguments": about["arguments"], "gen_ai.tool.call.result": about["result"]}
        return f"execute_tool {span.name}", {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": span.name,
            "gen_ai.tool.type": "function",
            "gen_ai.tool.call.id": about["id"],
            "caesura.tool.attempts": about["attempts"],
            **(told if content else {}),
            **error,
        }
    if span.kind == "pause":
        return "pause", {"caesura.pause.tools": about["tools"], **error}
    return f"{span.kind} {span.name}", error


def _generation(trace: RunTrace, span: Span, content: bool) -> Attributes:
    about = span.attributes
    return {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "caesura",
        "gen_ai.request.model": trace.model,
        "gen_ai.request.temperature": about.get("temperature"),
        "gen_ai.request.max_tokens": about.get("max_tokens"),
        "gen_ai.usage.input_tokens": about.get("prompt_tokens"),
        "gen_ai.usage.output_tokens": about.get("completion_tokens"),
        "gen_ai.usage.cache_read.input_tokens": about.get("cached_tokens"),
        "gen_ai.response.finish_reasons": [about["finish"]] if "finish" in about else None,
        "gen_ai.response.time_to_first_chunk": about.get("first_token_s"),
        "caesura.variable": span.name,
        "caesura.output": about.get("text") if content else None,
    }


def _decision(decision: Any) -> Attributes:
    costs = decision.costs
    return {
        "caesura.pause.action": decision.action.value,
        "caesura.pause.policy": decision.policy,
        "caesura.pause.reason": decision.reason,
        "caesura.pause.preserve_token_s": costs.preserve_token_s,
        "caesura.pause.swap_token_s": costs.swap_token_s,
        "caesura.pause.discard_token_s": costs.discard_token_s,
    }
