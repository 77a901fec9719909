"""A node: one peer of the mesh, with everything that it offers. Builds the parts, starts and stops them.

Start order: folder, identity, network, services, bootstrap, control socket, plug-ins; they stop in the
reverse order. Background work runs in one nursery: an error in it ends the node and leaves `open_node`.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, Literal, Protocol

import trio

from lattica import control, folder, protocols, status
from lattica.bootstrap import BootstrapPolicy
from lattica.config import NodeConfig
from lattica.dht.service import Records
from lattica.errors import DialError, LocalProtocolError, NetworkError, single_error
from lattica.ids import PeerId
from lattica.metrics_server import serve_metrics
from lattica.net.api import Host, Peer, Stream
from lattica.net.identity import Identity
from lattica.net.local import stream_pair
from lattica.plugins import plugins
from lattica.rpc.metrics import CallMetrics
from lattica.rpc.service import Limits, Rpc
from lattica.telemetry import Log, Metrics, span

Reachability = Literal["public", "private", "unknown"]
Mapping = Literal["endpoint-independent", "endpoint-dependent", "unknown"]

SERVICES_GROUP: Final = "lattica.services"


class OpenHost(Protocol):
    """What makes a node's network: `lattica.net.host.open_host`, or a MemoryNetwork's."""

    def __call__(
        self,
        *,
        identity: Identity,
        listen: Sequence[str],
        announce: Sequence[str],
        gate: Callable[[PeerId, str], bool],
        metrics: Metrics,
    ) -> AbstractAsyncContextManager[Host]: ...


class Node:
    """A running node. Made by `open_node`, stopped by leaving its block.

    Attributes:
        config, identity, peer_id: who it is.
        data_dir: its folder, None when it touches no disk.
        host: its place in the network.
        rpc: calls under `/lattica/rpc/1.0.0`: register services, call peers.
        dht: signed records.
        control: what commands may ask over the control socket; plug-ins register services here.
        serves: what it tells its peers that it serves, for `lattica peers`: a name and a short text each.
        metrics, log: what it counts and says.
        reachability, mapping: whether others can dial it, what its NAT does; this version does not find out.
    """

    reachability: Reachability = "unknown"
    mapping: Mapping = "unknown"

    def __init__(
        self, config: NodeConfig, identity: Identity, *, clock: Callable[[], float], rng: random.Random
    ) -> None:
        self.config = config
        self.identity = identity
        self.peer_id = identity.peer_id
        self.data_dir: Path | None = config.folder
        self.serves: dict[str, str] = {}
        self.metrics = Metrics()
        self._peer_count = self.metrics.gauge("lattica_peers", "Peers that are connected.")
        self.log = Log("lattica.node", {"node": str(self.peer_id)[-8:]})
        self._limits = Limits(
            max_argument_bytes=config.max_argument_bytes, max_reply_bytes=config.max_reply_bytes
        )
        self._call_metrics = CallMetrics(self.metrics.registry)
        self.control = Rpc(local=self.peer_id, open_stream=_no_stream)
        self.control.show(self._call_metrics, "control")
        self.host: Host
        self.rpc: Rpc
        self.dht: Records
        self._nursery: trio.Nursery
        self._clock = clock
        self._endpoints: dict[str, Rpc] = {}
        self._bootstrap = BootstrapPolicy(config.bootstrap, rng=rng, now=trio.current_time())
        self._attempts: dict[str, str] = {}  # why the last dial of each bootstrap address failed
        self._changed = trio.lowlevel.ParkingLot()  # a peer came or went
        self._started = trio.current_time()

    # Who and where

    @property
    def addresses(self) -> list[str]:
        """Dialable multiaddrs of this node, with `/p2p/`, no wildcards."""
        return self.host.addresses

    @property
    def uptime_seconds(self) -> float:
        """Since the node was opened."""
        return trio.current_time() - self._started

    def peers(self) -> list[Peer]:
        """The peers that it is connected to."""
        return self.host.peers()

    async def connect(self, address: str) -> PeerId:
        """Dial a multiaddr that ends in `/p2p/ID`; the peer is in `peers()` when this returns.

        Raises:
            DialError: it did not answer, or is not who the address says.
        """
        with span("connect", log=self.log, metrics=self.metrics, address=address):
            return await self.host.connect(address)

    async def online(self, timeout: float = 30.0) -> None:
        """Wait until this node is part of the mesh: connected to a peer.

        A first node, which has no bootstrap list and is dialled by others, returns at once.

        Raises:
            DialError: no bootstrap peer answered within `timeout` seconds; `attempts` tells why.
        """
        with trio.move_on_after(timeout) as waiting:
            while self._bootstrap.peers and not self.peers():
                await self._changed.park()
        if not waiting.cancelled_caught:
            return
        told = "; ".join(f"{address}: {reason}" for address, reason in self._attempts.items())
        raise DialError(
            f"no bootstrap peer answered within {timeout:g} s ({told or 'still dialling'});"
            " check the addresses and that those peers run",
            attempts=tuple(self._attempts.items()),
        )

    # Calls

    def endpoint(self, protocol: str) -> Rpc:
        """Calls under a protocol id of their own; the same object each time. Served from the first use.

        Calls to this node itself go through a local stream: whoever holds a shard may also ask it for tokens.

        Raises:
            LocalProtocolError: the id is not under `/lattica/`, where the gate stands.
        """
        if not protocol.startswith(protocols.GATED_PREFIX):
            raise LocalProtocolError(f"{protocol} is not under {protocols.GATED_PREFIX}, where the gate is")
        if protocol not in self._endpoints:

            async def open_stream(peer: PeerId) -> Stream:
                if peer == self.peer_id:
                    here, there = stream_pair(peer, protocol)
                    self._nursery.start_soon(_answer, rpc, there)
                    return here
                return await self.host.open_stream(peer, [protocol])

            rpc = Rpc(local=self.peer_id, open_stream=open_stream, limits=self._limits)
            rpc.show(self._call_metrics, protocol)
            self.host.serve(protocol, rpc.handle)
            self._endpoints[protocol] = rpc
        return self._endpoints[protocol]

    def gate(self, peer: PeerId, protocol: str) -> bool:
        """Whether `peer` may open a stream under `protocol`; asked of every inbound `/lattica/*` stream.

        Lets everybody in: this version has no swarms. Must not wait.
        """
        self.metrics.counter("lattica_inbound_streams", "Streams that peers opened.", ["protocol"]).labels(
            protocol
        ).inc()
        return True

    # Inside

    def _watch(self, peer: PeerId, connected: bool) -> None:
        """Told by the host of each peer that comes or goes."""
        self._peer_count.inc(1 if connected else -1)
        if connected:
            self._bootstrap.on_connected(peer)
        else:
            self._bootstrap.on_lost(peer, trio.current_time())
            for rpc in self._endpoints.values():
                rpc.forget(peer)
        self._changed.unpark_all()

    async def _keep_bootstrapped(self) -> None:
        """Act on the bootstrap policy until the node stops."""
        async with trio.open_nursery() as nursery:
            while True:
                for peer in self._bootstrap.poll(trio.current_time()):
                    nursery.start_soon(self._dial_bootstrap, peer)
                with trio.move_on_at(self._bootstrap.deadline()):
                    await self._changed.park()

    async def _dial_bootstrap(self, peer: PeerId) -> None:
        for address in self._bootstrap.addresses(peer):
            try:
                await self.connect(address)
            except NetworkError as error:
                self._attempts[address] = str(error)
                self.log.debug("a bootstrap peer did not answer", address=address, why=error)
            else:
                # `_watch` has told the policy, also if the connection is lost again by now.
                self._attempts.pop(address, None)
                return
        self._bootstrap.on_failed(peer, trio.current_time())
        self._changed.unpark_all()  # there is a new deadline


@asynccontextmanager
async def open_node(
    config: NodeConfig | None = None,
    *,
    network: OpenHost | None = None,
    clock: Callable[[], float] = time.time,
    rng: random.Random | None = None,
) -> AsyncIterator[Node]:
    """Run a node for as long as the block runs.

    Args:
        config: by default a node that touches no disk and listens on the default port.
        network: what to open instead of libp2p: a `lattica.testing.MemoryNetwork`.
        clock: unix seconds, for records.
        rng: draws the jitter between dials.

    Raises:
        ConfigError: an address is in use, or the data folder cannot be written or is another running node's.
        LatticaError: whatever ended the block, by itself and not in a group of one.
    """
    config = config or NodeConfig()
    with single_error():
        async with AsyncExitStack() as stack:
            holder = None
            if config.folder is not None:
                holder = stack.enter_context(folder.lock(config.folder))
            identity = Identity.generate() if config.folder is None else folder.load_identity(config.folder)
            node = Node(config, identity, clock=clock, rng=rng or random.Random())
            open_host = network or _libp2p()
            node.host = await stack.enter_async_context(
                open_host(
                    identity=identity,
                    listen=config.listen,
                    announce=config.announce,
                    gate=node.gate,
                    metrics=node.metrics,
                )
            )
            stack.callback(node.host.watch(node._watch))
            await _open_parts(node, stack, holder)
            node.log.info("node is up", peer_id=node.peer_id, addresses=node.addresses)
            yield node
            node.log.info("node stops")


def _libp2p() -> OpenHost:
    from lattica.net.host import open_host  # here, for the second that libp2p takes to import

    return open_host


async def _open_parts(node: Node, stack: AsyncExitStack, holder: folder.Holder | None) -> None:
    """Everything above the network, in start order; the stack stops it."""
    config, policy = node.config, node._bootstrap
    node._nursery = await stack.enter_async_context(trio.open_nursery())
    stack.callback(node._nursery.cancel_scope.cancel)
    node.rpc = node.endpoint(protocols.RPC)
    node.rpc.register(status.public_service(node))
    node.control.register(status.control_service(node))
    for peer in policy.peers:
        node.host.add_addresses(peer, policy.addresses(peer))
    node.dht = Records(
        identity=node.identity,
        rpc=node.endpoint(protocols.RECORDS),
        keepers=policy.peers,
        keeps=not policy.peers,
        clock=node._clock,
        log=node.log,
    )
    stack.callback(_close_endpoints, node)
    if config.metrics is not None:
        address = await stack.enter_async_context(serve_metrics(node.metrics, config.metrics))
        node.log.info("metrics are served", address=address)
    node._nursery.start_soon(node._keep_bootstrapped)
    if holder is not None:
        await stack.enter_async_context(control.serve(holder.control, node.control, log=node.log))
    if config.services:
        for name, open_services in plugins(SERVICES_GROUP, node.log):
            node.log.debug("starting what a package offers", package=name)
            await stack.enter_async_context(open_services(node))


def _close_endpoints(node: Node) -> None:
    for protocol, rpc in node._endpoints.items():
        node.host.unserve(protocol)
        rpc.close()


async def _answer(rpc: Rpc, stream: Stream) -> None:
    """Our own end of a call to ourselves; `Rpc.handle` raises nothing but Cancelled."""
    try:
        await rpc.handle(stream)
    finally:
        stream.reset()


async def _no_stream(peer: PeerId) -> Stream:
    raise LocalProtocolError("a node answers on its control socket; it does not call commands")
