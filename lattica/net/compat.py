"""What libp2p 0.8.1 needs before it can be relied on: one function a fix. Line numbers are that version's.

Each fix changes the objects of one host and nothing of the library, so that other hosts in the process stay
as they are. Some faults need no fix here because our own transport never meets them:

* inbound slots that are never freed (swarm.py:1982): `transport.Listener` ends libp2p's task with its
  connection;
* a cancelled write that breaks the connection, a reader's pause that resets its writer (yamux.py:280), a lost
  connection that reads as a clean end (yamux.py:572): `connection` and `yamux` do none of that;
* a dial that waits 250 ms after it succeeded, and tries one TCP address only (swarm.py:880-936): `dial`
  instead;
* sockets left open when the host ends (basic_host.py:536): `host.open_host` closes all.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable
from typing import Any

import trio
from libp2p.abc import INetStream
from libp2p.host.basic_host import BasicHost, _IdentifyNotifee
from libp2p.network.config import ConnectionConfig
from libp2p.network.connection import swarm_connection
from libp2p.network.swarm import Swarm

from lattica.errors import ConfigError, NetworkError, RemoteProtocolError
from lattica.ids import PeerId
from lattica.net import multistream
from lattica.net.stream import ForLibp2p, MuxedStream
from lattica.protocols import HANDSHAKE_TIMEOUT_SECONDS

log = logging.getLogger("lattica.net.compat")

VERSION = "0.8.1"
StreamGate = Callable[[PeerId, str], bool]


def require_version() -> None:
    """Refuse a libp2p that these fixes were not written for.

    Raises:
        ConfigError: another version is installed.
    """
    installed = importlib.metadata.version("libp2p")
    if installed != VERSION:
        raise ConfigError(
            f"libp2p {installed} is installed, but this version works with {VERSION} only; "
            f'run "pip install libp2p=={VERSION}"'
        )


def quiet_loggers() -> None:
    """Keep libp2p's account of expected failures (a refused dial, a closed stream) out of the node's log.

    It logs them as errors with tracebacks; our own lines say what matters. One module sets its own level,
    another logs through `logging.debug`, which installs a handler on the root logger of the whole program.
    """
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("libp2p."):
            logging.getLogger(name).setLevel(logging.NOTSET)
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    swarm_connection.__dict__["logging"] = logging.getLogger(swarm_connection.__name__)


def connection_config(max_connections: int) -> ConnectionConfig:
    """Limits under which libp2p closes no connection that somebody uses.

    As it comes, it closes old connections of a peer that has more than three, and any beyond a high-water
    mark.
    """
    return ConnectionConfig(
        max_connections=max_connections,
        min_connections=0,
        low_watermark=0,
        high_watermark=max_connections,
        max_connections_per_peer=max_connections,
        enable_health_monitoring=False,
    )


def no_auto_connector(network: Swarm) -> None:
    """Keep libp2p from dialling peers that nobody asked it to dial.

    It dials whoever its peer store knows until half of `high_watermark` is reached, whatever `low_watermark`
    and `min_connections` say (auto_connector.py:293), and a `high_watermark` of 0 closes all connections.
    """

    async def connect_to_nobody() -> None:
        await trio.lowlevel.checkpoint()

    network.auto_connector.maybe_connect = connect_to_nobody  # type: ignore[method-assign]  # that is the fix


def guard_streams(host: BasicHost, gate: StreamGate) -> None:
    """Put a guard between inbound streams and their handlers.

    libp2p lets a handler's ValueError end the whole host (basic_host.py:1554) and a handler's StreamEOF end
    the connection's accept loop; it leaves the stream open when a handler returns without closing it, and
    reads a protocol name of any length. The guard asks `gate(peer, protocol)` before any handler sees the
    stream.
    """
    network: Any = host.get_network()

    async def guarded(net_stream: INetStream) -> None:
        muxed = net_stream.muxed_stream  # type: ignore[attr-defined]  # NetStream has it, its interface does not
        assert isinstance(muxed, ForLibp2p), "only our transport is registered"
        stream = muxed.stream
        finished = False
        try:
            finished = await _run_handler(host, net_stream, stream, gate)
        except (NetworkError, RemoteProtocolError, trio.TooSlowError) as error:
            log.debug("a stream of %s ended: %s", stream.peer, error or type(error).__name__)
        except Exception:
            log.exception("the handler of %s failed on a stream of %s", stream.protocol, stream.peer)
        finally:
            if finished:
                stream.close()
            else:
                stream.reset()

    network.set_stream_handler(guarded)


async def _run_handler(
    host: BasicHost, net_stream: INetStream, stream: MuxedStream, gate: StreamGate
) -> bool:
    """Agree on a protocol and run its handler; False when the gate refused."""
    handlers: dict[Any, Any] = host.get_mux().handlers
    with trio.fail_after(HANDSHAKE_TIMEOUT_SECONDS):
        protocol, early = await multistream.answer(stream, handlers)
    stream.unread(early)
    stream.protocol = protocol
    net_stream.set_protocol(protocol)  # type: ignore[arg-type]  # a NewType of str
    if not gate(stream.peer, protocol):
        log.info("refused a stream of %s under %s", stream.peer, protocol)
        return False
    handler = handlers.get(protocol)
    if handler is None:  # unserved while the peer was choosing
        return False
    await handler(net_stream)
    return True


def stop_own_identify(host: BasicHost) -> None:
    """Keep libp2p from identifying peers by itself: it forgets their agent, reads messages of any length, and
    does so in system tasks that outlive the host."""
    network = host.get_network()
    assert isinstance(network, Swarm)
    for notifee in list(network.notifees):
        if isinstance(notifee, _IdentifyNotifee):
            network.remove_notifee(notifee)
