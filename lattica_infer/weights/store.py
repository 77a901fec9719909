"""The models of this machine: imported ones in the cache folder, and any folder of the user's.

```text
CACHE/models/NAME/      one imported model, in Hugging Face layout, and model.manifest
CACHE/manifests/        manifests of folders outside, so that they are hashed once
CACHE/downloads/        what imports fetched
```
CACHE is `$LATTICA_CACHE_DIR`, else the user's cache folder. A model appears under its name whole or not at
all. Nothing is ever written into a folder outside.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]
import platformdirs

from lattica.ids import Cid
from lattica_infer.errors import WeightsError
from lattica_infer.model import files
from lattica_infer.model.config import ModelConfig
from lattica_infer.weights.manifest import MAX_MANIFEST_BYTES, ModelManifest
from lattica_infer.weights.pieces import describe_folder

MANIFEST: Final = "model.manifest"

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_UNFINISHED: Final = ".import-"


def default_cache_dir() -> Path:
    """`$LATTICA_CACHE_DIR`, else the user's cache folder for lattica."""
    chosen = os.environ.get("LATTICA_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("lattica"))


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model on this machine. `folder` is in Hugging Face layout and not to be written to."""

    name: str
    folder: Path
    manifest: ModelManifest

    @property
    def cid(self) -> Cid:
        return self.manifest.cid

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(dict(self.manifest.config))

    def summary(self) -> dict[str, Any]:
        """The model as `model ls` shows it, in JSON's types; `size_bytes` counts weights and tokenizer."""
        return {
            "name": self.name,
            "cid": str(self.cid),
            "layers": len(self.manifest.layers),
            "parameters": self.manifest.parameters,
            "size_bytes": self.manifest.size_bytes,
            "dtype": self.manifest.dtype,
            "folder": str(self.folder),
        }


class ModelStore:
    """The models under a cache folder; `default_cache_dir()` unless another is given."""

    def __init__(self, cache_dir: str | Path | None = None) -> None:
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()

    def list(self) -> list[StoredModel]:
        """All imported models, by name. WeightsError names the folder of one that is damaged."""
        return [self._open(name) for name in self._names()]

    def find(self, name: str) -> StoredModel | None:
        """The imported model of this name, if there is one. WeightsError if the name can't be one."""
        check_name(name)
        return self._open(name) if (self._models / name / MANIFEST).is_file() else None

    def resolve(self, model: str | Path | Cid) -> StoredModel:
        """The model that a user means: a name from `list`, a Cid, or the path of a folder.

        A name goes before a folder of the same name; `./NAME` means the folder. A folder is read whole the
        first time, to hash it; later only if a file's size or time has changed.

        Raises:
            WeightsError: there is no such model; the message lists those that there are.
        """
        if isinstance(model, Cid) or (isinstance(model, str) and _is_cid(model)):
            return self._by_cid(Cid.parse(model))
        text = str(model)
        if isinstance(model, str) and _NAME.fullmatch(text) and (self._models / text / MANIFEST).is_file():
            return self._open(text)
        folder = os.path.expanduser(text)
        if os.path.isdir(folder):  # False, unlike Path's, also for text that no path can be
            return self._outside(Path(folder).resolve())
        known = ", ".join(self._names()) or "none"
        raise WeightsError(
            f"no model {text[:200]!r}: neither a folder nor an imported model (known: {known}); "
            'import one with "lattica model import SOURCE"'
        )

    def add(self, name: str, write: Callable[[Path], None]) -> StoredModel:
        """Let `write` fill an empty folder with a model and keep it under `name`.

        The same model under the same name once more changes nothing.

        Raises:
            WeightsError: what was written is no model, or another model has the name. Then, as when `write`
                raises, nothing is kept.
        """
        check_name(name)
        try:
            self._models.mkdir(parents=True, exist_ok=True)
            with files.locked(self._models / ".lock"):  # one import at a time: so leftovers are nobody's
                for leftover in self._models.glob(f"{_UNFINISHED}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self._models))
                try:
                    write(unfinished)
                    self._keep(unfinished, name)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
        except OSError as error:
            reason = error.strerror or error
            raise WeightsError(f"cannot keep model {name!r} in {self._models}: {reason}") from error
        return self._open(name)

    def _keep(self, unfinished: Path, name: str) -> None:
        try:
            manifest = describe_folder(unfinished)
        except WeightsError as error:  # it names files of a folder that is about to be gone
            raise WeightsError(str(error).replace(str(unfinished), name)) from error
        (unfinished / MANIFEST).write_bytes(manifest.to_bytes())
        earlier = self.find(name)
        if earlier is None:
            unfinished.chmod(0o755)
            unfinished.rename(self._models / name)
        elif earlier.cid != manifest.cid:
            raise WeightsError(
                f"the name {name!r} is taken by model {earlier.cid}, and this one is {manifest.cid}; "
                f"import it under another name, or delete {earlier.folder}"
            )

    @property
    def _models(self) -> Path:
        return self.cache_dir / "models"

    def _names(self) -> Iterable[str]:
        return sorted(path.parent.name for path in self._models.glob(f"[!.]*/{MANIFEST}"))

    def _open(self, name: str) -> StoredModel:
        folder = self._models / name
        try:
            manifest = ModelManifest.from_bytes(files.read_bounded(folder / MANIFEST, MAX_MANIFEST_BYTES))
        except WeightsError as error:
            raise WeightsError(f"model {name!r} is damaged; delete {folder} and import it again") from error
        return StoredModel(name, folder, manifest)

    def _by_cid(self, cid: Cid) -> StoredModel:
        for stored in self.list():
            if stored.cid == cid:
                return stored
        raise WeightsError(f'no imported model is {cid}; "lattica model ls" lists those that there are')

    def _outside(self, folder: Path) -> StoredModel:
        kept = self.cache_dir / "manifests" / str(Cid.of(os.fsencode(folder)))
        state = _folder_state(folder)
        manifest = _recall(kept, state)
        if manifest is None:
            manifest = describe_folder(folder)
            _remember(kept, state, manifest)
        return StoredModel(folder.name, folder, manifest)


def check_name(name: str) -> None:
    """Raise WeightsError unless `name` can be a model's: it becomes a folder's name, and is not a Cid."""
    if not _NAME.fullmatch(name) or _is_cid(name):
        raise WeightsError(
            f"{name[:100]!r} can't be a model's name; use up to 96 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )


def _is_cid(text: str) -> bool:
    try:
        Cid.parse(text)
    except ValueError:
        return False
    return True


def _folder_state(folder: Path) -> bytes:
    """What changes when somebody changes the model: names, sizes and times of its files."""
    weights = [path.name for path in files.weight_files(folder)]
    parts = []
    for name in sorted({files.CONFIG, files.WEIGHTS_INDEX, *files.SIDE_FILES, *weights}):
        try:
            status = (folder / name).stat()
        except FileNotFoundError:
            continue
        parts.append([name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino])
    state: bytes = msgpack.packb(parts)
    return Cid.of(state).digest


def _recall(kept: Path, state: bytes) -> ModelManifest | None:
    try:
        content = files.read_bounded(kept, MAX_MANIFEST_BYTES + len(state))
        return ModelManifest.from_bytes(content[len(state) :]) if content.startswith(state) else None
    except WeightsError:  # a cache: what can't be read is made again
        return None


def _remember(kept: Path, state: bytes, manifest: ModelManifest) -> None:
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(kept, state + manifest.to_bytes())
    except OSError:  # a read-only cache costs the hashing once more, not the model
        return
