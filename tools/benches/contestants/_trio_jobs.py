"""What the contestants on trio share: the client's loop, and the two ends of raw streams."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import _lines as lines
import trio


class ByteStream(Protocol):
    """A `lattica.net.api.Stream`, a trio SocketStream, or a libp2p stream made to look like them."""

    async def send_all(self, data: bytes) -> None: ...
    async def receive_some(self, max_bytes: int | None = None) -> bytes: ...
    async def send_eof(self) -> None: ...
    async def aclose(self) -> None: ...


async def work(client: Any) -> None:
    """Do the bench's jobs, each by the client's method of its name, until the bench goes."""
    lines.say({"ready": True})
    while True:
        job = await trio.to_thread.run_sync(lines.next_job, abandon_on_cancel=True)
        if job is None:
            os._exit(0)
        lines.say(await getattr(client, job["work"])(job))


async def echo_stream(stream: ByteStream) -> None:
    """Send back what arrives."""
    while data := await stream.receive_some():
        await stream.send_all(data)


async def count_bytes(stream: ByteStream) -> None:
    """Read to the end, then answer how much it was."""
    size = 0
    while data := await stream.receive_some():
        size += len(data)
    await stream.send_all(str(size).encode())
    await stream.send_eof()


async def send_bulk(stream: ByteStream, tally: lines.Tally) -> None:
    """Send until the tally's time is up; count what the other side says has arrived."""
    data = bytes(lines.BULK_CHUNK_BYTES)
    sent = 0
    while tally.open():
        await stream.send_all(data)
        sent += len(data)
    await stream.send_eof()
    answer = b""
    while some := await stream.receive_some():
        answer += some
    await stream.aclose()
    assert int(answer) == sent, f"{sent} bytes sent, {answer!r} arrived"
    tally.bytes += sent


async def echo_on(streams: Sequence[ByteStream], job: lines.Job) -> lines.Result:
    """Round trips, one caller a stream; the streams are closed behind them."""
    data = bytes(job["bytes"])
    tally = lines.Tally(job["seconds"])

    async def caller(stream: ByteStream) -> None:
        while tally.open():
            with tally.piece():
                await stream.send_all(data)
                got = 0
                while got < len(data):
                    got += len(await stream.receive_some())
        await stream.send_eof()
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        for stream in streams:
            nursery.start_soon(caller, stream)
    return tally.result()
