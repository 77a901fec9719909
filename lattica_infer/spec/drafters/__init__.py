"""Drafters: cheap guesses at what the target will say next, as trees.

A drafter sees the prompt and what was generated since, and nothing else: none learns from another prompt.
Whatever it proposes, the output stays the target's own; a bad guess costs time only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from lattica_infer.spec.tree import DraftTree

__all__ = ["DRAFTERS", "Drafter", "make_drafter"]


class Drafter(Protocol):
    """What the decode loop asks of a drafter. One drafter serves one generation at a time."""

    name: str

    def begin(self, prompt: Sequence[int]) -> None:
        """Forget everything and start with `prompt` (at least one token id)."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Take note of `tokens`, committed since the last call."""

    def draft(self, budget: int) -> DraftTree:
        """A tree whose node 0 is the last committed token, with up to `budget` further nodes, best first."""


class NoDrafter:
    """Drafts nothing: every round is one token, plain decoding."""

    name = "none"

    def __init__(self) -> None:
        self._last = 0

    def begin(self, prompt: Sequence[int]) -> None:
        self.extend(prompt)

    def extend(self, tokens: Sequence[int]) -> None:
        if tokens:
            self._last = tokens[-1]

    def draft(self, budget: int) -> DraftTree:
        return DraftTree((self._last,), (-1,), (1.0,))


def _suffix() -> Drafter:
    from lattica_infer.spec.drafters.suffix import SuffixDrafter  # native: loaded where it is used

    return SuffixDrafter()


_MAKERS: Final[dict[str, Callable[[], Drafter]]] = {"none": NoDrafter, "suffix": _suffix, "auto": _suffix}
DRAFTERS: Final = tuple(_MAKERS)  # names that `make_drafter` takes


def make_drafter(name: str) -> Drafter:
    """A new drafter by name; "auto" is the best of those that exist.

    Raises:
        ValueError: no drafter of this name.
    """
    try:
        return _MAKERS[name]()
    except KeyError:
        raise ValueError(f"no drafter {name!r}; there are {', '.join(DRAFTERS)}") from None
