"""Who may call what: every route in one table, by its raw path. What is not in it is refused."""

from __future__ import annotations

from enum import StrEnum


class Access(StrEnum):
    """What a route asks of its caller."""

    PUBLIC = "public"
    KEY = "key"
    ADMIN = "admin"


PUBLIC_PATHS = frozenset({b"/health", b"/ready", b"/version", b"/dashboard"})
ADMIN_PATHS = frozenset(
    {b"/flush_cache", b"/pause_generation", b"/continue_generation", b"/metrics", b"/v1/dashboard/state"}
)


def access_of(raw_path: bytes) -> Access:
    """Decided by the bytes on the wire: no decoding, no Host header, no routing. Deny by default."""
    if raw_path in PUBLIC_PATHS:
        return Access.PUBLIC
    if raw_path in ADMIN_PATHS:
        return Access.ADMIN
    return Access.KEY
