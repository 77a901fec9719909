"""Background tasks of a block, without the groups that a nursery wraps errors in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """A nursery that is cancelled when the block ends; what the block raises comes out as it is.

    For tasks that raise nothing: they tell of their errors in a way of their own.
    """
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except (trio.Cancelled, GeneratorExit):
            raise
        except BaseException as error:
            failure = error  # raised below, where the nursery cannot wrap it
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
