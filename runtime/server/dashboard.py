"""``/dashboard``: one page that draws the running engine, and ``/v1/dashboard/state``, which tells it what to draw.

The page is put together when the server starts, from the files in ``static``: one document that loads nothing else. Its
policy names the hashes of its own scripts and style, so nothing that could slip into it runs. The page itself holds no
data and needs no key; what it shows does, and the page asks for the key once.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections import deque
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from typing import Any, TypeVar

from caesura.runtime.history import (
    KEPT_DECISIONS,
    KEPT_SAMPLES,
    KEPT_SPANS,
    PastDecision,
    PastSpan,
    PoolSample,
)
from caesura.runtime.server.errors import ApiError
from caesura.runtime.server.http import reply
from caesura.runtime.server.info import package_version
from caesura.runtime.server.state import ServerState, engine_answers
from caesura.runtime.snapshot import EngineSnapshot
from starlette.requests import Request
from starlette.responses import Response

REFRESH_S = 0.5
SNAPSHOT_DEADLINE_S = 5.0
SCRIPTS = ("draw.js", "tree.js", "time.js", "lists.js", "main.js")
E = TypeVar("E", PastSpan, PastDecision, PoolSample)


class Feed:
    """The latest picture and the events before it. However many look on, the engine is asked every ``REFRESH_S``."""

    def __init__(self, state: ServerState) -> None:
        self._service = state.service
        self._lock = asyncio.Lock()
        self._read_at = float("-inf")
        self._picture: EngineSnapshot | None = None
        self._spans: deque[PastSpan] = deque(maxlen=KEPT_SPANS)
        self._decisions: deque[PastDecision] = deque(maxlen=KEPT_DECISIONS)
        self._samples: deque[PoolSample] = deque(maxlen=KEPT_SAMPLES)

    async def picture(self, life: str, since: int) -> EngineSnapshot:
        """The engine as of now, with what happened after event ``since`` of the life ``life``: all of it for another
        one. Raises EngineStopped when the engine does not answer."""
        async with self._lock:
            if self._picture is None or time.monotonic() - self._read_at >= REFRESH_S:
                self._picture = await self._refresh(self._picture)
                self._read_at = time.monotonic()
            picture = self._picture
        known = since if life == picture.life else 0
        return replace(
            picture,
            spans=_newer(self._spans, known),
            decisions=_newer(self._decisions, known),
            samples=_newer(self._samples, known),
        )

    async def _refresh(self, before: EngineSnapshot | None) -> EngineSnapshot:
        async with engine_answers(SNAPSHOT_DEADLINE_S):
            picture = await self._service.read_snapshot(before.cursor if before is not None else 0)
            if before is not None and picture.life != before.life:
                picture = await self._service.read_snapshot(0)
        if before is None or picture.life != before.life:
            for ring in (self._spans, self._decisions, self._samples):
                ring.clear()
        self._spans.extend(picture.spans)
        self._decisions.extend(picture.decisions)
        self._samples.extend(picture.samples)
        return picture


def _newer(ring: deque[E], since: int) -> tuple[E, ...]:
    return tuple(event for event in ring if event.number > since)


class Dashboard:
    """The two routes."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._feed = Feed(state)

    async def page(self, _: Request) -> Response:
        """The page: static, public, without any data."""
        body, headers = assembled()
        return Response(body, media_type="text/html", headers=headers)

    async def state(self, request: Request) -> Response:
        """The engine as it is, and what happened after the event ``since`` of the engine ``life``."""
        since, life = request.query_params.get("since", "0"), request.query_params.get("life", "")
        if not (since.isascii() and since.isdigit() and len(since) <= 15):
            raise ApiError(
                400, "since must be the cursor of an earlier answer: a number from 0 to 10**15", param="since"
            )
        picture = await self._feed.picture(life, int(since))
        answer = reply({"server": self._server(), "engine": picture})
        answer.headers["cache-control"] = "no-store"
        return answer

    def _server(self) -> dict[str, Any]:
        state = self._state
        return {
            "model": state.model_name,
            "version": package_version(),
            "uptime_s": time.time() - state.started_at,
            "requests": len(state.board),
            "kept_contexts": len(state.kept),
            "draining": state.draining,
        }


@lru_cache(maxsize=1)
def assembled() -> tuple[bytes, dict[str, str]]:
    """The page as one document, and the headers that go with it."""
    folder = files(__package__) / "static"
    style = (folder / "dashboard.css").read_text(encoding="utf-8")
    scripts = [(folder / name).read_text(encoding="utf-8") for name in SCRIPTS]
    for text in (style, *scripts):
        if re.search(r"</(style|script)", text, re.IGNORECASE):
            raise ValueError("a style or script of the dashboard holds its own closing mark")
    script = "".join(f"<script>{text}</script>" for text in scripts)
    page = (folder / "dashboard.html").read_text(encoding="utf-8")
    page = page.replace("<!-- style -->", f"<style>{style}</style>").replace("<!-- scripts -->", script)
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; connect-src 'self'; "
        f"img-src data:; style-src {_hash(style)}; script-src {' '.join(map(_hash, scripts))}; "
        "require-trusted-types-for 'script'"
    )
    return page.encode(), {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "x-frame-options": "DENY",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
