"""A node's metrics over HTTP, for Prometheus to read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from lattica.errors import ConfigError
from lattica.telemetry import Metrics


@asynccontextmanager
async def serve_metrics(metrics: Metrics, address: str) -> AsyncIterator[str]:
    """Serve `metrics` at HOST:PORT while the block runs, by prometheus_client's own server in a thread.

    Gives the address that it listens on, which tells the port where 0 was asked for.

    Raises:
        ConfigError: it cannot be listened on.
    """
    from prometheus_client import start_http_server

    host, _, port = address.rpartition(":")
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry=metrics.registry)
    except OSError as error:
        raise ConfigError(f"metrics = {address!r}: {error.strerror}; name another HOST:PORT") from None
    try:
        yield f"{host}:{server.server_port}"
    finally:
        with trio.CancelScope(shield=True):  # half a second at most: its poll interval
            await trio.to_thread.run_sync(server.shutdown)
        server.server_close()
        thread.join()
