"""A model in a folder of safetensors files, as Hugging Face's libraries write it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from lattica_infer.errors import WeightsError
from lattica_infer.model import files
from lattica_infer.model.sources.progress import Progress

_BLOCK_BYTES: Final = 4 * 1024 * 1024


def copy_folder(source: Path, target: Path, progress: Progress) -> None:
    """Copy what belongs to the model, and nothing else that lies in its folder.

    Copied, not linked: a linked file would change in the store when its owner changes it.

    Raises:
        WeightsError: a file that a model needs is missing or can't be read.
    """
    for needed in (files.CONFIG, files.TOKENIZER):
        if not (source / needed).exists():
            raise WeightsError(f"{source} has no {needed}; {_advice(needed, source)}")
    names = [path.name for path in files.weight_files(source)]
    side = (files.CONFIG, files.WEIGHTS_INDEX, *files.SIDE_FILES)
    names += [name for name in side if (source / name).exists()]
    try:
        total = sum((source / name).stat().st_size for name in names)
        done = 0
        for name in names:
            done = _copy(source / name, target / name, done, total, progress)
    except OSError as error:
        raise WeightsError(f"cannot copy {error.filename}: {error.strerror}") from error


def _copy(source: Path, target: Path, done: int, total: int, progress: Progress) -> int:
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(_BLOCK_BYTES):
            writer.write(block)
            done += len(block)
            progress(done, total)
    return done


def _advice(needed: str, source: Path) -> str:
    if needed == files.TOKENIZER and (source / "tokenizer.model").exists():
        return "save its tokenizer.model in the fast form first: AutoTokenizer.from_pretrained(...).save_pretrained"
    return "give the folder that a model was saved to, with all of its files"
