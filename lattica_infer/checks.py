"""One checker for each kind of plain value that a peer may send. `what` names the field in the error.

Each returns the value in its own type or raises `RemoteProtocolError`: nothing else, whatever comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from lattica.errors import RemoteProtocolError
from lattica.ids import Cid, PeerId

MAX_COUNTER: Final = (1 << 53) - 1  # epochs, frame and byte counts; stays exact in every language's numbers
MAX_LAYERS: Final = 1024  # eight times the deepest open model
MAX_ADDRESSES: Final = 16  # of one peer in a spec or an announcement; more is a port scan
MAX_ADDRESS_CHARS: Final = 512  # a circuit address through a relay, with room


def integer(value: object, what: str, low: int, high: int) -> int:
    if type(value) is not int:  # bool is an int to isinstance
        raise RemoteProtocolError(f"{what} is a {type(value).__name__}, not an integer")
    if not low <= value <= high:
        raise RemoteProtocolError(f"{what} {value} is not in {low}..{high}")
    return value


def number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RemoteProtocolError(f"{what} is a {type(value).__name__}, not a number")
    if not -MAX_COUNTER <= value <= MAX_COUNTER:  # NaN fails it too
        raise RemoteProtocolError(f"{what} is not a finite number of usual size")
    return float(value)


def text(value: object, what: str, longest: int) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= longest or not value.isprintable():
        raise RemoteProtocolError(f"{what} is not printable text of at most {longest} characters")
    return value


def integers(value: object, what: str, low: int, high: int, *, longest: int) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise RemoteProtocolError(f"{what} is a {type(value).__name__}, not a list")
    if len(value) > longest:
        raise RemoteProtocolError(f"{what} has {len(value)} entries, more than {longest}")
    return tuple(integer(item, what, low, high) for item in value)


def array(value: object, what: str, length: int) -> Iterator[Any]:
    if not isinstance(value, list) or len(value) != length:
        raise RemoteProtocolError(f"a {what} is a list of {length} values")
    return iter(value)


def mapping(value: object, what: str, names: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) != len(names) or any(name not in value for name in names):
        raise RemoteProtocolError(f"a {what} is a map of {', '.join(names)}")
    return value


def peer_id(value: object, what: str) -> PeerId:
    if not isinstance(value, str):
        raise RemoteProtocolError(f"the {what} is a {type(value).__name__}, not a peer id")
    try:
        return PeerId.parse(value)
    except ValueError as error:
        raise RemoteProtocolError(f"the {what} is no peer id: {value!r:.80}") from error


def cid(value: object) -> Cid:
    if not isinstance(value, str):
        raise RemoteProtocolError(f"the model is a {type(value).__name__}, not a Cid")
    try:
        return Cid.parse(value)
    except ValueError as error:
        raise RemoteProtocolError(f"the model is no Cid: {value!r:.80}") from error


def layer_range(value: object) -> range:
    first, stop = array(value, "layer range", 2)
    start = integer(first, "first layer", 0, MAX_LAYERS - 1)
    return range(start, integer(stop, "layer stop", start + 1, MAX_LAYERS))


def addresses(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_ADDRESSES:
        raise RemoteProtocolError(f"addresses are a list of at most {MAX_ADDRESSES}")
    return tuple(text(item, "address", MAX_ADDRESS_CHARS) for item in value)
