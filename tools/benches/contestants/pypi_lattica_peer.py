"""The package `lattica` from PyPI (libp2p in Rust under Python), which takes our import name and shares no code.

It contacts public servers whenever it starts, so it refuses to start where there is more than loopback. Callers
are threads that wait for `result()`: measured a tenth faster than awaiting the same calls under asyncio.
"""

from __future__ import annotations

import socket
import sys
import time

import _lines as lines
import _threads as threads

if [name for _, name in socket.if_nameindex()] != ["lo"]:
    raise SystemExit(
        "the package lattica contacts public servers: run it in a network namespace with nothing but lo"
    )

from lattica import ConnectionHandler, Lattica, rpc_method, rpc_stream_iter

CONNECT_SECONDS = 20.0


class Bench(ConnectionHandler):
    @rpc_method
    def echo(self, data: bytes) -> bytes:
        return data

    @rpc_stream_iter
    def items(self, size: int):
        data = bytes(size)
        while True:
            yield data


def built(host: str, port: int, bootstraps: list[str]) -> Lattica:
    node = Lattica.builder().with_listen_addrs([f"/ip4/{host}/tcp/{port}"])
    return node.with_bootstraps(bootstraps).with_mdns(False).with_upnp(False).build()


def serve(host: str) -> None:
    with socket.create_server((host, 0)) as probe:  # the node does not tell which port it took
        port = probe.getsockname()[1]
    node = built(host, port, [])
    service = Bench(node)
    assert service.get_service_name() == "Bench"
    lines.serve_state()
    lines.say({"address": f"/ip4/{host}/tcp/{port}/p2p/{node.peer_id()}"})
    while True:
        time.sleep(3600)


class Client:
    def __init__(self, address: str) -> None:
        self._node = built("127.0.0.1", 0, [address])
        server = address.rpartition("/")[2]
        until = time.monotonic() + CONNECT_SECONDS
        while server not in self._node.get_all_peers():
            if time.monotonic() > until:
                raise SystemExit(f"no connection to {address} within {CONNECT_SECONDS:g} s")
            time.sleep(0.02)
        self._stub = Bench(self._node).get_stub(server)

    def calls(self, job: lines.Job) -> lines.Result:
        return threads.calls(job, lambda data: self._stub.echo(data).result())

    def items(self, job: lines.Job) -> lines.Result:
        tally = lines.Tally(job["seconds"])
        stream = self._stub.items(job["bytes"])
        for item in stream:
            tally.bytes += len(item)
            if not tally.open():
                break
        stream.cancel()
        return tally.result()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        threads.work(Client(sys.argv[2]))
