"""A node on a trio thread of its own, for threads and event loops that are not trio's.

`Background` runs the thread; a `Job` is one piece of work in it, for whoever waits outside; `Held` keeps a block
open there. `lattica.blocking` and `lattica.aio` are its two faces.

Why not anyio's blocking portal: it hands each call over and back again before the caller waits, in which time
Ctrl-C loses the call without cancelling it, it blocks an asyncio loop meanwhile, and it knows no fork.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from contextvars import copy_context
from functools import partial
from typing import Any, Final, Generic, TypeVar

import trio

from lattica.errors import LatticaError, LocalProtocolError, StreamError, single_error
from lattica.node import Node

T = TypeVar("T")
Notify = Callable[[], None]

EXIT_SECONDS: Final = 5.0  # for a node that nobody closed, when the interpreter exits
_MAX_ITEMS: Final = 255  # taken beside the first one, so that the trio thread goes on with other work
_LOOK_SECONDS: Final = 1.0  # Python sleeps over a signal that comes just before it waits, until the wait ends
_THREAD: Final = "lattica"


class Job(Generic[T]):
    """Work on the trio thread, and then its result. `notify` is called there when the result is here."""

    __slots__ = ("_context", "_error", "_is_cancelled", "_notify", "_scope", "_value", "_work")

    def __init__(self, work: Callable[[], Awaitable[T]], notify: Notify) -> None:
        self._work = work
        self._notify = notify
        self._context = copy_context()  # a handler's call passes on its deadline and its trace
        self._scope: trio.CancelScope | None = None
        self._is_cancelled = False
        self._value: T
        self._error: BaseException | None = None

    def result(self) -> T:
        """What the work gave, after `notify`. Raises what it raised."""
        if self._error is None:
            return self._value
        error, self._error = self._error, None
        try:
            raise error
        finally:
            del error  # a frame in a traceback that holds the traceback is a cycle

    # On the trio thread

    def start(self, nursery: trio.Nursery) -> None:
        self._context.run(nursery.start_soon, self._run)

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._notify()

    def cancel(self) -> None:
        self._is_cancelled = True
        if self._scope is not None:
            self._scope.cancel()

    async def _run(self) -> None:
        error: BaseException | None = None
        try:
            with single_error(), trio.CancelScope() as self._scope:
                if self._is_cancelled:
                    self._scope.cancel()
                self._value = await self._work()
            if self._scope.cancelled_caught:
                error = LocalProtocolError("the call was cancelled")
        except trio.Cancelled:
            error = _closed()
            raise
        except BaseException as raised:
            error = raised
        finally:
            self._error = error
            del error
            self._notify()


class Background:
    """A thread that runs trio and a node, from `start` until `stop`.

    `opened` is told when the node is up or could not be opened, `ended` when the thread is over.
    """

    def __init__(
        self,
        open_node: Callable[[], AbstractAsyncContextManager[Node]],
        *,
        opened: Notify,
        ended: Notify,
    ) -> None:
        self.node: Node | None = None
        self.failure: BaseException | None = None  # what ended the node, or kept it from starting
        self._open_node = open_node
        self._tell = (opened, ended)
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name=_THREAD, daemon=True)
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._scope = trio.CancelScope()
        self._stopping = threading.Event()
        self._leave: trio.Event | None = None

    def start(self) -> None:
        """Start the thread; at the interpreter's exit it is stopped, if nobody has done so before."""
        atexit.register(self._at_exit)
        self._thread.start()

    def stop(self) -> None:
        """Begin to close the node, or to break off opening it; `ended` follows. More than once does nothing."""
        self._stopping.set()
        if self._token is not None and os.getpid() == self._pid:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._stop)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the thread's end."""
        atexit.unregister(self._at_exit)
        if os.getpid() == self._pid:
            self._thread.join(timeout)

    def check(self) -> None:
        """Raise LocalProtocolError where waiting for the trio thread would wait for ever."""
        if threading.get_ident() == self._thread.ident:
            raise LocalProtocolError(
                "a blocking call on the node's own thread would wait for itself; await the node's own methods there"
            )
        if os.getpid() != self._pid:
            raise LocalProtocolError(
                "this process was forked, and the node's thread is not in it; open a node after the fork"
            )

    def post(self, work: Callable[[], object]) -> None:
        """Run a function on the trio thread, soon. LatticaError when the node is closed."""
        if self._token is None:
            raise LocalProtocolError("the node is not open; calls belong inside of its `with` block")
        try:
            self._token.run_sync_soon(work)
        except trio.RunFinishedError:
            raise self.closed() from self.failure

    def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run work on the trio thread and block until it is done. Whatever interrupts the wait cancels the work."""
        self.check()
        here = threading.Lock()
        here.acquire()
        job = Job(work, here.release)
        try:
            self.post(partial(self.submit, job))
            while not here.acquire(timeout=_LOOK_SECONDS):
                pass
        except BaseException:  # Ctrl-C, or what another signal's handler raises
            with suppress(LatticaError):
                self.post(job.cancel)
            raise
        return job.result()

    def read(self, function: Callable[[Node], T]) -> T:
        """Run a function that does not wait on the trio thread; what it returns."""

        async def work() -> T:
            if self.node is None:
                raise self.closed()
            return function(self.node)

        return self.call(work)

    def submit(self, job: Job[Any]) -> None:
        """Start a job; its `notify` follows for certain. On the trio thread, or from `post`."""
        if self._nursery is None or self._stopping.is_set():
            job.fail(self.closed())
        else:
            job.start(self._nursery)

    def start_soon(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run something for as long as the node is open; for jobs, on the trio thread."""
        if self._nursery is None:
            raise self.closed()
        self._nursery.start_soon(work)

    def closed(self) -> LatticaError:
        if self.failure is None:
            return _closed()
        return LatticaError(f"the node has stopped: {self.failure}")

    # Inside

    def _run(self) -> None:
        opened, ended = self._tell
        try:
            trio.run(self._main)
        except BaseException as error:
            self.failure = error
        finally:
            if self.node is None:
                opened()
            ended()

    async def _main(self) -> None:
        self._leave = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        with single_error(), self._scope:
            if self._stopping.is_set():
                return
            async with self._open_node() as node:
                try:
                    async with trio.open_nursery() as self._nursery:
                        self.node = node
                        self._tell[0]()
                        await self._leave.wait()
                        self._nursery.cancel_scope.cancel()
                finally:
                    self._nursery = None

    def _stop(self) -> None:
        if self.node is None:
            self._scope.cancel()
        elif self._leave is not None:
            self._leave.set()

    def _at_exit(self) -> None:
        if os.getpid() == self._pid:
            self.stop()
            self._thread.join(EXIT_SECONDS)


