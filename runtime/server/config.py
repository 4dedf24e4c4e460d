"""The server's configuration: one frozen dataclass, validated once. It owns every default; see ``settings`` for where
values come from."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from caesura.runtime.config import EngineConfig
from caesura.runtime.errors import InvalidRequest
from caesura.runtime.logs import FORMATS, LEVELS

METRICS_COMPAT = ("none", "vllm")
_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_COUNTS = {
    "max_requests": 1 << 20,
    "max_connections": 1 << 20,
    "max_kept_contexts": 1 << 20,
    "max_contexts_per_key": 1 << 20,
    "default_max_tokens": 1 << 20,
}
_TIMES = (
    "tool_wait_s", "context_ttl_s", "request_deadline_s", "send_deadline_s", "header_deadline_s", "body_deadline_s",
    "drain_s",
)  # fmt: skip
MAX_TIME_S = 1e9


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What a server is made from.

    ``api_keys`` and ``admin_keys`` are secrets in clear (hashed at once); ``key_file`` holds one ``name:key`` or
    ``name:key:admin`` a line and may change while the server runs. Without any admin key every key may do everything.
    ``in_process`` keeps the engine in this process instead of one of its own.
    ``allowed_hosts`` and ``allowed_origins`` are accepted beside the loopback names when bound to loopback.
    ``cors_origins`` are web pages whose scripts may read answers (``*``: all, for servers with keys alone).
    ``tool_wait_s`` is how long a context waits for its tool results before it is given up; ``context_ttl_s`` how
    long one made by ``POST /v1/contexts`` lives unused. A request's headers must arrive within ``header_deadline_s``,
    its body within ``body_deadline_s`` more. ``drain_s`` is the time that SIGTERM leaves to requests.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    host: str = "127.0.0.1"
    port: int = 30000
    model_name: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    key_file: Path | None = None
    insecure: bool = False
    in_process: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_requests: int = 256
    max_connections: int = 1024
    max_kept_contexts: int = 1024
    max_contexts_per_key: int = 256
    default_max_tokens: int = 8192
    tool_wait_s: float = 600.0
    context_ttl_s: float = 3600.0
    request_deadline_s: float = 3600.0
    send_deadline_s: float = 60.0
    header_deadline_s: float = 10.0
    body_deadline_s: float = 30.0
    drain_s: float = 30.0
    metrics_compat: str = "none"
    log_format: str = "text"
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InvalidRequest(f"port is {self.port}; it must lie between 0 and 65535")
        for name, limit in _COUNTS.items():
            if not 1 <= getattr(self, name) <= limit:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must lie between 1 and {limit}")
        for name in _TIMES:
            if not 0 < getattr(self, name) <= MAX_TIME_S:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must be above 0 and at most 10**9 seconds")
        for name, choices in (("metrics_compat", METRICS_COMPAT), ("log_format", FORMATS), ("log_level", LEVELS)):
            if getattr(self, name) not in choices:
                raise InvalidRequest(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        for name in ("api_keys", "admin_keys"):
            for key in getattr(self, name):
                if len(key) < 8 or not key.isascii() or any(char.isspace() for char in key):
                    raise InvalidRequest(f"{name} has a key that is not 8 or more ASCII characters without blanks")
        self._check_origins()

    def _check_origins(self) -> None:
        for origin in self.cors_origins:
            if origin == "*" and not self.has_keys:
                raise InvalidRequest("cors_origins is '*', which lets every web page in: set keys, or name the origins")
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise InvalidRequest(
                    f"cors_origins has {origin!r}; an origin reads https://name or http://name:port, in small letters"
                )

    @property
    def has_keys(self) -> bool:
        """Whether requests must bring a key."""
        return bool(self.api_keys or self.admin_keys or self.key_file)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    def check_exposure(self) -> None:
        """Raises InvalidRequest for a server that others could use without a key."""
        if not (self.is_loopback or self.has_keys or self.insecure):
            raise InvalidRequest(
                f"host is {self.host!r}, which other machines can reach, and there is no API key: "
                "set api_keys or key_file, listen on 127.0.0.1, or say insecure=True"
            )


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
