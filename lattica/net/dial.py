"""Which of a peer's addresses to try when, and one dial for all who wait for the same peer.

Staggered as RFC 8305 (happy eyeballs) has it: the next address starts when one failed or a quarter of a
second went by; the first that connects wins and the others are cancelled. Opens nothing itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import trio

from lattica.errors import DialError

STAGGER_SECONDS = 0.25  # RFC 8305's recommended connection attempt delay
MAX_ADDRESSES = 16  # of one peer in one dial

Connection = TypeVar("Connection")


async def first_of(
    addresses: Sequence[str], attempt: Callable[[str], Awaitable[Connection]], *, what: str
) -> tuple[str, Connection]:
    """The first address that connects, and its connection.

    Args:
        attempt: connects to one address or raises an Exception; what it has opened when it is cancelled, it
            closes.
        what: whom we dial, for the error.

    Raises:
        DialError: none connected; `attempts` says why, address by address.
    """
    won: list[tuple[str, Connection]] = []
    failed: list[tuple[str, str]] = []

    async def run(address: str, over: trio.Event) -> None:
        try:
            connection = await attempt(address)
        except Exception as error:
            failed.append((address, str(error) or type(error).__name__))
        else:
            won.append((address, connection))
            nursery.cancel_scope.cancel()
        finally:
            over.set()

    tried = list(dict.fromkeys(addresses))[:MAX_ADDRESSES]
    async with trio.open_nursery() as nursery:
        for address in tried:
            over = trio.Event()
            nursery.start_soon(run, address, over)
            with trio.move_on_after(STAGGER_SECONDS):
                await over.wait()
    if won:
        return won[0]
    reasons = "; ".join(f"{address}: {reason}" for address, reason in failed)
    raise DialError(f"cannot connect to {what} ({reasons})", attempts=failed)


class SharedDial(Generic[Connection]):
    """A dial that several tasks wait for. It goes on while one of them does, and ends with the last."""

    def __init__(self) -> None:
        self._done = trio.Event()
        self._scope = trio.CancelScope()
        self._waiting = 0
        self._connection: Connection | None = None
        self._error: DialError | None = None

    async def run(self, dial: Callable[[], Awaitable[Connection]]) -> None:
        """Dial, in a task of its own."""
        try:
            with self._scope:
                self._connection = await dial()
        except DialError as error:
            self._error = error
        finally:
            self._done.set()

    async def wait(self) -> Connection:
        """The connection.

        Raises:
            DialError: as `first_of`; a fresh one for every waiter.
        """
        self._waiting += 1
        try:
            await self._done.wait()
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._scope.cancel()
        if self._connection is None:
            error = self._error or DialError("the node stopped while it dialled")
            raise DialError(str(error), attempts=error.attempts) from error.__cause__
        return self._connection
