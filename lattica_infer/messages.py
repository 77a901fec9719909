"""What crosses the wire of `/lattica/shard/1.0.0`: dataclasses, and their plain-value forms.

Every `from_value` takes what the RPC codec decoded and checks it whole before a tensor reaches torch:
whatever a peer sends, it raises `RemoteProtocolError` and nothing else. This module knows shapes and bounds;
it does not know sessions (`shard/sessions.py`) nor streams. Byte layout: docs/wire.md, "Shard sessions".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt

from lattica.errors import RemoteProtocolError
from lattica.ids import Cid, PeerId
from lattica.protocols import MAX_RECORD_VALUE_BYTES
from lattica_infer import checks

SESSION_ID_BYTES: Final = 16  # random, chosen by the coordinator; two of one peer never meet
MAX_ROWS: Final = 1 << 24  # cache rows of one session; shards grant far less
MAX_FRAME_NODES: Final = 1024  # rows of one forward pass: prompt chunk and draft tree together
MAX_CLASS_CHARS: Final = 64  # of a numeric class, "cpu-fp32-packed"
MAX_ANNOUNCEMENT_BYTES: Final = MAX_RECORD_VALUE_BYTES
_MAX_FIELDS: Final = 16  # of a map in an announcement
MAX_TOP_K: Final = (1 << 31) - 1
MAX_TEMPERATURE: Final = 1000.0

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tail draws: the same values on every route and every replay give the same tokens."""

    seed: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        """Raise ValueError, in one sentence, unless every value is in its range."""
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"the seed {self.seed} is out of range: take 0 to 2^64 - 1")
        if not 0.0 <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(f"temperature {self.temperature} is out of range: take 0 to {MAX_TEMPERATURE:g}")
        if not 0 <= self.top_k <= MAX_TOP_K:
            raise ValueError(f"top_k {self.top_k} is out of range: take 0 (all tokens) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p {self.top_p} is out of range: take more than 0, at most 1")

    def to_value(self) -> dict[str, Any]:
        return {"seed": self.seed, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}

    @classmethod
    def from_value(cls, value: object) -> Sampling:
        fields = checks.mapping(value, "sampling", ("seed", "temperature", "top_k", "top_p"))
        sampling = cls(
            seed=checks.integer(fields["seed"], "seed", 0, (1 << 64) - 1),
            temperature=checks.number(fields["temperature"], "temperature"),
            top_k=checks.integer(fields["top_k"], "top_k", 0, MAX_TOP_K),
            top_p=checks.number(fields["top_p"], "top_p"),
        )
        try:
            sampling.check()
        except ValueError as error:
            raise RemoteProtocolError(str(error)) from error
        return sampling


@dataclass(frozen=True, slots=True)
class Hop:
    """The next stage of a route: who, and where it may be dialled."""

    peer: PeerId
    layers: range
    addresses: tuple[str, ...] = ()

    def to_value(self) -> list[Any]:
        return [str(self.peer), [self.layers.start, self.layers.stop], list(self.addresses)]

    @classmethod
    def from_value(cls, value: object) -> Hop:
        peer, layers, addresses = checks.array(value, "next hop", 3)
        return cls(checks.peer_id(peer, "next hop"), checks.layer_range(layers), checks.addresses(addresses))


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """What a coordinator asks of one stage when it opens a session.

    `previous` is the only peer whose step stream the stage takes; `next` is where its own leads, None at the
    tail. `numeric_class` None takes whatever class the stage has. `rows` are cache rows: prompt, output and
    the largest draft tree.
    """

    session: bytes
    model: Cid
    layers: range
    rows: int
    previous: PeerId
    next: Hop | None
    numeric_class: str | None = None
    sampling: Sampling = Sampling()
    epoch: int = 0

    def to_value(self) -> dict[str, Any]:
        return {
            "session": self.session,
            "model": str(self.model),
            "layers": [self.layers.start, self.layers.stop],
            "rows": self.rows,
            "previous": str(self.previous),
            "next": None if self.next is None else self.next.to_value(),
            "numeric_class": self.numeric_class,
            "sampling": self.sampling.to_value(),
            "epoch": self.epoch,
        }

    @classmethod
    def from_value(cls, value: object) -> SessionSpec:
        fields = checks.mapping(value, "session spec", tuple(cls.__dataclass_fields__))
        wanted_class, following = fields["numeric_class"], fields["next"]
        return cls(
            session=session_id(fields["session"]),
            model=checks.cid(fields["model"]),
            layers=checks.layer_range(fields["layers"]),
            rows=checks.integer(fields["rows"], "rows", 1, MAX_ROWS),
            previous=checks.peer_id(fields["previous"], "previous hop"),
            next=None if following is None else Hop.from_value(following),
            numeric_class=None if wanted_class is None else _class(wanted_class),
            sampling=Sampling.from_value(fields["sampling"]),
            epoch=checks.integer(fields["epoch"], "epoch", 0, checks.MAX_COUNTER),
        )


