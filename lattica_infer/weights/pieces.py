"""Pieces of a model in a folder: their canonical bytes, and the manifest that names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Final

from blake3 import blake3

from lattica.ids import Cid
from lattica_infer.errors import WeightsError
from lattica_infer.model import files
from lattica_infer.model.config import ModelConfig, stage_tensors
from lattica_infer.model.tensor_file import StoredTensor, TensorSpec, canonical_header, read_tensor_tables
from lattica_infer.weights.manifest import MAX_CONFIG_BYTES, ModelManifest, Piece, SideFile, split

_BLOCK_BYTES: Final = 4 * 1024 * 1024

# Checkpoints of old transformers versions carry this table, which every implementation computes itself.
_COMPUTED: Final = "self_attn.rotary_emb.inv_freq"


def read_config(folder: Path) -> ModelConfig:
    """The architecture that a folder's config.json describes. WeightsError if we don't run it."""
    return ModelConfig.from_dict(files.read_object(folder / files.CONFIG))


def find_tensors(folder: Path, config: ModelConfig, layers: range) -> dict[str, StoredTensor]:
    """Where the tensors of a range of layers lie, by name; only the files' headers are read.

    Raises:
        WeightsError: a tensor is missing or of another shape than the config calls for, or a file is damaged.
    """
    stored = read_tensor_tables(files.weight_files(folder))
    return _select(stored, stage_tensors(config, layers), folder)


def describe_folder(folder: Path) -> ModelManifest:
    """The manifest of the model in `folder`. Reads and hashes all of its bytes; writes nothing.

    Raises:
        WeightsError: as `find_tensors`, or the folder holds a tensor that a model of this architecture lacks:
            then config.json doesn't describe the model, and running it would give nonsense.
    """
    config_json = files.read_bounded(folder / files.CONFIG, MAX_CONFIG_BYTES)
    config = ModelConfig.from_dict(files.parse_object(config_json, str(folder / files.CONFIG)))
    stored = read_tensor_tables(files.weight_files(folder))
    wanted = _select(stored, stage_tensors(config, range(config.num_layers)), folder)
    _refuse_strangers(stored.keys() - wanted.keys(), config, folder)
    parts = split({name: tensor.spec for name, tensor in wanted.items()}, config.num_layers)
    embedding, *layers, head = (_hash_piece(wanted, part) for part in parts)
    present = [folder / name for name in sorted(files.SIDE_FILES) if (folder / name).exists()]
    return ModelManifest(config_json, tuple(map(_side_file, present)), embedding, tuple(layers), head)


def piece_blocks(stored: Mapping[str, StoredTensor], tensors: tuple[TensorSpec, ...]) -> Iterator[bytes]:
    """The canonical bytes of a piece, block by block. Raises WeightsError if a file ended meanwhile."""
    yield canonical_header(tensors)
    for spec in tensors:
        tensor = stored[spec.name]
        try:
            with tensor.file.open("rb") as file:
                file.seek(tensor.start)
                left = spec.size_bytes
                while left:
                    block = file.read(min(left, _BLOCK_BYTES))
                    if not block:
                        raise WeightsError(f"{tensor.file} became shorter while it was read; copy it again")
                    left -= len(block)
                    yield block
        except OSError as error:
            raise WeightsError(f"cannot read {tensor.file}: {error.strerror}") from error


def _hash_piece(stored: Mapping[str, StoredTensor], tensors: tuple[TensorSpec, ...]) -> Piece:
    digest = blake3()
    for block in piece_blocks(stored, tensors):
        digest.update(block)
    return Piece(Cid(digest.digest()), tensors)


def _side_file(path: Path) -> SideFile:
    content = files.read_bounded(path, files.MAX_TOKENIZER_BYTES)
    return SideFile(path.name, Cid.of(content), len(content))


def _select(
    stored: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]], folder: Path
) -> dict[str, StoredTensor]:
    for name, shape in wanted.items():
        tensor = stored.get(name)
        if tensor is None:
            raise WeightsError(
                f"{folder} has no tensor {name}, which its {files.CONFIG} calls for; "
                "copy the model's files again"
            )
        if tensor.spec.shape != tuple(shape):
            raise WeightsError(
                f"tensor {name} in {tensor.file} has shape {list(tensor.spec.shape)}, but {files.CONFIG} "
                f"calls for {list(shape)}; the files belong to different models"
            )
    return {name: stored[name] for name in wanted}


def _refuse_strangers(names: AbstractSet[str], config: ModelConfig, folder: Path) -> None:
    strangers = sorted(
        name
        for name in names
        if not name.endswith(_COMPUTED)
        and not (config.tied and name == "lm_head.weight")  # a copy of the embedding
    )
    if strangers:
        raise WeightsError(
            f"{folder} has {len(strangers)} tensors that a {config.kind} model lacks, such as "
            f"{strangers[0][:80]}; lattica does not run this variant"
        )
