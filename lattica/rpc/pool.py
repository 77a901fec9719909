"""Streams kept for the next call, per peer."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import trio

from lattica.ids import PeerId
from lattica.net.api import Stream
from lattica.protocols import POOL_SECONDS
from lattica.rpc.channel import Channel
from lattica.rpc.deadlines import Deadlines
from lattica.rpc.limits import Limits


class Pool:
    """Idle streams, per peer; the one used last is used next, so that the others may go cold.

    A stream is kept only after a clean end of its call, and looked at before it is used again: one that its peer
    has left costs a new stream, not a failed call. A burst of calls opens as many streams as it needs; what it
    leaves beyond `max_pooled_streams` is kept for POOL_SECONDS, in case the next burst follows.
    """

    def __init__(
        self, open_stream: Callable[[PeerId], Awaitable[Stream]], limits: Limits, deadlines: Deadlines
    ) -> None:
        self._open_stream = open_stream
        self._limits = limits
        self._deadlines = deadlines
        self._idle: dict[PeerId, list[Channel]] = {}
        self._trims = False

    def get_idle(self, peer: PeerId) -> Channel | None:
        """An idle stream that lives, if there is one."""
        idle = self._idle.get(peer)
        while idle:
            channel = idle.pop()
            if channel.is_live():
                return channel
            channel.reset()
        return None

    async def open(self, peer: PeerId) -> Channel:
        """A new stream. Raises what opening one raises."""
        stream = await self._open_stream(peer)
        return Channel(stream, max_frame_bytes=self._limits.max_reply_frame_bytes)

    async def get(self, peer: PeerId) -> Channel:
        """An idle stream that lives, else a new one. Raises what opening one raises."""
        return self.get_idle(peer) or await self.open(peer)

    def put(self, peer: PeerId, channel: Channel) -> None:
        """Keep a stream whose call has ended cleanly."""
        idle = self._idle.get(peer)
        if idle is None:
            idle = self._idle[peer] = []
        idle.append(channel)
        if len(idle) > self._limits.max_pooled_streams:
            channel.idle_since = trio.current_time()
            if not self._trims:
                self._trims = True
                self._deadlines.hold(self, channel.idle_since + POOL_SECONDS)

    def expire(self) -> None:
        """End what stands above the bound and was not used for a while."""
        bound, now = self._limits.max_pooled_streams, trio.current_time()
        earliest = math.inf
        for idle in self._idle.values():
            burst = idle[bound:]
            del idle[bound:]
            for channel in burst:
                if channel.idle_since + POOL_SECONDS <= now:
                    channel.reset()
                else:
                    idle.append(channel)
                    earliest = min(earliest, channel.idle_since)
        self._trims = earliest < math.inf
        if self._trims:
            self._deadlines.hold(self, earliest + POOL_SECONDS)

    def drop(self, peer: PeerId) -> None:
        """End the idle streams to a peer."""
        for channel in self._idle.pop(peer, ()):
            channel.reset()

    def close(self) -> None:
        """End all idle streams."""
        for peer in list(self._idle):
            self.drop(peer)
        self._deadlines.release(self)
        self._trims = False
