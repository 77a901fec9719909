from __future__ import annotations

import pytest
import trio
import trio.testing

from lattica.errors import DialError
from lattica.net.dial import STAGGER_SECONDS, SharedDial, first_of


async def test_the_first_address_that_connects_wins(autojump_clock: trio.testing.MockClock) -> None:
    async def attempt(address: str) -> str:
        await trio.sleep({"slow": 9, "fast": 1}[address])
        return f"connection to {address}"

    start = trio.current_time()
    assert await first_of(["slow", "fast"], attempt, what="peer") == ("fast", "connection to fast")
    assert trio.current_time() - start == pytest.approx(STAGGER_SECONDS + 1)


async def test_a_dial_that_connects_at_once_waits_for_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async def attempt(address: str) -> str:
        return address

    start = trio.current_time()
    await first_of(["one", "two"], attempt, what="peer")
    assert trio.current_time() == start


async def test_a_failed_address_makes_way_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async def attempt(address: str) -> str:
        if address == "dead":
            raise OSError("refused")
        return address

    start = trio.current_time()
    assert (await first_of(["dead", "dead", "live"], attempt, what="peer"))[0] == "live"
    assert trio.current_time() == start


async def test_when_none_connects_each_reason_is_told() -> None:
    async def attempt(address: str) -> str:
        raise OSError(f"no {address}")

    with pytest.raises(DialError, match="cannot connect to peer") as caught:
        await first_of(["one", "two"], attempt, what="peer")
    assert caught.value.attempts == (("one", "no one"), ("two", "no two"))


async def test_all_who_wait_share_one_connection() -> None:
    dial: SharedDial[str] = SharedDial()
    found: list[str] = []

    async def wait() -> None:
        found.append(await dial.wait())

    async def connect() -> str:
        return "connection"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(dial.run, connect)
    assert found == ["connection", "connection"]


async def test_a_dial_outlives_one_impatient_caller_and_ends_with_the_last(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ended: list[float] = []

    async def connect() -> str:
        try:
            await trio.sleep(100)
        finally:
            ended.append(trio.current_time() - start)
        return "connection"

    async def wait(seconds: float) -> None:
        with trio.move_on_after(seconds):
            await dial.wait()

    start = trio.current_time()
    dial: SharedDial[str] = SharedDial()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, 1)
        nursery.start_soon(wait, 5)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(dial.run, connect)
    assert ended == [5]


async def test_every_waiter_gets_an_error_of_its_own() -> None:
    dial: SharedDial[str] = SharedDial()

    async def connect() -> str:
        raise DialError("nobody there", attempts=[("a", "refused")])

    await dial.run(connect)
    errors = []
    for _ in range(2):
        with pytest.raises(DialError, match="nobody there") as caught:
            await dial.wait()
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    assert errors[0].attempts == errors[1].attempts == (("a", "refused"),)
