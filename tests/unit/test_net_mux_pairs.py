"""The native mux and the reference, held against each other: the same calls give the same events and bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lattica import _native
from lattica.errors import LatticaError
from lattica.net import yamux
from lattica.net.mux import Mux, ReferenceBudget, ReferenceMux, WindowBudget
from lattica.net.noise import NoiseSession
from lattica.net.yamux import HEADER

KEYS = bytes([7]) * 32, bytes([8]) * 32
BUDGET = 3 << 20


class World:
    """Two ends and the bytes between them; `wires` and everything else by who hears it."""

    def __init__(self, native: tuple[bool, bool]) -> None:
        self.budgets = [WindowBudget(BUDGET) if each else ReferenceBudget(BUDGET) for each in native]
        kinds: list[Callable[..., Mux]] = [_native.Mux if each else ReferenceMux for each in native]
        self.ends = [
            kind(initiator=side == 0, send_key=KEYS[side], receive_key=KEYS[1 - side], windows=budget)
            for side, (kind, budget) in enumerate(zip(kinds, self.budgets, strict=True))
        ]
        self.wires = [bytearray(), bytearray()]
        for end in self.ends:
            end.start(b"")

    def state(self, side: int) -> object:
        end = self.ends[side]
        return (
            end.output_bytes,
            end.unread_bytes,
            end.inbound_streams,
            end.rtt,
            end.gone,
            self.budgets[side].used,
            len(self.wires[side]),
        )

    def do(self, name: str, side: int, stream: int, size: int, now: float) -> object:
        """What one step gives, or how it fails."""
        try:
            return self._do(name, side, stream, size, now), self.state(0), self.state(1)
        except LatticaError as error:
            return type(error), str(error), self.state(0), self.state(1)

    def _do(self, name: str, side: int, stream: int, size: int, now: float) -> object:
        end = self.ends[side]
        match name:
            case "open":
                return end.open_stream()
            case "send":
                return end.send(stream, memoryview(bytes([size % 251]) * size))
            case "send_all_or_nothing":
                return end.send_all_or_nothing(stream, [bytes(size // 2), bytearray(b"\1") * (size % 50)])
            case "read":
                return end.read(stream, size)
            case "read_into":
                buffer = bytearray(size)
                return end.read_into(stream, buffer), buffer
            case "ping":
                return end.ping(now)
            case "go_away":
                return end.go_away(size)
            case "move" | "deliver":
                if name == "move":
                    data, writable = end.take_output(size)
                    self.wires[1 - side] += data
                    return data, writable
                wire = self.wires[side]
                data = bytes(wire[:size])
                del wire[:size]
                return end.receive(data, now)
            case _:
                return getattr(end, name)(stream)


NAMES = [
    "open",
    "send",
    "send",
    "send_all_or_nothing",
    "end",
    "reset",
    "discard",
    "read",
    "read",
    "read_into",
]
NAMES += ["available", "ping", "move", "move", "move", "deliver", "deliver", "deliver"]
STEPS = st.tuples(
    st.sampled_from(NAMES),
    st.integers(0, 1),
    st.integers(0, 5),
    st.one_of(st.integers(0, 300), st.integers(0, 400_000), st.just(1 << 30)),
    st.floats(0, 0.02),
)


@given(steps=st.lists(STEPS, max_size=80), away=st.integers(0, 400))
def test_native_and_reference_do_the_same_with_each_other_and_themselves(
    steps: list[tuple[str, int, int, int, float]], away: int
) -> None:
    worlds = [World(native) for native in ((True, True), (False, False), (True, False), (False, True))]
    now = 1.0
    for index, (name, side, which, size, later) in enumerate(steps):
        now += later
        size = size if name in ("move", "deliver", "read") else min(size, 400_000)
        stream = 1 + which if name != "open" else 0
        results = [world.do(name, side, stream, size, now) for world in worlds]
        assert all(result == results[0] for result in results[1:]), (index, name, results)
        if index == away:
            assert len({repr(world.do("go_away", side, 0, 1, now)) for world in worlds}) == 1


def frame(kind: int, flags: int, stream: int, length: int, data: bytes) -> bytes:
    return HEADER.pack(0, kind, flags, stream, length) + data


ROUNDS = st.tuples(st.booleans(), st.floats(0, 0.004), st.integers(0, 2), st.sampled_from([0, 0, 0, 1, 5000]))


@given(rounds=st.lists(ROUNDS, max_size=25))
def test_windows_of_native_and_reference_grow_alike(rounds: list[tuple[bool, float, int, int]]) -> None:
    worlds = [World(native) for native in ((True, True), (False, False))]
    now = 1.0
    for world in worlds:
        world.do("open", 0, 0, 0, now)
    for ping, seconds, sends, leave in rounds:
        now += seconds
        steps = [("ping", 1, 0)] * ping + [("send", 0, 400_000)] * sends
        steps += [("move", 0, 1 << 30), ("deliver", 1, 1 << 30)]
        steps += [
            ("read", 1, (1 << 30) if not leave else 260_000 - leave),
            ("move", 1, 1 << 30),
            ("deliver", 0, 1 << 30),
        ]
        for name, side, size in steps:
            results = [world.do(name, side, 1, size, now) for world in worlds]
            assert results[0] == results[1], name


FRAMES = st.builds(
    frame,
    st.integers(0, 3),
    st.integers(0, 15),
    st.integers(0, 6),
    st.one_of(st.integers(0, 20), st.integers(0, 2**32 - 1)),
    st.binary(max_size=20),
)
SOUND = st.tuples(st.sampled_from([1, 3]), st.binary(max_size=30)).map(
    lambda it: frame(yamux.DATA, 0, it[0], len(it[1]), it[1])
)


def heard(mux: Mux, pieces: list[bytes]) -> list[Any]:
    """All that comes of these bytes: events, what can be read, what is answered, the error."""
    mux.start(b"")
    trace: list[Any] = [mux.open_stream()]
    try:
        for piece in pieces:
            for event in mux.receive(piece, 1.0):
                trace.append(event)
                if event[0] == 1:
                    trace.append(mux.read(event[1], 7))
                elif event[0] == 2:
                    mux.discard(event[1])
    except LatticaError as error:
        trace += [type(error), str(error)]
    trace += [mux.read(stream, 1 << 20) for stream in range(7)]
    return [*trace, mux.take_output(1 << 20), mux.output_bytes, mux.unread_bytes]


def both_hear(pieces: list[bytes]) -> list[Any]:
    keys = {"initiator": False, "send_key": KEYS[1], "receive_key": KEYS[0]}
    native = heard(_native.Mux(**keys, windows=WindowBudget(BUDGET)), pieces)  # type: ignore[arg-type]
    reference = heard(ReferenceMux(**keys, windows=ReferenceBudget(BUDGET)), pieces)  # type: ignore[arg-type]
    assert native == reference
    return native


@given(
    frames=st.lists(st.one_of(FRAMES, SOUND, st.binary(max_size=20)), max_size=30),
    cut=st.integers(1, 200),
)
def test_likely_frames_in_any_order_mean_the_same_to_both(frames: list[bytes], cut: int) -> None:
    sealed = NoiseSession(send_key=KEYS[0], receive_key=KEYS[1]).encrypt(frames)
    both_hear([sealed[start : start + cut] for start in range(0, len(sealed), cut)])


@given(data=st.binary(max_size=400), at=st.integers(0, 60), cut=st.integers(1, 100))
def test_random_and_changed_records_mean_the_same_to_both(data: bytes, at: int, cut: int) -> None:
    sealed = NoiseSession(send_key=KEYS[0], receive_key=KEYS[1]).encrypt([frame(yamux.DATA, 1, 1, 3, b"abc")])
    bent = bytearray(sealed + data)
    bent[at % len(bent)] ^= 1 + at
    both_hear([bytes(bent[start : start + cut]) for start in range(0, len(bent), cut)])


@given(
    length=st.integers(0, 70_000),
    flags=st.sampled_from([0, yamux.FIN, yamux.RST]),
    cut=st.integers(1, 70_000),
)
def test_a_frame_longer_than_a_record_means_the_same_to_both(length: int, flags: int, cut: int) -> None:
    plain = frame(yamux.DATA, yamux.SYN | flags, 1, length, bytes(length))
    sealed = NoiseSession(send_key=KEYS[0], receive_key=KEYS[1]).encrypt([plain])
    trace = both_hear([sealed[start : start + cut] for start in range(0, len(sealed), cut)])
    assert (yamux.RESET, 1, 0) in trace or not flags & yamux.RST
