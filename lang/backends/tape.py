"""The file behind record, replay and durable runs: JSON lines that are only ever appended, whole or not at all.

A line is ``{"key", "what", "at", "value"}``: what was asked (as a digest, and in words), when, and the answer. Equal
questions are answered in the order in which they were recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from caesura.lang.errors import NoRecording, ReplayError

BEGINNING = b'{"key": "'
ALWAYS = ("backend:", "model:", "turn:", "results:")  # facts: answered as often as they are asked for


def key(kind: str, *parts: Any) -> str:
    """A question's digest."""
    return kind + ":" + hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()


class Tape:
    """Recorded answers, and the file that new ones are appended to (none for a replay)."""

    def __init__(self, entries: list[dict[str, Any]], fd: int | None, path: Path) -> None:
        self.path = path
        self._answers: defaultdict[str, deque[dict[str, Any]]] = defaultdict(deque)
        for entry in entries:
            self._answers[entry["key"]].append(entry)
        self._fd = fd
        self.num_left = sum(not entry["key"].startswith(ALWAYS) for entry in entries)

    @staticmethod
    def read(path: Path) -> Tape:
        """A recording to replay. Raises ReplayError when the file is none."""
        try:
            entries, _ = _entries(path.read_bytes(), path)
        except OSError as error:
            raise NoRecording(f"{path} cannot be read: {error.strerror}") from None
        return Tape(entries, None, path)

    @staticmethod
    def open(path: Path, *, anew: bool) -> Tape:
        """A recording to go on with, or (``anew``) to write over. A torn last line, which a crash can leave behind, is
        dropped. Raises ReplayError when it is none, or when another process is writing to it."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise NoRecording(f"{path} cannot be written: {error.strerror}") from None
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ReplayError(
                    f"{path} is being written to by another run; give each run a file of its own"
                ) from None
            entries: list[dict[str, Any]] = []
            size = 0
            if anew:
                _check_beginning(os.pread(fd, len(BEGINNING), 0), path)  # replaced is a recording, and no other file
            else:
                entries, size = _entries(path.read_bytes(), path)
            os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return Tape(entries, fd, path)

    def take(self, asked: str) -> Any:
        """The recorded answer, None when there is none (left). An answer itself is never None."""
        answers = self._answers.get(asked)
        if not answers:
            return None
        if asked.startswith(ALWAYS):
            return answers[0]["value"]
        self.num_left -= 1
        return answers.popleft()["value"]

    def write(self, asked: str, what: str, value: Any) -> None:
        """Append an answer."""
        entry = {"key": asked, "what": what, "at": round(time.time(), 6), "value": value}
        if asked.startswith(ALWAYS):
            self._answers[asked].append(entry)
        if self._fd is not None:
            os.write(self._fd, json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")

    async def sync(self) -> None:
        """Put everything written on the disk: for what must not be done a second time."""
        if self._fd is not None:
            with contextlib.suppress(OSError):  # a pipe or another file that cannot be synced
                await asyncio.to_thread(os.fsync, self._fd)

    def unused(self) -> list[str]:
        """Answers that nobody asked for, in words."""
        return [
            entry.get("what", asked)
            for asked, answers in self._answers.items()
            if not asked.startswith(ALWAYS)
            for entry in answers
        ]

    def missing(self, what: str) -> ReplayError:
        """The error for a question that the recording does not answer."""
        unused = self.unused()
        instead = f"; what it has and was not asked for: {', '.join(unused[:3])}" if unused else ""
        return ReplayError(f"the program has changed since the recording: it has no (further) {what}{instead}")

    def close(self) -> None:
        """Give the file free. May be called twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _entries(data: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines, and the bytes they take; a last line that is torn is left out."""
    entries: list[dict[str, Any]] = []
    *lines, torn = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry.get("key"), str) or "value" not in entry:
                raise ValueError("it has no key or no value")
        except (ValueError, AttributeError) as error:
            raise NoRecording(f"{path} is no recording: line {number}: {error}") from None
        entries.append(entry)
    if not entries:  # what is torn is about to be cut off
        _check_beginning(torn[: len(BEGINNING)], path)
    return entries, len(data) - len(torn)


def _check_beginning(data: bytes, path: Path) -> None:
    if not BEGINNING.startswith(data):
        raise NoRecording(f"{path} is no recording: it does not begin as one")
