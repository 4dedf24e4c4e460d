"""API keys: kept as SHA-256, compared in constant time, read again when their file changes."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from caesura.runtime.errors import InvalidRequest

RELOAD_INTERVAL_S = 1.0
MAX_KEY_CHARS = 1024


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. ``key_id`` is the beginning of the key's hash, "" on a server without keys."""

    key_id: str
    name: str = ""
    admin: bool = True


ANYONE = Principal("")


@dataclass(frozen=True, slots=True)
class _Entry:
    digest: bytes
    principal: Principal


class KeyRing:
    """The keys that open the server. Without keys and without a file everyone may come in."""

    def __init__(
        self,
        keys: Iterable[str] = (),
        admin_keys: Iterable[str] = (),
        file: Path | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fixed = [("", key, False) for key in keys] + [("", key, True) for key in admin_keys]
        self._file = file
        self._monotonic = monotonic
        self._checked_at = monotonic()
        self._stamp: tuple[int, int] | None = None
        self._entries = self._load()

    @property
    def is_open(self) -> bool:
        """No key is needed."""
        return not self._fixed and self._file is None

    def find(self, token: str | None) -> Principal | None:
        """The owner of a key; None for a wrong or missing one. Takes as long for either."""
        if self.is_open:
            return ANYONE
        self._reload_if_changed()
        digest = hashlib.sha256((token or "")[:MAX_KEY_CHARS].encode("utf-8", "replace")).digest()
        found: Principal | None = None
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry.principal
        return found if token else None

    def _reload_if_changed(self) -> None:
        now = self._monotonic()
        if self._file is None or now - self._checked_at < RELOAD_INTERVAL_S:
            return
        self._checked_at = now
        try:
            if self._stamp_of(self._file) != self._stamp:
                self._entries = self._load()
        except (OSError, InvalidRequest):
            return  # a file in the middle of being replaced, or a slip of its editor: the old keys stand

    def _load(self) -> list[_Entry]:
        rows = list(self._fixed)
        if self._file is not None:
            try:
                self._stamp = self._stamp_of(self._file)
                rows += _parse(self._file.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidRequest(f"the key file {self._file} cannot be read: {error}") from error
        any_admin = any(admin for _, _, admin in rows)
        entries = []
        for name, key, admin in rows:
            digest = hashlib.sha256(key.encode()).digest()
            key_id = digest.hex()[:16]
            entries.append(_Entry(digest, Principal(key_id, name or key_id[:8], admin or not any_admin)))
        return entries

    @staticmethod
    def _stamp_of(file: Path) -> tuple[int, int]:
        stat = file.stat()
        return stat.st_mtime_ns, stat.st_size


def _parse(text: str) -> list[tuple[str, str, bool]]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        parts = stripped.split(":")
        if len(parts) not in (2, 3) or len(parts[1]) < 8 or (len(parts) == 3 and parts[2] != "admin"):
            raise InvalidRequest(f"the key file's line {number} must read name:key or name:key:admin (key >= 8 chars)")
        if not parts[1].isascii() or any(char.isspace() for char in parts[1]):
            raise InvalidRequest(f"the key file's line {number} has a key that is not ASCII or has blanks in it")
        rows.append((parts[0], parts[1], len(parts) == 3))
    return rows
