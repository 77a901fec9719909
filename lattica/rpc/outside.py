"""Handlers that run outside of trio: plain functions in threads. What their Call offers there."""

from __future__ import annotations

import inspect
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import fields
from functools import partial, wraps
from typing import Any, Final
from weakref import WeakSet

import trio

from lattica.rpc.methods import Call, Handler

MAX_HANDLER_THREADS: Final = 64  # of one node; a handler beyond them waits for a thread, within its deadline

_END: Final = object()
_made: WeakSet[Handler] = WeakSet()  # by in_thread
_threads: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("lattica_handler_threads")


class OutsideCall(Call):
    """A Call for a handler that does not run in trio: `remaining` works there, and `items` is what is given."""

    def __init__(self, call: Call, items: Any) -> None:
        for field in fields(Call):
            setattr(self, field.name, getattr(call, field.name))
        self.items = items
        remaining = call.remaining()
        self._end = None if remaining is None else time.monotonic() + remaining

    def remaining(self) -> float | None:
        """Seconds until the deadline, 0 when it has passed, None without one."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())


class BlockingItems:
    """A caller's items for a handler in a thread: `for item in call.items`."""

    def __init__(self, items: AsyncIterator[Any], run: Callable[..., Any]) -> None:
        self._items = items
        self._run = run

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = self._run(_next, self._items)
        if item is _END:
            raise StopIteration
        return item


async def _next(items: AsyncIterator[Any]) -> Any:
    try:
        return await items.__anext__()
    except StopAsyncIteration:
        return _END


def in_thread(handler: Handler) -> Handler:
    """A plain function, or generator function, as a handler: it runs in a thread.

    A thread cannot be interrupted: when the call ends early its work is left to itself, and it counts as one of
    MAX_HANDLER_THREADS until it returns.
    """
    if inspect.isgeneratorfunction(handler):

        @wraps(handler)
        async def stream(call: Call, *args: Any) -> AsyncIterator[Any]:
            items: Generator[Any, None, None] = handler(_threaded(call), *args)
            try:
                while (item := await _run(partial(next, items, _END))) is not _END:
                    yield item
            finally:
                if inspect.getgeneratorstate(items) != inspect.GEN_RUNNING:
                    with trio.CancelScope(shield=True):
                        await _run(items.close)

        _made.add(stream)
        return stream

    @wraps(handler)
    async def unary(call: Call, *args: Any) -> Any:
        return await _run(partial(handler, _threaded(call), *args))

    _made.add(unary)
    return unary


def is_threaded(handler: Handler) -> bool:
    """Whether `in_thread` made it."""
    return handler in _made


def _threaded(call: Call) -> OutsideCall:
    return OutsideCall(call, BlockingItems(call.items.__aiter__(), trio.from_thread.run))


async def _run(function: Callable[[], Any]) -> Any:
    try:
        limiter = _threads.get()
    except LookupError:
        limiter = trio.CapacityLimiter(MAX_HANDLER_THREADS)
        _threads.set(limiter)
    return await trio.to_thread.run_sync(  # (trio-typing, which libp2p brings, knows an older trio)
        function,
        thread_name="lattica handler",
        abandon_on_cancel=True,
        limiter=limiter,  # type: ignore[call-arg]
    )
