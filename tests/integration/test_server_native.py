"""SGLang's protocol and Caesura's contexts on the embedded model."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.integration.server_client import QUESTION, TOOLS, embedded_service, events_of, nothing_left, post, run

TEXT = "What is 3 plus 4? The answer is"


def sampling(**params: Any) -> dict[str, Any]:
    """As SGLang's client writes them: every field, many of them empty."""
    return {
        "skip_special_tokens": True, "spaces_between_special_tokens": True, "max_new_tokens": 8, "min_new_tokens": 0,
        "n": 1, "stop": [], "stop_token_ids": [], "stop_regex": [], "temperature": 0, "top_p": 1.0, "top_k": -1,
        "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "ignore_eos": False, "regex": None,
        "json_schema": None, **params,
    }  # fmt: skip


def test_generate_streams_the_whole_text_every_time() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        body = {"text": TEXT, "sampling_params": sampling(ignore_eos=True), "return_logprob": True}
        whole = await post(client, "/generate", body)
        events = list(events_of((await client.post("/generate", json={**body, "stream": True})).text))
        for before, after in itertools.pairwise(events):
            assert after["text"].startswith(before["text"])
            assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        last = events[-1]
        assert (last["text"], last["output_ids"]) == (whole["text"], whole["output_ids"])
        assert last["meta_info"]["output_token_logprobs"] == whole["meta_info"]["output_token_logprobs"]
        assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 8}
        assert [entry[1] for entry in whole["meta_info"]["output_token_logprobs"]] == whole["output_ids"]
        assert all(event["meta_info"]["id"] for event in events)
        assert {event["meta_info"]["finish_reason"] is None for event in events[:-1]} == {True}

    run(test)


def test_a_zero_token_request_fills_the_cache() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        text = TEXT + " 7." * 20
        first = await post(client, "/generate", {"text": text, "sampling_params": sampling(max_new_tokens=0)})
        meta = first["meta_info"]
        assert (first["text"], meta["completion_tokens"], meta["cached_tokens"]) == ("", 0, 0)
        ids = (await post(client, "/tokenize", {"prompt": text}))["tokens"]
        assert meta["prompt_tokens"] == len(ids)
        second = await post(client, "/generate", {"input_ids": ids, "sampling_params": sampling()})
        cached = second["meta_info"]["cached_tokens"]
        assert len(ids) - 16 <= cached <= len(ids) - 1
        assert (await client.post("/flush_cache")).status_code == 200
        third = await post(client, "/generate", {"input_ids": ids, "sampling_params": sampling()})
        assert third["meta_info"]["cached_tokens"] == 0

    run(test)


def test_choices_are_scored_in_three_steps_as_select_does() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        prompt = await post(client, "/generate", {"text": TEXT, "sampling_params": sampling(max_new_tokens=0)})
        size = prompt["meta_info"]["prompt_tokens"]
        body = {
            "text": [TEXT + " 7", TEXT + " blue"], "return_logprob": True, "return_text_in_logprobs": True,
            "logprob_start_len": max(size - 2, 0), "sampling_params": sampling(max_new_tokens=0),
        }  # fmt: skip
        results = await post(client, "/generate", body)
        for result in results:
            meta = result["meta_info"]
            entries = meta["input_token_logprobs"]
            assert len(entries) == meta["prompt_tokens"] - (size - 2)
            assert all(isinstance(value, float) and isinstance(text, str) for value, _, text in entries)
            assert meta["output_token_logprobs"] == []
        # step three: nothing said about where to begin, the whole list is wanted
        ids = [(await post(client, "/tokenize", {"prompt": choice}))["tokens"] for choice in (" 7", " blue")]
        alone = {"input_ids": ids, "return_logprob": True, "sampling_params": sampling(max_new_tokens=0)}
        for result, own in zip(await post(client, "/generate", alone), ids, strict=True):
            entries = result["meta_info"]["input_token_logprobs"]
            assert [entry[1] for entry in entries] == own
            assert entries[0][0] is None and all(entry[0] is not None for entry in entries[1:])

    run(test)


