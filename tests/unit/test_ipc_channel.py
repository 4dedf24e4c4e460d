"""The stream between server and engine: exactly once and in order over a bad line, and deaf to strangers."""

from __future__ import annotations

import random

import msgspec
import pytest
from caesura.runtime.ipc.channel import MAX_ASKS, TAG_BYTES, Channel, LinkBroken
from caesura.runtime.ipc.messages import MAX_FRAME_BYTES, MAX_MESSAGE_BYTES

KEY = bytes(range(32))


def pair() -> tuple[Channel[int], Channel[int]]:
    one: Channel[int] = Channel(KEY, sends="there", receives="back", inbound=int)
    other: Channel[int] = Channel(KEY, sends="back", receives="there", inbound=int)
    return one, other


def encoded(*numbers: int) -> list[bytes]:
    return [msgspec.msgpack.encode(number) for number in numbers]


def settle(one: Channel[int], other: Channel[int], to_one: list[bytes], to_other: list[bytes]) -> list[int]:
    """Deliver until nobody has anything to say; returns what ``other`` heard."""
    heard: list[int] = []
    while to_one or to_other:
        for frame in to_other:
            received = other.take(frame)
            heard += received.messages
            to_one = to_one + received.replies
        to_other = []
        for frame in to_one:
            to_other += one.take(frame).replies
        to_one = []
    return heard


def test_messages_arrive_in_order_and_are_forgotten_once_acknowledged() -> None:
    one, other = pair()
    heard = []
    for start in range(0, 3000, 3):
        for frame in one.pack(encoded(start, start + 1, start + 2)):
            received = other.take(frame)
            heard += received.messages
            for reply in received.replies:
                one.take(reply)
    one.take(other.note())
    assert heard == list(range(3000))
    assert one._unacked_bytes == 0
    assert not one._unacked


@pytest.mark.parametrize("seed", range(40))
def test_lost_repeated_and_reordered_frames_change_nothing(seed: int) -> None:
    draw = random.Random(seed)
    one, other = pair()
    heard: list[int] = []
    line: list[bytes] = []
    for number in range(300):
        line += one.pack(encoded(number))
        if draw.random() < 0.3 and line:
            draw.shuffle(line)
            arrived = [frame for frame in line for _ in range(draw.choice([0, 1, 1, 1, 2]))]
            line = []
            for frame in arrived:
                received = other.take(frame)
                heard += received.messages
                for reply in received.replies:
                    if draw.random() < 0.7:
                        line += one.take(reply).replies
    for _ in range(3):
        heard += settle(one, other, [], [*line, one.note()])
        line = []
    assert heard == list(range(300))
    assert other.counts.gaps > 0
    assert one.counts.resent > 0


def test_a_lost_last_frame_shows_with_the_next_note() -> None:
    one, other = pair()
    one.pack(encoded(1))
    assert settle(one, other, [], [one.note()]) == [1]


def test_many_frames_behind_a_gap_ask_once() -> None:
    one, other = pair()
    _lost, *rest = [frame for number in range(500) for frame in one.pack(encoded(number))]
    replies = [reply for frame in rest for reply in other.take(frame).replies]
    assert len(replies) == 1
    assert settle(one, other, replies, []) == list(range(500))


def test_a_gap_that_never_closes_breaks_the_link() -> None:
    one, other = pair()
    one.pack(encoded(1))
    with pytest.raises(LinkBroken, match="frame 1 does not arrive"):
        for _ in range(MAX_ASKS + 2):
            other.take(one.note())


def test_a_hundred_thousand_random_or_damaged_frames_are_dropped_and_counted() -> None:
    draw = random.Random(3)
    one, other = pair()
    whole = one.pack(encoded(*range(50)))[0]
    for number in range(100_000):
        if number % 2:
            frame = draw.randbytes(draw.randrange(120))
        else:
            damaged = bytearray(whole)
            damaged[draw.randrange(len(whole))] ^= draw.randrange(1, 256)
            frame = bytes(damaged)
        received = other.take(frame)
        assert not received.authentic
        assert not received.messages
        assert not received.replies
    assert other.counts.unauthentic == 100_000
    assert other.take(whole).messages == list(range(50))


def test_a_frame_played_back_to_its_sender_is_a_strangers() -> None:
    one, _ = pair()
    (frame,) = one.pack(encoded(1))
    assert not one.take(frame).authentic


def test_another_key_is_a_stranger() -> None:
    one, _ = pair()
    foreign: Channel[int] = Channel(bytes(32), sends="back", receives="there", inbound=int)
    assert not foreign.take(one.pack(encoded(1))[0]).authentic


def sealed(body: bytes) -> bytes:
    one, _ = pair()
    return one._tag(b"there", body) + body


def test_authentic_nonsense_is_counted_or_breaks_the_link() -> None:
    _, other = pair()
    for body in (b"", b"\xc1", msgspec.msgpack.encode("no envelope"), b"\x91" * 50_000, b"\xa1\xff"):
        assert other.take(sealed(body)).messages == []
    assert other.counts.malformed == 5
    with pytest.raises(LinkBroken, match="could not be read"):
        other.take(sealed(msgspec.msgpack.encode([1, 1, 0, 0, ["no number"]])))
    with pytest.raises(LinkBroken, match="protocol 2"):
        other.take(sealed(msgspec.msgpack.encode([2, 1, 0, 0, [1]])))


def test_frames_stay_under_the_limit() -> None:
    one, _ = pair()
    big = bytes(MAX_MESSAGE_BYTES)
    frames = one.pack([big, b"\x01", big, *[bytes(1 << 20)] * 40])
    assert max(map(len, frames)) <= MAX_FRAME_BYTES + TAG_BYTES
