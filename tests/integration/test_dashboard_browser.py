"""The dashboard in a real browser: it draws a working engine, believes no tool name, keeps the key."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from caesura.runtime.api import PendingCall
from caesura.runtime.config import EngineConfig
from caesura.runtime.handle import ContextHandle
from caesura.runtime.sampling import SamplingParams
from caesura.runtime.server import ServerConfig
from caesura.runtime.server.run import make_server
from caesura.runtime.service import EngineService

from tests.integration import chromium
from tests.integration.server_client import embedded_service

pytestmark = pytest.mark.skipif(chromium.find() is None, reason="no Chromium is installed: the page was not looked at")

HOSTILE = "<script>hacked=1</script><img src=x onerror=hacked=1>"
KEY, ADMIN_KEY = "sk-user-0123456789", "sk-admin-0123456789"


class Running:
    """A server on a free port of this machine, in a thread."""

    def __init__(self, service: EngineService, port: int = 0, **options: object) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        self._server = make_server(service, ServerConfig(port=self.port, drain_s=1.0, **options))  # type: ignore[arg-type]
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        end = time.monotonic() + 20
        while not self._server.started and time.monotonic() < end:
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=20)
        assert not self._thread.is_alive()
        self._socket.close()


@pytest.fixture(scope="module")
def page() -> Iterator[chromium.Page]:
    with chromium.browser() as found:
        found.size(1280, 800)
        yield found


@pytest.fixture(scope="module")
def tight() -> Iterator[EngineService]:
    """An engine with too little memory for what the tests do."""
    with EngineService.start(EngineConfig(num_threads=1, kv_tokens=768, host_kv_tokens=512)) as service:
        yield service


async def agents(service: EngineService, tools: list[str]) -> list[ContextHandle]:
    """One context for each tool, all waiting for it; together they need more than the pool."""
    handles = []
    shared = list(range(5, 101))
    for number, tool in enumerate(tools):
        handle = await service.open()
        await handle.append(shared + [200 + number] * 120)
        async for _ in handle.generate(SamplingParams(max_new_tokens=4, temperature=0.0, ignore_eos=True)):
            pass
        await handle.pause([PendingCall(tool, expected_s=30.0)])
        handles.append(handle)
    return handles


async def end(handles: list[ContextHandle]) -> None:
    for handle in handles:
        await handle.close()


def test_an_idle_server_says_what_to_run(page: chromium.Page) -> None:
    service = EngineService.start(EngineConfig(num_threads=1, kv_tokens=512))
    server = Running(service)
    try:
        page.open(f"{server.url}/dashboard")
        page.until("!document.getElementById('lanes-empty').hidden")
        text = page.run("document.body.innerText")
        assert "Nothing has run yet" in text and f"curl {server.url}/v1/chat/completions" in text
        assert page.complaints() == []
    finally:
        server.stop()
        service.close()


def test_a_working_engine_is_drawn_and_hostile_names_are_only_text(page: chromium.Page, tight: EngineService) -> None:
    server = Running(tight)
    handles = asyncio.run(agents(tight, ["search", HOSTILE, "shell", "search", "person", "search"]))
    try:
        page.open(f"{server.url}/dashboard")
        page.until("document.querySelectorAll('#decisions .chip').length > 0")
        page.until("document.querySelectorAll('#tree .block').length > 5")
        states = page.run(
            "[...new Set([...document.querySelectorAll('#tree .block')].map(b => b.getAttribute('class')))]"
        )
        assert "block s-preserved" in states
        assert {"block s-swapped", "block s-discarded"} & set(states), "memory was short"
        assert page.run("document.querySelectorAll('#lanes .block').length") >= 6
        assert page.run("document.querySelectorAll('#pool path').length") >= 3
        costs = page.run("document.querySelector('#decisions li').innerText")
        assert all(word in costs for word in ("preserve", "swap", "discard", "memory is wanted"))
        names = page.run("[...document.querySelectorAll('#tools td:first-child')].map(cell => cell.textContent)")
        assert HOSTILE in names
        assert page.run("typeof hacked") == "undefined"
        assert (
            page.run(
                "document.querySelectorAll('img, script[src], body script + img, iframe, link[href^=http]').length"
            )
            == 0
        )
        assert page.complaints() == []
        hosts = {urlsplit(request["url"]).netloc for request in page.requests() if request["url"].startswith("http")}
        assert {host for host in hosts if host.endswith(f":{server.port}")} and all(
            h.startswith("127.0.0.1:") for h in hosts
        )
    finally:
        asyncio.run(end(handles))
        server.stop()


def test_nothing_that_slips_into_the_page_runs(page: chromium.Page, tight: EngineService) -> None:
    """The content policy stops it, should the page ever put a name where it does not belong."""
    server = Running(tight)
    try:
        page.open(f"{server.url}/dashboard")
        for attempt in (
            "setTimeout('hacked=1')",
            "document.body.innerHTML += '<img src=x onerror=\"hacked=1\">'",
            "eval('hacked=1')",
            "document.body.append(Object.assign(document.createElement('script'), {text: 'hacked=1'}))",
            "document.body.setAttribute('onclick', 'hacked=1')",
        ):
            page.run(f"(() => {{ try {{ {attempt} }} catch (error) {{}} }})()")
        page.run("document.body.click()")
        assert page.run("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
        assert page.run("typeof hacked") == "undefined"
    finally:
        server.stop()


@pytest.mark.parametrize(("width", "height", "dark"), [(1280, 800, False), (1280, 800, True), (400, 800, False)])
def test_it_fits_the_window(page: chromium.Page, tight: EngineService, width: int, height: int, dark: bool) -> None:
    server = Running(tight)
    handles = asyncio.run(agents(tight, ["a_tool_with_a_rather_long_name_that_needs_cutting"] * 4))
    page.size(width, height, dark=dark)
    try:
        page.open(f"{server.url}/dashboard")
        page.until("document.querySelectorAll('#tree .block').length > 3")
        assert page.run("document.documentElement.scrollWidth") <= width, "nothing sticks out"
        if width > 1000:
            assert page.run("document.documentElement.scrollHeight") <= height, "everything at one look"
        ground, ink = page.run(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        assert (_light(ground) < 0.2 < 0.8 < _light(ink)) if dark else (_light(ink) < 0.2 < 0.8 < _light(ground))
        picture = page.picture()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    finally:
        page.size(1280, 800)
        asyncio.run(end(handles))
        server.stop()


def _light(colour: str) -> float:
    red, green, blue = (int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    return (red + green + blue) / 765


def test_the_key_is_asked_for_once_and_never_in_an_address(page: chromium.Page) -> None:
    server = Running(embedded_service(), api_keys=(KEY,), admin_keys=(ADMIN_KEY,))
    enter = "document.getElementById('key').value = '%s'; document.getElementById('key-form').requestSubmit()"
    try:
        page.open(f"{server.url}/dashboard")
        page.until("!document.getElementById('key-form').hidden")
        assert page.run("document.getElementById('notice').hidden")
        for wrong, words in (("sk-wrong-0123456789", "does not know this key"), (KEY, "needs an admin key")):
            page.run(enter % wrong)
            page.until(f"document.getElementById('notice').textContent.includes('{words}')")
            assert page.run("sessionStorage.length") == 0
        page.run(enter % ADMIN_KEY)
        page.until("!document.getElementById('board').hidden && document.getElementById('key-form').hidden")
        page.open(f"{server.url}/dashboard")
        page.until("!document.getElementById('board').hidden")
        assert ADMIN_KEY not in page.run("document.documentElement.outerHTML")
        mine = [request for request in page.requests() if f":{server.port}/" in request["url"]]
        assert mine and not any("sk-" in request["url"] for request in mine)
        assert any(request["headers"].get("authorization") == f"Bearer {ADMIN_KEY}" for request in mine)
        assert page.run("document.cookie + localStorage.length") == "0"
    finally:
        server.stop()


def test_it_comes_back_after_the_server_was_restarted(page: chromium.Page) -> None:
    first = EngineService.start(EngineConfig(num_threads=1, kv_tokens=1024))
    server = Running(first)
    asyncio.run(agents(first, ["before_the_end"]))
    page.open(f"{server.url}/dashboard")
    page.until("document.getElementById('tools').innerText.includes('before_the_end')")
    server.stop()
    first.close()
    page.until("document.getElementById('link').className === 'lost'")
    second = EngineService.start(EngineConfig(num_threads=1, kv_tokens=1024))
    server = Running(second, port=server.port)
    try:
        page.until("document.getElementById('link').className === 'live'")
        page.until("!document.getElementById('tools').innerText.includes('before_the_end')")
        assert page.run("document.querySelectorAll('#tree .block').length") == 0, "another engine's past is not shown"
    finally:
        server.stop()
        second.close()
