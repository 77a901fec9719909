"""Frames of a call: their bytes, their order, and what is refused."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica.errors import LocalProtocolError, OverloadedError, RemoteError, RemoteProtocolError
from lattica.protocols import MAX_ERROR_BYTES, MAX_METHOD_BYTES
from lattica.rpc.call import ClientCall, End, Failure, Item, Message, Request, ServerCalls, pack, parse
from lattica.rpc.failures import error_of, failure_of
from lattica.rpc.framing import Body, FrameReader

texts = st.text(max_size=20)
values = st.none() | st.integers(-5, 5) | texts | st.lists(st.integers(0, 9), max_size=3)
seconds = st.none() | st.floats(0, 1e6)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        Request,
        texts,
        st.lists(values, max_size=3),
        seconds,
        texts.filter(lambda t: len(t.encode()) <= 64),
        st.booleans(),
    ),
    st.builds(Item, values),
    st.builds(End, values),
    st.builds(Failure, texts, texts, st.dictionaries(texts, values, max_size=2)),
)


def body(message: Message) -> Body:
    reader = FrameReader()
    reader.feed(b"".join(pack(message)))
    found = reader.next()
    assert found is not None
    return found


@given(messages)
def test_messages_survive_the_wire(message: Message) -> None:
    assert parse(body(message)) == message


@given(messages, st.data())
def test_changed_frames_raise_only_remote_protocol_error(message: Message, data: st.DataObject) -> None:
    array, section = body(message)
    at = data.draw(st.integers(0, len(array) - 1))
    changed = array[:at] + data.draw(st.binary(max_size=3)) + array[at + data.draw(st.integers(0, 2)) :]
    with contextlib.suppress(RemoteProtocolError):
        pack(parse((changed, section)))  # what is let in can be sent on


@given(st.lists(messages, max_size=12))
def test_any_order_of_frames_is_followed_or_refused(sent: list[Message]) -> None:
    """A server is only ever in a call that began with a Request; a client sees one outcome."""
    calls, client = ServerCalls(), ClientCall()
    client.request(Request("s.m", [], None, "", True))
    requests = outcomes = 0
    for message in sent:
        with contextlib.suppress(RemoteProtocolError):
            got = calls.receive(body(message))
            requests += isinstance(got, Request)
            assert not isinstance(got, Item | End) or requests
            if calls.is_open and not calls.has_more:
                calls.outcome(End(None))
        with contextlib.suppress(RemoteProtocolError):
            outcomes += isinstance(client.receive(body(message)), End | Failure)
    assert outcomes <= 1
    assert client.is_clean is False  # our own End is not said
    client.end()
    assert client.is_clean == (outcomes == 1)


def test_a_second_request_waits_for_the_end_of_the_first() -> None:
    calls, request = ServerCalls(), body(Request("s.m", [], None, "", True))
    calls.receive(request)
    with pytest.raises(RemoteProtocolError):
        calls.receive(request)
    calls.outcome(End(1))
    with pytest.raises(RemoteProtocolError):
        calls.receive(request)  # the caller still owes its End
    calls.receive(body(End(None)))
    assert calls.receive(request) is not None


@pytest.mark.parametrize(
    "message",
    [
        Request("greeter.hello", ["Ada"], 5.0, "00f067aa0ba902b7", False),
        Item(np.array([[1, 2], [3, 4]], np.float32)),
    ],
    ids=["request", "tensor"],
)
def test_bytes_are_those_in_the_documents(message: Message, repository: Path) -> None:
    page = (repository / "docs/wire.md").read_text()
    example = page.partition("## Frames and calls")[2].partition("### An example")[2]
    vectors = ["".join(block.split()) for block in re.findall(r"```text\n(.*?)```", example, flags=re.DOTALL)]
    assert b"".join(pack(message)).hex() in vectors


@pytest.mark.parametrize(
    "fields",
    [
        [0, "m", [], -1, "", False],
        [0, "m", [], math.nan, "", False],
        [0, "m", [], math.inf, "", False],
        [0, "m", [], True, "", False],
        [0, "m", {}, None, "", False],
        [0, "m", [], None, "", 0],
        [0, "m", [], None, ""],
        [0, "m" * (MAX_METHOD_BYTES + 1), [], None, "", False],
        [0, "m", [], None, "t" * 65, False],
        [1],
        [2, 1, 2],
        [3, "code", "text"],
        [3, "code", "t" * (MAX_ERROR_BYTES + 1), {}],
        [3, "c" * 200, "text", {}],
        [4],
        [4, None],
        [5],
        [-1],
        [],
        {},
        0,
    ],
)
def test_frames_that_no_side_writes_are_refused(fields: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        parse((msgpack.packb(fields), memoryview(b"")))


def test_a_method_name_over_the_limit_is_its_callers_mistake() -> None:
    with pytest.raises(LocalProtocolError, match="256 bytes"):
        pack(Request("m" * (MAX_METHOD_BYTES + 1), [], None, "", False))


@pytest.mark.parametrize("wait", [-1, math.nan, math.inf, "soon", None, 1e9])
def test_advice_to_wait_is_only_taken_if_it_makes_sense(wait: object) -> None:
    error = error_of(Failure("OverloadedError", "full", {"retry_after": wait}), method="s.m", peer=None)
    assert isinstance(error, OverloadedError)
    assert error.retry_after == 1.0


def test_an_error_from_further_away_keeps_its_name() -> None:
    first = error_of(Failure("KeyError", "'x'", {"a": 1}), method="far.m", peer=None)
    second = error_of(failure_of(ExceptionGroup("", [first])), method="near.m", peer=None)
    assert isinstance(second, RemoteError)
    assert (second.code, second.text, second.details, second.method) == (
        "KeyError",
        "'x'",
        {"a": 1},
        "near.m",
    )