@dataclass(frozen=True, slots=True, eq=False)
class StepFrame:
    """One forward pass: keep some rows of the last one, then compute some more. A `Round` on the wire.

    `window` numbers the frames of an epoch, from 0. `commit` lists the rows of the frame before that join
    the committed prefix: a path from its node 0. `base` is the length of the prefix after that, and where
    node 0 of this frame stands. `walk` asks the tail for a verdict; without it the frame only fills caches.
    `hidden` is what the previous stage computed, [nodes, hidden] float32; None on the way from the
    coordinator, which holds no layers.
    """

    epoch: int
    window: int
    base: int
    commit: tuple[int, ...]
    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    walk: bool
    hidden: Floats | None = None

    @property
    def payload_bytes(self) -> int:
        """Size of what the frame carries, headers of the framing and of the stream left out."""
        activations = 0 if self.hidden is None else self.hidden.nbytes
        return 4 * (len(self.commit) + 2 * len(self.tokens)) + activations

    @property
    def is_chain(self) -> bool:
        """Does every node follow the one before it?"""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def to_value(self) -> list[Any]:
        parents = None if self.is_chain else list(self.parents)
        place = [self.epoch, self.window, self.base, list(self.commit)]
        return [*place, list(self.tokens), parents, self.walk, self.hidden]

    @classmethod
    def from_value(cls, value: object, *, vocab: int, width: int | None) -> StepFrame:
        """Check a frame against the model.

        Args:
            vocab: token ids are below it.
            width: hidden size of the activations that come along; None on the first stage, which gets none.
        """
        epoch, window, base, commit, tokens, parents, walk, hidden = checks.array(value, "step frame", 8)
        ids = checks.integers(tokens, "tokens", 0, vocab - 1, longest=MAX_FRAME_NODES)
        if not ids:
            raise RemoteProtocolError("a step frame holds at least one token")
        if not isinstance(walk, bool):
            raise RemoteProtocolError(f"walk is a {type(walk).__name__}, not true or false")
        return cls(
            epoch=checks.integer(epoch, "epoch", 0, checks.MAX_COUNTER),
            window=checks.integer(window, "window", 0, checks.MAX_COUNTER),
            base=checks.integer(base, "base", 0, MAX_ROWS),
            commit=checks.integers(commit, "commit", 0, MAX_FRAME_NODES - 1, longest=MAX_FRAME_NODES),
            tokens=ids,
            parents=tuple(range(-1, len(ids) - 1)) if parents is None else _parents(parents, len(ids)),
            walk=walk,
            hidden=_activations(hidden, len(ids), width),
        )


@dataclass(frozen=True, slots=True)
class Opened:
    """A stage's answer to a spec: the rows are granted, and its stream to the next hop is open."""

    numeric_class: str
    lease_seconds: float

    def to_value(self) -> list[Any]:
        return ["opened", self.numeric_class, self.lease_seconds]


@dataclass(frozen=True, slots=True)
class VerdictFrame:
    """What the tail decided about the tree of the frame with this epoch and window.

    `tokens`: emitted ids, accepted ones first, then the correction or bonus token. `path`: accepted nodes,
    without node 0. `logprobs`: one per emitted token.
    """

    epoch: int
    window: int
    tokens: tuple[int, ...]
    path: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def payload_bytes(self) -> int:
        """Size of what the verdict carries, as in `StepFrame`."""
        return 4 * (len(self.tokens) + len(self.path)) + 8 * len(self.logprobs)

    def to_value(self) -> list[Any]:
        drawn = [list(self.tokens), list(self.path), list(self.logprobs)]
        return ["verdict", self.epoch, self.window, *drawn]


@dataclass(frozen=True, slots=True)
class Alive:
    """A stage's answer to a renewal: frames it has received and passed on, payload bytes it has sent."""

    received: int
    sent: int
    bytes_sent: int

    def to_value(self) -> list[Any]:
        return ["alive", self.received, self.sent, self.bytes_sent]


Event = Opened | VerdictFrame | Alive