class Held(Generic[T]):
    """A block that a task on the trio thread keeps open for somebody outside.

    `work` runs inside of the block as far as its end goes: when a timeout ends the block, it ends, with the
    error that the block raised.
    """

    def __init__(self, background: Background, block: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self.value: T
        self._background = background
        self._block = block
        self._opened = trio.Event()
        self._leave = trio.Event()
        self._ended = trio.Event()
        self._scope = trio.CancelScope()
        self._inside: set[trio.CancelScope] = set()
        self._error: BaseException | None = None

    async def open(self) -> None:
        """Enter the block. Raises what entering it raises."""
        self._background.start_soon(self._hold)
        try:
            await self._opened.wait()
        except trio.Cancelled:
            self._scope.cancel()
            raise
        if self._error is not None:
            raise self._error

    async def work(self, function: Callable[[], Awaitable[Any]]) -> Any:
        """Await something while the block is open."""
        if not self._leave.is_set() and not self._ended.is_set():
            with trio.CancelScope() as scope:
                self._inside.add(scope)
                try:
                    return await function()
                except StreamError:
                    if not scope.cancel_called:
                        raise
                    # Else it was awake already when the block ended, and found its stream gone: the block says why.
                finally:
                    self._inside.discard(scope)
        await self._ended.wait()
        raise self._error or StreamError("the stream was left already; use it inside of its `with` block")

    async def leave(self) -> None:
        """Leave the block. Raises what leaving it raises."""
        self._leave.set()
        await self._ended.wait()
        if self._error is not None:
            raise self._error

    async def _hold(self) -> None:
        try:
            with single_error(), self._scope:
                async with self._block() as self.value:
                    self._opened.set()
                    try:
                        await self._leave.wait()
                    finally:
                        for scope in self._inside:
                            scope.cancel()
        except trio.Cancelled:
            self._error = _closed()
            raise
        except BaseException as error:
            self._error = error
        finally:
            self._opened.set()
            self._ended.set()


async def take_items(stream: AsyncIterator[Any], into: deque[Any]) -> None:
    """Wait for a stream's next item, then take what has arrived with it: one crossing for all of them.

    Raises what the stream raises in place of the first; later it would say the same again. Whoever is cancelled
    loses no item: they lie in `into`.
    """
    into.append(await stream.__anext__())
    with trio.CancelScope(shield=True) as scope, suppress(StopAsyncIteration, LatticaError):
        # Set inside, a deadline that has passed ends the first wait; set at the start, it would end all at once.
        scope.deadline = trio.current_time()
        for _ in range(_MAX_ITEMS):
            into.append(await stream.__anext__())


def _closed() -> LocalProtocolError:
    return LocalProtocolError("the node is closed; calls belong inside of its `with` block")
