"""The manifest: one name per model, and nothing but WeightsError for bytes that are no manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import safetensors.torch
from hypothesis import given
from hypothesis import strategies as st

from lattica.ids import Cid
from lattica_infer.errors import WeightsError
from lattica_infer.model.tensor_file import TensorSpec, read_tensor_tables
from lattica_infer.weights import manifest as module
from lattica_infer.weights.manifest import ModelManifest, Piece, SideFile
from lattica_infer.weights.pieces import describe_folder, piece_blocks


@pytest.fixture(scope="module")
def manifest(tiny_model: Path) -> ModelManifest:
    return describe_folder(tiny_model)


def fields_of(manifest: ModelManifest) -> list[Any]:
    fields: list[Any] = msgpack.unpackb(manifest.to_bytes())
    return fields


def test_a_manifest_comes_back_from_its_bytes(manifest: ModelManifest) -> None:
    again = ModelManifest.from_bytes(manifest.to_bytes())
    assert again == manifest
    assert again.cid == manifest.cid == Cid.of(manifest.to_bytes())


def test_a_manifest_tells_what_the_model_is(manifest: ModelManifest, tiny_model: Path) -> None:
    tensors = safetensors.torch.load_file(tiny_model / "model.safetensors")
    assert len(manifest.layers) == 5
    assert manifest.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert manifest.dtype == "f32"
    assert manifest.config["hidden_size"] == 64
    assert [part.name for part in manifest.side_files] == [
        *("generation_config.json", "tokenizer.json", "tokenizer_config.json")
    ]


def test_the_same_source_gives_the_same_cid(make_tiny_model: Callable[..., Path]) -> None:
    assert describe_folder(make_tiny_model()).cid == describe_folder(make_tiny_model()).cid


def test_other_weights_give_another_cid(
    make_tiny_model: Callable[..., Path], manifest: ModelManifest
) -> None:
    assert describe_folder(make_tiny_model(seed=1)).cid != manifest.cid


def test_another_chat_template_gives_another_cid(
    make_tiny_model: Callable[..., Path], manifest: ModelManifest
) -> None:
    folder = make_tiny_model()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert describe_folder(folder).cid != manifest.cid


@pytest.mark.parametrize("files", [2, 7])
def test_a_resharded_copy_has_the_same_cid(
    make_tiny_model: Callable[..., Path], manifest: ModelManifest, files: int
) -> None:
    assert describe_folder(make_tiny_model(files=files)).cid == manifest.cid


def test_a_piece_is_a_safetensors_file_of_just_that_layer(tiny_model: Path, manifest: ModelManifest) -> None:
    stored = read_tensor_tables([tiny_model / "model.safetensors"])
    whole = safetensors.torch.load_file(tiny_model / "model.safetensors")
    seen = set()
    for piece in manifest.pieces:
        content = b"".join(piece_blocks(stored, piece.tensors))
        assert (Cid.of(content), len(content)) == (piece.cid, piece.size_bytes)
        tensors = safetensors.torch.load(content)
        assert all(tensor.equal(whole[name]) for name, tensor in tensors.items())
        seen |= tensors.keys()
    assert seen == whole.keys()
    assert [tensor.name for tensor in manifest.embedding.tensors] == ["model.embed_tokens.weight"]
    assert [tensor.name for tensor in manifest.head.tensors] == ["model.norm.weight"]


def test_an_untied_head_holds_its_own_matrix(make_tiny_model: Callable[..., Path]) -> None:
    head = describe_folder(make_tiny_model(tied=False)).head
    assert [tensor.name for tensor in head.tensors] == ["lm_head.weight", "model.norm.weight"]


def test_a_copy_of_the_embedding_in_a_tied_model_does_not_count(
    make_tiny_model: Callable[..., Path], manifest: ModelManifest
) -> None:
    folder = make_tiny_model()
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    assert describe_folder(folder).cid == manifest.cid


def test_a_tensor_that_the_architecture_lacks_is_refused(make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model(kind="qwen3", layers=2)
    settings = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=r"4 tensors that a llama model lacks.*k_norm"):
        describe_folder(folder)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json does not exist"):
        describe_folder(tmp_path)


def test_the_encoding_is_what_the_wire_page_says() -> None:
    def piece(digest: int, *tensors: str) -> Piece:
        return Piece(Cid(bytes([digest] * 32)), tuple(TensorSpec(name, "F16", (2, 300)) for name in tensors))

    manifest = ModelManifest(
        config_json=b'{"num_hidden_layers":1}',
        side_files=(SideFile("tokenizer.json", Cid(bytes(32)), 70_000),),
        embedding=piece(1, "model.embed_tokens.weight"),
        layers=(piece(2, "model.layers.0.mlp.up_proj.weight"),),
        head=piece(3, "lm_head.weight", "model.norm.weight"),
    )
    shape = b"\xa3F16\x92\x02\xcd\x01\x2c"
    assert manifest.to_bytes() == (
        b"\x95\xadlattica-model\x01"
        b'\xc4\x17{"num_hidden_layers":1}'
        b"\x91\x93\xaetokenizer.json\xc4\x20" + bytes(32) + b"\xce\x00\x01\x11\x70"
        b"\x93"
        b"\x92\xc4\x20" + b"\x01" * 32 + b"\x91\x93\xb9model.embed_tokens.weight" + shape + b"\x92\xc4\x20"
        b"" + b"\x02" * 32 + b"\x91\x93\xd9\x21model.layers.0.mlp.up_proj.weight" + shape + b"\x92\xc4\x20"
        b"" + b"\x03" * 32 + b"\x92\x93\xaelm_head.weight" + shape + b"\x93\xb1model.norm.weight" + shape
    )


@given(st.binary(max_size=300))
def test_random_bytes_are_no_manifest(data: bytes) -> None:
    with pytest.raises(WeightsError):
        ModelManifest.from_bytes(data)


@given(st.data())
def test_mutated_bytes_are_a_weights_error_or_another_model(
    manifest: ModelManifest, data: st.DataObject
) -> None:
    content = bytearray(manifest.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        read = ModelManifest.from_bytes(bytes(content))
    except WeightsError:
        return
    assert read.to_bytes() == bytes(content)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=5)
    | st.binary(max_size=33),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=10,
)


@given(st.data())
def test_a_manifest_with_any_field_replaced_is_a_weights_error(
    manifest: ModelManifest, data: st.DataObject
) -> None:
    fields = fields_of(manifest)
    spot, key = fields, data.draw(st.integers(0, len(fields) - 1))
    while isinstance(spot[key], list) and spot[key] and data.draw(st.booleans()):
        spot, key = spot[key], data.draw(st.integers(0, len(spot[key]) - 1))
    original = spot[key]
    spot[key] = data.draw(PLAIN)
    if spot[key] == original or (isinstance(original, bytes) and len(original) == 32):
        return  # another digest is another model, as good as this one
    try:
        read = ModelManifest.from_bytes(msgpack.packb(fields))
    except WeightsError:
        return
    assert read != manifest  # a size or shape may be replaced by another that could be true
    assert len(read.layers) == 5


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda fields: fields.__setitem__(1, 2), "version 2; this lattica reads version 1"),
        (lambda fields: fields[4].pop(1), "4 layers, but its config.json says 5"),
        (lambda fields: fields[4].reverse(), "doesn't belong"),
        (lambda fields: fields[4][1][1].reverse(), "out of their order"),
        (lambda fields: fields[4][1][1].insert(0, fields[4][1][1][0]), "twice in a piece"),
        (lambda fields: fields[4][1][1].clear(), "a piece of 0 tensors"),
        (lambda fields: fields[3].reverse(), "in order"),
        (lambda fields: fields[3].append(["../../.ssh/authorized_keys", bytes(32), 3]), "side files"),
        (lambda fields: fields[3][0].__setitem__(2, 1 << 50), "bytes"),
        (lambda fields: fields.__setitem__(2, b"[]"), "object belongs"),
        (lambda fields: fields[4][1][1][0].__setitem__(1, "F8_E4M3"), "F32, F16 or BF16"),
        (lambda fields: fields[4][1][1][0].__setitem__(2, [1 << 62, 1 << 62]), "more than any model"),
        (lambda fields: fields[4][1][1][0].__setitem__(2, [0, 4]), "impossible shape"),
    ],
)
def test_what_no_model_looks_like_is_refused_by_name(
    manifest: ModelManifest, change: Callable[[list[Any]], object], complaint: str
) -> None:
    fields = fields_of(manifest)
    change(fields)
    with pytest.raises(WeightsError, match=complaint):
        ModelManifest.from_bytes(msgpack.packb(fields))


def test_a_second_spelling_of_a_manifest_is_refused(manifest: ModelManifest) -> None:
    content = manifest.to_bytes()
    assert content[1] == 0xA0 | len(module.MAGIC)
    longer = content[:1] + b"\xd9" + bytes([len(module.MAGIC)]) + content[2:]  # str 8 instead of fixstr
    assert msgpack.unpackb(longer) == msgpack.unpackb(content)
    with pytest.raises(WeightsError, match="canonical"):
        ModelManifest.from_bytes(longer)


def test_an_oversize_manifest_is_refused_unread() -> None:
    with pytest.raises(WeightsError, match="more than"):
        ModelManifest.from_bytes(bytes(module.MAX_MANIFEST_BYTES + 1))


def test_a_manifest_cannot_be_built_wrong(manifest: ModelManifest) -> None:
    with pytest.raises(WeightsError, match="doesn't belong"):
        replace(manifest, embedding=manifest.head)


def test_piece_bytes_of_a_file_that_shrank_are_an_error(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    stored = read_tensor_tables([file])
    file.write_bytes(file.read_bytes()[:-8])
    last = max(stored.values(), key=lambda tensor: tensor.start)
    with pytest.raises(WeightsError, match="became shorter"):
        list(piece_blocks(stored, (last.spec,)))
