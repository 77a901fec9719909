"""Blocking grpc over an insecure channel, a thread for each caller: bytes through generic handlers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import _lines as lines
import _threads as threads
import grpc

OPTIONS = [
    ("grpc.max_send_message_length", lines.MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", lines.MAX_MESSAGE_BYTES),
]
SERVER_THREADS = 64  # as many as there are callers at most


def echo(request: bytes, context: grpc.ServicerContext) -> bytes:
    return request


def items(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    data = bytes(int(request))
    while context.is_active():
        yield data


def serve(host: str) -> None:
    server = grpc.server(ThreadPoolExecutor(SERVER_THREADS), options=OPTIONS)
    methods = {
        "echo": grpc.unary_unary_rpc_method_handler(echo),
        "items": grpc.unary_stream_rpc_method_handler(items),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", methods),))
    port = server.add_insecure_port(f"{host}:0")
    server.start()
    lines.serve_state()
    lines.say({"address": f"{host}:{port}"})
    server.wait_for_termination()


class Client:
    def __init__(self, address: str) -> None:
        self._address = address
        channel = grpc.insecure_channel(address, options=OPTIONS)
        self._echo = channel.unary_unary("/bench/echo")
        self._items = channel.unary_stream("/bench/items")

    def calls(self, job: lines.Job) -> lines.Result:
        return threads.calls(job, self._echo)

    def items(self, job: lines.Job) -> lines.Result:
        tally = lines.Tally(job["seconds"])
        call = self._items(str(job["bytes"]).encode())
        for item in call:
            tally.bytes += len(item)
            if not tally.open():
                break
        call.cancel()
        return tally.result()

    def connect(self, job: lines.Job) -> lines.Result:
        tally = lines.Tally(0)
        for _ in range(job["count"]):
            with tally.piece():
                # Channels of one process share connections unless told otherwise.
                channel = grpc.insecure_channel(
                    self._address, options=[*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
                )
                channel.unary_unary("/bench/echo")(b"x")
            channel.close()
        return tally.result()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        threads.work(Client(sys.argv[2]))
