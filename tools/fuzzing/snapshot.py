"""An object as it was: put it back after an input changed it, for less than building it anew."""

from __future__ import annotations

from typing import Any, Final

_ROOMS: Final = (
    "noise",
    "lattica",
)  # objects of these packages hold state; others, such as keys, never change


class Snapshot:
    """The attributes of an object and of everything it reaches, lists and buffers included, at this moment."""

    def __init__(self, root: object) -> None:
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._buffers: list[tuple[Any, Any]] = []
        self._walk(root, set())

    def _walk(self, thing: Any, seen: set[int]) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, list | bytearray):
            self._buffers.append((thing, thing[:]))
        elif type(thing).__module__.partition(".")[0] in _ROOMS and hasattr(thing, "__dict__"):
            self._attributes.append((thing.__dict__, dict(thing.__dict__)))
            for value in thing.__dict__.values():
                self._walk(value, seen)

    def restore(self) -> None:
        """Put everything back."""
        for attributes, saved in self._attributes:
            attributes.clear()
            attributes.update(saved)
        for buffer, content in self._buffers:
            buffer[:] = content
