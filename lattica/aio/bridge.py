"""Between an asyncio loop and a node on a trio thread: functions, work and handlers that cross over."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import trio

from lattica.background import Background, Job
from lattica.config import NodeConfig
from lattica.errors import LocalProtocolError
from lattica.node import open_node

T = TypeVar("T")


class Bridge:
    """Between an asyncio loop and a Background: functions to run, in order, one wake-up for all that wait."""

    def __init__(self, config: NodeConfig | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.opened = Waiter(self)
        self.ended = Waiter(self)
        self.background = Background(lambda: open_node(config), opened=self.opened, ended=self.ended)
        self._there: deque[Callable[[], object]] = deque()
        self._here: deque[Callable[[], object]] = deque()
        self._is_waking_there = False
        self._is_waking_here = False

    async def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run work on the trio thread; its result. Cancelled, it waits until the work has been cancelled."""
        if asyncio.get_running_loop() is not self.loop:
            raise LocalProtocolError("the node belongs to another event loop; open one in this loop")
        self.background.check()
        waiter = Waiter(self)
        job = Job(work, waiter)
        self.run_there(partial(self.background.submit, job))
        await waiter.wait(partial(self.run_there, job.cancel))
        return job.result()

    def run_there(self, function: Callable[[], object]) -> None:
        """Run a function on the trio thread, soon. From the loop's thread."""
        self._there.append(function)
        if self._is_waking_there:
            return
        self._is_waking_there = True
        try:
            self.background.post(self._run_there)
        except BaseException:
            self._is_waking_there = False
            self._there.clear()
            raise

    def run_here(self, function: Callable[[], object]) -> None:
        """Run a function in the loop, soon. From the trio thread; RuntimeError when the loop is closed."""
        self._here.append(function)
        if self._is_waking_here:
            return
        self._is_waking_here = True
        try:
            self.loop.call_soon_threadsafe(self._run_here)
        except RuntimeError:
            self._is_waking_here = False
            self._here.clear()
            raise

    def _run_there(self) -> None:
        self._is_waking_there = False
        while self._there:
            self._there.popleft()()

    def _run_here(self) -> None:
        self._is_waking_here = False
        while self._here:
            self._here.popleft()()

    # Handlers

    async def run_handler(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a handler's coroutine in the loop; from trio. Cancelled, it cancels the handler and goes on."""
        done = trio.Event()
        task: asyncio.Task[T] | None = None

        def start() -> None:
            nonlocal task
            task = self.loop.create_task(work)
            task.add_done_callback(finished)

        def finished(task: asyncio.Task[T]) -> None:
            task.cancelled() or task.exception()  # it is read here, whether or not somebody waits for it
            with suppress(LocalProtocolError):
                self.run_there(done.set)

        def cancel() -> None:
            if task is not None:
                task.cancel()

        try:
            self.run_here(start)
        except RuntimeError as error:
            work.close()
            raise LocalProtocolError("the event loop of the handler is closed") from error
        try:
            await done.wait()
        except trio.Cancelled:
            with suppress(RuntimeError):
                self.run_here(cancel)
            raise
        assert task is not None
        if task.cancelled():
            raise LocalProtocolError("the handler was cancelled in its event loop")
        return task.result()


class Waiter:
    """One task's wait for one word from the trio thread; called there."""

    __slots__ = ("_bridge", "_future", "_is_over")

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._future: asyncio.Future[None] = bridge.loop.create_future()
        self._is_over = False

    def __call__(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._bridge.run_here(self._finish)

    def _finish(self) -> None:
        self._is_over = True
        if not self._future.done():
            self._future.set_result(None)

    async def wait(self, cancel: Callable[[], object]) -> None:
        """Until the word comes. When this task is cancelled: `cancel`, wait for the word, raise CancelledError."""
        try:
            await self._future
        except asyncio.CancelledError:
            with suppress(LocalProtocolError):
                cancel()
                if not self._is_over:
                    self._future = self._bridge.loop.create_future()
                    await self._future
            raise
