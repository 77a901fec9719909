"""The asyncio face of a node: `async with lattica.aio.open_node(config) as node`, with the same names.

The node runs on a trio thread of its own. Calls cross over in batches: what an event loop asks in one pass wakes
the other thread once, and so do the answers. Cancelling a task cancels what it waits for there.
"""

from lattica.aio.node import AsyncioNode, AsyncioRecords, AsyncioRpc, AsyncioStream, open_node

__all__ = ["AsyncioNode", "AsyncioRecords", "AsyncioRpc", "AsyncioStream", "open_node"]