def test_prompt_scores_equal_the_scores_of_generating() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        made = await post(client, "/generate", {"text": TEXT, "return_logprob": True, "sampling_params": sampling()})
        ids = (await post(client, "/tokenize", {"prompt": TEXT}))["tokens"] + made["output_ids"]
        start = made["meta_info"]["prompt_tokens"]
        body = {"input_ids": ids, "return_logprob": True, "logprob_start_len": start}
        scored = await post(client, "/generate", {**body, "sampling_params": sampling(max_new_tokens=0)})
        got = [entry[0] for entry in scored["meta_info"]["input_token_logprobs"]]
        wanted = [entry[0] for entry in made["meta_info"]["output_token_logprobs"]]
        assert got == pytest.approx(wanted, abs=1e-4)

    run(test)


def test_the_next_distribution_without_a_token() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        body = {"text": "", "return_logprob": True, "top_logprobs_num": 3}
        answer = await post(client, "/generate", {**body, "sampling_params": sampling(max_new_tokens=0)})
        assert (answer["text"], answer["output_ids"], answer["meta_info"]["completion_tokens"]) == ("", [], 0)
        assert len(answer["meta_info"]["output_top_logprobs"][0]) == 3

    run(test)


def test_several_choices_and_prompts_come_as_a_list() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        params = sampling(n=2, temperature=1.0, sampling_seed=3, max_new_tokens=4)
        results = await post(client, "/generate", {"text": ["What", "The"], "sampling_params": params})
        assert [result["meta_info"]["prompt_tokens"] for result in results] == [1, 1, 1, 1]
        assert len({result["meta_info"]["id"] for result in results}) == 4
        answer = await client.post(
            "/generate", json={"text": ["What", "The"], "sampling_params": params, "stream": True}
        )
        last = {event["index"]: event for event in events_of(answer.text)}
        assert [last[i]["text"] for i in range(4)] == [result["text"] for result in results]
        whole = (await post(client, "/generate", {"text": TEXT, "sampling_params": sampling()}))["text"]
        stop = whole[len(whole) // 2 :][:2]
        stopped = await post(client, "/generate", {"text": TEXT, "sampling_params": sampling(stop=stop)})
        assert stopped["text"] == whole[: whole.index(stop)] != whole
        assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
        held = await post(
            client, "/generate", {"text": TEXT, "sampling_params": sampling(json_schema='{"enum": ["x"]}')}
        )
        assert held["text"] == '"x"'

    run(test)


@pytest.mark.parametrize(
    "body",
    [
        {}, {"text": "x", "input_ids": [1]}, {"input_ids": []}, {"input_ids": [1 << 30]}, {"input_ids": [1, [2]]},
        {"text": "x", "image_data": "aGk="}, {"text": "x", "sampling_params": {"n": 9}},
        {"text": "x", "sampling_params": {"json_schema": "{"}}, {"text": ["x"] * 64, "sampling_params": {"n": 2}},
        {"text": "x", "logprob_start_len": 99, "return_logprob": True},
        {"text": ["x", "y"], "rid": ["a"]}, {"text": ["x", "y"], "rid": ["a", "a"]}, {"text": "x", "rid": ["a", "b"]},
        {"text": ["x", "y"], "return_logprob": [True]}, {"text": "x", "sampling_params": {"structural_tag": "{}"}},
    ],
)  # fmt: skip
def test_wrong_native_requests_are_400(body: dict[str, Any]) -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        for stream in (False, True):
            answer = await client.post("/generate", json={**body, "stream": stream})
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["message"]

    run(test)


def test_abort_ends_a_request_and_only_ones_own() -> None:
    ann, bob = ({"authorization": f"Bearer key-{name}-000"} for name in ("ann", "bob"))

    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        body = {"text": TEXT, "rid": "mine", "sampling_params": sampling(max_new_tokens=1900, ignore_eos=True)}
        running = asyncio.ensure_future(client.post("/generate", json=body, headers=ann))
        while not len(app.state.server.board):
            await asyncio.sleep(0.005)
        twice = await client.post("/generate", json=body, headers=ann)
        assert twice.status_code == 400 and "Duplicate request ID" in twice.text
        busy = await client.post("/flush_cache", headers=ann)
        assert busy.status_code == 400
        theirs = await post(client, "/abort_request", {"rid": "mine"}, headers=bob)
        assert theirs["aborted"] == 0 and not running.done()
        await asyncio.sleep(0.1)
        assert (await post(client, "/abort_request", {"rid": "mine"}, headers=ann))["aborted"] == 1
        answer = (await running).json()
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        await nothing_left(embedded_service())
        assert (await post(client, "/abort_request", {"abort_all": True}, headers=ann))["aborted"] == 0

    run(test, api_keys=("key-ann-000", "key-bob-000"))


@pytest.mark.parametrize("stream", [False, True])
def test_each_prompt_of_a_list_is_aborted_by_its_own_id(stream: bool) -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        short, long = (sampling(max_new_tokens=count, ignore_eos=True) for count in (40, 1900))
        body = {"text": [TEXT, "x"], "rid": ["one", "two"], "sampling_params": [short, long], "stream": stream}
        running = asyncio.ensure_future(client.post("/generate", json=body))
        board = app.state.server.board
        while not len(board):
            await asyncio.sleep(0.005)
        assert len(board) == 1
        twice = await client.post("/generate", json={"text": "x", "rid": "two"})
        assert twice.status_code == 400 and "Duplicate request ID 'two'" in twice.text
        assert (await post(client, "/abort_request", {"rid": "two"}))["aborted"] == 1
        answer = await asyncio.wait_for(running, 20)
        told = {
            one["meta_info"]["id"]: one["meta_info"] for one in (events_of(answer.text) if stream else answer.json())
        }
        assert {name: meta["finish_reason"]["type"] for name, meta in told.items()} == {"one": "length", "two": "abort"}
        assert told["one"]["completion_tokens"] == 40
        assert len(board) == 0 and not board._at_work
        await nothing_left(embedded_service())

    run(test)


def test_too_many_requests_are_told_to_come_back() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        body = {"text": TEXT, "sampling_params": sampling(max_new_tokens=1900, ignore_eos=True)}
        running = asyncio.ensure_future(client.post("/generate", json=body))
        while not len(app.state.server.board):
            await asyncio.sleep(0.005)
        for stream in (False, True):
            answer = await client.post("/v1/completions", json={"prompt": "x", "stream": stream})
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["message"] == "The request queue is full."
        await post(client, "/abort_request", {"abort_all": True})
        await running

    run(test, max_requests=1)


def test_information_routes() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        for path in ("/get_model_info", "/model_info"):
            assert (await client.get(path)).json()["model_path"] == "embedded"
        for path in ("/get_server_info", "/server_info"):
            assert (await client.get(path)).json()["internal_states"][0]["page_size"] == 16
        for path in ("/health", "/ready", "/version", "/health_generate", "/v1/models", "/v1/models/embedded"):
            assert (await client.get(path)).status_code == 200, path
        assert (await client.get("/v1/models/other")).status_code == 404
        assert (
            await client.post("/concate_and_append_request", json={"src_rids": [], "dst_rid": "x"})
        ).status_code == 200
        both = await post(client, "/tokenize", {"prompt": [TEXT, "x"]})
        assert (await post(client, "/detokenize", {"tokens": both["tokens"]}))["text"] == [TEXT, "x"]
        assert (await client.post("/detokenize", json={"tokens": [1 << 20]})).status_code == 400
        metrics = (await client.get("/metrics")).text
        assert 'caesura_http_requests_total{route="/health",status="200"} 1.0' in metrics
        assert "caesura_decisions_total" in metrics and "caesura_kv_pages" in metrics
        document = (await client.get("/openapi.json")).json()
        body = document["paths"]["/v1/contexts/{context_id}/pause"]["post"]["requestBody"]
        reference = body["content"]["application/json"]["schema"]["$ref"]
        assert document["components"]["schemas"][reference.rsplit("/", 1)[1]]["required"] == ["calls"]

    run(test)


def test_a_server_that_is_full_is_healthy() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        body = {"text": TEXT, "sampling_params": sampling(max_new_tokens=1900, ignore_eos=True), "rid": "long"}
        running = asyncio.ensure_future(client.post("/generate", json=body))
        while not len(app.state.server.board):
            await asyncio.sleep(0.005)
        assert (await client.post("/generate", json={"text": "a"})).status_code == 429
        assert (await client.get("/health_generate")).status_code == 200
        assert (await post(client, "/abort_request", {"rid": "long"}))["aborted"] == 1
        await running

    run(test, max_requests=1)


def test_completions_echo_and_score_the_prompt() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        body = {"prompt": TEXT, "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 1}
        one = (await post(client, "/v1/completions", body))["choices"][0]
        logprobs = one["logprobs"]
        assert one["text"].startswith(TEXT)
        assert logprobs["token_logprobs"][0] is None and all(v <= 0 for v in logprobs["token_logprobs"][1:])
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert one["text"][offset : offset + len(token)] == token
        ids = (await post(client, "/tokenize", {"prompt": TEXT}))["tokens"]
        lists = await post(client, "/v1/completions", {"prompt": [ids, ids], "max_tokens": 4, "temperature": 0})
        assert [choice["index"] for choice in lists["choices"]] == [0, 1]
        assert {TEXT + choice["text"] for choice in lists["choices"]} == {one["text"]}
        streamed = await client.post("/v1/completions", json={**body, "stream": True})
        assert "".join(event["choices"][0]["text"] for event in events_of(streamed.text)) == one["text"]
        places = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        prompt = list(places)[1 : len(ids)]
        assert logprobs["top_logprobs"][0] is None
        assert all(top[token] == value and 1 <= len(top) <= 2 for token, value, top in prompt)
        assert any(max(top.values()) > value for _, value, top in prompt), "not every word is what comes to mind first"
        drawn = {"prompt": TEXT, "max_tokens": 24, "temperature": 2.0, "seed": 5, "logprobs": 1, "ignore_eos": True}
        logprobs = (await post(client, "/v1/completions", drawn))["choices"][0]["logprobs"]
        places = list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))
        assert all(top[token] == value for token, value, top in places), "the sampled token is always among them"
        assert any(len(top) == 2 for _, _, top in places)

    run(test)


