"""Calls between peers: one codec, one framing, one set of limits."""

from lattica.rpc.codec import Tensor
from lattica.rpc.service import Call, ClientStream, Limits, Rpc, Service

__all__ = ["Call", "ClientStream", "Limits", "Rpc", "Service", "Tensor"]
