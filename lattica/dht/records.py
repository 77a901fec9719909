"""Signed, sequence-numbered, expiring records, and the rules by which a store keeps them.

A record says: this author, under this key and subkey, at this sequence number, until this time, means this
value. Its slot is (key, subkey, author): in one slot the highest sequence number wins. Only the holder of the
author's key can make one, so it may be asked of anybody and kept by anybody.

The signature covers a domain prefix and a canonical msgpack array that is built anew from the decoded fields:
how the bytes that arrived were spelled does not matter. Time (unix seconds) is an argument. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgpack  # type: ignore[import-untyped]

from lattica.errors import RecordError, RemoteProtocolError
from lattica.ids import PeerId
from lattica.net.identity import Identity, verify
from lattica.protocols import (
    MAX_RECORD_BYTES,
    MAX_RECORD_KEY_BYTES,
    MAX_RECORD_STORE_BYTES,
    MAX_RECORD_SUBKEY_BYTES,
    MAX_RECORD_TTL_SECONDS,
    MAX_RECORD_VALUE_BYTES,
    MAX_RECORDS_PER_AUTHOR,
    MAX_RECORDS_PER_KEY,
    RECORD_CLOCK_SLACK_SECONDS,
    RECORD_SLOT_BYTES,
)

SIGNED_PREFIX: Final = b"lattica-record-v1\x00"  # no signature of ours for anything else is one of these
_MAX_INTEGER: Final = 2**63 - 1  # msgpack and most languages agree on these

Slot = tuple[str, str, PeerId]


@dataclass(frozen=True, slots=True)
class Record:
    """What an author says under a key. Bounded when it exists; true only after `check`."""

    key: str
    subkey: str
    value: bytes
    author: PeerId
    sequence: int
    expires_ms: int  # unix milliseconds
    signature: bytes

    @property
    def expires(self) -> float:
        """When it ends, in unix seconds."""
        return self.expires_ms / 1000

    @property
    def slot(self) -> Slot:
        """Where it stands: records with the same slot replace each other."""
        return (self.key, self.subkey, self.author)

    def __post_init__(self) -> None:
        check_key(self.key, self.subkey)
        if len(self.value) > MAX_RECORD_VALUE_BYTES:
            raise RecordError(
                f"the value under {self.key!r} has {len(self.value)} bytes; a record holds at most"
                f" {MAX_RECORD_VALUE_BYTES}: put a Cid into it"
            )
        if not 0 <= self.sequence <= _MAX_INTEGER or not 0 <= self.expires_ms <= _MAX_INTEGER:
            raise RecordError(f"the record under {self.key!r} has a sequence number or an end out of range")

    def check(self, now: float) -> None:
        """Nothing, when the author signed this and it is alive at `now`.

        Raises:
            RecordError: it is forged, has ended, or claims to live longer than any record may.
        """
        what = f"the record {self.key!r} of {self.author}"
        if self.expires <= now:
            raise RecordError(f"{what} ended {now - self.expires:.0f} s ago")
        if self.expires > now + MAX_RECORD_TTL_SECONDS + RECORD_CLOCK_SLACK_SECONDS:
            raise RecordError(f"{what} would live longer than {MAX_RECORD_TTL_SECONDS / 3600:.0f} hours")
        if not verify(self.author, self.signature, _signed_bytes(self)):
            raise RecordError(f"{what} does not carry its author's signature")

    def to_bytes(self) -> bytes:
        """The record as it travels: `[author, key, subkey, value, sequence, expires_ms, signature]`."""
        return _pack([*_signed_fields(self), self.signature])

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview) -> Record:
        """Read a record that a peer sent; not yet checked.

        Raises:
            RemoteProtocolError: the bytes are no record.
            RecordError: it is one, over a bound.
        """
        if len(raw) > MAX_RECORD_BYTES:
            raise RemoteProtocolError(f"a record of {len(raw)} bytes; the most is {MAX_RECORD_BYTES}")
        try:
            fields = msgpack.unpackb(raw, max_map_len=0, max_ext_len=0, max_array_len=7, strict_map_key=True)
        except Exception as error:  # msgpack raises ValueError, its own kinds and RecursionError
            raise RemoteProtocolError(f"not a record: {type(error).__name__}") from None
        kinds = [bytes, str, str, bytes, int, int, bytes]
        if not isinstance(fields, list) or [type(field) for field in fields] != kinds:
            raise RemoteProtocolError(
                "a record is [author, key, subkey, value, sequence, expires, signature]"
            )
        author, key, subkey, value, sequence, expires_ms, signature = fields
        try:
            peer = PeerId.from_bytes(author)
        except ValueError as error:
            raise RemoteProtocolError(f"a record's author is {error}") from None
        return cls(key, subkey, value, peer, sequence, expires_ms, signature)


def sign(
    identity: Identity, key: str, value: bytes, *, sequence: int, expires_ms: int, subkey: str = ""
) -> Record:
    """A record of ours. RecordError when key, subkey or value are over their bounds."""
    unsigned = Record(key, subkey, bytes(value), identity.peer_id, sequence, expires_ms, b"")
    signature = identity.sign(_signed_bytes(unsigned))
    return Record(key, subkey, unsigned.value, identity.peer_id, sequence, expires_ms, signature)


def check_key(key: str, subkey: str = "") -> None:
    """Nothing for a key and subkey within their bounds; else RecordError."""
    for name, text, least, most in (
        ("key", key, 1, MAX_RECORD_KEY_BYTES),
        ("subkey", subkey, 0, MAX_RECORD_SUBKEY_BYTES),
    ):
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise RecordError(f"the {name} {text!r} is not text that UTF-8 can hold") from None
        if not least <= size <= most:
            raise RecordError(f"the {name} {text[:40]!r} has {size} bytes; {least} to {most} are allowed")


def _signed_fields(record: Record) -> list[object]:
    author = record.author.multihash
    return [author, record.key, record.subkey, record.value, record.sequence, record.expires_ms]


def _signed_bytes(record: Record) -> bytes:
    return SIGNED_PREFIX + _pack(_signed_fields(record))


def _pack(fields: list[object]) -> bytes:
    packed = msgpack.packb(fields, use_bin_type=True)
    assert isinstance(packed, bytes)
    return packed


@dataclass(slots=True)
class _Place:
    """A slot's newest record, or only its number: the number outlives the record."""

    record: Record | None
    sequence: int
    until: float  # unix seconds; when the last of all records seen here has ended

    @property
    def size(self) -> int:
        return RECORD_SLOT_BYTES + (len(self.record.value) if self.record else 0)