def test_no_stop_trim_keeps_what_a_pattern_matched() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        sampling = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
        whole = (await post(client, "/generate", {"text": TEXT, "sampling_params": sampling}))["text"]
        pattern = re.escape(whole[len(whole) // 3 :][:3])
        stops = {**sampling, "stop_regex": pattern, "no_stop_trim": True}
        kept = (await post(client, "/generate", {"text": TEXT, "sampling_params": stops}))["text"]
        assert re.search(pattern, kept) and whole.startswith(kept) and len(kept) < len(whole)

    run(test)


def test_an_abort_ends_what_a_context_computes_and_leaves_the_context() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        path = "/v1/contexts/" + (await post(client, "/v1/contexts", {"pieces": [{"text": TEXT}]}))["id"]
        spec = {"max_new_tokens": 1500, "ignore_eos": True}
        for stream in (False, True):
            running = asyncio.create_task(client.post(f"{path}/generate", json={**spec, "stream": stream}))
            while not len(app.state.server.board):
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.1)
            assert (await post(client, "/abort_request", {"abort_all": True}))["aborted"] == 1
            answer = await asyncio.wait_for(running, 20)
            told = named_events(answer.text)[-1][1] if stream else answer.json()
            assert (told["reason"], told["usage"]["completion_tokens"] < 1500) == ("abort", True)
        more = await post(client, f"{path}/generate", {**spec, "max_new_tokens": 2, "stream": False})
        assert more["reason"] == "length"

    run(test)


def named_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    out = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        out.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return out


def test_a_context_pauses_resumes_forks_and_rolls_back() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        pieces = [
            {"text": "<|im_start|>user\n", "special": True}, {"text": QUESTION["content"]},
            {"text": "<|im_end|>\n<|im_start|>assistant\n", "special": True},
        ]  # fmt: skip
        made = await post(client, "/v1/contexts", {"pieces": pieces})
        path = f"/v1/contexts/{made['id']}"
        mark = made["num_tokens"]
        spec = {"tools": TOOLS, "tool_choice": "calculator", "temperature": 0}
        answer = await client.post(f"{path}/generate", json=spec)
        events = named_events(answer.text)
        assert {name for name, _ in events} == {"chunk", "finish"} and events[-1][0] == "finish"
        finish = events[-1][1]
        assert finish["tool_calls"][0]["name"] == "calculator"
        state = await post(
            client, f"{path}/pause", {"calls": [{"tool": "calculator", "expected_s": 0.1, "deadline_s": 60}]}
        )
        assert state["num_tokens"] == finish["num_tokens"]
        assert await post(client, f"{path}/progress", {"fraction": 0.25}) == state
        assert await post(client, f"{path}/progress", {"fraction": 1, "call": 63}) == state, "it waits for no such call"
        for wrong in ({}, {"fraction": 1.5}, {"fraction": -0.1}, {"fraction": 0.5, "call": -1}):
            assert (await client.post(f"{path}/progress", json=wrong)).status_code == 400
        assert isinstance((await client.get(f"{path}/decisions")).json()["decisions"], list)
        await post(client, f"{path}/resume", {"tool_results": [{"name": "calculator", "content": "1911492"}]})
        after = await post(client, f"{path}/generate", {"temperature": 0, "stream": False})
        assert "1911492" in after["text"]
        assert finish["num_tokens"] - 1 <= after["usage"]["cached_tokens"] <= finish["num_tokens"]
        forks = (await post(client, f"{path}/fork", {"count": 2}))["contexts"]
        assert [fork["num_tokens"] for fork in forks] == [after["num_tokens"]] * 2
        await post(client, f"{path}/snapshot", {"name": "answered"})
        assert (await post(client, f"{path}/rollback", {"num_tokens": mark}))["num_tokens"] == mark
        gone = await client.post(f"{path}/rollback", json={"snapshot": "answered"})
        assert gone.status_code == 404, "what it named was cut off"
        assert (await post(client, f"{path}/snapshot", {"name": "asked"}))["snapshots"] == {"asked": mark}
        for wrong in ({}, {"snapshot": "asked", "num_tokens": 1}):
            assert (await client.post(f"{path}/rollback", json=wrong)).status_code == 400
        again = await post(client, f"{path}/generate", {**spec, "stream": False})
        assert again["tool_calls"] == finish["tool_calls"]
        assert (await post(client, f"{path}/rollback", {"snapshot": "asked"}))["num_tokens"] == mark
        again = await post(client, f"{path}/generate", {**spec, "stream": False})
        assert len((await post(client, f"{path}/score", {"start": 1}))["logprobs"]) == again["num_tokens"] - 1
        assert (await post(client, f"{path}/prefill", {}))["computed_tokens"] == again["num_tokens"]
        assert len((await client.get(f"{path}/tokens")).json()["token_ids"]) == again["num_tokens"]
        assert (await client.post(f"{path}/truncate", json={"num_tokens": 9999})).status_code == 400
        assert (await client.delete(path)).status_code == 200
        assert (await client.get(path)).status_code == 404
        assert (await client.delete(path)).status_code == 404

    run(test)


def test_a_context_belongs_to_its_key_and_to_one_request_at_a_time() -> None:
    ann, bob = ({"authorization": f"Bearer key-{name}-000"} for name in ("ann", "bob"))

    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        made = await post(client, "/v1/contexts", {"pieces": [{"text": TEXT}]}, headers=ann)
        path = f"/v1/contexts/{made['id']}"
        for method, verb in [
            ("GET", ""),
            ("DELETE", ""),
            ("POST", "/pause"),
            ("POST", "/progress"),
            ("POST", "/generate"),
            ("GET", "/decisions"),
        ]:
            body = {"calls": [{"tool": "x"}], "fraction": 0.5}
            assert (await client.request(method, path + verb, json=body, headers=bob)).status_code == 404
        spec = {"max_new_tokens": 1900, "ignore_eos": True, "stream": False}
        running = asyncio.ensure_future(client.post(f"{path}/generate", json=spec, headers=ann))
        while not len(app.state.server.board):
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        busy = await client.post(f"{path}/append", json={"pieces": [{"text": "x"}]}, headers=ann)
        assert busy.status_code == 409 and busy.json()["error"]["code"] == "context_busy"
        assert (await client.delete(path, headers=ann)).status_code == 200
        assert (await running).status_code == 410

    run(test, api_keys=("key-ann-000", "key-bob-000"))


def test_contexts_are_bounded_and_end_by_deadline() -> None:
    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        made = [await post(client, "/v1/contexts", {"ttl_s": 0.2}) for _ in range(2)]
        assert (await client.post("/v1/contexts", json={})).status_code == 429
        await asyncio.sleep(0.25)
        gone = await client.get(f"/v1/contexts/{made[0]['id']}")
        assert gone.status_code == 404
        paused = await post(client, "/v1/contexts", {"pieces": [{"text": TEXT}]})
        path = f"/v1/contexts/{paused['id']}"
        await post(client, f"{path}/pause", {"calls": [{"tool": "slow", "deadline_s": 0.05}]})
        await asyncio.sleep(0.3)
        answer = await client.post(f"{path}/resume", json={})
        assert answer.status_code == 410 and answer.json()["error"]["code"] == "context_gone"

    run(test, max_contexts_per_key=2)
