"""A peer of another language in a process of its own, and what our side serves to it.

Requests, replies and events are JSON lines over stdin and stdout: see README.md.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import trio

from lattica.ids import PeerId
from lattica.net.api import Stream
from lattica.net.host import MeshHost, open_host
from lattica.net.identity import Identity

ECHO: Final = "/interop/echo/1.0.0"  # sends back what it gets
SINK: Final = "/interop/sink/1.0.0"  # answers everything up to the end with its SHA-256
SOURCE: Final = "/interop/source/1.0.0"  # answers a 64-bit number with as many bytes
HOLD: Final = "/interop/hold/1.0.0"  # whose streams a test moves by hand

LIMIT_SECONDS: Final = 60.0  # for a whole test; a healthy one takes a second or two
EXIT_SECONDS: Final = 3.0  # for a peer whose stdin was closed

RunPeer = Callable[..., AbstractAsyncContextManager["OtherPeer"]]


class PeerError(Exception):
    """A command failed at the other peer, or the peer ended."""


class OtherPeer:
    """A running peer: `do` asks it, `event` waits for what it reports."""

    peer_id: PeerId
    addresses: list[str]

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._asked = 0
        self._asking = trio.Lock()  # whole lines, whoever else asks
        self._replies: dict[int, trio.MemorySendChannel[dict[str, Any]]] = {}
        self._events: list[dict[str, Any]] = []  # that nobody has taken yet
        self._more = trio.lowlevel.ParkingLot()
        self._ended = False

    @property
    def address(self) -> str:
        """Its first multiaddr, with /p2p/."""
        return self.addresses[0]

    async def do(self, command: str, **arguments: object) -> dict[str, Any]:
        """Ask for something and wait for its result. Raises PeerError."""
        self._asked += 1
        number = self._asked
        give, take = trio.open_memory_channel[dict[str, Any]](1)
        self._replies[number] = give
        plain = {
            name: str(value) if isinstance(value, PeerId) else value for name, value in arguments.items()
        }
        line = json.dumps({"id": number, "do": command} | plain).encode() + b"\n"
        assert self._process.stdin is not None
        async with self._asking:
            await self._process.stdin.send_all(line)
        try:
            reply = await take.receive()
        except trio.EndOfChannel:
            raise PeerError(f"the peer ended before it answered {command!r}") from None
        if "error" in reply:
            raise PeerError(reply["error"])
        result: dict[str, Any] = reply["result"]
        return result

    async def event(
        self, kind: str, *, where: Callable[[dict[str, Any]], bool] = lambda event: True
    ) -> dict[str, Any]:
        """The oldest event of a kind that nobody has taken yet; waits for it."""
        while True:
            for index, event in enumerate(self._events):
                if event["event"] == kind and where(event):
                    return self._events.pop(index)
            if self._ended:
                raise PeerError(f"the peer ended before it reported {kind!r}")
            await self._more.park()

    def kill(self) -> None:
        """End it as a power cut does, but for the sockets that its kernel closes."""
        self._process.kill()

    async def listen(self) -> None:
        """Take in its lines until it ends."""
        assert self._process.stdout is not None
        rest = bytearray()
        async for data in self._process.stdout:
            rest += data
            if b"\n" in data:
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    self._heard(json.loads(line))
        self._ended = True
        self._more.unpark_all()
        for waiting in self._replies.values():
            waiting.close()

    def _heard(self, line: dict[str, Any]) -> None:
        if "event" in line:
            self._events.append(line)
            self._more.unpark_all()
        else:
            self._replies.pop(line["id"]).send_nowait(line)


@asynccontextmanager
async def run_peer(command: Sequence[str], **options: object) -> AsyncIterator[OtherPeer]:
    """Run a peer for as long as the block runs; `options` are those of README.md."""
    process = await trio.lowlevel.open_process(
        [*command, json.dumps({"listen": ["/ip4/127.0.0.1/tcp/0"]} | options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    peer = OtherPeer(process)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.listen)
            ready = await peer.event("ready")
            peer.peer_id, peer.addresses = PeerId.parse(ready["peer"]), ready["addresses"]
            yield peer
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            assert process.stdin is not None
            assert process.stdout is not None
            await process.stdin.aclose()
            with trio.move_on_after(EXIT_SECONDS):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()
            await process.stdout.aclose()


@asynccontextmanager
async def run_ours(**settings: Any) -> AsyncIterator[tuple[MeshHost, trio.MemoryReceiveChannel[Stream]]]:
    """Our host with the same four protocols; yields it and the channel on which streams under HOLD arrive.

    A held stream is the test's until the host stops.
    """
    give, take = trio.open_memory_channel[Stream](1024)

    async def hold(stream: Stream) -> None:
        await give.send(stream)
        await trio.sleep_forever()

    options: dict[str, Any] = {"listen": ["/ip4/127.0.0.1/tcp/0"], "agent": "ours/1"} | settings
    async with open_host(identity=Identity.generate(), **options) as host:
        for protocol, handler in {
            ECHO: serve_echo,
            SINK: serve_sink,
            SOURCE: serve_source,
            HOLD: hold,
        }.items():
            host.serve(protocol, handler)
        yield host, take


# Bulk data: a pattern that repeats, of a prime length, so that a lost or doubled chunk shows

PATTERN: Final = bytes((i * 167 + (i >> 8)) & 0xFF for i in range(65_521))


def pattern(size: int) -> bytes:
    """The first bytes of what bulk commands send."""
    return (PATTERN * (size // len(PATTERN) + 1))[:size]


def sha256(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


async def read_all(stream: Stream) -> bytes:
    """Everything up to the other side's end."""
    data = bytearray()
    while piece := await stream.receive_some():
        data += piece
    return bytes(data)


