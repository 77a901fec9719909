"""A peer-to-peer mesh for AI: connect, call, and run one model across many machines.

Names load when they are first used (PEP 562): `import lattica` takes milliseconds and imports no network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lattica import aio
    from lattica.blocking import portal
    from lattica.config import NodeConfig
    from lattica.errors import (
        BlobError,
        CallError,
        ConfigError,
        DeadlineError,
        DialError,
        DocumentError,
        HashError,
        InferenceError,
        LatticaError,
        LocalProtocolError,
        NetworkError,
        NoSuchMethodError,
        NotFoundError,
        OverloadedError,
        ProtocolError,
        RecordError,
        RemoteError,
        RemoteProtocolError,
        StreamError,
        UnreachableError,
    )
    from lattica.ids import Cid, PeerId
    from lattica.node import Node, open_node
    from lattica.rpc.codec import Tensor
    from lattica.rpc.service import Call, Service

__version__ = "0.1.0"

_HOMES = {
    "lattica.blocking": ("portal",),
    "lattica.config": ("NodeConfig",),
    "lattica.errors": (
        "BlobError",
        "CallError",
        "ConfigError",
        "DeadlineError",
        "DialError",
        "DocumentError",
        "HashError",
        "InferenceError",
        "LatticaError",
        "LocalProtocolError",
        "NetworkError",
        "NoSuchMethodError",
        "NotFoundError",
        "OverloadedError",
        "ProtocolError",
        "RecordError",
        "RemoteError",
        "RemoteProtocolError",
        "StreamError",
        "UnreachableError",
    ),
    "lattica.ids": ("Cid", "PeerId"),
    "lattica.node": ("Node", "open_node"),
    "lattica.rpc.codec": ("Tensor",),
    "lattica.rpc.service": ("Call", "Service"),
}
_ROOMS = ("aio", "errors", "ids", "protocols", "testing")  # modules that readers reach as `lattica.errors`
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BlobError",
    "Call",
    "CallError",
    "Cid",
    "ConfigError",
    "DeadlineError",
    "DialError",
    "DocumentError",
    "HashError",
    "InferenceError",
    "LatticaError",
    "LocalProtocolError",
    "NetworkError",
    "NoSuchMethodError",
    "Node",
    "NodeConfig",
    "NotFoundError",
    "OverloadedError",
    "PeerId",
    "ProtocolError",
    "RecordError",
    "RemoteError",
    "RemoteProtocolError",
    "Service",
    "StreamError",
    "Tensor",
    "UnreachableError",
    "aio",
    "open_node",
    "portal",
]


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return importlib.import_module(f"lattica.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'lattica' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
