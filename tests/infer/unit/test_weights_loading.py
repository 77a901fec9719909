"""Loading a range of layers: the right tensors, mapped, and one sentence for each thing that can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lattica_infer.errors import WeightsError
from lattica_infer.weights.loading import load_stage_tensors


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))


def layers_in(names: Any) -> set[int]:
    return {int(name.split(".")[2]) for name in names if name.startswith("model.layers.")}


@pytest.mark.parametrize("files", [1, 4])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_all_layers_give_all_tensors(make_tiny_model: Callable[..., Path], kind: str, files: int) -> None:
    folder = make_tiny_model(kind=kind, files=files, tied=False)
    whole = {}
    for file in folder.glob("*.safetensors"):
        whole |= safetensors.torch.load_file(file)
    loaded = load_stage_tensors(folder, range(5))
    assert loaded.keys() == whole.keys()
    assert all(tensor.equal(whole[name]) for name, tensor in loaded.items())


def test_a_middle_range_gives_its_layers_and_nothing_else(tiny_model: Path) -> None:
    loaded = load_stage_tensors(tiny_model, range(1, 3))
    assert layers_in(loaded) == {1, 2}
    assert all(name.startswith("model.layers.") for name in loaded)


def test_the_ends_hold_embedding_and_head(tiny_model: Path) -> None:
    assert "model.embed_tokens.weight" in load_stage_tensors(tiny_model, range(1))
    last = load_stage_tensors(tiny_model, range(4, 5))
    assert {
        "model.norm.weight",
        "model.embed_tokens.weight",
    } <= last.keys()  # tied: the head is the embedding


def test_bf16_stays_bf16(make_tiny_model: Callable[..., Path]) -> None:
    loaded = load_stage_tensors(make_tiny_model(dtype=torch.bfloat16), range(5))
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}


def test_tensors_are_mapped_not_copied(make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model()
    tensor = load_stage_tensors(folder, range(5))["model.norm.weight"]
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    address = tensor.data_ptr()
    mine = [line for line in maps.read_text().splitlines() if str(folder) in line]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in mine]
    assert any(start <= address < end for start, end in ranges)


def test_a_missing_tensor_is_named(make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model()
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(WeightsError, match=r"no tensor model\.layers\.3\.mlp\.up_proj\.weight"):
        load_stage_tensors(folder, range(5))
    assert load_stage_tensors(folder, range(3))  # the layers that are whole still load


def test_a_wrong_shape_is_named(make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model()
    edit_config(folder, intermediate_size=256)
    with pytest.raises(WeightsError, match=r"shape \[128, 64\], but config\.json calls for \[256, 64\]"):
        load_stage_tensors(folder, range(1))


@pytest.mark.parametrize("left", [0.999, 0.5, 0.0])
def test_a_truncated_file_is_named(make_tiny_model: Callable[..., Path], left: float) -> None:
    folder = make_tiny_model()
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * left)])
    with pytest.raises(WeightsError, match=r"model\.safetensors .*truncated"):
        load_stage_tensors(folder, range(1))


def test_a_missing_shard_is_named(make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model(files=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"00002-of-00003\.safetensors does not exist"):
        load_stage_tensors(folder, range(1))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", "", None, 3]
)
def test_an_index_cannot_lead_outside(make_tiny_model: Callable[..., Path], name: Any) -> None:
    folder = make_tiny_model(files=2)
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="beside it"):
        load_stage_tensors(folder, range(1))


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": 3}', "{"])
def test_a_damaged_index_is_refused(make_tiny_model: Callable[..., Path], content: str) -> None:
    folder = make_tiny_model(files=2)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match=r"index\.json"):
        load_stage_tensors(folder, range(1))


def test_an_unknown_architecture_is_named(make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model()
    edit_config(folder, model_type="mamba")
    with pytest.raises(WeightsError, match="mamba"):
        load_stage_tensors(folder, range(1))


def test_pickled_weights_are_not_read(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(WeightsError, match="not pickled"):
        load_stage_tensors(tmp_path, range(1))


def test_several_files_without_an_index_are_refused(make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model(files=2)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(WeightsError, match=r"no model\.safetensors\.index\.json to tie them"):
        load_stage_tensors(folder, range(1))
