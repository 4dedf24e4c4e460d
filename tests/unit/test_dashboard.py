"""The dashboard without a browser: what the page may load and run, who may see the state, and how often the engine is
asked."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from importlib.resources import files
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from caesura.runtime.api import Service
from caesura.runtime.errors import EngineStopped
from caesura.runtime.history import History
from caesura.runtime.server import ServerConfig, create_app, dashboard
from caesura.runtime.server.dashboard import Feed, assembled
from caesura.runtime.snapshot import EngineSnapshot, take_snapshot

from tests.sim.agents import World, populate
from tests.unit.test_server_guard import BrokenService

KEY, ADMIN_KEY = "sk-test-0123456789", "sk-admin-0123456789"


class Engine(BrokenService):
    """A service that only shows: an engine in simulated time that can be replaced by another one."""

    model_name = "simulated"

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.gone = False
        self.restart(0)

    def restart(self, agents: int) -> None:
        self.world, self.history = World("min_waste"), History()
        self.world.engine.observers.append(self.history)
        populate(self.world, agents)
        self.world.sim.run()

    async def read_snapshot(self, since: int = 0) -> EngineSnapshot:
        self.asked.append(since)
        if self.gone:
            raise EngineStopped("the engine was closed")
        return take_snapshot(self.world.engine, self.history, since)


def get(engine: Engine, path: str, key: str | None = None, **options: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        app = create_app(cast(Service, engine), ServerConfig(**options))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:30000") as client:
            return await client.get(path, headers={"authorization": f"Bearer {key}"} if key else {})

    return asyncio.run(run())


@pytest.mark.skipif(shutil.which("node") is None, reason="no JavaScript outside of a browser here")
def test_the_axis_of_a_small_tree_names_every_token_once() -> None:
    _, found, rest = (files("caesura.runtime.server") / "static" / "draw.js").read_text().partition("function ticks")
    code = found + rest.partition("\n}\n")[0] + "\n}\nconsole.log(JSON.stringify([ticks(3, 8), ticks(16, 8)]))"
    told = subprocess.run(["node", "-e", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert json.loads(told) == [[0, 1, 2, 3], list(range(0, 17, 2))]


def test_the_page_loads_nothing_and_runs_only_what_its_policy_names() -> None:
    body, headers = assembled()
    page = body.decode()
    policy = {part.split()[0]: part.split()[1:] for part in headers["content-security-policy"].split(";")}
    assert policy["default-src"] == ["'none'"]
    assert policy["require-trusted-types-for"] == ["'script'"]
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        assert policy[kind] == [f"'sha256-{digest}'" for digest in hashes] and hashes
    markup = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.DOTALL)
    assert not re.search(r"\son[a-z]+\s*=", markup), "no inline handlers"
    assert not re.search(r"\sstyle\s*=", markup), "no inline styles: the policy would drop them"
    assert not re.search(r"<script[^>]|<link(?![^>]*href=\"data:)|@import|url\((?!#)", page)
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "localStorage",
    ):
        assert word not in page, word
    assert "unsafe" not in headers["content-security-policy"]


def test_the_page_is_public_and_the_state_is_the_admins() -> None:
    engine = Engine()
    keys = {"api_keys": (KEY,), "admin_keys": (ADMIN_KEY,)}
    page = get(engine, "/dashboard", **keys)
    assert page.status_code == 200 and page.content == assembled()[0]
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["referrer-policy"] == "no-referrer"
    for key, status in ((None, 401), (KEY, 403), (ADMIN_KEY, 200)):
        assert get(engine, "/v1/dashboard/state", key, **keys).status_code == status
    assert get(engine, "/v1/dashboard/state").status_code == 200, "without keys everyone may look"


def test_the_state_is_the_engines_picture() -> None:
    engine = Engine()
    engine.restart(24)
    answer = get(engine, "/v1/dashboard/state").json()
    assert answer["server"]["model"] == "simulated" and answer["server"]["uptime_s"] >= 0
    told = answer["engine"]
    assert told["life"] == engine.history.life and told["policy"] == "min_waste"
    assert told["spans"] and told["decisions"] and told["samples"]
    assert not any("namespace" in str(key) for key in told)
    newer = get(engine, f"/v1/dashboard/state?life={told['life']}&since={told['cursor']}").json()["engine"]
    assert (newer["spans"], newer["decisions"]) == ([], [])
    foreign = get(engine, f"/v1/dashboard/state?life=other&since={told['cursor']}").json()["engine"]
    assert len(foreign["spans"]) == len(told["spans"])


@pytest.mark.parametrize("since", ["-1", "x", "", "1e3", "9" * 16, "1.0", "%F0%9F%98%80", "٣"])
def test_a_bad_cursor_is_the_callers_mistake(since: str) -> None:
    answer = get(Engine(), f"/v1/dashboard/state?since={since}")
    assert answer.status_code == 400 and "since" in answer.json()["error"]["message"]


def test_an_engine_that_is_gone_is_503() -> None:
    engine = Engine()
    engine.gone = True
    assert get(engine, "/v1/dashboard/state").status_code == 503


def test_however_many_look_on_the_engine_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    engine.restart(4)
    now = 100.0
    monkeypatch.setattr(dashboard, "time", SimpleNamespace(monotonic=lambda: now))
    feed = Feed(cast(Any, SimpleNamespace(service=engine)))

    async def run() -> None:
        nonlocal now
        pictures = await asyncio.gather(*(feed.picture("", 0) for _ in range(20)))
        assert engine.asked == [0] and len({picture.cursor for picture in pictures}) == 1
        first = pictures[0]
        now += 1.0
        again = await feed.picture(first.life, first.cursor)
        assert engine.asked == [0, first.cursor], "only what is new is asked for"
        assert again.spans == () and len((await feed.picture("", 0)).spans) == len(first.spans)
        engine.restart(6)
        now += 1.0
        after = await feed.picture(first.life, first.cursor)
        assert after.life == engine.history.life != first.life
        assert after.spans == take_snapshot(engine.world.engine, engine.history).spans, (
            "the old engine's events are gone"
        )
        assert replace(after, spans=(), decisions=(), samples=()).num_contexts == 0

    asyncio.run(run())
