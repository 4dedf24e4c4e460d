"""``caesura top``: a running server on a terminal, asked once a second. What it shows is what ``/dashboard`` draws."""

from __future__ import annotations

import http.client
import json
import ssl
import sys
import time
from typing import Any
from urllib.parse import urlencode, urlsplit

from caesura.lang.cli.output import NO_ENGINE, USAGE, CliError, print_json

INTERVAL_S = 1.0
TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 64 << 20


class Lost(Exception):
    """The server does not answer now; it may again."""


class StateSource:
    """Asks a server for its state. The key goes in a header and nowhere else; redirects are not followed."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.username:
            raise CliError(
                f"{url!r} is no server's address; it looks like http://127.0.0.1:30000", "caesura top --help", USAGE
            )
        if key is not None and not (key.isascii() and key.isprintable()):
            raise CliError("the key must be printable ASCII", "caesura top --help", USAGE)
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._https = parts.scheme == "https"
        self._host, self._port = parts.hostname, port
        self._headers = {"accept": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._has_key = key is not None
        self._life, self._cursor = "", 0
        self.samples: list[dict[str, Any]] = []
        self.decisions: list[dict[str, Any]] = []

    def read(self) -> dict[str, Any]:
        """The state, with ``samples`` and ``decisions`` since this source was made. Raises Lost, CliError."""
        query = urlencode({"life": self._life, "since": self._cursor})
        status, body = self._get(f"/v1/dashboard/state?{query}")
        if status in (401, 403):
            raise self._refused(status)
        if status == 404:
            raise CliError(f"{self.url} is no Caesura server, or an old one", "caesura serve", USAGE)
        if status != 200:
            busy = "the engine is restarting" if status == 503 else f"it answers {status}"
            raise Lost(f"{self.url}: {busy}")
        try:
            answer: dict[str, Any] = json.loads(body)
            self._take(answer["engine"])
        except (ValueError, KeyError, TypeError) as error:
            raise CliError(f"{self.url} answers what is no state of an engine: {error!r}", "caesura serve") from None
        return answer

    def _get(self, path: str) -> tuple[int, bytes]:
        connection: http.client.HTTPConnection
        if self._https:
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT_S, context=context)
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
        try:
            connection.request("GET", path, headers=self._headers)
            answer = connection.getresponse()
            return answer.status, answer.read(MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise Lost(f"{self.url} does not answer: {error or type(error).__name__}") from None
        finally:
            connection.close()

    def _refused(self, status: int) -> CliError:
        if status == 403:
            return CliError(f"{self.url}: this key may not look; an admin key may", "caesura top --key KEY", USAGE)
        what = "does not know this key" if self._has_key else "asks for a key"
        return CliError(f"{self.url} {what}", "caesura top --key KEY (or CAESURA_API_KEY=KEY caesura top)", USAGE)

    def _take(self, engine: dict[str, Any]) -> None:
        if engine["life"] != self._life:
            self.samples, self.decisions = [], []
        self._life, self._cursor = engine["life"], engine["cursor"]
        self.samples = (self.samples + engine["samples"])[-120:]
        self.decisions = (self.decisions + [entry["decision"] for entry in engine["decisions"]])[-64:]


def top_command(*, url: str, key: str | None, once: bool, as_json: bool) -> None:
    """Show the server until interrupted; once, when that is asked for or standard output is no terminal."""
    source = StateSource(url, key)
    try:
        state = source.read()
    except Lost as error:
        raise CliError(str(error), "caesura serve, or caesura top --url URL", NO_ENGINE) from None
    if as_json:
        print_json(state)
        return
    from caesura.lang.cli.output import stdout
    from caesura.lang.cli.top_view import top_view

    console = stdout()
    if once or not sys.stdout.isatty():
        console.print(top_view(source, state, None))
        return
    _live(console, source, state)


def _live(console: Any, source: StateSource, state: dict[str, Any]) -> None:
    from caesura.lang.cli.top_view import top_view
    from rich.live import Live

    lost: str | None = None
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(top_view(source, state, lost, height=console.height), refresh=True)
                time.sleep(INTERVAL_S)
                try:
                    state, lost = source.read(), None
                except Lost as error:
                    lost = str(error)
    except KeyboardInterrupt:
        return
