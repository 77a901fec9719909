"""Putting and getting records: asks the peers that keep them, believes none of them.

For now the keepers are the bootstrap peers, and a node without a bootstrap list keeps records for others.
Every record that comes back is checked as if a stranger had sent it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import trio

from lattica.dht.records import Record, RecordStore, check_key, sign
from lattica.errors import (
    CallError,
    LatticaError,
    NotFoundError,
    RecordError,
    RemoteProtocolError,
)
from lattica.ids import PeerId
from lattica.net.identity import Identity
from lattica.protocols import MAX_RECORD_TTL_SECONDS, MAX_RECORDS_PER_KEY, RECORD_TIMEOUT_SECONDS
from lattica.rpc.service import Call, Rpc, Service
from lattica.telemetry import Log

DEFAULT_TTL_SECONDS: Final = 3600.0


class Records:
    """`node.dht`: signed records, by key.

    Args:
        identity: signs what we put.
        rpc: the endpoint of `/lattica/records/1.0.0`.
        keepers: the peers that are asked.
        keeps: whether this node keeps records, its own and others'.
        clock: unix seconds.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        rpc: Rpc,
        keepers: Sequence[PeerId],
        keeps: bool,
        clock: Callable[[], float],
        log: Log,
    ) -> None:
        self._identity = identity
        self._rpc = rpc
        self._keepers = tuple(keepers)
        self._clock = clock
        self._log = log
        self._sequence = 0
        self.store: RecordStore | None = RecordStore() if keeps else None
        if self.store is not None:
            rpc.register(_service(self.store, clock))

    async def put(self, key: str, value: bytes, *, ttl: float = DEFAULT_TTL_SECONDS, subkey: str = "") -> int:
        """Say under `key` that `value` holds for `ttl` seconds; replaces what we said there before.

        Returns:
            How many nodes keep it now, this one included when it keeps records. The others failed.

        Raises:
            RecordError: it is over a bound, or nobody acknowledged it.
        """
        if not 0 < ttl <= MAX_RECORD_TTL_SECONDS:
            raise RecordError(f"ttl {ttl:g} s is not within 0 to {MAX_RECORD_TTL_SECONDS:g} s")
        check_key(key, subkey)
        kept, reasons = await self._put_once(key, value, ttl, subkey)
        if any(isinstance(reason, CallError) for reason in reasons) and await self._catch_up(key, subkey):
            kept, reasons = await self._put_once(key, value, ttl, subkey)
        if not kept:
            told = "; ".join(sorted({str(reason) for reason in reasons})) or "this node has no bootstrap peer"
            raise RecordError(f"nobody keeps the record {key!r}: {told}")
        return kept

    async def get(self, key: str, *, author: PeerId | str | None = None, subkey: str = "") -> Record:
        """The newest record under `key` and `subkey`, of `author` or of anybody.

        Of several authors' the one with the highest sequence number (about: the latest made).

        Raises:
            NotFoundError: the keepers that answered have none.
            RecordError: no keeper answered.
        """
        try:
            wanted = None if author is None else PeerId.parse(author)
        except ValueError as error:
            raise RecordError(f"the author of a record is a peer id: {error}") from None
        records = await self._collect(key, wanted, subkey)
        if not records:
            whose = "" if wanted is None else f" of {wanted}"
            raise NotFoundError(f"no record {key!r}{whose}: none was put, or it has ended")
        return max(records, key=lambda record: (record.sequence, record.author))

    async def get_all(self, key: str) -> list[Record]:
        """The newest valid record of every author and subkey under `key`; [] when there is none.

        Raises:
            RecordError: no keeper answered.
        """
        records = await self._collect(key, None, None)
        return sorted(records, key=lambda record: (record.subkey, record.author))

    async def _put_once(
        self, key: str, value: bytes, ttl: float, subkey: str
    ) -> tuple[int, list[LatticaError]]:
        now = self._clock()
        # Milliseconds since 1970 go on where the last run of this node stopped, without a file.
        self._sequence = max(self._sequence + 1, int(now * 1000))
        record = sign(
            self._identity,
            key,
            value,
            sequence=self._sequence,
            expires_ms=round((now + ttl) * 1000),
            subkey=subkey,
        )
        raw, kept, reasons = record.to_bytes(), 0, list[LatticaError]()
        if self.store is not None:
            self.store.put(record, now)
            kept += 1

        async def put_to(peer: PeerId) -> None:
            nonlocal kept
            try:
                await self._rpc.call(
                    peer, "records.put", raw, timeout=RECORD_TIMEOUT_SECONDS, idempotent=True
                )
                kept += 1
            except LatticaError as error:
                self._log.debug("a keeper did not take a record", key=key, keeper=peer, why=error)
                reasons.append(error)

        async with trio.open_nursery() as nursery:
            for peer in self._keepers:
                nursery.start_soon(put_to, peer)
        return kept, reasons

    async def _catch_up(self, key: str, subkey: str) -> bool:
        """Whether a keeper has a number of ours above the last one that we gave: our clock went back."""
        try:
            found = await self._collect(key, self._identity.peer_id, subkey)
        except RecordError:
            return False
        newest = max((record.sequence for record in found), default=-1)
        behind = newest >= self._sequence
        self._sequence = max(self._sequence, newest)
        return behind

    async def _collect(self, key: str, author: PeerId | None, subkey: str | None) -> list[Record]:
        """The newest valid record of each slot, from our store and from every keeper that answers."""
        check_key(key, subkey or "")
        best: dict[tuple[str, str, PeerId], Record] = {}
        answered = 0
        reasons: list[str] = []

        def offer(record: Record) -> None:
            known = best.get(record.slot)
            if known is None or record.sequence > known.sequence:
                best[record.slot] = record

        async def ask(peer: PeerId) -> None:
            nonlocal answered
            try:
                reply = await self._rpc.call(
                    peer,
                    "records.get",
                    key,
                    None if author is None else author.multihash,
                    subkey,
                    timeout=RECORD_TIMEOUT_SECONDS,
                    idempotent=True,
                )
                for record in self._believe(reply, peer, key, author, subkey):
                    offer(record)
                answered += 1
            except LatticaError as error:
                self._log.debug("a keeper did not answer", key=key, keeper=peer, why=error)
                reasons.append(str(error))

        if self.store is not None:
            answered += 1
            for record in self.store.get(key, self._clock(), author=author, subkey=subkey):
                offer(record)
        async with trio.open_nursery() as nursery:
            for peer in self._keepers:
                nursery.start_soon(ask, peer)
        if not answered:
            told = "; ".join(sorted(set(reasons)))
            raise RecordError(f"no peer could be asked for the record {key!r}: {told}")
        return list(best.values())

    def _believe(
        self, reply: object, peer: PeerId, key: str, author: PeerId | None, subkey: str | None
    ) -> list[Record]:
        """What is true in a keeper's reply: a bad record is left out and logged, the others count."""
        if not isinstance(reply, list) or len(reply) > MAX_RECORDS_PER_KEY:
            raise RemoteProtocolError(f"{peer} did not answer with a list of records", peer=peer)
        believed = []
        for raw in reply:
            try:
                if not isinstance(raw, bytes | memoryview):
                    raise RemoteProtocolError("a record travels as bytes", peer=peer)
                record = Record.from_bytes(raw)
                record.check(self._clock())
            except (RemoteProtocolError, RecordError) as error:
                self._log.warning("a keeper sent a bad record", keeper=peer, key=key, why=error)
                continue
            fits = record.key == key and author in (None, record.author) and subkey in (None, record.subkey)
            if fits:
                believed.append(record)
        return believed


def _service(store: RecordStore, clock: Callable[[], float]) -> Service:
    """What a keeper offers: `records.put(record)` and `records.get(key, author or nil, subkey or nil)`."""
    service = Service("records")

    @service.method
    async def put(call: Call, raw: bytes) -> None:
        if not isinstance(raw, bytes | memoryview):
            raise RecordError("records.put takes the bytes of a record")
        try:
            record = Record.from_bytes(raw)
        except RemoteProtocolError as error:  # the caller's mistake, and news for nobody but the caller
            raise RecordError(str(error)) from None
        store.put(record, clock())

    @service.method
    async def get(call: Call, key: str, author: bytes | None, subkey: str | None) -> list[bytes]:
        if not isinstance(key, str) or not isinstance(subkey, str | None):
            raise RecordError("records.get takes a key and a subkey as text")
        try:
            whose = None if author is None else PeerId.from_bytes(author)
        except (ValueError, TypeError) as error:
            raise RecordError(f"records.get takes an author's peer id as bytes: {error}") from None
        return [record.to_bytes() for record in store.get(key, clock(), author=whose, subkey=subkey)]

    return service
