"""The manifest of a model: its config, and the content id of every piece that a peer may want by itself.

A piece is what one stage holds: the embedding, one layer, or the head (final norm and, unless tied, lm_head).
Its bytes are a canonical safetensors file of just those tensors (`lattica_infer.model.tensor_file`), so a
piece can be fetched, checked and mapped alone, and its name doesn't depend on how the files had been split.
Two peers that imported the same model hold the same manifest, byte for byte; its hash names the model.

Pure: bytes in, bytes out. Byte layout: docs/wire.md, "Model manifest".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]

from lattica.ids import Cid
from lattica_infer.errors import WeightsError
from lattica_infer.model import files
from lattica_infer.model.tensor_file import TensorSpec, canonical_header, canonical_order

MAGIC: Final = "lattica-model"
VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 8 * 1024 * 1024  # 60 bytes a tensor; also bounds every list and string inside
MAX_LAYERS: Final = 1024  # Llama 3.1 405B has 126
MAX_PIECE_TENSORS: Final = 4096
MAX_CONFIG_BYTES: Final = 256 * 1024

_LAYER_NAME: Final = re.compile(r"model\.layers\.(0|[1-9]\d{0,3})\..+")


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file beside the weights, such as tokenizer.json."""

    name: str
    cid: Cid
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Tensors that travel together. `cid` and `size_bytes` are of their canonical safetensors file."""

    cid: Cid
    tensors: tuple[TensorSpec, ...]  # in canonical order

    @property
    def header(self) -> bytes:
        """What stands in the piece's file before the tensors' bytes."""
        return canonical_header(self.tensors)

    @property
    def size_bytes(self) -> int:
        return len(self.header) + sum(tensor.size_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class ModelManifest:
    """What a model consists of. Build it from files with `lattica_infer.weights.pieces.describe_folder`."""

    config_json: bytes = field(repr=False)  # config.json as it stands in the model's folder
    side_files: tuple[SideFile, ...]
    embedding: Piece
    layers: tuple[Piece, ...]
    head: Piece

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json, parsed. Shared: not to be changed."""
        return MappingProxyType(files.parse_object(self.config_json, files.CONFIG))

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Embedding, layers in order, head."""
        return (self.embedding, *self.layers, self.head)

    @property
    def parameters(self) -> int:
        return sum(tensor.elements for piece in self.pieces for tensor in piece.tensors)

    @property
    def size_bytes(self) -> int:
        """Of all pieces and side files: what has to be moved to have the whole model."""
        side_bytes = sum(part.size_bytes for part in self.side_files)
        return side_bytes + sum(piece.size_bytes for piece in self.pieces)

    @property
    def dtype(self) -> str:
        """What most parameters are stored as, in our words: "f32", "f16" or "bf16"."""
        elements: Counter[str] = Counter()
        for piece in self.pieces:
            for tensor in piece.tensors:
                elements[tensor.dtype] += tensor.elements
        return elements.most_common(1)[0][0].lower()

    @cached_property
    def cid(self) -> Cid:
        """The model's name in the mesh: the hash of `to_bytes()`."""
        return Cid.of(self.to_bytes())

    def to_bytes(self) -> bytes:
        """The canonical encoding; equal manifests have equal bytes."""
        side_files = [[part.name, part.cid.digest, part.size_bytes] for part in self.side_files]
        pieces = [
            [piece.cid.digest, [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in piece.tensors]]
            for piece in self.pieces
        ]
        packed: bytes = msgpack.packb([MAGIC, VERSION, self.config_json, side_files, pieces])
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> ModelManifest:
        """Read a manifest. Raises WeightsError for whatever `to_bytes` would not have written."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise _bad(f"{len(data)} bytes, more than {MAX_MANIFEST_BYTES}")
        try:
            fields = msgpack.unpackb(
                data,
                raw=False,
                use_list=True,
                max_ext_len=0,
                max_map_len=0,
                max_array_len=2 * MAX_PIECE_TENSORS,
            )
        except (ValueError, RecursionError, msgpack.UnpackException) as error:
            raise WeightsError(f"this is no model manifest: {error or type(error).__name__}") from error
        manifest = _from_fields(fields)
        if manifest.to_bytes() != data:  # one spelling only, or one model would have several names
            raise _bad("an encoding other than the canonical one")
        return manifest


def split(tensors: Mapping[str, TensorSpec], layers: int) -> list[tuple[TensorSpec, ...]]:
    """The tensors of each piece of a model of so many layers, in canonical order: embedding, layers, head.

    Raises:
        WeightsError: a tensor belongs to no piece.
    """
    pieces: list[list[TensorSpec]] = [[] for _ in range(layers + 2)]
    for name, tensor in tensors.items():
        pieces[_piece_of(name, layers)].append(tensor)
    return [canonical_order(piece) for piece in pieces]


def _piece_of(name: str, layers: int) -> int:
    if name == "model.embed_tokens.weight":
        return 0
    if name in ("model.norm.weight", "lm_head.weight"):
        return layers + 1
    match = _LAYER_NAME.fullmatch(name)
    if match is None or int(match[1]) >= layers:
        raise WeightsError(f"tensor {name[:80]!r} belongs to no part of a model of {layers} layers")
    return 1 + int(match[1])


def _check(manifest: ModelManifest) -> None:
    """What holds for every manifest, built or read."""
    layers = len(manifest.layers)
    if not 1 <= layers <= MAX_LAYERS:
        raise _bad(f"{layers} layers, not 1 to {MAX_LAYERS}")
    if len(manifest.config_json) > MAX_CONFIG_BYTES:
        raise _bad(f"a config.json of {len(manifest.config_json)} bytes")
    declared = manifest.config.get("num_hidden_layers")
    if declared != layers:
        raise _bad(f"{layers} layers, but its config.json says {str(declared)[:20]}")
    for index, piece in enumerate(manifest.pieces):
        if not 0 < len(piece.tensors) <= MAX_PIECE_TENSORS:
            raise _bad(f"a piece of {len(piece.tensors)} tensors")
        if len({tensor.name for tensor in piece.tensors}) != len(piece.tensors):
            raise _bad("a tensor that stands twice in a piece")
        if any(_piece_of(tensor.name, layers) != index for tensor in piece.tensors):
            raise _bad("a tensor in a piece where it doesn't belong")
        if canonical_order(piece.tensors) != piece.tensors:
            raise _bad("tensors out of their order")
    names = [part.name for part in manifest.side_files]
    if not set(names) <= set(files.SIDE_FILES) or names != sorted(set(names)):
        raise _bad(f"side files {str(names)[:80]}, which are not what a model has, in order")
    for part in manifest.side_files:
        if not 0 <= part.size_bytes <= files.MAX_TOKENIZER_BYTES:
            raise _bad(f"a {part.name} of {part.size_bytes} bytes")


def _from_fields(fields: Any) -> ModelManifest:
    match fields:
        case ["lattica-model", 1, bytes(config), list(side_files), list(pieces)] if len(pieces) >= 3:
            embedding, *layers, head = [_piece(piece) for piece in pieces]
            return ModelManifest(config, tuple(map(_side_file, side_files)), embedding, tuple(layers), head)
        case ["lattica-model", int(version), *_] if version != VERSION:
            raise _bad(f"version {str(version)[:20]}; this lattica reads version {VERSION}")
        case _:
            raise _bad("fields other than a manifest's")


def _side_file(fields: Any) -> SideFile:
    match fields:
        case [str(name), bytes(digest), int(size)] if len(digest) == 32 and type(size) is int:
            return SideFile(name, Cid(digest), size)
        case _:
            raise _bad("a side file that is not [name, digest, size]")


def _piece(fields: Any) -> Piece:
    match fields:
        case [bytes(digest), list(tensors)] if len(digest) == 32:
            return Piece(Cid(digest), tuple(map(_tensor, tensors)))
        case _:
            raise _bad("a piece that is not [digest, tensors]")


def _tensor(fields: Any) -> TensorSpec:
    match fields:
        case [str(name), str(dtype), list(shape)] if all(type(size) is int for size in shape):
            return TensorSpec(name, dtype, tuple(shape))
        case _:
            raise _bad("a tensor that is not [name, dtype, shape]")


def _bad(what: str) -> WeightsError:
    return WeightsError(f"the model manifest has {what}; import or fetch the model again")
