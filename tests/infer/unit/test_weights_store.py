"""The store: what a model's name means, and that nothing half-done or outside is touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lattica.ids import Cid
from lattica_infer.errors import WeightsError
from lattica_infer.weights import store as module
from lattica_infer.weights.manifest import ModelManifest
from lattica_infer.weights.pieces import describe_folder
from lattica_infer.weights.store import ModelStore, default_cache_dir


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "cache")


def copier(folder: Path) -> Callable[[Path], None]:
    def write(target: Path) -> None:
        shutil.copytree(folder, target, dirs_exist_ok=True)

    return write


def everything_under(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_new_store_is_empty(store: ModelStore) -> None:
    assert store.list() == []


def test_an_added_model_is_found_by_name_cid_and_path(store: ModelStore, tiny_model: Path) -> None:
    added = store.add("tiny", copier(tiny_model))
    assert added.cid == describe_folder(tiny_model).cid
    assert store.list() == [added]
    assert store.resolve("tiny") == store.resolve(added.cid) == store.resolve(str(added.cid)) == added
    assert store.resolve(added.folder).cid == added.cid
    assert store.find("tiny") == added
    assert store.find("other") is None


def test_the_summary_is_what_model_ls_shows(store: ModelStore, tiny_model: Path) -> None:
    added = store.add("tiny", copier(tiny_model))
    summary = added.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["cid"] == str(added.cid)
    assert (summary["name"], summary["layers"], summary["dtype"]) == ("tiny", 5, "f32")
    assert summary["parameters"] * 4 < summary["size_bytes"] < summary["parameters"] * 4 + 100_000


def test_adding_the_same_model_again_changes_nothing(store: ModelStore, tiny_model: Path) -> None:
    added = store.add("tiny", copier(tiny_model))
    before = everything_under(added.folder)
    assert store.add("tiny", copier(tiny_model)) == added
    assert everything_under(added.folder) == before


def test_a_name_keeps_its_model(
    store: ModelStore, tiny_model: Path, make_tiny_model: Callable[..., Path]
) -> None:
    added = store.add("tiny", copier(tiny_model))
    with pytest.raises(WeightsError, match=f"'tiny' is taken by model {added.cid}"):
        store.add("tiny", copier(make_tiny_model(seed=1)))
    assert store.list() == [added]


def test_a_write_that_fails_leaves_nothing(store: ModelStore, tiny_model: Path) -> None:
    def interrupted(target: Path) -> None:
        copier(tiny_model)(target)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.add("tiny", interrupted)
    assert store.list() == []
    assert [path.name for path in (store.cache_dir / "models").iterdir()] == [".lock"]


def test_what_is_no_model_is_not_kept(store: ModelStore) -> None:
    with pytest.raises(WeightsError, match=r"config\.json"):
        store.add("tiny", lambda target: None)
    assert store.list() == []


def test_leftovers_of_a_crash_are_swept(store: ModelStore, tiny_model: Path) -> None:
    leftover = store.cache_dir / "models" / ".import-dead"
    copier(tiny_model)(leftover)
    store.add("tiny", copier(tiny_model))
    assert not leftover.exists()


def test_an_unknown_name_lists_the_known_ones(store: ModelStore, tiny_model: Path) -> None:
    with pytest.raises(WeightsError, match="known: none"):
        store.resolve("tinny")
    store.add("tiny", copier(tiny_model))
    with pytest.raises(WeightsError, match=r"'tinny'.*known: tiny"):
        store.resolve("tinny")


def test_an_unknown_cid_is_named(store: ModelStore) -> None:
    with pytest.raises(WeightsError, match=str(Cid.of(b"x"))):
        store.resolve(str(Cid.of(b"x")))


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../x", "a/b", "/etc", ".hidden", "a\x00b", "a b", "x" * 97, "é"]
)
def test_a_name_that_is_a_path_trick_is_refused(store: ModelStore, tiny_model: Path, name: str) -> None:
    with pytest.raises(WeightsError, match="can't be a model's name"):
        store.add(name, copier(tiny_model))
    with pytest.raises(WeightsError, match="can't be a model's name"):
        store.find(name)


def test_a_cid_cannot_be_a_name(store: ModelStore, tiny_model: Path) -> None:
    with pytest.raises(WeightsError, match="can't be a model's name"):
        store.add(str(Cid.of(b"x")), copier(tiny_model))


@pytest.mark.parametrize("model", ["\x00", "a\x00b", "x" * 5000, "~nobody-of-that-name/x"])
def test_strange_text_is_an_unknown_model(store: ModelStore, model: str) -> None:
    with pytest.raises(WeightsError, match="no model"):
        store.resolve(model)


def test_a_name_goes_before_a_folder_of_that_name(
    store: ModelStore,
    tiny_model: Path,
    make_tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    added = store.add("tiny", copier(tiny_model))
    copier(make_tiny_model(seed=1))(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert store.resolve("tiny").cid == added.cid
    assert store.resolve("./tiny").cid != added.cid


def test_a_folder_outside_is_a_model_and_is_not_written_to(store: ModelStore, tiny_model: Path) -> None:
    before = everything_under(tiny_model)
    resolved = store.resolve(tiny_model)
    assert (resolved.name, resolved.folder) == (tiny_model.name, tiny_model.resolve())
    assert resolved.cid == describe_folder(tiny_model).cid
    assert everything_under(tiny_model) == before
    assert store.list() == []


def test_a_folder_is_hashed_once(
    store: ModelStore, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []

    def counting(folder: Path) -> ModelManifest:
        hashed.append(folder)
        return describe_folder(folder)

    monkeypatch.setattr(module, "describe_folder", counting)
    assert store.resolve(tiny_model) == store.resolve(f"{tiny_model}/")
    assert len(hashed) == 1


def test_a_changed_folder_is_hashed_again(store: ModelStore, make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model()
    before = store.resolve(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1  # the same size
    (folder / "model.safetensors").write_bytes(content)
    assert store.resolve(folder).cid != before.cid


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_cache_entry_is_made_again(
    store: ModelStore, tiny_model: Path, damage: bytes | None
) -> None:
    before = store.resolve(tiny_model)
    (entry,) = (store.cache_dir / "manifests").iterdir()
    entry.write_bytes(entry.read_bytes()[:100] if damage is None else damage)
    assert store.resolve(tiny_model) == before


def test_a_cache_that_cannot_be_made_still_resolves_folders(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert ModelStore(tmp_path / "cache").resolve(tiny_model).cid == describe_folder(tiny_model).cid


def test_a_cache_that_cannot_be_made_keeps_no_model(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(WeightsError, match=f"cannot keep model 'tiny' in {tmp_path}/cache/models"):
        ModelStore(tmp_path / "cache").add("tiny", copier(tiny_model))


def test_a_damaged_model_is_named_and_does_not_hide_others(store: ModelStore, tiny_model: Path) -> None:
    store.add("bad", copier(tiny_model))
    good = store.add("good", copier(tiny_model))
    (store.cache_dir / "models" / "bad" / "model.manifest").write_bytes(b"garbage")
    with pytest.raises(WeightsError, match="'bad' is damaged; delete"):
        store.list()
    assert store.resolve("good") == good


def test_the_environment_chooses_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATTICA_CACHE_DIR", str(tmp_path))
    assert ModelStore().cache_dir == tmp_path
    monkeypatch.delenv("LATTICA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir().name == "lattica"
