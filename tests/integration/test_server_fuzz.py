"""schemathesis on the OpenAPI document: what fits the schema and what just does not, to every operation. Seeded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from caesura.runtime.ipc.client import EngineClient
from caesura.runtime.server import ServerConfig, create_app
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import Case, GenerationMode

from tests.integration.server_client import client_of
from tests.integration.server_hostile import check_answer, go_on, idle, remote_service

FEW, MANY = 5, 250  # examples for each operation and mode
MOST_TOKENS = 4
LENGTHS = {"max_tokens", "max_completion_tokens", "max_new_tokens", "max_output_tokens"}
LENGTH_OF = {
    "/v1/chat/completions": "max_tokens", "/v1/completions": "max_tokens", "/v1/responses": "max_output_tokens",
    "/v1/contexts/{context_id}/generate": "max_new_tokens",
}  # fmt: skip


class Fuzzer:
    """Sends cases to an application on one event loop, with ids of things that exist."""

    def __init__(self, runner: asyncio.Runner, app: FastAPI, client: httpx.AsyncClient) -> None:
        self._runner = runner
        self._client = client
        self.document = app.openapi()
        self.num_sent = 0
        self.statuses: set[int] = set()

    def send(self, case: Case) -> None:
        self._runner.run(asyncio.wait_for(self._send(case), 60))

    async def _send(self, case: Case) -> None:
        path = case.operation.path
        made: str | None = None
        if "{context_id}" in path:
            body = {"pieces": [{"token_ids": [5, 6, 7]}]}
            made = (await self._client.post("/v1/contexts", json=body)).json()["id"]
            case.path_parameters = {"context_id": made}
        _shorten(path, case.body)
        wire = case.as_transport_kwargs(base_url="http://127.0.0.1:30000")
        wire.pop("cookies", None)
        try:
            answer = await self._client.request(**{**wire, "headers": _sendable(wire.get("headers"))})
        except httpx.InvalidURL:  # what the client library refuses never reaches a server
            return
        finally:
            if made is not None:
                await self._client.delete(f"/v1/contexts/{made}")
        await go_on(self._client, path)
        self.num_sent += 1
        self.statuses.add(answer.status_code)
        check_answer(answer, (case.method, path, str(case.body)[:300]))
        for fork in answer.json().get("contexts", []) if path.endswith("/fork") else []:
            await self._client.delete(f"/v1/contexts/{fork['id']}")
        if path == "/v1/contexts" and answer.status_code == 201:
            await self._client.delete(f"/v1/contexts/{answer.json()['id']}")


def _sendable(headers: Any) -> dict[str, str]:
    return {name: str(value) for name, value in dict(headers or {}).items()}


def _shorten(path: str, body: Any) -> None:
    """Answers of a few tokens: the test is about requests."""
    if isinstance(body, list):
        for part in body:
            _shorten("", part)
    if not isinstance(body, dict):
        return
    if path in LENGTH_OF:
        body.setdefault(LENGTH_OF[path], MOST_TOKENS)
    for name in LENGTHS & set(body):
        if (isinstance(body[name], int) and body[name] > MOST_TOKENS) or body[name] is None:
            body[name] = MOST_TOKENS
    if path == "/generate":
        params = body.setdefault("sampling_params", {})
        for one in params if isinstance(params, list) else [params]:
            if isinstance(one, dict):
                one.setdefault("max_new_tokens", MOST_TOKENS)
                _shorten("", one)


@contextlib.contextmanager
def fuzzing(service: EngineClient) -> Iterator[Fuzzer]:
    app = create_app(service, ServerConfig(default_max_tokens=4, request_deadline_s=60))
    with asyncio.Runner() as runner:
        client = client_of(app)
        yield Fuzzer(runner, app, runner.run(client.__aenter__()))
        runner.run(app.state.server.close())
        runner.run(idle(service))
        runner.run(client.__aexit__(None, None, None))


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_sec_08_no_request_that_fits_the_document_or_just_does_not_is_a_server_error(count: int) -> None:
    service = remote_service()
    pid = service.engine_pid
    with fuzzing(service) as fuzzer:
        schema = schemathesis.openapi.from_dict(fuzzer.document)
        for found in schema.get_all_operations():
            operation = found.ok()
            for mode in GenerationMode:
                if mode is GenerationMode.NEGATIVE and not operation.body:
                    continue
                strategy = operation.as_strategy(generation_mode=mode)

                @seed(20)
                @settings(
                    max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                    phases=[Phase.generate],
                )  # fmt: skip
                @given(case=strategy)
                def check(case: Case) -> None:
                    fuzzer.send(case)

                check()
        assert fuzzer.num_sent > 20 * count
        assert {200, 201, 400} <= fuzzer.statuses
    assert service.engine_pid == pid
    assert service.stats()["ipc"]["restarts"] == 0
