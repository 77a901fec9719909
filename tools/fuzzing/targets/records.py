"""Signed records, and the store that keeps others'."""

from __future__ import annotations

from random import Random
from typing import Final

from fuzzing import draw
from fuzzing.engine import Target
from lattica.dht.records import Record, RecordStore, sign
from lattica.errors import RecordError, RemoteProtocolError
from lattica.net.identity import Identity

_NOW: Final = 1_790_000_000.0
_AUTHORS: Final = [Identity(bytes([number]) * 32) for number in range(4)]
_MAX_STORE_BYTES: Final = 1 << 15


def _valid(random: Random) -> bytes:
    record = sign(
        random.choice(_AUTHORS),
        "k" + draw.text(random),
        random.randbytes(random.choice((0, 1, 100, 3000))),
        sequence=random.choice((0, 1, 2**63 - 1, random.getrandbits(40))),
        expires_ms=int((_NOW + random.choice((1, 60, 48 * 3600))) * 1000),
        subkey=draw.text(random),
    )
    return record.to_bytes()


def _run(data: bytes) -> bool:
    """What is read is written the same; only what its author signed gets into a store, and it stays in bounds."""
    try:
        record = Record.from_bytes(data)
    except (RemoteProtocolError, RecordError):
        return False
    written = record.to_bytes()
    assert Record.from_bytes(written) == record
    try:
        record.check(_NOW)
    except RecordError:
        return False
    assert record.author in [author.peer_id for author in _AUTHORS], "a signature that nobody made"
    store = RecordStore(max_bytes=_MAX_STORE_BYTES)
    store.put(record, _NOW)
    store.put(record, _NOW)
    assert store.get(record.key, _NOW) == [record]
    assert len(record.value) < store.size_bytes <= _MAX_STORE_BYTES
    store.expire(record.expires + 1)
    assert (len(store), store.size_bytes) == (0, 0)
    return True


def targets() -> list[Target]:
    return [
        Target(
            "records",
            "Record.from_bytes, its signature, and RecordStore.put",
            _valid,
            _run,
            ("lattica.dht.records",),
            words=(b"\xc4\x26\x00\x24\x08\x01\x12\x20", b"\xcf", b"\x97\xc4"),
            memory_bytes=1 << 19,  # msgpack's own stack of 256 KiB, whatever it reads
        )
    ]
