"""SEC-08: hostile values in every field of every route, as the OpenAPI document lists them."""

from __future__ import annotations

import re

import httpx
import pytest
from fastapi import FastAPI

from tests.integration.server_hostile import (
    BASES,
    RICH,
    VALUES,
    bodies_of,
    check_answer,
    fields_of,
    filled,
    go_on,
    merged,
    with_remote,
)

CANARY = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}}
CONTEXT = "{context_id}"


class Caller:
    """Sends bodies to one route; a route about a context gets one that exists."""

    def __init__(self, client: httpx.AsyncClient, path: str) -> None:
        self._client = client
        self._path = path
        self._context: str | None = None
        self._uses = 0

    async def post(self, body: bytes) -> httpx.Response:
        if CONTEXT not in self._path:
            return await self._client.post(self._path, content=body)
        if self._context is None or self._uses >= 20:
            await self.close()
            made = await self._client.post("/v1/contexts", json={"pieces": [{"token_ids": [5, 6, 7]}]})
            self._context, self._uses = made.json()["id"], 0
        self._uses += 1
        answer = await self._client.post(self._path.replace(CONTEXT, self._context), content=body)
        for fork in answer.json().get("contexts", []) if self._path.endswith("/fork") else []:
            await self._client.delete(f"/v1/contexts/{fork['id']}")
        if answer.status_code in (404, 410):
            self._context = None
        return answer

    async def close(self) -> None:
        if self._context is not None:
            await self._client.delete(f"/v1/contexts/{self._context}")
            self._context = None


SHARE = 6  # the default run takes every sixth (field, value), shifted from field to field; the slow one the rest


@pytest.mark.parametrize(
    "shares", [(0,), pytest.param((1, 2, 3, 4, 5), marks=pytest.mark.slow)], ids=["a sixth", "the rest"]
)
def test_sec_08_hostile_values_in_every_field_of_every_route(shares: tuple[int, ...]) -> None:
    """Each is taken or refused with a 4xx; the engine stays the same process, and the next request is answered."""

    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        expected = (await client.post("/generate", json=CANARY)).json()["output_ids"]
        whole, num_requests = app.openapi(), 0
        for path, schema in bodies_of(whole):
            caller = Caller(client, path)
            for number, (name, template) in enumerate(fields_of(whole, schema)):
                bases = [BASES.get(path, {})]
                if path in RICH and "." not in name:
                    bases.append({**bases[0], **RICH[path]})
                for shift, base in enumerate(bases, start=number):
                    for value in (v for at, v in enumerate(VALUES, start=shift) if at % SHARE in shares):
                        body = filled(merged(base, template), value)
                        check_answer(await caller.post(body), (path, name, value[:60]))
                        await go_on(client, path)
                        num_requests += 1
                answer = await client.post("/generate", json=CANARY)
                assert answer.json()["output_ids"] == expected, f"after {path} {name}"
            await caller.close()
        assert num_requests > 1000

    with_remote(test)


@pytest.mark.parametrize("raw", [value for value in VALUES if value != b"{}"], ids=range(len(VALUES) - 1))
def test_sec_08_bodies_that_are_no_request(raw: bytes) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        for path, _ in bodies_of(app.openapi()):
            check_answer(await client.post(path.replace(CONTEXT, "x"), content=raw), (path, raw[:60]))
            await go_on(client, path)

    with_remote(test)


def test_sec_08_hostile_ids_and_queries() -> None:
    """What stands in the path or behind it: ids of contexts and models, query strings."""

    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        ids = [
            "-1",
            "0",
            str(1 << 63),
            "NaN",
            "x" * 10_000,
            "%00",
            "%ff%fe",
            "..%2f..%2fetc",
            "%f0%9f%92%a9",
            "a%0d%0ab",
        ]
        for path, operations in app.openapi()["paths"].items():
            for method in operations:
                for value in ids if "{" in path else ["?x=%00", "?" + "a=1&" * 5000, "?%ff"]:
                    url = re.sub(r"{.*?}", value, path) if "{" in path else path + value
                    answer = await client.request(method, url, content=b"{}" if method == "post" else None)
                    await go_on(client, path)
                    check_answer(answer, (method, path, value[:40]))
                    if "{" in path and answer.status_code == 200:
                        raise AssertionError((method, url[:80], "is nobody's"))

    with_remote(test)


def test_a_deadline_too_short_to_be_met_is_the_callers() -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        for deadline_s in (1e-9, 1e-6, 1e-4):
            body = {"pieces": [{"text": "word " * 500}], "deadline_s": deadline_s}
            answer = await client.post("/v1/contexts", json=body)
            check_answer(answer, deadline_s)
            assert answer.status_code in (201, 408)
            assert answer.status_code == 201 or answer.json()["error"]["param"] == "deadline_s"

    with_remote(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_bias_on_a_token_that_the_model_does_not_have_is_refused(stream: bool) -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        wrong = {"logit_bias": {"5": 1.0, "1048576": 1.0}}
        native = {**BASES["/generate"]["sampling_params"], **wrong}
        for path, asked in (
            ("/v1/chat/completions", wrong),
            ("/v1/completions", wrong),
            ("/generate", {"sampling_params": native}),
        ):
            answer = await client.post(path, json={**BASES[path], **asked, "stream": stream})
            assert answer.status_code == 400, (path, answer.text)
            assert "logit_bias: token id 1048576" in answer.text

    with_remote(test)
