"""Records: what is stored is signed, fresh, within bounds - and nothing else ever is."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattica import RecordError, RemoteProtocolError
from lattica.dht.records import Record, RecordStore, sign
from lattica.net.identity import Identity
from lattica.protocols import (
    MAX_RECORD_BYTES,
    MAX_RECORD_KEY_BYTES,
    MAX_RECORD_SUBKEY_BYTES,
    MAX_RECORD_TTL_SECONDS,
    MAX_RECORD_VALUE_BYTES,
    MAX_RECORDS_PER_AUTHOR,
    MAX_RECORDS_PER_KEY,
    RECORD_SLOT_BYTES,
)

NOW = 1_800_000_000.0
ADA, BOB = Identity(bytes(31) + b"\x01"), Identity(bytes(31) + b"\x02")


def a_record(
    value: bytes = b"v",
    *,
    author: Identity = ADA,
    key: str = "jobs",
    subkey: str = "",
    sequence: int = 1,
    ttl: float = 60,
) -> Record:
    expires_ms = round((NOW + ttl) * 1000)
    return sign(author, key, value, sequence=sequence, expires_ms=expires_ms, subkey=subkey)


def a_store(*records: Record) -> RecordStore:
    store = RecordStore()
    for record in records:
        store.put(record, NOW)
    return store


@given(
    key=st.text(st.characters(codec="utf-8"), min_size=1, max_size=40),
    subkey=st.text(st.characters(codec="utf-8"), max_size=20),
    value=st.binary(max_size=200),
    sequence=st.integers(0, 2**63 - 1),
    ttl=st.floats(0.01, MAX_RECORD_TTL_SECONDS),
)
def test_a_record_survives_the_wire(key: str, subkey: str, value: bytes, sequence: int, ttl: float) -> None:
    record = a_record(value, key=key, subkey=subkey, sequence=sequence, ttl=ttl)
    assert Record.from_bytes(record.to_bytes()) == record
    record.check(NOW)


def test_the_largest_record_fits_its_bound() -> None:
    largest = a_record(
        bytes(MAX_RECORD_VALUE_BYTES), key="k" * MAX_RECORD_KEY_BYTES, subkey="s" * MAX_RECORD_SUBKEY_BYTES
    )
    assert len(largest.to_bytes()) <= MAX_RECORD_BYTES


def test_the_bytes_of_a_record_are_those_of_the_page() -> None:
    """The vector of docs/wire.md, section "Records"."""
    record = sign(ADA, "jobs", b"v", sequence=1, expires_ms=1_800_000_060_000, subkey="a")
    assert record.to_bytes().hex() == (
        "97c4260024080112204cb5abf6ad79fbf5abbccafcc269d85cd2651ed4b885b5869f241aedf0a5ba29"
        "a46a6f6273a161c4017601cf000001a3185d3a60c440"
        "c61465de1e647269b941af56914e9a5a3932d85aaf815e236b11b839b37f9428"
        "64c7228e52bf505018cd1f733026fe7bcfee2e126c7efd39ee2bf450f0ac3f08"
    )


@given(raw=st.binary(max_size=300))
def test_random_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Record.from_bytes(raw)


@given(position=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.integers(0, 40))
def test_a_changed_record_is_never_stored(position: int, byte: int, cut: int) -> None:
    record = a_record()
    raw = bytearray(record.to_bytes())
    raw[position % len(raw)] = byte
    raw = raw[: len(raw) - cut]
    store = RecordStore()
    with contextlib.suppress(RemoteProtocolError, RecordError):
        store.put(Record.from_bytes(bytes(raw)), NOW)
    assert store.get("jobs", NOW) in ([], [record])


@pytest.mark.parametrize(
    "forged",
    [
        replace(a_record(), value=b"w"),
        replace(a_record(), key="jobz"),
        replace(a_record(), subkey="x"),
        replace(a_record(), sequence=2),
        replace(a_record(), expires_ms=a_record().expires_ms + 1),
        replace(a_record(), author=BOB.peer_id),
        replace(a_record(), signature=b""),
    ],
)
def test_a_signature_covers_every_field(forged: Record) -> None:
    with pytest.raises(RecordError, match="signature"):
        RecordStore().put(forged, NOW)


def test_key_and_subkey_do_not_run_together() -> None:
    one, other = a_record(key="ab", subkey="c"), a_record(key="a", subkey="bc")
    with pytest.raises(RecordError, match="signature"):
        replace(one, key=other.key, subkey=other.subkey).check(NOW)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"value": bytes(MAX_RECORD_VALUE_BYTES + 1)}, "16384: put a Cid into it"),
        ({"key": ""}, "1 to 256"),
        ({"key": "é" * 129}, "258 bytes"),
        ({"key": "\ud800"}, "UTF-8"),
        ({"subkey": "s" * 129}, "0 to 128"),
        ({"sequence": -1}, "out of range"),
        ({"sequence": 2**63}, "out of range"),
    ],
)
def test_an_oversize_record_cannot_be_made(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        replace(a_record(), **fields)


@pytest.mark.parametrize("ttl", [0, -1, MAX_RECORD_TTL_SECONDS + 301])
def test_a_record_lives_neither_in_the_past_nor_for_ever(ttl: float) -> None:
    with pytest.raises(RecordError):
        RecordStore().put(a_record(ttl=ttl), NOW)


def test_a_newer_record_replaces_an_older_one() -> None:
    store = a_store(a_record(b"old", sequence=1), a_record(b"new", sequence=2))
    assert [record.value for record in store.get("jobs", NOW)] == [b"new"]


def test_a_stale_record_is_refused() -> None:
    store = a_store(a_record(b"new", sequence=2))
    with pytest.raises(RecordError, match="number 1; 2 is here"):
        store.put(a_record(b"old", sequence=1), NOW)
    assert [record.value for record in store.get("jobs", NOW)] == [b"new"]


def test_the_same_number_cannot_say_two_things() -> None:
    store = a_store(a_record(b"one"), a_record(b"one"))
    with pytest.raises(RecordError, match="here already"):
        store.put(a_record(b"two"), NOW)
    assert [record.value for record in store.get("jobs", NOW)] == [b"one"]


def test_an_ended_record_does_not_let_its_elder_back_in() -> None:
    elder = a_record(b"old", sequence=1, ttl=3600)
    store = a_store(elder, a_record(b"new", sequence=2, ttl=10))
    store.expire(NOW + 11)
    assert store.get("jobs", NOW + 11) == []
    with pytest.raises(RecordError, match="here already"):
        store.put(elder, NOW + 11)


def test_authors_and_subkeys_stand_apart() -> None:
    records = [a_record(), a_record(subkey="x"), a_record(author=BOB), a_record(key="other")]
    store = a_store(*records)
    assert set(store.get("jobs", NOW)) == set(records[:3])
    assert store.get("jobs", NOW, author=BOB.peer_id) == [records[2]]
    assert store.get("jobs", NOW, subkey="x") == [records[1]]
    assert store.get("nothing", NOW) == []


def test_a_record_is_not_given_out_after_its_end() -> None:
    store = a_store(a_record(ttl=10))
    assert store.get("jobs", NOW + 9.9)
    assert store.get("jobs", NOW + 10) == []


def test_an_author_has_a_share_of_the_store() -> None:
    store = RecordStore()
    for number in range(MAX_RECORDS_PER_AUTHOR):
        store.put(a_record(b"", key=f"k{number}"), NOW)
    with pytest.raises(RecordError, match="an author may have"):
        store.put(a_record(key="one more"), NOW)
    store.put(a_record(author=BOB), NOW)


def test_a_key_has_room_for_so_many() -> None:
    store = RecordStore()
    for number in range(MAX_RECORDS_PER_KEY):
        store.put(a_record(subkey=f"s{number}"), NOW)
    with pytest.raises(RecordError, match="a key may have"):
        store.put(a_record(subkey="one more"), NOW)
    store.put(a_record(b"newer", subkey="s0", sequence=2), NOW)


def test_a_full_store_makes_room_by_dropping_what_has_ended() -> None:
    store = RecordStore(max_bytes=2 * RECORD_SLOT_BYTES)
    store.put(a_record(b"", subkey="a", ttl=10), NOW)
    store.put(a_record(b"", subkey="b", ttl=60), NOW)
    with pytest.raises(RecordError, match="full"):
        store.put(a_record(b"", subkey="c"), NOW)
    store.put(a_record(b"", subkey="c"), NOW + 11)
    assert [record.subkey for record in store.get("jobs", NOW + 11)] == ["b", "c"]


_ACTIONS = st.lists(
    st.tuples(
        st.sampled_from([ADA, BOB]),
        st.sampled_from(["", "x"]),
        st.integers(0, 5),  # sequence
        st.integers(1, 50),  # ttl, seconds
        st.integers(0, 20),  # seconds that pass
    ),
    max_size=20,
)


@given(actions=_ACTIONS)
def test_what_a_slot_gives_out_never_goes_back(
    actions: list[tuple[Identity, str, int, int, int]],
) -> None:
    """Against a model that remembers every record ever accepted."""
    store, now, accepted = RecordStore(), NOW, dict[tuple[str, object], list[Record]]()
    for author, subkey, sequence, ttl, passed in actions:
        now += passed
        record = sign(
            author, "k", bytes(sequence), sequence=sequence, expires_ms=int(now + ttl) * 1000, subkey=subkey
        )
        seen = accepted.setdefault((subkey, author.peer_id), [])
        alive = [old for old in seen if old.expires > now]
        try:
            store.put(record, now)
        except RecordError:
            assert any(old.sequence >= sequence and old != record for old in seen), "refused without a reason"
        else:
            assert all(old.sequence < sequence or old == record for old in alive)
            seen.append(record)
        for found in store.get("k", now):
            assert found.expires > now
            assert found == max(
                accepted[found.subkey, found.author], key=lambda old: (old.expires > now, old.sequence)
            )
    store.expire(now + 1000)
    assert len(store) == store.size_bytes == 0
