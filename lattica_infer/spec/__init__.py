"""Speculation: draft trees, drafters, the verifying walk, budget and decode loop. Nothing here does I/O."""

from __future__ import annotations

from lattica_infer.spec.tree import DraftTree
from lattica_infer.spec.verify import Verdict, walk

__all__ = ["DraftTree", "Verdict", "walk"]
