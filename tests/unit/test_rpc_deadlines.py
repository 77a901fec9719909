"""What is held expires in time, what is released does not, and nothing runs when nothing is held."""

from __future__ import annotations

import pytest
import trio

from lattica.rpc.deadlines import Deadlines


class Entry:
    def __init__(self) -> None:
        self.expired: list[float] = []

    def expire(self) -> None:
        self.expired.append(trio.current_time())


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


async def test_entries_expire_at_their_times_in_whatever_order_they_came(autojump_clock: object) -> None:
    deadlines, start = Deadlines(), trio.current_time()
    entries = {at: Entry() for at in (5.0, 1.0, 3.0, 3.0005, 10.0)}
    for at, entry in entries.items():
        deadlines.hold(entry, start + at)
    await trio.sleep(2)
    late = entries[2.5] = Entry()
    deadlines.hold(late, start + 2.5)
    await trio.sleep(20)
    for at, entry in entries.items():
        assert entry.expired == [pytest.approx(start + at, abs=0.0011)]


async def test_what_is_released_never_expires(autojump_clock: object) -> None:
    deadlines, kept, released = Deadlines(), Entry(), Entry()
    deadlines.hold(released, trio.current_time() + 1)
    deadlines.hold(kept, trio.current_time() + 2)
    deadlines.release(released)
    deadlines.release(released)
    await trio.sleep(5)
    assert (len(kept.expired), released.expired) == (1, [])


async def test_a_time_that_has_passed_expires_at_once(autojump_clock: object) -> None:
    deadlines, entry, start = Deadlines(), Entry(), trio.current_time()
    deadlines.hold(entry, start - 1)
    await trio.sleep(0.01)
    assert entry.expired == [start]


async def test_the_task_ends_when_nothing_is_held_and_starts_again(autojump_clock: object) -> None:
    deadlines, before = Deadlines(), tasks()
    for _ in range(2):
        entry = Entry()
        deadlines.hold(entry, trio.current_time() + 1)
        assert tasks() == before + 1
        await trio.sleep(2)
        assert len(entry.expired) == 1
        assert tasks() == before


async def test_closing_ends_the_task_once_nothing_is_held(autojump_clock: object) -> None:
    deadlines, before = Deadlines(), tasks()
    entries = [Entry(), Entry()]
    for entry in entries:
        deadlines.hold(entry, trio.current_time() + 30)
    await trio.sleep(0.1)
    deadlines.release(entries[0])
    deadlines.close()
    await trio.sleep(0.1)
    assert tasks() == before + 1
    deadlines.release(entries[1])
    await trio.sleep(0.1)
    assert tasks() == before
