"""How an import tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int], object]  # (bytes done, bytes in all)


def quiet(done: int, total: int) -> None:
    """Tell nobody."""
