"""The server's configuration: one frozen dataclass, validated once."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from caesura.runtime.config import EngineConfig
from caesura.runtime.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What a server is made from.

    ``api_keys`` and ``admin_keys`` are secrets in clear (hashed at once); ``key_file`` holds one ``name:key`` or
    ``name:key:admin`` a line and may change while the server runs. Without any admin key every key may do everything.
    ``in_process`` keeps the engine in this process instead of one of its own.
    ``allowed_hosts`` and ``allowed_origins`` are accepted beside the loopback names when bound to loopback.
    ``tool_wait_s`` is how long a context waits for its tool results before it is given up; ``context_ttl_s`` how
    long one made by ``POST /v1/contexts`` lives unused. ``drain_s`` is the time that SIGTERM leaves to requests.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    host: str = "127.0.0.1"
    port: int = 30000
    model_name: str | None = None
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    key_file: Path | None = None
    insecure: bool = False
    in_process: bool = False
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_requests: int = 256
    max_kept_contexts: int = 1024
    max_contexts_per_key: int = 256
    default_max_tokens: int = 1024
    tool_wait_s: float = 600.0
    context_ttl_s: float = 3600.0
    request_deadline_s: float = 3600.0
    send_deadline_s: float = 60.0
    body_deadline_s: float = 30.0
    drain_s: float = 30.0
    metrics_compat: str = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InvalidRequest(f"port is {self.port}; it must lie between 0 and 65535")
        counts = ("max_requests", "max_kept_contexts", "max_contexts_per_key", "default_max_tokens")
        times = ("tool_wait_s", "context_ttl_s", "request_deadline_s", "send_deadline_s", "body_deadline_s", "drain_s")
        for name in (*counts, *times):
            if not 0 < getattr(self, name) <= 1e9:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must lie between 0 and 10**9")
        for key in (*self.api_keys, *self.admin_keys):
            if len(key) < 8 or not key.isascii() or any(char.isspace() for char in key):
                raise InvalidRequest("an API key must have at least 8 characters, all ASCII and none of them blank")

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
