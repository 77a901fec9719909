"""Whatever a peer sends instead of a message, RemoteProtocolError is all that comes of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica.errors import RemoteProtocolError
from lattica.ids import Cid, PeerId
from lattica.rpc.call import Item, pack
from lattica_infer.messages import (
    MAX_FRAME_NODES,
    Alive,
    Announcement,
    Hop,
    Opened,
    Sampling,
    SessionSpec,
    StepFrame,
    VerdictFrame,
    event_from_value,
    owner_id,
    session_id,
)

VOCAB, WIDTH = 100, 8
ADA, BOB = (PeerId.from_public_key(bytes([n]) * 32) for n in (1, 2))

SPEC = SessionSpec(
    session=b"s" * 16,
    model=Cid.of(b"model"),
    layers=range(10),
    rows=300,
    previous=ADA,
    next=Hop(BOB, range(10, 20), ("/ip4/127.0.0.1/tcp/4001",)),
    numeric_class="cpu-fp32-packed",
    sampling=Sampling(seed=2**64 - 1, temperature=0.7, top_k=40, top_p=0.9),
)
FRAME = StepFrame(
    epoch=0,
    window=0,
    base=12,
    commit=(0, 2),
    tokens=(5, 6, 7, 8),
    parents=(-1, 0, 1, 0),
    walk=True,
    hidden=np.ones((4, WIDTH), np.float32),
)
VERDICT = VerdictFrame(epoch=0, window=3, tokens=(7, 9), path=(1,), logprobs=(-0.25, -1.5))
ANNOUNCEMENT = Announcement(range(10), "cpu-fp32-packed", "f32", ("/ip4/127.0.0.1/tcp/4001",))


def read_frame(value: object) -> StepFrame:
    return StepFrame.from_value(value, vocab=VOCAB, width=WIDTH)


def read_event(value: object) -> object:
    return event_from_value(value, vocab=VOCAB)


READERS: list[tuple[Callable[[object], object], Any]] = [
    (SessionSpec.from_value, SPEC.to_value()),
    (read_frame, FRAME.to_value()),
    (read_event, VERDICT.to_value()),
    (read_event, Opened("cpu-fp32", 20.0).to_value()),
    (read_event, Alive(3, 3, 1000).to_value()),
    (Announcement.from_value, ANNOUNCEMENT.to_value()),
    (session_id, b"s" * 16),
    (owner_id, str(ADA)),
]

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.sampled_from(["opened", "verdict", "alive"])
    | st.builds(np.zeros, st.just((4, WIDTH)), st.sampled_from([np.float32, np.float64, np.int64])),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=8), inner, max_size=9),
    max_leaves=12,
)


def spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a plain value, the whole included."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path, *(spot for key in keys for spot in spots(value[key], (*path, key)))]


@given(st.sampled_from(READERS), plain)
def test_random_values_raise_remote_protocol_error_alone(
    reader: tuple[Callable[[object], object], Any], value: object
) -> None:
    read, _ = reader
    with contextlib.suppress(RemoteProtocolError):
        read(value)


@given(st.sampled_from(READERS), st.data())
def test_mutated_messages_raise_remote_protocol_error_alone(
    reader: tuple[Callable[[object], object], Any], data: st.DataObject
) -> None:
    read, value = reader
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(spots(value)))
        replacement = data.draw(plain)
        if not path:
            value = replacement
            continue
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = replacement
    with contextlib.suppress(RemoteProtocolError):
        read(value)


def test_a_spec_survives_the_way_there() -> None:
    assert SessionSpec.from_value(SPEC.to_value()) == SPEC


def test_a_frame_survives_the_way_there() -> None:
    arrived = read_frame(FRAME.to_value())
    assert arrived.hidden is not None
    assert FRAME.hidden is not None
    assert (arrived.tokens, arrived.parents, arrived.walk) == (FRAME.tokens, FRAME.parents, FRAME.walk)
    assert (arrived.commit, arrived.base) == (FRAME.commit, FRAME.base)
    assert np.array_equal(arrived.hidden, FRAME.hidden)


def test_a_chain_travels_without_its_parents() -> None:
    chain = StepFrame(0, 0, 0, (), (1, 2, 3), (-1, 0, 1), False)
    value = chain.to_value()
    assert value[5] is None
    assert StepFrame.from_value(value, vocab=VOCAB, width=None).parents == (-1, 0, 1)


@pytest.mark.parametrize(
    "event", [VERDICT, Opened("cuda-bf16", 20.0), Alive(1, 2, 3)], ids=lambda e: type(e).__name__
)
def test_an_event_survives_the_way_back(event: VerdictFrame | Opened | Alive) -> None:
    assert read_event(event.to_value()) == event


def test_an_announcement_survives_its_record() -> None:
    assert Announcement.from_value(ANNOUNCEMENT.to_value()) == ANNOUNCEMENT


def test_the_example_in_the_wire_page_is_what_travels(repository: Path) -> None:
    frame = StepFrame(0, 3, 41, (0, 2), (5, 17, 9, 17), (-1, 0, 1, 0), walk=True)
    verdict = VerdictFrame(0, 3, (17, 9, 4), (1, 2), (-0.5, -0.25, -1.0))
    page = (repository / "docs" / "wire.md").read_text().replace("\n", "")
    for message in (frame, verdict):
        assert b"".join(pack(Item(message.to_value()))).hex() in page


def frame_with(**changes: Any) -> list[Any]:
    names = ["epoch", "window", "base", "commit", "tokens", "parents", "walk", "hidden"]
    value = FRAME.to_value()
    for name, new in changes.items():
        value[names.index(name)] = new
    return value


BAD_HIDDEN = np.ones((4, WIDTH), np.float32)
BAD_HIDDEN[2, 3] = np.inf


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": [5, 6, 7, VOCAB]}, "tokens 100 is not in 0..99"),
        ({"tokens": [5, 6, 7, -1]}, "tokens -1 is not in 0..99"),
        ({"tokens": [5, 6, 7, True]}, "tokens is a bool"),
        ({"tokens": []}, "at least one token"),
        ({"tokens": [1] * (MAX_FRAME_NODES + 1)}, "more than 1024"),
        ({"parents": [-1, 0, 1]}, "3 parents for 4 tokens"),
        ({"parents": [-1, 0, 1, 3]}, "node 3 hangs on 3"),
        ({"parents": [-1, -1, 1, 0]}, "node 1 hangs on -1"),
        ({"parents": [0, 0, 1, 1]}, "node 0 hangs on 0"),
        ({"walk": 1}, "walk is a int"),
        ({"hidden": None}, "not a tensor"),
        ({"hidden": np.ones((4, WIDTH + 1), np.float32)}, r"float32 \[4, 9\], not float32 \[4, 8\]"),
        ({"hidden": np.ones((4, WIDTH), np.float64)}, "float64"),
        ({"hidden": BAD_HIDDEN}, "not finite"),
    ],
)
def test_a_frame_that_would_harm_the_model_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        read_frame(frame_with(**changes))


def test_the_first_stage_takes_no_activations() -> None:
    with pytest.raises(RemoteProtocolError, match="embeds the tokens itself"):
        StepFrame.from_value(FRAME.to_value(), vocab=VOCAB, width=None)


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        (Sampling(seed=-1), "seed -1"),
        (Sampling(seed=2**64), "out of range: take 0 to 2"),
        (Sampling(temperature=-0.1), "temperature -0.1"),
        (Sampling(temperature=float("nan")), "temperature nan"),
        (Sampling(top_k=-1), "top_k -1"),
        (Sampling(top_p=0.0), "top_p 0.0"),
        (Sampling(top_p=1.1), "top_p 1.1"),
    ],
)
def test_sampling_out_of_range_is_named(sampling: Sampling, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        sampling.check()
