"""Every protocol id, size limit and time limit, each with its unit and its reason. One table, no code.

A peer can make nothing grow that has no bound here.
"""

from __future__ import annotations

from typing import Final

# Protocol ids. A new version of a protocol gets a new id; both are served for one release.
RPC: Final = "/lattica/rpc/1.0.0"  # services that a user registers
SHARD: Final = "/lattica/shard/1.0.0"  # sessions of distributed inference
RECORDS: Final = "/lattica/records/1.0.0"  # signed records, kept by the bootstrap peers
GATED_PREFIX: Final = "/lattica/"  # every inbound stream under it passes the node's gate

# Frames (bytes)
KIB: Final = 1024
MIB: Final = 1024 * 1024
MAX_FRAME_BYTES: Final = 64 * MIB  # unless a limit says otherwise
MAX_ARGUMENT_BYTES: Final = MAX_FRAME_BYTES  # one argument list; larger values belong in a blob or a stream
MAX_REPLY_BYTES: Final = MAX_FRAME_BYTES  # one reply or item
SMALL_FRAME_BYTES: Final = 16 * KIB  # bounded by the number of calls: 4,096 of them hold 64 MiB
MAX_METHOD_BYTES: Final = 256  # "service.method"
MAX_NESTING: Final = 32  # containers in containers; deeper values are somebody's attack or somebody's bug
MAX_TENSOR_DIMS: Final = 8  # no model here needs more
MAX_FRAME_VALUES: Final = 1024 * 1024  # in one frame; a Python object costs some 60 bytes, a byte on the wire
INLINE_BYTES: Final = 4 * KIB  # bytes values from this size travel behind the array, uncopied, as tensors do

# Calls
DEFAULT_TIMEOUT_SECONDS: Final = 30.0  # of a unary call that names none
MAX_CALLS_PER_PEER: Final = 4096  # in flight; beyond it OverloadedError instead of a growing queue
MAX_STREAMS_PER_PEER: Final = MAX_CALLS_PER_PEER + 1024  # inbound, idle ones too: room to answer "overloaded"
MAX_RECEIVED_BYTES_PER_PEER: Final = 64 * MIB  # arguments of running calls; beyond it OverloadedError
READ_BYTES: Final = 64 * KIB  # asked of a stream at once, where it is not known what comes
MAX_ERROR_BYTES: Final = 4 * KIB  # of an error's text, and again of its details
MAX_TRACE_BYTES: Final = 64  # a trace id is 16 hex digits; others' tracers use up to 55
MAX_POOLED_STREAMS: Final = 64  # idle streams kept per peer: go-libp2p allows 75 per protocol and peer
POOL_SECONDS: Final = 10.0  # how long those of a burst are kept beyond that, for the next burst

# Records
MAX_RECORD_KEY_BYTES: Final = 256
MAX_RECORD_SUBKEY_BYTES: Final = 128
MAX_RECORD_VALUE_BYTES: Final = 16 * KIB  # records point at content, they do not hold it
MAX_RECORD_TTL_SECONDS: Final = 48 * 3600.0  # Kademlia's usual upper bound for provider records
MAX_RECORD_BYTES: Final = 17 * KIB  # value, key, subkey, author, signature and the framing of all
MAX_RECORDS_PER_AUTHOR: Final = 1024  # slots in one store: a shard announces itself in one
MAX_RECORDS_PER_KEY: Final = 512  # what `get_all` can answer in one reply, 8.5 MiB at the most
MAX_RECORD_STORE_BYTES: Final = 64 * MIB  # all records that a node keeps for others, in memory
RECORD_SLOT_BYTES: Final = 1024  # what a slot counts for beside its value, so that empty records cost too
RECORD_CLOCK_SLACK_SECONDS: Final = 300.0  # how far an author's clock may run ahead of a keeper's
RECORD_TIMEOUT_SECONDS: Final = 10.0  # one keeper's answer, the dial included

# Connections
MAX_CONNECTIONS: Final = 512  # of a node: a socket, two tasks and some buffers each
MAX_CONNECTIONS_PER_PEER: Final = 8  # two from dialling each other at once, some on their way out
MAX_WINDOW_GROWTH_BYTES: Final = 256 * MIB  # windows of all connections, beyond their first size
MAX_HANDSHAKES: Final = 256  # accepted sockets that have not proved who they are: a task and some KiB each
MAX_PEERS_KNOWN: Final = 4096  # whose addresses are kept, connected ones not counted
ANSWER_TIMEOUT_SECONDS: Final = 1.8  # TCP and a first byte from one address; one SYN may get lost
DIAL_TIMEOUT_SECONDS: Final = 10.0  # one address, name to Yamux
HANDSHAKE_TIMEOUT_SECONDS: Final = 10.0  # Noise and Yamux on an accepted socket: slow-loris bound
PING_INTERVAL_SECONDS: Final = 15.0  # rust-libp2p's interval; keeps NAT mappings of 30 s alive
PING_SOONER_SECONDS: Final = 2.0  # when we said something and heard nothing since: find out early
PING_TIMEOUT_SECONDS: Final = 10.0  # mute for so long after a ping: dead; loading torch takes up to 6
UNSENT_BYTES: Final = 128 * KIB  # in the kernel, not on the wire: small frames wait behind them
