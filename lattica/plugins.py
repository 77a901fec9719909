"""What installed packages add to ours, found by entry point group."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from lattica.telemetry import Log


def plugins(group: str, log: Log) -> Iterator[tuple[str, Any]]:
    """The name and object of each entry point of a group, by name.

    One that cannot be imported is left out with a warning: a package without its extras, or a broken one,
    must not take down what works without it.
    """
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        try:
            loaded = entry.load()
        except Exception as error:
            log.warning(
                "a package's entry point cannot be loaded", entry=f"{group}: {entry.value}", why=error
            )
            continue
        yield entry.name, loaded
