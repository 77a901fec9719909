"""How much calls may take. The defaults stand in `protocols`, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from lattica import protocols


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one Rpc. `calls` counts those of one peer that are in flight, in each direction by itself."""

    max_frame_bytes: int = protocols.MAX_FRAME_BYTES
    max_calls_per_peer: int = protocols.MAX_CALLS_PER_PEER
    max_streams_per_peer: int = protocols.MAX_STREAMS_PER_PEER
    max_buffered_bytes_per_peer: int = protocols.MAX_BUFFERED_BYTES_PER_PEER
    max_pooled_streams: int = protocols.MAX_POOLED_STREAMS
