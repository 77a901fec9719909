"""What goes wrong in a handler, and what its caller is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from lattica.errors import (
    LatticaError,
    LocalProtocolError,
    NoSuchMethodError,
    OverloadedError,
    RemoteError,
    RemoteProtocolError,
)
from lattica.protocols import MAX_ERROR_BYTES, RPC
from lattica.rpc import Call
from lattica.rpc.call import End, Item, pack
from lattica.rpc.framing import varint


async def test_what_a_handler_raises_reaches_the_caller_and_the_log_once(
    pair: Any, autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with pair() as p:
        runs = []

        @p.service.method
        async def fail(call: Call, n: int) -> None:
            runs.append(call.trace)
            raise KeyError(f"no {n}")

        with pytest.raises(RemoteError) as caught:
            await p.call("fail", 7)
        error = caught.value
        assert (error.code, error.text, error.method) == ("KeyError", "'no 7'", "s.fail")
        assert error.peer == p.bob.peer_id
        assert len(runs) == 1
        assert len(caplog.records) == 1
        assert caplog.records[0].__dict__["fields"]["trace"] == runs[0]
        assert "Traceback" in caplog.text


async def test_a_failed_idempotent_call_is_not_repeated(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:
        runs = []

        @p.service.method
        async def fail(call: Call) -> None:
            runs.append(1)
            raise ValueError

        with pytest.raises(RemoteError):
            await p.call("fail", idempotent=True)
        assert len(runs) == 1


async def test_an_error_half_way_comes_after_the_items_before_it(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def count(call: Call) -> AsyncIterator[int]:
            for i in range(3):
                yield i
            raise RuntimeError("no more")

        got = []
        with pytest.raises(RemoteError, match="RuntimeError: no more"):
            async with p.stream("count") as items:
                await trio.sleep(5)  # the error is here long before the first item is read
                async for item in items:
                    got.append(item)
        assert got == [0, 1, 2]


async def test_a_group_of_one_counts_as_that_one(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        async def lookup() -> None:
            raise LookupError("inside")

        @p.service.method
        async def fail(call: Call) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lookup)

        with pytest.raises(RemoteError) as caught:
            await p.call("fail")
        assert (caught.value.code, caught.value.text) == ("LookupError", "inside")


class NoRouteError(LatticaError):
    @property
    def details(self) -> dict[str, Any]:
        return {"missing": [8, 9]}


async def test_details_of_an_error_cross(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def route(call: Call) -> None:
            raise NoRouteError("no route")

        @p.service.method
        async def busy(call: Call) -> None:
            raise OverloadedError("come back", retry_after=3.5)

        @p.service.method
        async def strange(call: Call) -> None:
            error = ValueError("strange")
            error.details = {"it": object()}  # type: ignore[attr-defined]
            raise error

        with pytest.raises(RemoteError) as route_error:
            await p.call("route")
        assert route_error.value.details == {"missing": [8, 9]}
        with pytest.raises(OverloadedError, match="come back") as busy_error:
            await p.call("busy")
        assert busy_error.value.retry_after == 3.5
        with pytest.raises(RemoteError) as strange_error:
            await p.call("strange")
        assert strange_error.value.details == {}


async def test_a_long_text_is_cut(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def fail(call: Call) -> None:
            raise ValueError("\u00e9\ud800" * MAX_ERROR_BYTES)

        with pytest.raises(RemoteError) as caught:
            await p.call("fail")
        assert len(caught.value.text.encode()) <= MAX_ERROR_BYTES
        assert caught.value.text.startswith("\u00e9?\u00e9?")
        assert caught.value.text.endswith("...")


@pytest.mark.parametrize("method", ["s.nothing", "t.hello", "hello", "", "s.hello.more", "s."])
async def test_a_method_that_is_not_there_is_named(pair: Any, method: str, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def hello(call: Call) -> None: ...

        with pytest.raises(NoSuchMethodError) as caught:
            await p.rpc.call(p.bob.peer_id, method)
        assert repr(method) in str(caught.value)
        assert caught.value.peer == p.bob.peer_id


async def test_arguments_that_do_not_fit_are_refused_before_the_handler_runs(
    pair: Any, autojump_clock: object
) -> None:
    async with pair() as p:
        runs = []

        @p.service.method
        async def two(call: Call, a: int, b: int = 0) -> None:
            runs.append((a, b))

        for args in [(), (1, 2, 3)]:
            with pytest.raises(
                RemoteError, match=f"TypeError: s.two takes 1 to 2 arguments, got {len(args)}"
            ):
                await p.call("two", *args)
        assert runs == []


async def test_what_does_not_travel_fails_where_it_is_and_costs_no_stream(
    pair: Any, autojump_clock: object
) -> None:
    async with pair() as p:

        @p.service.method
        async def ask(call: Call, what: object) -> Any:
            return {1, 2} if what == "set" else what

        assert await p.call("ask", 1) == 1
        started = trio.current_time()
        with pytest.raises(LocalProtocolError, match="set"):
            await p.call("ask", {3})
        with pytest.raises(LocalProtocolError, match="set"):
            async with p.stream("ask", {3}):
                pass
        assert trio.current_time() == started
        with pytest.raises(RemoteError, match=r"LocalProtocolError: .*set"):
            await p.call("ask", "set")
        assert await p.call("ask", 2) == 2
        assert trio.current_time() == pytest.approx(started + 0.04)  # two round trips: the stream served on


async def test_the_exception_of_the_block_comes_out_as_it_is(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def wait(call: Call) -> None:
            await trio.sleep_forever()

        with pytest.raises(ZeroDivisionError):
            async with p.stream("wait"):
                raise ZeroDivisionError


async def test_a_call_that_gets_items_says_how_to_ask(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def count(call: Call) -> AsyncIterator[int]:
            yield 1

        with pytest.raises(LocalProtocolError, match=r"rpc\.stream"):
            await p.call("count")


async def test_nothing_is_sent_after_finish(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def total(call: Call) -> int:
            return len([item async for item in call.items])

        async with p.stream("total") as stream:
            await stream.finish()
            await stream.finish()
            with pytest.raises(LocalProtocolError, match="finish"):
                await stream.send(1)
            assert await stream.result() == 0


async def test_a_handler_that_exits_does_not_take_the_node_down(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def leave(call: Call) -> None:
            raise SystemExit(3)

        with pytest.raises(RemoteError, match="SystemExit"):
            await p.call("leave")
        with pytest.raises(RemoteError, match="SystemExit"):
            await p.call("leave")


async def test_a_failed_handler_ends_a_send_that_waits_for_room(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        @p.service.method
        async def fine(call: Call) -> str:
            return "fine"

        @p.service.method
        async def refuse(call: Call) -> None:
            await trio.sleep(1)
            raise PermissionError("not for you")

        sent = 0
        with pytest.raises(RemoteError, match="PermissionError: not for you"):
            async with p.stream("refuse") as stream:
                while True:
                    await stream.send(bytes(100_000))
                    sent += 1
        assert 2 <= sent <= 6  # the window, what is read ahead, and no more
        assert trio.current_time() < 1.1
        started = trio.current_time()
        assert await p.call("fine") == "fine"
        assert trio.current_time() - started == pytest.approx(0.02)  # no negotiation: the stream serves on


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n" * 10, id="http"),
        pytest.param(varint(1 << 30) + varint(0), id="oversize"),
        pytest.param(b"\x02\x00\x91\x04" * 3 + b"\x03\x00\x92\x01\x01", id="an item without a request"),
        pytest.param(b"\x02\x00\x91\x07", id="unknown kind"),
    ],
)
async def test_a_peer_that_sends_garbage_fails_alone(
    pair: Any, garbage: bytes, autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with pair() as p:

        @p.service.method
        async def sleep(call: Call) -> str:
            await trio.sleep(5)
            return "slept"

        async def good() -> None:
            assert await p.call("sleep") == "slept"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(good)
            await trio.sleep(1)
            stream = await p.alice.open_stream(p.bob.peer_id, [RPC])
            await stream.send_all(garbage)
            answer = b""
            while data := await stream.receive_some():
                answer += data
            assert b"RemoteProtocolError" in answer
            assert trio.current_time() < 2
        assert len(caplog.records) == 1


async def test_a_stream_with_something_left_on_it_carries_no_other_call(
    pair: Any, autojump_clock: object
) -> None:
    async with pair() as p:

        async def talk_on(stream: Any) -> None:
            await stream.receive_some()
            await stream.send_all(b"".join(pack(End("yes")) + pack(Item("and more"))))
            await trio.sleep_forever()

        p.bob.unserve(RPC)
        p.bob.serve(RPC, talk_on)
        for _ in range(3):
            assert await p.call("hello") == "yes"


async def test_garbage_from_the_server_is_named_by_its_peer(pair: Any, autojump_clock: object) -> None:
    async with pair() as p:

        async def lie(stream: Any) -> None:
            await stream.receive_some()
            await stream.send_all(b"\x01\x00\xc1")

        p.bob.unserve(RPC)
        p.bob.serve(RPC, lie)
        for _ in range(2):
            with pytest.raises(RemoteProtocolError) as caught:
                await p.call("hello")
            assert caught.value.peer == p.bob.peer_id
        with pytest.raises(RemoteProtocolError) as caught:
            async with p.stream("hello") as stream:
                await stream.result()
        assert caught.value.peer == p.bob.peer_id
