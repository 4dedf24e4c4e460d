"""Who may call what: every route in one table, by its path. What is not in it is refused."""

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


def access_of(path: bytes) -> Access:
    """Decided by the path alone: no Host header, no routing. Deny by default."""
    if path in PUBLIC_PATHS:
        return Access.PUBLIC
    if path in ADMIN_PATHS:
        return Access.ADMIN
    return Access.KEY


def strictest(*paths: bytes) -> Access:
    """What one request asks for under all spellings of its path: ``%6d`` is an ``m`` to whoever routes."""
    asked = {access_of(path) for path in paths}
    return next(access for access in (Access.ADMIN, Access.KEY, Access.PUBLIC) if access in asked)
