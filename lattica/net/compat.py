"""libp2p 0.8.1: what it needs before it can be relied on, and what becomes of each of its known faults here.

We use its messages (identify, Noise, later Kademlia, relay and DCUtR) and its kinds of keys. Its Swarm and BasicHost
do not run, so most of its faults are never met; line numbers are that version's.

Fixed here:

* expected failures logged as errors, one module at a level of its own, one with a handler on the root logger of the
  whole program: `quiet_loggers`;
* another version than the one that this was read for: `require_version`.

Never met, because our own code does it (the test that would fail is named):

* inbound slots that are never freed, so that 250 connections are the end (swarm.py:1982): `MeshHost.joined`;
* a handler's ValueError ends the host (basic_host.py:1554), its StreamEOF the accept loop; a handler that returns
  leaves its peer hanging; a protocol name of any length: `MeshHost._handle`;
* a cancelled write breaks the connection by half a frame; a reader's pause of 5 s resets its writer (yamux.py:280);
  256 streams, then `new_stream` blocks for ever; a lost connection reads as a clean end (yamux.py:572, 1065):
  `connection` and `mux`;
* sockets left open by a host that was not closed (basic_host.py:536): `host.open_host` closes all;
* the auto-connector dials whoever it knows, and connections are trimmed beyond three of a peer: nothing dials unasked
  and nothing is trimmed;
* a dial waits 250 ms after it succeeded and tries one TCP address only (swarm.py:880-936): `dial`;
* nobody notices a peer that vanished (its health monitor is off): `MuxedConnection.check`;
* identify forgets the agent, reads messages of any length, in tasks that outlive the host, and pushes an empty
  observed address that go-libp2p refuses (identify.py:98): `identify`, `attend`;
* ping streams idle for 10 s are ended while rust-libp2p pings every 15 (ping.py:32): `attend.answer_pings`;
* rust-libp2p signs peer records under another name than everyone else: no signed record is asked for or needed.

Not met, because what it is about is not used: QUIC (idle reads fail after 30 s, 3 MB/s), AutoNAT v1 (answers OK for
what cannot be reached), bitswap, gossipsub (10 messages a second), its Kademlia service and its tables, its relay
transport, discovery and DCUtR, the peer store's UNKNOWN connections that lose to a relay. Whoever runs libp2p's own
Swarm on our transport (`faces`) has its faults back, all but the slots: `faces.ListenerFace` frees those.

Not mended, because it is not ours: the wheel installs top-level packages `docs`, `examples`, `interop` and `stubs`;
`import libp2p` takes a second and 60 MB, whatever part of it is wanted.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys

from lattica.errors import ConfigError

VERSION = "0.8.1"
_SWARM_CONNECTION = "libp2p.network.connection.swarm_connection"


def require_version() -> None:
    """Refuse a libp2p that this was not written for.

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
    swarm_connection = sys.modules.get(_SWARM_CONNECTION)
    if swarm_connection is not None:
        swarm_connection.__dict__["logging"] = logging.getLogger(_SWARM_CONNECTION)
