"""Stop strings that may begin in one token and end in another. Pure: texts in, texts out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Generic, TypeVar

from lattica_infer.errors import InferenceError

_Item = TypeVar("_Item")

MAX_STOPS: Final = 16  # strings; a longer list is a grammar, and wants another tool
MAX_STOP_CHARS: Final = 1024  # that much text may be held back


class StopScanner(Generic[_Item]):
    """Holds back a token as long as its text may turn out to be part of a stop string.

    Tokens come out in order, each with its own text; the one in which a stop string begins comes out cut
    short (or not at all when nothing of it is left), and those after it never do.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises InferenceError: an empty stop string, too many, or too long ones."""
        if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
            raise InferenceError(
                f"stop takes at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters: "
                f"{list(stops)!r:.80}"
            )
        self._stops = tuple(stops)
        self._held: list[tuple[_Item, str]] = []
        self.stopped = False

    def feed(self, item: _Item, text: str) -> list[tuple[_Item, str]]:
        """The tokens that may go out now that `item` with `text` has come."""
        self._held.append((item, text))
        joined = "".join(text for _, text in self._held)
        found = [at for at in (joined.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found), ends=True)
        return self._release(len(joined) - self._open_chars(joined), ends=False)

    def flush(self) -> list[tuple[_Item, str]]:
        """The tokens still held, once no more come."""
        held, self._held = self._held, []
        return held

    def _open_chars(self, joined: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(joined)), 0, -1):
            if any(stop.startswith(joined[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, chars: int, *, ends: bool) -> list[tuple[_Item, str]]:
        """Give out the tokens within the first `chars` characters; at the end also a cut one."""
        out: list[tuple[_Item, str]] = []
        while self._held:
            item, text = self._held[0]
            if len(text) > chars:
                break
            out.append((item, text))
            chars -= len(text)
            del self._held[0]
        if ends:
            if self._held and chars:
                out.append((self._held[0][0], self._held[0][1][:chars]))
            self._held = []
        return out
