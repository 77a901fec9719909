"""All targets by name, each from the module of its room. What is not installed is left out, with a reason."""

from __future__ import annotations

import importlib
from typing import Final

from fuzzing.engine import Target

_ROOMS: Final = ("net", "mux", "rpc", "records", "inference")


def load() -> tuple[dict[str, Target], dict[str, str]]:
    """The targets that can run here, and why others can't: names to targets, names to reasons."""
    targets: dict[str, Target] = {}
    missing: dict[str, str] = {}
    for room in _ROOMS:
        module = importlib.import_module(f"fuzzing.targets.{room}")
        targets |= {target.name: target for target in module.targets()}
        missing |= getattr(module, "MISSING", {})
    return targets, missing
