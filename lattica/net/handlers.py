"""What a host serves: which handler gets an inbound stream, and what becomes of the stream when that is done."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import trio

from lattica.errors import LocalProtocolError, NetworkError, RemoteProtocolError, StreamError
from lattica.ids import PeerId
from lattica.net import multistream
from lattica.net.api import StreamHandler
from lattica.net.stream import MuxedStream
from lattica.protocols import GATED_PREFIX, HANDSHAKE_TIMEOUT_SECONDS

log = logging.getLogger("lattica.net")

Gate = Callable[[PeerId, str], bool]


class Handlers:
    """The handlers of a host by protocol, behind a gate.

    Args:
        gate: asked with (peer, protocol) before a handler sees a stream under /lattica/; False resets the
            stream. None lets everybody in. Must not wait.
    """

    def __init__(self, gate: Gate | None = None) -> None:
        self._gate = gate
        self._handlers: dict[str, StreamHandler] = {}

    @property
    def protocols(self) -> list[str]:
        return list(self._handlers)

    def add(self, protocol: str, handler: StreamHandler) -> None:
        """Serve a protocol. Raises LocalProtocolError when it is served already."""
        if protocol in self._handlers:
            raise LocalProtocolError(f"{protocol} is served already")
        self._handlers[protocol] = handler

    def remove(self, protocol: str) -> None:
        """Serve it no more; streams that are being handled go on."""
        self._handlers.pop(protocol, None)

    async def handle(self, stream: MuxedStream) -> None:
        """Agree on a protocol and run its handler; whatever that does, only this stream ends.

        Raises nothing but Cancelled.
        """
        finished = False
        try:
            handler = await self._agree(stream)
            if handler is not None:
                await handler(stream)
                finished = True
        except (NetworkError, RemoteProtocolError, trio.TooSlowError) as error:
            log.debug("a stream of %s ended: %s", stream.peer, error or type(error).__name__)
        except Exception:
            log.exception("the handler of %s failed on a stream of %s", stream.protocol, stream.peer)
        finally:
            if finished:
                stream.close()
            else:
                stream.reset()

    async def _agree(self, stream: MuxedStream) -> StreamHandler | None:
        """What handles the protocol that the peer chose; None when the gate refused."""
        with trio.fail_after(HANDSHAKE_TIMEOUT_SECONDS):
            protocol, early = await multistream.answer(_Answering(stream), self._handlers)
        stream.unread(early)
        stream.protocol = protocol
        gate = self._gate if protocol.startswith(GATED_PREFIX) else None
        if gate is not None and not gate(stream.peer, protocol):
            log.info("refused a stream of %s under %s", stream.peer, protocol)
            return None
        return self._handlers.get(protocol)  # None: unserved while the peer was choosing


class _Answering:
    """An inbound stream while its protocol is agreed on.

    The proposal and the data behind it may be a peer's last words: that it can hear no answer is no reason not to
    hand them on.
    """

    def __init__(self, stream: MuxedStream) -> None:
        self._stream = stream

    async def send_all(self, data: bytes) -> None:
        with contextlib.suppress(StreamError):
            await self._stream.send_all(data)

    async def receive_some(self, max_bytes: int) -> bytes:
        return await self._stream.receive_some(max_bytes)
