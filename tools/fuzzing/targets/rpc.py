"""The frames of calls and the values in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from random import Random
from typing import Any, Final

from fuzzing import draw
from fuzzing.engine import Target
from lattica.errors import RemoteProtocolError
from lattica.protocols import MAX_FRAME_BYTES
from lattica.rpc import call, codec
from lattica.rpc.framing import SKIPPED, Body, FrameReader, frame, size_of

_ASK_FROM: Final = 150  # bytes of a frame; larger ones wait for a word


def _join(parts: list[codec.Part]) -> bytes:
    return b"".join(parts)


# Frames


def _valid_frames(random: Random) -> bytes:
    sizes = (1, 5, 127, 128, 200, 3000)
    bodies = [
        (random.randbytes(random.choice(sizes)), random.randbytes(random.choice((0, 0, *sizes))))
        for _ in range(random.randrange(1, 4))
    ]
    return b"".join(_join(frame([array, section] if section else [array])) for array, section in bodies)


def _run_frames(data: bytes) -> bool:
    """However the bytes come, the same frames come out, and they are spelled in one way only.

    Once as a whole; once cut, by `feed` or into the reader's own buffer, where large frames are admitted or skipped.
    """
    whole = FrameReader()
    whole.feed(data)
    bodies: list[Body] = []
    failed = _drain(whole, bodies)
    written = b"".join(
        _join(frame([array, section] if len(section) else [array])) for array, section in bodies
    )
    assert data.startswith(written)

    reader = FrameReader(ask_from=_ASK_FROM)
    skips = bool(len(data) & 1)
    found: list[Body] = []
    for piece in draw.cuts(data):
        while piece and not reader.is_failed:
            room = reader.buffer()
            if room is None:
                reader.feed(piece)
                piece = b""
            else:
                assert reader.unread == 0
                size = min(len(room), len(piece))
                room[:size] = piece[:size]
                reader.received(size)
                piece = piece[size:]
            assert _drain(reader, found, skips=skips) == reader.is_failed
            assert 0 <= reader.missing <= reader.announced <= MAX_FRAME_BYTES
            assert 0 <= reader.unread <= len(data)
    assert (reader.is_failed, reader.is_between_frames) == (failed, whole.is_between_frames)
    if skips:
        bodies = [
            (body[0][:2] + body[0][2:][-1:], SKIPPED) if size_of(body) > _ASK_FROM else body
            for body in bodies
        ]
    assert found == bodies
    return reader.is_between_frames


def _drain(reader: FrameReader, bodies: list[Body], *, skips: bool = False) -> bool:
    """Take all frames that are here; whether what follows is none."""
    while True:
        try:
            body = reader.next()
        except RemoteProtocolError:
            return True
        if body is not None:
            bodies.append(body)
        elif reader.asks:
            (reader.skip if skips else reader.admit)()
        else:
            return False


# Values: 2 bytes with the section's length, the section, the array


def _valid_values(random: Random) -> bytes:
    while True:
        array, *section = codec.encode([draw.value(random) for _ in range(random.randrange(1, 4))])
        joined = _join(section)
        if len(joined) < 1 << 16:
            return len(joined).to_bytes(2, "big") + joined + bytes(array)


def _valid_tensors(random: Random) -> bytes:
    array, *section = codec.encode([draw.tensor(random) for _ in range(random.randrange(1, 6))])
    joined = _join(section)
    return len(joined).to_bytes(2, "big") + joined + bytes(array)


def _valid_large_values(random: Random) -> bytes:
    """Arrays above the length from which the codec looks at all heads before msgpack does."""
    if random.random() < 0.03:
        filling: list[Any] = [random.getrandbits(random.choice((3, 7, 16, 32))) for _ in range(4200)]
    else:
        filling = ["x" * random.choice((4000, 300))] * (14 if random.random() < 0.1 else 1) + ["y" * 4000]
    filling[len(filling) // 2 :] = [
        draw.value(random, 1),
        *filling[len(filling) // 2 :],
        draw.value(random, 1),
    ]
    array, *section = codec.encode(filling)
    joined = _join(section)
    return len(joined).to_bytes(2, "big") + joined + bytes(array)


def _run_values(data: bytes) -> bool:
    size = int.from_bytes(data[:2], "big")
    try:
        value = codec.decode(data[2 + size :], data[2 : 2 + size])
    except RemoteProtocolError:
        return False
    # NaN differs from itself and arrays have no ==, so values are compared by what is written of them.
    written = codec.encode(value)
    again = codec.encode(codec.decode(bytes(written[0]), _join(written[1:])))
    assert _join(again) == _join(written)
    return True


# Messages: frames on one stream, both sides' state machines


def _messages(random: Random) -> Iterator[call.Message]:
    more = random.random() < 0.5
    timeout = random.choice((None, 0, 1.5, 30))
    args = [draw.value(random, 2) for _ in range(random.randrange(3))]
    yield call.Request(draw.text(random), args, timeout, "0123456789abcdef", more)
    if more:
        for _ in range(random.randrange(4)):
            yield call.Item(draw.value(random, 2))
        yield call.End(None)
    if random.random() < 0.3:
        yield call.Failure("ValueError", draw.text(random), {draw.text(random): draw.value(random, 3)})
    elif random.random() < 0.5:
        yield call.End(draw.value(random, 2))


def _valid_messages(random: Random) -> bytes:
    return b"".join(_join(call.pack(message)) for message in _messages(random))


def _run_messages(data: bytes) -> bool:
    reader = FrameReader()
    server = call.ServerCalls()
    client = call.ClientCall()
    client.request(call.Request("m", [], None, "", False))
    is_good = True
    for piece in draw.cuts(data):
        reader.feed(piece)
        try:
            while (body := reader.next()) is not None:
                is_good &= _run_message(body)
                _step(server, client, body)
        except RemoteProtocolError:
            return False
    return is_good and reader.is_between_frames


def _run_message(body: Body) -> bool:
    """What was read can be written, and reads as the same."""
    try:
        message = call.parse(body)
    except RemoteProtocolError:
        return False
    written = _join(call.pack(message))
    reader = FrameReader()
    reader.feed(written)
    again = reader.next()
    assert again is not None
    assert reader.is_between_frames
    assert _join(call.pack(call.parse(again))) == written
    return True


def _step(server: call.ServerCalls, client: call.ClientCall, body: Body) -> None:
    was_open = server.is_open
    with contextlib.suppress(RemoteProtocolError):  # as a side without room for it sees it
        array = body[0]
        call.ServerCalls().receive((array[:2] + array[2:][-1:], SKIPPED))
    with contextlib.suppress(RemoteProtocolError):
        taken: Any = server.receive(body)
        assert not (was_open and isinstance(taken, call.Request)), "a second request inside a call"
    if server.is_open and not server.has_more:
        server.outcome(call.End(None))
        assert not server.is_open
    over = client.outcome is not None
    with contextlib.suppress(RemoteProtocolError):
        taken = client.receive(body)
        assert not over or taken is None, "something after the outcome"


def targets() -> list[Target]:
    codec_modules = ("lattica.rpc.codec", "lattica.rpc.tensors")
    words = (
        b"\xc7\x06\x01", b"\xd8\x02", b"\xdc\xff\xff", b"\xdd\x7f\xff\xff\xff", b"\xdf\x00\x10\x00\x00",
        b"\x81\xc4\x01k\xc0", b"\xd6\xff" + bytes(4), b"\x91" * 31, b"\x91" * 32, b"\x81\xa0" * 33, b"\x9f" * 16,
    )  # fmt: skip
    return [
        Target(
            "frames",
            "FrameReader: bytes cut anywhere to frames",
            _valid_frames,
            _run_frames,
            ("lattica.rpc.framing",),
            words=(b"\xff\xff\x03", b"\xff\xff\xff\xff\x0f", b"\x80\x00"),
            memory_bytes=3 << 18,  # a section begins with 256 KiB, whatever length is announced
        ),
        Target(
            "values",
            "codec.decode: an array and its section to values",
            _valid_values,
            _run_values,
            codec_modules,
            words=words,
            memory_bytes=33 << 20,  # what msgpack may reserve for heads that nest, see _UNSCANNED_BYTES
        ),
        Target(
            "tensors",
            "codec.decode, with tensors and long bytes only",
            _valid_tensors,
            _run_values,
            codec_modules,
            words=(*words, b"\xa3f32", b"\xa4bf16", b"\xa4bool", b"\xcd\x10\x00"),
            memory_bytes=33 << 20,
        ),
        Target(
            "large-values",
            "codec.decode, with arrays that are scanned before msgpack sees them",
            _valid_large_values,
            _run_values,
            codec_modules,
            words=words,
            memory_bytes=1 << 20,
            memory_per_byte=256,
            max_bytes=1 << 16,
        ),
        Target(
            "messages",
            "call.parse and both sides of a call: frames to requests, items, outcomes",
            _valid_messages,
            _run_messages,
            ("lattica.rpc.call", "lattica.rpc.framing", "lattica.rpc.codec"),
            words=words,
            memory_bytes=33 << 20,
        ),
    ]