async def read_exactly(stream: Stream, size: int) -> bytes:
    """`size` bytes; fewer only when the other side ends before."""
    data = b""
    while len(data) < size and (piece := await stream.receive_some(size - len(data))):
        data += piece
    return data


async def send_and_end(stream: Stream, data: bytes) -> None:
    """Send everything, then end our direction."""
    await stream.send_all(data)
    await stream.send_eof()


async def serve_echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


async def serve_sink(stream: Stream) -> None:
    total = hashlib.sha256()
    while data := await stream.receive_some():
        total.update(data)
    await stream.send_all(total.digest())


async def serve_source(stream: Stream) -> None:
    size = int.from_bytes(await read_exactly(stream, 8), "big")
    for start in range(0, size, len(PATTERN)):
        await stream.send_all(PATTERN[: size - start])


# Both together


@dataclass(frozen=True)
class Pair:
    """Our host and another peer, connected to each other."""

    ours: MeshHost
    held: trio.MemoryReceiveChannel[Stream]  # the streams under HOLD that the other peer has opened
    other: OtherPeer

    async def we_open_held(self) -> tuple[Stream, int]:
        """A stream that both ends move by hand: ours, and its number at the other peer."""
        stream = await self.ours.open_stream(self.other.peer_id, [HOLD])
        await stream.send_all(
            b"\n"
        )  # multistream may be lazy: the other end hears of a stream with its first data
        number = (await self.other.event("stream"))["stream"]
        assert (await self.other.do("read", stream=number, bytes=1))["text"] == "\n"
        return stream, number

    async def they_open_held(self) -> tuple[Stream, int]:
        """The same, opened by the other peer."""
        number = (await self.other.do("open", peer=self.ours.peer_id, protocol=HOLD))["stream"]
        await self.other.do("write", stream=number, text="\n")
        stream = await self.held.receive()
        assert await read_exactly(stream, 1) == b"\n"
        return stream, number

    async def open_held(self, *, we_open: bool) -> tuple[Stream, int]:
        return await (self.we_open_held() if we_open else self.they_open_held())


@asynccontextmanager
async def connected(
    run_other: RunPeer, *, we_dial: bool, ip: str = "/ip4/127.0.0.1", **options: object
) -> AsyncIterator[Pair]:
    """A pair, connected by the side that is asked to dial, and at most LIMIT_SECONDS old."""
    listen = [f"{ip}/tcp/0"]
    with trio.fail_after(LIMIT_SECONDS):
        async with run_ours(listen=listen) as (ours, held), run_other(listen=listen, **options) as other:
            if we_dial:
                assert await ours.connect(other.address) == other.peer_id
            else:
                reply = await other.do("dial", address=ours.addresses[0])
                assert reply["peer"] == str(ours.peer_id)
                await until(ours.peers)  # who dials may be done before the other end is
            yield Pair(ours, held, other)


async def until(true: Callable[[], object]) -> None:
    """Wait for what our host tells only to those who look."""
    while not true():  # noqa: ASYNC110  # identify has no event to wait for
        await trio.sleep(0.002)
