"""The native parts, compiled from `native/`. Nothing here needs torch."""

from collections.abc import Sequence
from typing import Self, final

from typing_extensions import Buffer

__all__ = ["Mux", "SuffixAutomaton", "WindowBudget", "gumbel", "walk"]

def walk(
    tokens: Sequence[int],
    parents: Sequence[int],
    rows: Buffer,
    *,
    position: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    logprobs: bool,
) -> tuple[list[int], list[int], list[float]]:
    """Emitted tokens, accepted nodes and log-probabilities; see `lattica_infer.spec.walk`, which calls this.

    `rows`: float32, [nodes, vocabulary], C-contiguous; read in place while the GIL is released, so nobody may
        write to it meanwhile. `position` and `seed` are unsigned 64-bit integers.

    Raises:
        ValueError: a tree, shape, setting or visited row that cannot be walked.
        OverflowError: an integer outside its range.
    """

def gumbel(seed: int, position: int, token: int) -> float:
    """Standard Gumbel noise of one token: docs/wire.md, "Seeded noise".

    For tests; the walk never leaves Rust.
    """

@final
class SuffixAutomaton:
    """A text's suffix automaton that drafts what may come next.

    Every suffix of the text that occurred before votes, the longest first; shorter ones share what it leaves.
    How much a context of some length may claim starts from a fixed table and is learned from this text.
    Appending a token takes about 0.2 us; a tree of 64 nodes about 0.4 ms. `max_tokens` (2 to 65536) bounds
    the memory, at most about 16 MB: beyond it the older half of the text is forgotten.

    Raises:
        ValueError: `max_tokens` out of range.
    """

    def __new__(cls, max_tokens: int = 65536) -> Self: ...
    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens (unsigned 32-bit integers)."""

    def draft(self, budget: int) -> tuple[list[int], list[int], list[float]]:
        """Tokens, parents and path probabilities of a tree, best first.

        Node 0 is the last token; up to `budget` further nodes, never more than 4095.

        Raises:
            ValueError: there is no token yet.
        """

@final
class WindowBudget:
    """Growth of receive windows beyond their first size, for all connections that share this.

    Raises:
        OverflowError: `limit_bytes` is no unsigned 64-bit integer.
    """

    def __new__(cls, limit_bytes: int) -> Self: ...
    @property
    def limit(self) -> int: ...
    @property
    def used(self) -> int:
        """Bytes; falls as streams end and muxes are dropped."""

@final
class Mux:
    """`lattica.net.mux.Mux`, which says what each method does; for use by one thread at a time.

    Sealing and opening more than 64 KiB releases the GIL. Whatever a peer sends raises RemoteProtocolError and nothing
    else.

    Raises:
        LocalProtocolError: a key that is not 32 bytes long.
    """

    def __new__(
        cls, *, initiator: bool, send_key: bytes, receive_key: bytes, windows: WindowBudget
    ) -> Self: ...
    @property
    def output_bytes(self) -> int: ...
    @property
    def rtt(self) -> float | None: ...
    @property
    def gone(self) -> bool: ...
    @property
    def unread_bytes(self) -> int: ...
    @property
    def inbound_streams(self) -> int: ...
    def seal(self, data: Buffer) -> bytes: ...
    def open(self, data: bytes) -> bytes: ...
    def start(self, early: bytes) -> list[tuple[int, int, int]]: ...
    def receive(self, data: bytes, now: float) -> list[tuple[int, int, int]]: ...
    def open_stream(self) -> int: ...
    def send(self, stream: int, data: Buffer) -> int: ...
    def send_all_or_nothing(self, stream: int, parts: Sequence[Buffer]) -> bool: ...
    def end(self, stream: int) -> None: ...
    def reset(self, stream: int) -> None: ...
    def read(self, stream: int, max_bytes: int) -> bytes: ...
    def read_into(self, stream: int, buffer: Buffer) -> int: ...
    def available(self, stream: int) -> int: ...
    def discard(self, stream: int) -> None: ...
    def ping(self, now: float) -> None: ...
    def go_away(self, code: int = 0) -> None: ...
    def take_output(self, max_bytes: int) -> tuple[bytes, list[int]]: ...
