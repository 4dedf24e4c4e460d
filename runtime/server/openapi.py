"""The OpenAPI document: FastAPI's routes, with request bodies from the types that read them."""

from __future__ import annotations

from typing import Any

import msgspec
from caesura.runtime.server.chat_protocol import ChatRequest
from caesura.runtime.server.completions import CompletionRequest
from caesura.runtime.server.contexts_protocol import (
    AppendRequest,
    ContextRequest,
    ForkRequest,
    GenerateSpec,
    PauseRequest,
    ProgressRequest,
    ResultsRequest,
    RollbackRequest,
    ScoreRequest,
    SnapshotRequest,
    TruncateRequest,
    TurnRequest,
)
from caesura.runtime.server.native_control import ParseCalls, PauseGeneration, SplitReasoning
from caesura.runtime.server.native_info import AbortRequest, DetokenizeRequest, TokenizeRequest
from caesura.runtime.server.native_protocol import GenerateRequest
from caesura.runtime.server.responses_protocol import ResponsesRequest
from caesura.runtime.server.sessions import CloseSession, OpenSession
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_CONTEXT = "/v1/contexts/{context_id}"
BODIES: dict[str, type[msgspec.Struct]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/generate": GenerateRequest,
    "/abort_request": AbortRequest,
    "/open_session": OpenSession,
    "/close_session": CloseSession,
    "/pause_generation": PauseGeneration,
    "/parse_function_call": ParseCalls,
    "/separate_reasoning": SplitReasoning,
    "/tokenize": TokenizeRequest,
    "/v1/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/detokenize": DetokenizeRequest,
    "/v1/contexts": ContextRequest,
    f"{_CONTEXT}/append": AppendRequest,
    f"{_CONTEXT}/resume": AppendRequest,
    f"{_CONTEXT}/generate": GenerateSpec,
    f"{_CONTEXT}/fork": ForkRequest,
    f"{_CONTEXT}/pause": PauseRequest,
    f"{_CONTEXT}/progress": ProgressRequest,
    f"{_CONTEXT}/score": ScoreRequest,
    f"{_CONTEXT}/truncate": TruncateRequest,
    f"{_CONTEXT}/snapshot": SnapshotRequest,
    f"{_CONTEXT}/rollback": RollbackRequest,
    "/v1/template/turn": TurnRequest,
    "/v1/template/tool_results": ResultsRequest,
}


def describe(app: FastAPI) -> None:
    """Let the application answer ``/openapi.json`` with request bodies."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    setattr(app, "openapi", document)  # noqa: B010 - FastAPI's own way, which a type checker does not take


def _document(app: FastAPI) -> dict[str, Any]:
    out = get_openapi(title=app.title, version=app.version, routes=app.routes)
    kinds = list(BODIES.values())
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    out.setdefault("components", {}).setdefault("schemas", {}).update(components)
    out["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, schema in zip(BODIES, schemas, strict=True):
        out["paths"][path]["post"]["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    for path, operations in out["paths"].items():
        names = [part.strip("{}") for part in path.split("/") if part.startswith("{")]
        for operation in operations.values() if names else ():
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
    return out
