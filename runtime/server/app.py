"""The application: middleware, routes, and what they share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from caesura.runtime.api import Service
from caesura.runtime.server.chat import Chat
from caesura.runtime.server.completions import Completions
from caesura.runtime.server.config import ServerConfig
from caesura.runtime.server.contexts import Contexts
from caesura.runtime.server.contexts_template import Template
from caesura.runtime.server.dashboard import Dashboard
from caesura.runtime.server.errors import as_api_error
from caesura.runtime.server.guard import Auth, BodyLimit, HostGuard, Outermost
from caesura.runtime.server.info import Info, package_version
from caesura.runtime.server.metrics import Counting, Metrics
from caesura.runtime.server.native import Generate
from caesura.runtime.server.native_control import NativeControl
from caesura.runtime.server.native_info import NativeInfo
from caesura.runtime.server.openapi import describe
from caesura.runtime.server.responses import Responses
from caesura.runtime.server.state import ServerState
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(service: Service, config: ServerConfig | None = None) -> FastAPI:
    """The server's ASGI application on a running engine. The service stays its owner's; its contexts do not."""
    config = config or ServerConfig()
    state = ServerState(service, config)
    info = Info(state)
    metrics = Metrics(state, info)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.ensure_future(state.sweep())
        yield
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)
        await state.close()

    origins = (*config.allowed_origins, *config.cors_origins)
    guard = Middleware(HostGuard, loopback=config.is_loopback, hosts=config.allowed_hosts, origins=origins)
    app = FastAPI(
        title="Caesura",
        version=package_version(),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
        middleware=[
            Middleware(Counting, metrics),
            *_cors(config),
            Middleware(Outermost, counts=state.counts),
            guard,
            Middleware(Auth, state.keys),
            Middleware(BodyLimit, deadline_s=config.body_deadline_s),
        ],
        exception_handlers={HTTPException: _http_error},
    )
    app.state.server = state
    for methods, path, endpoint in _routes(state, info, metrics):
        app.add_api_route(path, _plain(endpoint), methods=methods.split(), response_model=None, name=path)
    describe(app)
    return app


def _cors(config: ServerConfig) -> list[Middleware]:
    """Answers to scripts of the origins that were named. Credentials of a browser are never asked for: keys are sent
    in a header. Outside of what refuses, so that such a script may read the refusal."""
    if not config.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
            allow_credentials=False,
            max_age=600,
        )
    ]


def _routes(state: ServerState, info: Info, metrics: Metrics) -> list[tuple[str, str, Endpoint]]:
    """(methods, path, endpoint). ``access.py`` says who may call what."""
    native, contexts, template = NativeInfo(state, info), Contexts(state), Template(state)
    dashboard = Dashboard(state)
    responses, control = Responses(state), NativeControl(state)
    one = "/v1/contexts/{context_id}"
    return [
        ("GET", "/health", info.health),
        ("GET", "/ready", info.ready),
        ("GET", "/version", info.version),
        ("GET", "/v1/models", info.models),
        ("GET", "/v1/models/{model:path}", info.model),
        ("GET", "/metrics", metrics.show),
        ("GET", "/dashboard", dashboard.page),
        ("GET", "/v1/dashboard/state", dashboard.state),
        ("POST", "/v1/chat/completions", Chat(state).__call__),
        ("POST", "/v1/completions", Completions(state).__call__),
        ("POST", "/v1/responses", responses.create),
        ("GET", "/v1/responses/{response_id}", responses.show),
        ("DELETE", "/v1/responses/{response_id}", responses.delete),
        ("POST", "/v1/responses/{response_id}/cancel", responses.cancel),
        ("GET", "/v1/responses/{response_id}/input_items", responses.input_items),
        ("POST", "/generate", Generate(state).__call__),
        ("GET", "/get_model_info", native.model_info),
        ("GET", "/model_info", native.model_info),
        ("GET", "/get_server_info", native.server_info),
        ("GET", "/server_info", native.server_info),
        ("GET", "/health_generate", native.health_generate),
        ("POST", "/flush_cache", native.flush_cache),
        ("POST", "/concate_and_append_request", native.concate_and_append),
        ("POST", "/abort_request", native.abort),
        ("POST", "/open_session", control.open_session),
        ("POST", "/close_session", control.close_session),
        ("POST", "/pause_generation", control.pause_generation),
        ("POST", "/continue_generation", control.continue_generation),
        ("GET", "/start_profile", control.profile),
        ("POST", "/start_profile", control.profile),
        ("GET", "/stop_profile", control.profile),
        ("POST", "/stop_profile", control.profile),
        ("POST", "/parse_function_call", control.parse_function_call),
        ("POST", "/separate_reasoning", control.separate_reasoning),
        ("POST", "/tokenize", native.tokenize),
        ("POST", "/v1/tokenize", native.tokenize),
        ("POST", "/detokenize", native.detokenize),
        ("POST", "/v1/detokenize", native.detokenize),
        ("POST", "/v1/contexts", contexts.create),
        ("GET", one, contexts.show),
        ("DELETE", one, contexts.delete),
        ("POST", one + "/append", contexts.append),
        ("POST", one + "/generate", contexts.generate),
        ("POST", one + "/prefill", contexts.prefill),
        ("POST", one + "/score", contexts.score),
        ("POST", one + "/fork", contexts.fork),
        ("POST", one + "/pause", contexts.pause),
        ("POST", one + "/progress", contexts.progress),
        ("POST", one + "/resume", contexts.resume),
        ("POST", one + "/truncate", contexts.truncate),
        ("POST", one + "/snapshot", contexts.snapshot),
        ("POST", one + "/rollback", contexts.rollback),
        ("GET", one + "/tokens", contexts.tokens),
        ("GET", one + "/decisions", contexts.decisions),
        ("POST", "/v1/template/turn", template.turn),
        ("POST", "/v1/template/tool_results", template.tool_results),
    ]


def _plain(endpoint: Endpoint) -> Endpoint:
    """A function of its own for each route: FastAPI reads its signature and names its operation after it."""

    async def answer(request: Request) -> Response:
        return await endpoint(request)

    answer.__doc__ = endpoint.__doc__
    return answer


async def _http_error(_: Request, error: Exception) -> Response:
    return as_api_error(error).response()