def event_from_value(value: object, *, vocab: int) -> Event:
    """Read what a stage says on its session's stream; the coordinator trusts it no more than any peer."""
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise RemoteProtocolError("a session event is a list that begins with its kind")
    match value[0]:
        case "opened":
            _, numeric_class, lease = checks.array(value, "opened", 3)
            lease_seconds = checks.number(lease, "lease")
            if not 0 < lease_seconds < checks.MAX_COUNTER:
                raise RemoteProtocolError(f"a lease of {lease_seconds} seconds")
            return Opened(_class(numeric_class), lease_seconds)
        case "verdict":
            _, epoch, window, tokens, path, logprobs = checks.array(value, "verdict", 6)
            ids = checks.integers(tokens, "verdict tokens", 0, vocab - 1, longest=MAX_FRAME_NODES)
            nodes = checks.integers(path, "verdict path", 1, MAX_FRAME_NODES - 1, longest=MAX_FRAME_NODES)
            if not isinstance(logprobs, list) or not len(logprobs) == len(ids) == len(nodes) + 1:
                raise RemoteProtocolError("a verdict names one more token than nodes, and a logprob for each")
            return VerdictFrame(
                epoch=checks.integer(epoch, "epoch", 0, checks.MAX_COUNTER),
                window=checks.integer(window, "window", 0, checks.MAX_COUNTER),
                tokens=ids,
                path=nodes,
                logprobs=tuple(_logprob(item) for item in logprobs),
            )
        case "alive":
            _, *counts = checks.array(value, "alive", 4)
            return Alive(*(checks.integer(count, "count", 0, checks.MAX_COUNTER) for count in counts))
        case kind:
            raise RemoteProtocolError(f"unknown session event {kind!r:.40}")


@dataclass(frozen=True, slots=True)
class Announcement:
    """A shard as its signed record names it: the layers, the numeric class, where to dial."""

    layers: range
    numeric_class: str
    dtype: str
    addresses: tuple[str, ...]

    def to_value(self) -> dict[str, Any]:
        return {
            "layers": [self.layers.start, self.layers.stop],
            "numeric_class": self.numeric_class,
            "dtype": self.dtype,
            "addresses": list(self.addresses),
        }

    def to_bytes(self) -> bytes:
        return bytes(msgpack.packb(self.to_value()))

    @classmethod
    def from_bytes(cls, data: bytes) -> Announcement:
        """Read a record's value. Raises RemoteProtocolError."""
        if len(data) > MAX_ANNOUNCEMENT_BYTES:
            raise RemoteProtocolError(f"an announcement of {len(data)} bytes")
        try:
            value = msgpack.unpackb(data, max_array_len=checks.MAX_ADDRESSES, max_map_len=_MAX_FIELDS)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise RemoteProtocolError(f"an announcement that is not msgpack: {error!r:.80}") from error
        return cls.from_value(value)

    @classmethod
    def from_value(cls, value: object) -> Announcement:
        fields = checks.mapping(value, "announcement", tuple(cls.__dataclass_fields__))
        return cls(
            layers=checks.layer_range(fields["layers"]),
            numeric_class=_class(fields["numeric_class"]),
            dtype=checks.text(fields["dtype"], "dtype", MAX_CLASS_CHARS),
            addresses=checks.addresses(fields["addresses"]),
        )


def shards_key(model: Cid) -> str:
    """The record key under which a model's shards announce themselves; subkeys are "LO-HI"."""
    return f"shards/{model}"


def session_id(value: object) -> bytes:
    """Check a session's name."""
    if not isinstance(value, bytes) or len(value) != SESSION_ID_BYTES:
        raise RemoteProtocolError(f"a session id has {SESSION_ID_BYTES} bytes")
    return value


def owner_id(value: object) -> PeerId:
    """Check the name of a session's coordinator."""
    return checks.peer_id(value, "coordinator")


def _class(value: object) -> str:
    return checks.text(value, "numeric class", MAX_CLASS_CHARS)


def _logprob(value: object) -> float:
    number = checks.number(value, "logprob")
    if number > 1e-3:  # a probability of 1 may round upwards
        raise RemoteProtocolError(f"logprob {number} is positive")
    return number


def _parents(value: object, nodes: int) -> tuple[int, ...]:
    """One tree: node 0 is its root, and parents come before their children."""
    parents = checks.integers(value, "parents", -1, nodes - 1, longest=MAX_FRAME_NODES)
    if len(parents) != nodes:
        raise RemoteProtocolError(f"{len(parents)} parents for {nodes} tokens")
    for node, parent in enumerate(parents):
        if not (0 <= parent < node if node else parent == -1):
            raise RemoteProtocolError(
                f"node {node} hangs on {parent}: node 0 on -1, others on one before them"
            )
    return parents


def _activations(value: object, nodes: int, width: int | None) -> Floats | None:
    if width is None:
        if value is not None:
            raise RemoteProtocolError("the first stage embeds the tokens itself and takes no activations")
        return None
    if not isinstance(value, np.ndarray):
        raise RemoteProtocolError(f"activations are a {type(value).__name__}, not a tensor")
    if value.dtype != np.float32 or value.shape != (nodes, width):
        found = f"{value.dtype} {list(value.shape)}"
        raise RemoteProtocolError(f"activations are {found}, not float32 [{nodes}, {width}]")
    if not np.isfinite(value).all():
        raise RemoteProtocolError("the activations hold a value that is not finite")
    return value
