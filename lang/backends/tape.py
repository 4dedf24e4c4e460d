"""The file behind record, replay and durable runs: JSON lines that are only ever appended, whole or not at all.

A line is ``{"key", "what", "at", "value"}``: what was asked (as a digest, and in words), when, and the answer. Equal
questions are answered in the order in which they were recorded. A tool's answer names its ``call``, and what was asked
``within`` calls names them: with the tool's answer known, nobody will ask that again.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from caesura.lang.errors import NoRecording, ReplayError

BEGINNING = b'{"key": "'
ALWAYS = ("backend:", "model:", "turn:", "results:")  # facts: answered as often as they are asked for


_CALLS: ContextVar[tuple[str, ...]] = ContextVar("caesura_calls", default=())  # tools at work, the outermost first


def key(kind: str, *parts: Any) -> str:
    """A question's digest."""
    return kind + ":" + hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()


class ContextKeys:
    """Digests of questions about a context that grows: each is the `key` of path, whole text and parts, but what was
    read is not read again."""

    def __init__(self, path: str) -> None:
        self._hash = hashlib.sha256(f'[{json.dumps(path)}, "'.encode())

    def add(self, text: str) -> None:
        """More of the context."""
        self._hash.update(json.dumps(text)[1:-1].encode())

    def key(self, kind: str, *parts: Any) -> str:
        """The digest of a question that stands here."""
        whole = self._hash.copy()
        told = "".join(", " + json.dumps(part, sort_keys=True, default=list) for part in parts)
        whole.update(f'"{told}]'.encode())
        return f"{kind}:{whole.hexdigest()}"


class Tape:
    """Recorded answers, and the file that new ones are appended to (none for a replay, nor once it is closed)."""

    def __init__(self, entries: list[dict[str, Any]], fd: int | None, path: Path, *, is_torn: bool = False) -> None:
        self.path = path
        self._is_torn = is_torn
        self._answers: defaultdict[str, deque[dict[str, Any]]] = defaultdict(deque)
        entries = _still_asked(entries)
        for entry in entries:
            self._answers[entry["key"]].append(entry)
        self._fd = fd
        self.num_left = sum(not entry["key"].startswith(ALWAYS) for entry in entries)

    @staticmethod
    def read(path: Path) -> Tape:
        """A recording to replay. Raises ReplayError when the file is none."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise NoRecording(f"{path} cannot be read: {error.strerror}") from None
        entries, size = _entries(data, path)
        is_torn = size < len(data)
        if is_torn and not entries:
            raise NoRecording(f"{path} is no recording: its only line is torn")
        return Tape(entries, None, path, is_torn=is_torn)

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

    def take(self, asked: str, read: Callable[[Any], Any] = lambda value: value) -> Any:
        """The recorded answer as ``read`` makes it, None when there is none (left). An answer itself is never None.
        Raises NoRecording when ``read`` cannot make anything of it."""
        answers = self._answers.get(asked)
        if not answers:
            return None
        entry = answers[0]
        if not asked.startswith(ALWAYS):
            self.num_left -= 1
            answers.popleft()
        try:
            return read(entry["value"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            wrong = f"it has no field {error}" if isinstance(error, KeyError) else str(error)
            where = f"{self.path}, line {entry.get('line', '?')} ({entry.get('what', asked)})"
            raise NoRecording(f"{where}: damaged, or of another version: {wrong}") from None

    @staticmethod
    @contextmanager
    def calling() -> Iterator[str]:
        """A call is going on: what is written meanwhile, by it, is marked so. Gives its name, for its own answer."""
        call = secrets.token_hex(8)
        token = _CALLS.set((*_CALLS.get(), call))
        try:
            yield call
        finally:
            _CALLS.reset(token)

    def write(self, asked: str, what: str, value: Any, call: str | None = None) -> None:
        """Append an answer, of a tool that of its ``call``. Raises NoRecording where that fails, and when the file was
        closed."""
        entry = {"key": asked, "what": what, "at": round(time.time(), 6), "value": value}
        entry |= {"within": list(_CALLS.get())} if _CALLS.get() else {}
        entry |= {"call": call} if call is not None else {}
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        try:
            _append(self._open_fd(what), line)
        except OSError as error:
            raise self._unwritten(what, error) from None
        if asked.startswith(ALWAYS):
            self._answers[asked].append(entry)

    async def sync(self, what: str) -> None:
        """Put everything written on the disk: for ``what`` must not be done a second time."""
        try:
            await asyncio.to_thread(os.fsync, self._open_fd(what))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot sync
                raise self._unwritten(what, error) from None

    def _open_fd(self, what: str) -> int:
        if self._fd is None:
            told = "wait for the program, with state.sync(), before the backend is closed"
            raise NoRecording(f"{self.path} is closed: {told}; what it lacks: {what}")
        return self._fd

    def _unwritten(self, what: str, error: OSError) -> NoRecording:
        return NoRecording(f"{self.path} cannot be written: {error.strerror}; what it lacks: {what}")

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
        if self._is_torn:
            return ReplayError(f"{self.path} ends in a torn line: it has no (further) {what}{instead}")
        return ReplayError(f"the program has changed since the recording: it has no (further) {what}{instead}")

    def close(self) -> None:
        """Give the file free. May be called twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _still_asked(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All but what programs of a tool asked in the course of a call whose own answer is there."""
    answered = {entry["call"] for entry in entries if "call" in entry}
    return [
        entry for entry in entries if entry["key"].startswith(ALWAYS) or not answered & set(entry.get("within", ()))
    ]


def _append(fd: int, line: bytes) -> None:
    """All of the line or none of it: a disk that is full takes a part."""
    size = os.fstat(fd).st_size
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[os.write(fd, rest) :]
    except OSError:
        os.ftruncate(fd, size)
        raise


def _entries(data: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines, and the bytes they take; a last line that is torn is left out."""
    entries: list[dict[str, Any]] = []
    *lines, torn = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("key"), str) or entry.get("value") is None:
                raise ValueError("it has no key or no value")
        except ValueError as error:
            raise NoRecording(f"{path} is no recording: line {number}: {error}") from None
        entries.append({**entry, "line": number})
    if not entries:  # what is torn is about to be cut off
        _check_beginning(torn[: len(BEGINNING)], path)
    return entries, len(data) - len(torn)


def _check_beginning(data: bytes, path: Path) -> None:
    if not BEGINNING.startswith(data):
        raise NoRecording(f"{path} is no recording: it does not begin as one")