class RecordStore:
    """Keeps what others put, within bounds: forged, stale and oversize records never get in.

    A newer record that ends early must not let an older one with a longer life come back, so a slot keeps
    its number until every record that was ever in it has ended.
    """

    def __init__(self, *, max_bytes: int = MAX_RECORD_STORE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._keys: dict[str, dict[Slot, _Place]] = {}
        self._per_author: dict[PeerId, int] = {}

    def __len__(self) -> int:
        return sum(len(places) for places in self._keys.values())

    @property
    def size_bytes(self) -> int:
        """What the store counts itself as holding."""
        return self._bytes

    def put(self, record: Record, now: float) -> None:
        """Keep a record, or the one that is here already when it is the same.

        Raises:
            RecordError: it is forged, stale, contradicts one with its number, or the store is full.
        """
        record.check(now)
        place = self._keys.get(record.key, {}).get(record.slot)
        if place is not None and place.until > now:
            if place.record == record:
                return
            if record.sequence <= place.sequence:
                raise RecordError(
                    f"the record {record.key!r} of {record.author} has number {record.sequence};"
                    f" {place.sequence} is here already"
                )
        if self._no_room(record, place):
            self.expire(now)
            place = self._keys.get(record.key, {}).get(record.slot)
            if reason := self._no_room(record, place):
                raise RecordError(f"no room for the record {record.key!r} of {record.author}: {reason}")
        self._set(record, place)

    def get(
        self, key: str, now: float, *, author: PeerId | None = None, subkey: str | None = None
    ) -> list[Record]:
        """The live records under a key, of one author or one subkey where asked; in a fixed order."""
        found = [
            place.record
            for place in self._keys.get(key, {}).values()
            if place.record is not None
            and place.record.expires > now
            and (author is None or place.record.author == author)
            and (subkey is None or place.record.subkey == subkey)
        ]
        return sorted(found, key=lambda record: (record.subkey, record.author))

    def expire(self, now: float) -> None:
        """Let go of everything that has ended."""
        for key in list(self._keys):
            places = self._keys[key]
            for slot, place in list(places.items()):
                if place.until <= now:
                    self._drop(slot)
                elif place.record is not None and place.record.expires <= now:
                    self._bytes -= place.size
                    place.record = None
                    self._bytes += place.size

    def _no_room(self, record: Record, place: _Place | None) -> str:
        """Why there is no room for this record now; "" when there is."""
        growth = RECORD_SLOT_BYTES + len(record.value) - (place.size if place else 0)
        if self._bytes + growth > self._max_bytes:
            return f"the store is full ({self._max_bytes} bytes)"
        if place is not None:
            return ""
        if self._per_author.get(record.author, 0) >= MAX_RECORDS_PER_AUTHOR:
            return f"an author may have {MAX_RECORDS_PER_AUTHOR} records"
        if len(self._keys.get(record.key, {})) >= MAX_RECORDS_PER_KEY:
            return f"a key may have {MAX_RECORDS_PER_KEY} records"
        return ""

    def _set(self, record: Record, place: _Place | None) -> None:
        until = record.expires
        if place is not None:
            until = max(until, place.until)
            self._drop(record.slot)
        new = _Place(record, record.sequence, until)
        self._keys.setdefault(record.key, {})[record.slot] = new
        self._per_author[record.author] = self._per_author.get(record.author, 0) + 1
        self._bytes += new.size

    def _drop(self, slot: Slot) -> None:
        key, _, author = slot
        places = self._keys[key]
        self._bytes -= places.pop(slot).size
        if not places:
            del self._keys[key]
        self._per_author[author] -= 1
        if not self._per_author[author]:
            del self._per_author[author]
