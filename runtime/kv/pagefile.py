"""The file below the host tier: pages of one engine, checked as they come back, gone with the process.

The file has no name (or loses it at once), so nobody else opens it and nothing survives the engine. It is read and
written by calls, not mapped: where a mapping meets a full or broken disk the process is killed, a call says so.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from pathlib import Path

from caesura.runtime.errors import InvalidRequest


class BadPage(OSError):
    """A page came back other than it was written."""


class PageFile:
    """``num_pages`` pages of ``page_bytes`` each, reserved on the disk at once. One thread reads and writes."""

    def __init__(self, folder: Path, num_pages: int, page_bytes: int) -> None:
        """Raises InvalidRequest when ``folder`` cannot hold the file."""
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        size_bytes = num_pages * page_bytes
        try:
            # mode 0600, and without a name (or unlinked) before this returns
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise InvalidRequest(
                f"kv_disk is {str(folder)!r}; it must be a writable folder: {error.strerror}"
            ) from None
        try:
            os.posix_fallocate(self._file.fileno(), 0, max(1, size_bytes))
        except OSError as error:
            self._file.close()
            raise InvalidRequest(
                f"kv_disk {str(folder)!r} has no room for {size_bytes} bytes ({error.strerror}): lower kv_disk_tokens "
                "or take another folder"
            ) from None
        self._sums: list[int | None] = [None] * num_pages

    def write(self, first: int, data: memoryview) -> None:
        """Put whole pages (``data`` is bytes, contiguous) at ``first`` and note their checksums. Raises OSError."""
        size = self.page_bytes
        count = len(data) // size
        self._sums[first : first + count] = [None] * count  # a write that breaks off leaves no page behind
        sums: list[int | None] = [zlib.crc32(data[at * size : (at + 1) * size]) for at in range(count)]
        offset, left = first * size, data
        while left:
            written = os.pwrite(self._file.fileno(), left, offset)
            offset, left = offset + written, left[written:]
        self._sums[first : first + count] = sums

    def read(self, first: int, into: memoryview) -> None:
        """Fill ``into`` with whole pages from ``first``. Raises BadPage for one that has changed, OSError."""
        size = self.page_bytes
        offset, left = first * size, into
        while left:
            got = os.preadv(self._file.fileno(), [left], offset)
            if not got:
                raise BadPage(f"the file ends at byte {offset}, within a page")
            offset, left = offset + got, left[got:]
        for at in range(len(into) // size):
            if zlib.crc32(into[at * size : (at + 1) * size]) != self._sums[first + at]:
                raise BadPage(f"page {first + at} has changed on the disk")

    def close(self) -> None:
        """Give the space back. May be called twice."""
        self._file.close()
