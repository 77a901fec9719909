"""Tensors of a range of layers, memory-mapped from a model's folder.

Mapped pages are the page cache's: several processes on one machine that serve the same model share them, and
only the layers asked for are ever read.
"""

from __future__ import annotations

from pathlib import Path

import safetensors
from torch import Tensor

from lattica_infer.errors import WeightsError
from lattica_infer.weights.pieces import find_tensors, read_config


def load_stage_tensors(folder: str | Path, layers: range) -> dict[str, Tensor]:
    """The tensors that a stage of these layers needs, by name, in the file's dtype, on CPU.

    They are views of the mapped files: they cost no memory until read, and must not be written to.

    Raises:
        WeightsError: a tensor is missing or has another shape than config.json says, a file is truncated or
            damaged, or the architecture is one that we don't run.
    """
    folder = Path(folder)
    stored = find_tensors(folder, read_config(folder), layers)
    by_file: dict[Path, list[str]] = {}
    for name in stored:
        by_file.setdefault(stored[name].file, []).append(name)
    tensors: dict[str, Tensor] = {}
    for file, names in by_file.items():
        try:
            with safetensors.safe_open(file, framework="pt", device="cpu") as handle:
                tensors |= {name: handle.get_tensor(name) for name in names}
        except (safetensors.SafetensorError, OSError) as error:
            raise WeightsError(f"{file} cannot be read: {error}; copy it again") from error
    return {name: tensors[name] for name in stored}
