"""One end of a reliable, authenticated stream of messages over a transport that may drop, repeat or be written to by
strangers. Bytes in, messages out; no sockets, no clock.

A frame is a 16-byte keyed tag and a msgpack envelope. Messages are numbered per direction. The receiver takes frames in
order and says so in its own frames (``ack``); at a gap it asks for the missing ones (``resend_from``), and the sender
keeps every frame until it is acknowledged. Frames without messages carry only these numbers.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import msgspec
from caesura.runtime.errors import CaesuraError
from caesura.runtime.ipc.messages import MAX_FRAME_BYTES, PROTOCOL, UNREADABLE

KEY_BYTES = 32
TAG_BYTES = 16
ACK_EVERY_FRAMES = 32
MAX_UNACKED_BYTES = 256 << 20
MAX_ASKS = 16

M = TypeVar("M")


class LinkBroken(CaesuraError):
    """The two processes cannot understand each other any more; the message says why."""


class _Sent(msgspec.Struct, frozen=True, array_like=True):
    """The envelope as it is written: messages are encoded already."""

    protocol: int
    number: int
    ack: int
    resend_from: int
    messages: list[msgspec.Raw]


class _Header(msgspec.Struct, frozen=True, array_like=True):
    """The envelope as it is read first: the numbers, before anything is made of the messages."""

    protocol: int
    number: int
    ack: int
    resend_from: int
    messages: msgspec.Raw


@dataclass(slots=True)
class ChannelCounts:
    """What was dropped and why, since the channel was made."""

    frames: int = 0
    unauthentic: int = 0  # random, damaged, or from someone without the key
    malformed: int = 0  # authentic, but no message we know
    repeated: int = 0
    gaps: int = 0
    resent: int = 0


@dataclass(slots=True)
class Received(Generic[M]):
    """What a frame led to: messages to handle, frames to send at once."""

    messages: list[M] = field(default_factory=list)
    replies: list[bytes] = field(default_factory=list)
    authentic: bool = True


class Channel(Generic[M]):
    """One end. ``sends`` and ``receives`` name the two directions, so that no frame can be played back to its sender.

    ``inbound`` is the union of messages that may arrive.
    """

    def __init__(self, key: bytes, *, sends: str, receives: str, inbound: object) -> None:
        self.counts = ChannelCounts()
        self._key = key
        self._sends = sends.encode()
        self._receives = receives.encode()
        self._decoder = msgspec.msgpack.Decoder(list[inbound])  # type: ignore[valid-type]
        self._encoder = msgspec.msgpack.Encoder()
        self._headers = msgspec.msgpack.Decoder(_Header)
        self._number = 0  # of the last frame sent
        self._taken = 0  # of the last frame received in order
        self._acked = 0  # of the last frame the other end was told it arrived
        self._unacked: deque[tuple[int, bytes]] = deque()
        self._unacked_bytes = 0
        self._asked_for = 0
        self._asks = 0

    # -- sending ----------------------------------------------------------------------------------------------

    @property
    def room_bytes(self) -> int:
        """Of messages that may be packed now. Half of what may stay unacknowledged: frames are larger than these."""
        return MAX_UNACKED_BYTES // 2 - self._unacked_bytes

    def pack(self, messages: list[bytes]) -> list[bytes]:
        """Frames that carry these encoded messages, kept until they are acknowledged."""
        frames: list[bytes] = []
        batch: list[bytes] = []
        size_bytes = 0
        for message in messages:
            if batch and size_bytes + len(message) > MAX_FRAME_BYTES // 2:
                frames.append(self._numbered(batch))
                batch, size_bytes = [], 0
            batch.append(message)
            size_bytes += len(message)
        if batch:
            frames.append(self._numbered(batch))
        return frames

    def _numbered(self, messages: list[bytes]) -> bytes:
        self._number += 1
        frame = self._seal(0, messages)
        self._unacked.append((self._number, frame))
        self._unacked_bytes += len(frame)
        if self._unacked_bytes > MAX_UNACKED_BYTES:
            raise LinkBroken(f"{self._unacked_bytes} bytes were sent and not acknowledged; the other end hangs")
        return frame

    def note(self) -> bytes:
        """A frame without messages: what arrived, and how far this end has sent (which reveals a lost last frame)."""
        return self._seal(0, [])

    def _seal(self, resend_from: int, messages: list[bytes]) -> bytes:
        self._acked = self._taken
        envelope = _Sent(PROTOCOL, self._number, self._taken, resend_from, [msgspec.Raw(m) for m in messages])
        body = self._encoder.encode(envelope)
        return self._tag(self._sends, body) + body

    def _tag(self, direction: bytes, body: bytes | memoryview) -> bytes:
        return hashlib.blake2b(body, key=self._key, digest_size=TAG_BYTES, person=direction).digest()

    # -- receiving --------------------------------------------------------------------------------------------

    def take(self, frame: bytes) -> Received[M]:
        """Check one frame. Never raises for what a stranger can send; LinkBroken when the two ends cannot agree."""
        self.counts.frames += 1
        body = memoryview(frame)[TAG_BYTES:]
        if not hmac.compare_digest(bytes(frame[:TAG_BYTES]), self._tag(self._receives, body)):
            self.counts.unauthentic += 1
            return Received(authentic=False)
        try:
            header = self._headers.decode(body)
        except UNREADABLE:
            self.counts.malformed += 1
            return Received()
        if header.protocol != PROTOCOL:
            raise LinkBroken(f"the other process speaks protocol {header.protocol}, this one {PROTOCOL}: restart both")
        received: Received[M] = Received(replies=self._acknowledged(header))
        empty = bytes(header.messages) == b"\x90"
        if empty:
            if header.number > self._taken:
                self._gap(received, again=True)
        elif header.number <= self._taken:
            self.counts.repeated += 1
        elif header.number > self._taken + 1:
            self._gap(received, again=False)
        else:
            self._in_order(header, received)
        return received

    def _acknowledged(self, header: _Header) -> list[bytes]:
        while self._unacked and self._unacked[0][0] <= header.ack:
            self._unacked_bytes -= len(self._unacked.popleft()[1])
        if not header.resend_from:
            return []
        again = [frame for number, frame in self._unacked if number >= header.resend_from]
        self.counts.resent += len(again)
        return again

    def _in_order(self, header: _Header, received: Received[M]) -> None:
        try:
            received.messages = self._decoder.decode(header.messages)
        except UNREADABLE as error:
            # The other end holds the key and yet sends this: a bug or a version skew, which a resend will not mend.
            self.counts.malformed += 1
            raise LinkBroken(f"a frame could not be read: {error}") from error
        self._taken = header.number
        if self._taken - self._acked >= ACK_EVERY_FRAMES:
            received.replies.append(self.note())

    def _gap(self, received: Received[M], *, again: bool) -> None:
        """Ask for what is missing: at the first frame that shows it, then with every note, but not for ever.

        Frames behind a gap are many, and each answer is all of them; notes are few.
        """
        self.counts.gaps += 1
        wanted = self._taken + 1
        if wanted != self._asked_for:
            self._asked_for, self._asks = wanted, 0
        elif not again:
            return
        self._asks += 1
        if self._asks > MAX_ASKS:
            raise LinkBroken(f"frame {wanted} does not arrive, though it was asked for {MAX_ASKS} times")
        received.replies.append(self._seal(wanted, []))
