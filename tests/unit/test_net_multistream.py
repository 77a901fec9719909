from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from lattica.errors import RemoteProtocolError, StreamError
from lattica.net.multistream import MAX_PROPOSALS, LazyOffer, MessageReader, answer, encode, offer

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


# An offer whose answer nobody waits for


@given(cuts=st.lists(st.integers(0, 60), max_size=6))
def test_a_lazy_offers_answer_may_come_in_pieces(cuts: list[int]) -> None:
    lazy = LazyOffer("/a")
    assert lazy.proposal == encode("/multistream/1.0.0", "/a")
    data = encode("/multistream/1.0.0", "/a") + b"data"
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    rest: bytes | None = None
    for start, end in zip([0, *ends], ends, strict=False):
        if rest is not None:
            rest += data[start:end]
        else:
            rest = lazy.feed(data[start:end])
    assert rest == b"data"


def test_a_refused_lazy_offer_says_what_was_refused() -> None:
    with pytest.raises(StreamError, match="does not speak /a"):
        LazyOffer("/a").feed(encode("/multistream/1.0.0", "na"))


@pytest.mark.parametrize("told", [("/http/1.1",), ("/multistream/1.0.0", "/b")])
def test_another_answer_to_a_lazy_offer_breaks_the_protocol(told: tuple[str, ...]) -> None:
    with pytest.raises(RemoteProtocolError):
        LazyOffer("/a").feed(encode(*told))


@given(data=st.binary(max_size=200))
def test_random_answers_to_a_lazy_offer_raise_nothing_else(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError, StreamError):
        LazyOffer("/a").feed(data)


async def test_what_follows_a_proposal_travels_with_it() -> None:
    dialer, listener = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            assert await offer(dialer, ["/a"], then=b"first words") == ("/a", b"")

        nursery.start_soon(ask)
        assert await answer(listener, {"/a"}) == ("/a", b"first words")
