"""Yamux frames, and the whole mux as a connection uses it: programs of frames that arrive and calls that we make.

The Python reference and the native mux run the same programs; alone for speed, together to be compared.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from fuzzing import draw
from fuzzing.engine import Target
from lattica.errors import LocalProtocolError, RemoteProtocolError, StreamError
from lattica.net import mux, yamux
from lattica.net.mux import Mux, ReferenceMux
from lattica.net.noise import NoiseSession
from lattica.net.windows import EXTRA_WINDOWS, INITIAL_WINDOW, MAX_WINDOW, ReferenceBudget
from lattica.net.yamux import ACK, DATA, FIN, GO_AWAY, HEADER, PING, RST, SYN, WINDOW_UPDATE

try:
    from lattica import _native

    NativeMux: Any = _native.Mux
    NativeBudget: Any = _native.WindowBudget
    MISSING: dict[str, str] = {}
except (ImportError, AttributeError):
    MISSING = dict.fromkeys(("mux-native", "mux-both"), "the native module has no Mux; build it with maturin")

_KEYS: Final = bytes([7]) * 32, bytes([8]) * 32  # the peer's sending key and ours; the peer dialled
_MAX_STEPS: Final = 200
_BUDGET: Final = 1 << 20  # small, so that programs come to its end
_BUFFER: Final = memoryview(bytes(range(256)) * 256)
_HELD_PER_BYTE: Final = 8  # memory that may be held for each byte that came in or was to be sent,
_HELD_BYTES: Final = 1 << 20  # beside this


def _frame(kind: int, flags: int, stream: int, length: int, data: bytes = b"") -> bytes:
    return HEADER.pack(0, kind, flags, stream, length) + data


# Frames alone


def _valid_frames(random: Random) -> bytes:
    """What a peer that dialled may say; streams 1 to 9."""
    out = []
    open_streams: list[int] = []
    following = 1
    for _ in range(random.randrange(1, 12)):
        stream = random.choice(open_streams) if open_streams else 0
        data = random.randbytes(random.choice((0, 1, 5, 100, 1000)))
        match random.randrange(8):
            case 0 | 1:
                out.append(_frame(DATA, SYN, following, len(data), data))
                open_streams.append(following)
                following += 2
            case 2 | 3 if stream:
                out.append(_frame(DATA, 0, stream, len(data), data))
            case 4 if stream:
                out.append(_frame(WINDOW_UPDATE, 0, stream, random.choice((1, 1000, 1 << 20))))
            case 5 if stream:
                ending = random.choice((FIN, RST))
                out.append(_frame(random.choice((DATA, WINDOW_UPDATE)), ending, stream, 0))
                open_streams.remove(stream)
            case 6:
                out.append(_frame(PING, random.choice((SYN, ACK)), 0, random.getrandbits(32)))
            case _:
                out.append(_frame(GO_AWAY, 0, 0, random.randrange(3)))
    return b"".join(out)


def _run_frames(data: bytes) -> bool:
    """Cut anywhere, the same events and bytes; and no counter differs from what it counts."""
    machines = [yamux.Yamux(initiator=False, windows=ReferenceBudget(_BUDGET)) for _ in range(2)]
    events: list[list[mux.Event]] = [[], []]
    is_good = []
    for machine, seen, pieces in zip(machines, events, (draw.cuts(data), [data]), strict=True):
        try:
            for piece in pieces:
                machine.receive(piece, 0.0, seen)
                _check(machine)
            is_good.append(True)
        except RemoteProtocolError:
            is_good.append(False)
        _check(machine)
    assert events[0] == events[1]
    assert is_good[0] == is_good[1]
    for stream in {stream for _, stream, _ in events[0]}:
        assert machines[0].read(stream, 1 << 20) == machines[1].read(stream, 1 << 20)
    assert machines[0].unread_bytes == 0
    while pieces_out := machines[0].record(65_519):
        assert sum(map(len, pieces_out)) <= 65_519
        _check(machines[0])
    assert machines[0].output_bytes == 0
    return is_good[0]


def _check(machine: yamux.Yamux) -> None:
    """The sums that the machine keeps, against what they are sums of."""
    streams = machine._streams
    assert machine.unread_bytes == sum(len(state.unread) for state in streams.values())
    assert machine.output.queued == sum(len(state.queued) for state in streams.values())
    assert machine.inbound_streams == sum(stream % 2 for stream in streams)
    assert machine._extra == sum(state.window.size - INITIAL_WINDOW for state in streams.values())
    for state in streams.values():
        assert 0 <= state.window.left <= state.window.size <= MAX_WINDOW
        assert 0 <= state.send_window < 1 << 32
    assert 0 <= machine._extra <= EXTRA_WINDOWS
    assert machine._lingering.keys() <= streams.keys()


# Programs. A step is a byte that says what to do, and what the step needs: a stream (1 byte, an index into those
# that are known) and a size (2 bytes). FEED has a size and so many bytes of plaintext, RAW the same unsealed; FILL
# is a data frame of that size, its stream named by id, for programs that come to a window's end.

FEED, RAW, OPEN, SEND, SEND_ALL, END, RESET, READ, DISCARD, TAKE, PING_, AWAY, LATER, FILL = range(14)
_KINDS: Final = 14


def _step(kind: int, stream: int = 0, size: int = 0) -> bytes:
    return bytes([kind, stream]) + size.to_bytes(2, "big")


def _valid_program(random: Random) -> bytes:
    """Frames of a well-behaved peer, with calls of ours between them."""
    plain = _valid_frames(random)
    out = []
    if random.random() < 0.03:
        opening = _frame(WINDOW_UPDATE, SYN, 101, 0) + _frame(PING, SYN, 0, 1)
        out += [_step(FEED, 0, len(opening)) + opening, _step(PING_), _step(LATER, 0, 50)]
        answer = _frame(PING, ACK, 0, 1)
        out.append(_step(FEED, 0, len(answer)) + answer)
        for _ in range(random.randrange(12)):
            out += [
                _step(FILL, 101, 60_000),
                _step(READ, 2, 65_535),
                _step(LATER, 0, random.choice((0, 5, 500))),
            ]
    while plain:
        size = random.choice((1, 12, 13, 40, len(plain)))
        piece, plain = plain[:size], plain[size:]
        out.append(_step(FEED, 0, len(piece)) + piece)
        for _ in range(random.randrange(4)):
            kind = random.choice(
                (OPEN, SEND, SEND, SEND_ALL, END, RESET, READ, READ, DISCARD, TAKE, PING_, LATER)
            )
            out.append(_step(kind, random.randrange(8), random.choice((0, 1, 1000, 65_535))))
    return b"".join(out)


@dataclass
class _Heard:
    """What a peer said and was told, read by a parser of its own: the judge of what the mux did with it."""

    payloads: dict[int, bytearray] = field(default_factory=lambda: defaultdict(bytearray))
    credit: dict[int, int] = field(default_factory=lambda: defaultdict(lambda: INITIAL_WINDOW))
    opened: dict[int, int] = field(default_factory=lambda: defaultdict(int))


def _parse(plain: bytes) -> _Heard:
    heard = _Heard()
    at = 0
    while len(plain) - at >= HEADER.size:
        _, kind, flags, stream, length = HEADER.unpack_from(plain, at)
        at += HEADER.size
        heard.opened[stream] += flags & SYN
        if kind == DATA:
            heard.payloads[stream] += plain[at : at + length]
            at += length
        elif kind == WINDOW_UPDATE:
            heard.credit[stream] += length
    return heard


class _Run:
    """One mux at work on a program; `trace` is everything it gave back."""

    def __init__(self, make: Callable[..., Mux], budget: Any) -> None:
        self.windows = budget(_BUDGET)
        self.mux = make(initiator=False, send_key=_KEYS[1], receive_key=_KEYS[0], windows=self.windows)
        self.mux.start(b"")
        self.trace: list[Any] = []
        self.streams: list[int] = [1, 2]
        self.broken = False
        self.now = 0.0
        self.took: dict[int, bytearray] = defaultdict(bytearray)
        self.output: list[bytes] = []
        self.heap_bytes: int | None = None  # before, where memory is counted
        self.volume_bytes = 0  # that came in or that we asked to send

    def arrives(self, data: bytes) -> None:
        try:
            events = self.mux.receive(data, self.now)
        except RemoteProtocolError as error:
            self.broken = True
            self.trace.append(str(error))
            return
        self.trace.append(events)
        self.streams += [stream for kind, stream, _ in events if kind == mux.OPENED]

        if self.heap_bytes is not None:  # tracemalloc does not see what native code takes
            self.volume_bytes += len(data)
            grown = _heap_bytes() - self.heap_bytes
            assert grown <= _HELD_BYTES + _HELD_PER_BYTE * self.volume_bytes, f"{grown} bytes are held"

    def call(self, kind: int, stream: int, size: int) -> None:
        self.volume_bytes += size
        try:
            self.trace.append(self._call(kind, self.streams[stream % len(self.streams)], size))
        except (StreamError, LocalProtocolError) as error:
            self.trace.append(f"{type(error).__name__} {error}")

    def _call(self, kind: int, stream: int, size: int) -> Any:
        if kind == OPEN:
            self.streams.append(self.mux.open_stream())
            return self.streams[-1]
        if kind == READ:
            return self._read(stream, size)
        if kind == TAKE:
            data, writable = self.mux.take_output(size)
            assert len(data) < size + 65_537
            self.output.append(data)
            return data, writable
        if kind == LATER:
            self.now += size / 1000
            return None
        parts: list[yamux.Piece] = [_BUFFER[: size // 2], b"and", _BUFFER[: size // 3]]
        calls: dict[int, Callable[[], Any]] = {
            SEND: lambda: self.mux.send(stream, _BUFFER[:size]),
            SEND_ALL: lambda: self.mux.send_all_or_nothing(stream, parts),
            END: lambda: self.mux.end(stream),
            RESET: lambda: self.mux.reset(stream),
            DISCARD: lambda: self.mux.discard(stream),
            PING_: lambda: self.mux.ping(self.now),
            AWAY: lambda: self.mux.go_away(size),
        }
        return calls[kind]()

    def _read(self, stream: int, size: int) -> bytes:
        """In one way or the other; never more than was said to be there."""
        here = self.mux.available(stream)
        if size % 2:
            data = self.mux.read(stream, size)
        else:
            buffer = bytearray(size)
            count = self.mux.read_into(stream, buffer)
            assert buffer.count(0, count) == size - count
            data = bytes(buffer[:count])
        assert len(data) == min(here, size)
        self.took[stream] += data
        return data

    def check(self) -> None:
        """What holds at any time, whatever came."""
        waiting = sum(self.mux.available(stream) for stream in {*self.streams})
        if self.broken:  # what opened in the call that raised is not known to us
            assert waiting <= self.mux.unread_bytes
        else:
            assert waiting == self.mux.unread_bytes
            assert self.mux.inbound_streams <= len(self.streams)
        assert self.mux.unread_bytes <= yamux.MAX_UNREAD_BYTES
        assert 0 <= self.mux.inbound_streams <= yamux.MAX_INBOUND_STREAMS
        assert self.mux.output_bytes >= 0
        assert 0 <= self.windows.used <= _BUDGET

    def finish(self, plain: bytes) -> None:
        """Nothing was made up, nothing was sent beyond what the peer granted, everything is given back."""
        data, _ = self.mux.take_output(1 << 30)
        told = NoiseSession(send_key=_KEYS[0], receive_key=_KEYS[1])
        out = b"".join(told.receive(b"".join(self.output) + data))
        assert self.mux.output_bytes == 0
        said, answered = _parse(plain), _parse(out)
        for stream, payload in self.took.items():
            if said.opened[stream] == 1 or stream % 2 == 0:
                assert said.payloads[stream].startswith(payload), "bytes that the peer did not send there"
        for stream, payload in answered.payloads.items():
            assert len(payload) <= said.credit[stream], "more sent than granted"
        at = 0
        while at < len(out):
            version, kind, _, _, length = HEADER.unpack_from(out, at)
            assert (version, kind <= GO_AWAY) == (0, True)
            at += HEADER.size + (length if kind == DATA else 0)
        assert at == len(out)
        self.trace.append(out)
        del self.mux
        assert self.windows.used == 0, "window growth that was not given back"


def _execute(data: bytes, runs: list[_Run]) -> bool:
    """The program in all muxes, step by step. True when the peer in it broke nothing."""
    peer = NoiseSession(send_key=_KEYS[0], receive_key=_KEYS[1])
    plain = b""
    at = 0
    for _ in range(_MAX_STEPS):
        if len(data) - at < 4:
            break
        kind, stream = data[at] % _KINDS, data[at + 1]
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        at += 4
        if kind in (FEED, RAW, FILL):
            if kind == FILL:
                piece = _frame(DATA, 0, stream, size, bytes(_BUFFER[:size]))
            else:
                piece = data[at : at + size]
                at += len(piece)
            if kind != RAW and not runs[0].broken:
                plain += piece
            sealed = piece if kind == RAW else peer.encrypt([piece])
            for run in runs:
                run.arrives(sealed)
                run.check()
        else:
            for run in runs:
                run.call(kind, stream, size)
        for run in runs[1:]:
            assert run.trace[-1] == runs[0].trace[-1], f"{run.trace[-1]!r:.200} != {runs[0].trace[-1]!r:.200}"
    for run in runs:
        run.check()
        run.finish(plain)
        assert run.trace[-1] == runs[0].trace[-1], "other frames sent"
    return not runs[0].broken


def _run_reference(data: bytes) -> bool:
    return _execute(data, [_Run(ReferenceMux, ReferenceBudget)])


def _run_native(data: bytes) -> bool:
    before = _heap_bytes()
    run = _Run(NativeMux, NativeBudget)
    run.heap_bytes = before
    is_good = _execute(data, [run])
    del run
    grown = _heap_bytes() - before
    assert grown <= _HELD_BYTES, f"{grown} bytes kept by a mux that is gone"
    return is_good


def _run_both(data: bytes) -> bool:
    return _execute(data, [_Run(ReferenceMux, ReferenceBudget), _Run(NativeMux, NativeBudget)])


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "used",
            "free",
            "keep",
        )
    ]


try:
    _mallinfo: Any = ctypes.CDLL(None).mallinfo2  # glibc 2.33
    _mallinfo.restype = _MallInfo
except AttributeError:
    _mallinfo = None


def _heap_bytes() -> int:
    """What C and Rust code hold by malloc; 0 where the system does not tell."""
    if _mallinfo is None:
        return 0
    info = _mallinfo()
    return int(info.used + info.hblkhd)


def targets() -> list[Target]:
    modules = ("lattica.net.yamux", "lattica.net.windows")
    words = (
        _frame(DATA, SYN, 1, 5), _frame(DATA, FIN, 1, 0), _frame(DATA, 0, 1, INITIAL_WINDOW),
        _frame(WINDOW_UPDATE, 0, 1, 0xFFFFFFFF), _frame(WINDOW_UPDATE, RST, 1, 0), _frame(WINDOW_UPDATE, ACK, 2, 0),
        _frame(PING, SYN, 0, 1), _frame(PING, ACK, 0, 0), _frame(GO_AWAY, 0, 0, 0),
    )  # fmt: skip
    steps = tuple(_step(kind, 0, 65_535) for kind in range(2, _KINDS))
    fed = tuple(_step(FEED, 0, len(word)) + word for word in words)
    found = [
        Target(
            "yamux",
            "Yamux.receive: frames cut anywhere",
            _valid_frames,
            _run_frames,
            modules,
            words=words,
            memory_bytes=1 << 17,
            memory_per_byte=128,
        ),
        Target(
            "mux",
            "ReferenceMux: sealed frames and our own calls in any order",
            _valid_program,
            _run_reference,
            (*modules, "lattica.net.mux"),
            words=(*words, *steps, *fed),
            memory_bytes=64 << 20,  # what we queue ourselves
            max_bytes=1 << 12,
        ),
    ]
    if not MISSING:
        program = (_valid_program,)
        found += [
            Target(
                "mux-native",
                "the native Mux, as mux",
                *program,
                _run_native,
                (),
                words=(*words, *steps, *fed),
                memory_bytes=64 << 20,
                max_bytes=1 << 12,
            ),
            Target(
                "mux-both",
                "the native Mux against ReferenceMux: the same events, bytes and errors",
                *program,
                _run_both,
                (),
                words=(*words, *steps, *fed),
                memory_bytes=64 << 20,
                max_bytes=1 << 12,
            ),
        ]
    return found
