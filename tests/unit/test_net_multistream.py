from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from lattica.errors import RemoteProtocolError
from lattica.net.multistream import MAX_PROPOSALS, MessageReader, answer, encode, offer

Agreed = dict[str, tuple[str | None, bytes]]


async def negotiate(wishes: Sequence[str], supported: set[str], *, then: bytes = b"") -> Agreed:
    dialer, listener = trio.testing.memory_stream_pair()
    agreed: Agreed = {}

    async def dial() -> None:
        agreed["dialer"] = await offer(dialer, wishes)
        if then:
            await dialer.send_all(then)
        await dialer.send_eof()

    async def listen() -> None:
        with contextlib.suppress(RemoteProtocolError):
            agreed["listener"] = await answer(listener, supported)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dial)
        nursery.start_soon(listen)
    return agreed


async def test_the_first_common_protocol_is_chosen() -> None:
    agreed = await negotiate(["/a", "/b", "/c"], {"/c", "/b"})
    assert agreed["dialer"][0] == agreed["listener"][0] == "/b"


async def test_no_common_protocol_is_no_error_for_the_side_that_asks() -> None:
    agreed = await negotiate(["/a", "/b"], {"/c"})
    assert agreed == {"dialer": (None, b"")}


async def test_one_wish_costs_one_round_trip() -> None:
    dialer, listener = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(offer, dialer, ["/a"])
        first = await listener.receive_some(1000)
        await listener.send_all(encode("/multistream/1.0.0", "/a"))
    assert first == encode("/multistream/1.0.0", "/a")


async def test_bytes_behind_the_agreement_are_handed_on() -> None:
    dialer, listener = trio.testing.memory_stream_pair()
    await dialer.send_all(encode("/multistream/1.0.0", "/a") + b"data")
    assert await answer(listener, {"/a"}) == ("/a", b"data")
    await listener.send_all(b"more")
    assert await offer(dialer, ["/a"]) == ("/a", b"more")


async def test_endless_proposals_are_broken_off() -> None:
    dialer, listener = trio.testing.memory_stream_pair()
    await dialer.send_all(encode("/multistream/1.0.0", *["/x"] * MAX_PROPOSALS))
    with pytest.raises(RemoteProtocolError, match="proposed"):
        await answer(listener, {"/a"})


@given(messages=st.lists(st.text(max_size=300).filter(lambda text: len(text.encode()) < 1023)))
def test_messages_survive_single_bytes(messages: list[str]) -> None:
    reader = MessageReader()
    found = []
    for byte in encode(*messages) + b"rest":
        reader.feed(bytes([byte]))
        if (message := reader.next_message() if len(found) < len(messages) else None) is not None:
            found.append(message)
    assert found == messages
    assert bytes(reader.rest) == b"rest"


@given(data=st.binary(max_size=200))
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    reader = MessageReader()
    reader.feed(data)
    with contextlib.suppress(RemoteProtocolError):
        while reader.next_message() is not None:
            pass


@pytest.mark.parametrize("start", [b"\xff\xff\xff\x7f", b"\x00", b"\x81\x08"], ids=["huge", "empty", "1025"])
def test_a_length_out_of_bounds_is_refused_at_once(start: bytes) -> None:
    reader = MessageReader()
    reader.feed(start)
    with pytest.raises(RemoteProtocolError):
        reader.next_message()
