"""Backends by address, for defaults, the command line and configuration files."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from caesura.lang.backend import Backend
from caesura.lang.errors import DefinitionError

if TYPE_CHECKING:
    from caesura.lang.backends.http import HTTPBackend
    from caesura.lang.backends.openai import OpenAIBackend
    from caesura.lang.backends.sglang import SGLangBackend

KINDS = ("caesura", "openai", "sglang")
_OPTIONS = {"caesura": (), "openai": ("model", "dialect"), "sglang": ("chat",)}
_connected: dict[str, Backend] = {}
_lock = threading.Lock()


def connect(address: str, api_key: str | None = None, **options: Any) -> HTTPBackend | OpenAIBackend | SGLangBackend:
    """The backend at an address: ``http://host:port`` for a Caesura server, ``openai+https://host/v1?model=NAME``,
    ``sglang+http://host:port``.

    Without ``api_key`` it is taken from the environment: CAESURA_API_KEY, OPENAI_API_KEY or SGLANG_API_KEY. Further
    options go to the backend. Raises DefinitionError for an address of another shape.
    """
    kind, url, found = split_address(address)
    key = api_key if api_key is not None else os.environ.get(f"{kind.upper()}_API_KEY") or None
    given: dict[str, Any] = {**found, **options}
    if kind == "openai":
        from caesura.lang.backends.openai import OpenAIBackend

        return OpenAIBackend(url, api_key=key, **given)
    if kind == "sglang":
        from caesura.lang.backends.sglang import SGLangBackend

        return SGLangBackend(url, key, **given)
    from caesura.lang.backends.http import HTTPBackend

    return HTTPBackend(url, key, **given)


def split_address(address: str) -> tuple[str, str, dict[str, str]]:
    """``(kind, url, options)`` of an address."""
    kind, plus, url = address.partition("+")
    if not plus or "/" in kind:
        kind, url = "caesura", address
    url, _, query = url.partition("?")
    options = dict(parse_qsl(query))
    shapes = "http://host:port, openai+https://host/v1?model=NAME or sglang+http://host:port"
    if kind not in KINDS or not url.startswith(("http://", "https://")):
        raise DefinitionError(f"the address is {address!r}; it must read {shapes}")
    unknown = sorted(set(options) - set(_OPTIONS[kind]))
    if unknown:
        raise DefinitionError(f"the address has the option {unknown[0]!r}; {kind} takes {_OPTIONS[kind] or 'none'}")
    return kind, url, options


def shared(address: str) -> Backend:
    """As `connect`, but the same backend, and so one connection pool, for the same address."""
    with _lock:
        if address not in _connected:
            _connected[address] = connect(address)
        return _connected[address]
