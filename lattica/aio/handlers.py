"""Handlers that are written for asyncio, as trio calls them."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import wraps
from typing import Any, Final, Self

from lattica.aio.bridge import Bridge
from lattica.rpc.methods import Handler
from lattica.rpc.outside import OutsideCall, is_threaded
from lattica.rpc.service import Call

_END: Final = object()


class _Items:
    """A caller's items for a handler in asyncio."""

    def __init__(self, bridge: Bridge, items: AsyncIterator[Any]) -> None:
        self._bridge = bridge
        self._items = items

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        return await self._bridge.call(self._items.__anext__)


def in_asyncio(bridge: Bridge, handler: Handler) -> Handler:
    """A handler that asyncio runs, as one for trio. What runs in threads does so already."""
    if is_threaded(handler):
        return handler

    def outside(call: Call) -> OutsideCall:
        return OutsideCall(call, _Items(bridge, call.items.__aiter__()))

    if inspect.isasyncgenfunction(handler):

        @wraps(handler)
        async def stream(call: Call, *args: Any) -> AsyncIterator[Any]:
            items = handler(outside(call), *args)
            try:
                while (item := await bridge.run_handler(_next(items))) is not _END:
                    yield item
            finally:
                with suppress(RuntimeError):
                    bridge.run_here(lambda: bridge.loop.create_task(items.aclose()))

        return stream

    @wraps(handler)
    async def unary(call: Call, *args: Any) -> Any:
        return await bridge.run_handler(handler(outside(call), *args))

    return unary


async def _next(items: AsyncIterator[Any]) -> Any:
    try:
        return await items.__anext__()
    except StopAsyncIteration:
        return _END
