"""A model as a folder: which files it has, and reading them with a bound.

The layout is Hugging Face's. Knows the names and sizes of files, nothing of what stands in them.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from lattica_infer.errors import WeightsError

CONFIG: Final = "config.json"
GENERATION_CONFIG: Final = "generation_config.json"
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
CHAT_TEMPLATE: Final = "chat_template.jinja"
WEIGHTS: Final = "model.safetensors"
WEIGHTS_INDEX: Final = "model.safetensors.index.json"

# What a model needs beside its tensors and its config.json; the last three may be missing.
SIDE_FILES: Final = (TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE)

MAX_JSON_BYTES: Final = 4 * 1024 * 1024  # Llama 3's tokenizer_config.json, with 256 added tokens, has 50 kB
MAX_INDEX_BYTES: Final = 64 * 1024 * 1024  # 100 bytes a tensor; large public models have 100,000
MAX_TOKENIZER_BYTES: Final = 128 * 1024 * 1024  # a vocabulary of 256,000 has 35 MB


def read_bounded(path: Path, limit: int) -> bytes:
    """All bytes of a file. Raises WeightsError if it can't be read or has more than `limit` bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path} does not exist; a model's folder holds {CONFIG}, {TOKENIZER} and *.safetensors"
        ) from error
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > limit:
        raise WeightsError(f"{path} is larger than the {limit} bytes that such a file may have")
    return content


def parse_object(content: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises WeightsError, naming `what`, for everything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{what} is not JSON ({type(error).__name__}); import the model again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{what} holds a JSON {type(value).__name__} where an object belongs")
    return value


def read_object(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file; WeightsError as in `read_bounded` and `parse_object`."""
    return parse_object(read_bounded(path, limit), str(path))


def read_optional_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no such file."""
    return read_object(path) if path.exists() else {}


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model, as its index names them; without an index, the one that there is.

    Raises:
        WeightsError: there is none, or several without an index, or the index names a path outside.
    """
    if (folder / WEIGHTS_INDEX).exists():
        return _indexed(folder)
    if (folder / WEIGHTS).exists():
        return (folder / WEIGHTS,)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return tuple(found)
    if found:
        raise WeightsError(f"{folder} has {len(found)} safetensors files but no {WEIGHTS_INDEX} to tie them")
    raise WeightsError(
        f"{folder} has no *.safetensors file; lattica reads safetensors folders and .gguf files"
        f"{', not pickled .bin weights' if any(folder.glob('*.bin')) else ''}"
    )


def _indexed(folder: Path) -> tuple[Path, ...]:
    weight_map = read_object(folder / WEIGHTS_INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{folder / WEIGHTS_INDEX} has no weight_map; copy the file again")
    names = set()
    for name in weight_map.values():
        plain = isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors")
        if not plain:
            raise WeightsError(
                f"{folder / WEIGHTS_INDEX} names {str(name)[:80]!r}; a shard is a *.safetensors beside it"
            )
        names.add(name)
    return tuple(folder / name for name in sorted(names))


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path`, whole or not at all, also if two processes do it at once. Raises OSError."""
    descriptor, unfinished = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`; waits while another process holds it. The system frees it at a crash."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
