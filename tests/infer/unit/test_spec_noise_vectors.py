"""The vectors printed in docs/wire.md, "Seeded noise", against both implementations."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from lattica import _native
from lattica_infer.spec import DraftTree, reference, walk

PAGE = Path(__file__).resolve().parents[3] / "docs" / "wire.md"


def vectors(kind: str) -> list[list[str]]:
    block = re.search(r"^```text vectors\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert block is not None
    found = [line.split()[1:] for line in block[1].splitlines() if line.split()[0] == kind]
    assert found, f"docs/wire.md has no vectors of {kind}"
    return found


def bits(text: str) -> float:
    return float.fromhex(text)


@pytest.mark.parametrize(("x", "result"), vectors("log"))
def test_log(x: str, result: str) -> None:
    assert reference.log(torch.tensor([bits(x)], dtype=torch.float64)).item() == bits(result)
    assert bits(result) == pytest.approx(math.log(bits(x)), rel=3e-16)


@pytest.mark.parametrize(("x", "result"), vectors("exp"))
def test_exp(x: str, result: str) -> None:
    assert reference.exp(torch.tensor([bits(x)], dtype=torch.float64)).item() == bits(result)
    assert bits(result) == pytest.approx(math.exp(bits(x)), rel=5e-16, abs=1e-300)


@pytest.mark.parametrize(("seed", "position", "token", "result"), vectors("gumbel"))
def test_gumbel(seed: str, position: str, token: str, result: str) -> None:
    assert _native.gumbel(int(seed), int(position), int(token)) == bits(result)
    noise = reference.gumbel(int(seed), int(position), torch.tensor([int(token)]))
    assert noise.item() == bits(result)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("vector", vectors("draw"), ids=" ".join)
def test_draw(backend: str, vector: list[str]) -> None:
    vocabulary, seed, position, temperature, top_k, top_p, token, logprob = vector
    rows = torch.tensor([[((37 * t) % 101) / 8 - 6 for t in range(int(vocabulary))]])
    verdict = walk(
        DraftTree([0], [-1]),
        rows,
        position=int(position) - 1,
        seed=int(seed),
        temperature=float(temperature),
        top_k=int(top_k),
        top_p=float(top_p),
        backend=backend,  # type: ignore[arg-type]
        logprobs=True,
    )
    assert (verdict.tokens, verdict.logprobs) == ([int(token)], [bits(logprob)])
