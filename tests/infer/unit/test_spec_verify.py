from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lattica import _native
from lattica_infer.spec import DraftTree, reference, walk
from lattica_infer.spec.tree import MAX_NODES

# Ties, denormals, both ends of float32, masked tokens; and plain values with any bits.
ODD = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, 3.4028235e38, -3.4028235e38, 60.0, -90.0, -math.inf]
FLOATS = st.one_of(
    st.floats(-20, 20, width=32),
    st.sampled_from(ODD),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[DraftTree, np.ndarray]:
    """A tree and rows.

    Wide rows repeat a pattern: many ties, several noise blocks, a last one that is not full.
    """
    vocabulary = draw(st.one_of(st.integers(1, 40), st.sampled_from([128, 1023, 1024, 1025, 2500])))
    nodes = draw(st.integers(1, 5))
    tokens = draw(st.lists(st.integers(0, min(vocabulary, 3) - 1), min_size=nodes, max_size=nodes))
    parents = [-1] + [draw(st.integers(0, node - 1)) for node in range(1, nodes)]
    pattern = draw(
        hnp.arrays(np.float32, (nodes, draw(st.integers(1, min(vocabulary, 60)))), elements=FLOATS)
    )
    rows = np.tile(pattern, (1, -(-vocabulary // pattern.shape[1])))[:, :vocabulary].copy()
    rows[:, draw(st.integers(0, vocabulary - 1))] = draw(st.floats(-30, 30, width=32))  # never all masked
    return DraftTree(tokens, parents), rows


@given(
    case=cases(),
    position=st.one_of(st.integers(0, 9000), st.integers(0, 2**63 - 1 - MAX_NODES)),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.one_of(st.just(0.0), st.floats(0.05, 5.0), st.sampled_from([5e-324, 1e-300, 1e300])),
    top_k=st.one_of(st.just(0), st.integers(1, 3000)),
    top_p=st.one_of(st.just(1.0), st.floats(0.0, 1.0, exclude_min=True)),
)
def test_native_and_torch_agree_bit_for_bit(case: tuple[DraftTree, np.ndarray], **settings: Any) -> None:
    tree, rows = case
    native = walk(tree, rows, backend="native", logprobs=True, **settings)
    torch_ = walk(tree, torch.from_numpy(rows), backend="torch", logprobs=True, **settings)
    assert native == torch_


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
def test_native_and_torch_agree_on_a_real_vocabulary(temperature: float, scale: float) -> None:
    rows = torch.randn(6, 49_152, generator=torch.Generator().manual_seed(3)) * scale
    tree = DraftTree([0] * 6, [-1, 0, 0, 0, 1, 1])
    for seed, (top_k, top_p) in enumerate([(0, 1.0), (40, 1.0), (0, 0.9), (1000, 0.5)]):
        verdicts = [
            walk(
                tree,
                rows,
                position=7,
                seed=seed,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                backend=backend,
                logprobs=True,
            )
            for backend in ("native", "torch")
        ]
        assert verdicts[0] == verdicts[1]


@pytest.mark.gpu
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (40, 1.0), (0, 0.9)])
def test_the_reference_on_a_gpu_agrees_bit_for_bit(top_k: int, top_p: float) -> None:
    rows = torch.randn(3, 49_152, generator=torch.Generator().manual_seed(4)) * 4
    settings: dict[str, Any] = {"position": 3, "seed": 8, "temperature": 0.8, "top_k": top_k, "top_p": top_p}
    tree = DraftTree([0, 1, 2], [-1, 0, 0])
    native = walk(tree, rows, logprobs=True, **settings)
    assert walk(tree, rows.cuda(), backend="torch", logprobs=True, **settings) == native


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**32 - 1), min_size=1))
def test_noise_agrees_bit_for_bit(seed: int, position: int, tokens: list[int]) -> None:
    want = reference.gumbel(seed, position, torch.tensor(tokens)).tolist()
    assert [_native.gumbel(seed, position, token) for token in tokens] == want


def test_log_probabilities_are_those_of_a_softmax() -> None:
    rows = torch.randn(3, 3000, generator=torch.Generator().manual_seed(0)) * 4
    verdict = walk(
        DraftTree.chain([1, 2, 3]), rows, position=0, seed=5, temperature=2.0, top_k=50, logprobs=True
    )
    want = torch.log_softmax(rows.double(), -1)[0, verdict.tokens[0]].item()
    assert verdict.logprobs[0] == pytest.approx(want, abs=1e-6)
    assert walk(DraftTree.chain([1, 2, 3]), rows, position=0, seed=5).logprobs == []


def test_temperature_0_is_the_first_argmax_whatever_else_is_asked() -> None:
    rows = np.array([[1.0, 5.0, 5.0, -math.inf]], dtype=np.float32)
    verdict = walk(DraftTree([0], [-1]), rows, position=0, seed=9, top_k=3, top_p=0.1)
    assert (verdict.tokens, verdict.path) == ([1], [])


def test_of_equal_siblings_the_lowest_index_is_accepted() -> None:
    rows = np.zeros((4, 3), dtype=np.float32)
    rows[:, 2] = 1
    verdict = walk(DraftTree([0, 1, 2, 2], [-1, 0, 0, 0]), rows, position=0, seed=0)
    assert (verdict.tokens, verdict.path) == ([2, 2], [2])


def test_rows_may_be_any_buffer_of_floats() -> None:
    rows = np.eye(4, dtype=np.float32)
    rows.setflags(write=False)
    tree = DraftTree.chain([3, 0, 1, 2])
    asked = [rows, torch.eye(4), torch.eye(4, requires_grad=True), memoryview(rows)]
    assert {tuple(walk(tree, table, position=0, seed=0).tokens) for table in asked} == {(0, 1, 2, 3)}


GOOD: dict[str, Any] = {"position": 0, "seed": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": -1}, "position is -1"),
        ({"position": 2**63 - MAX_NODES}, "position is"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": math.nan}, "top_p is nan"),
    ],
)
def test_a_setting_out_of_range_is_named(backend: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        walk(DraftTree([0], [-1]), torch.zeros(1, 3), backend=backend, **{**GOOD, **change})


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("value", "message"), [(math.nan, "NaN"), (math.inf, r"\+inf"), (-math.inf, "masks every token")]
)
def test_a_visited_row_that_is_no_distribution_is_refused(
    backend: Any, temperature: float, value: float, message: str
) -> None:
    rows = torch.zeros(2, 700)
    rows[0, 1] = 1e9
    tree = DraftTree([0, 1], [-1, 0])
    if value < 0:
        rows[1] = value
    else:
        rows[1, 650] = value
        rows[1, 3] = -math.inf
    with pytest.raises(ValueError, match=f"node 1 .*{message}"):
        walk(tree, rows, backend=backend, **{**GOOD, "temperature": temperature})
    # The same row where no walk comes by is nobody's business.
    walk(DraftTree([0, 2], [-1, 0]), rows, backend=backend, **{**GOOD, "temperature": temperature})


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(1, 3),
        torch.zeros(3, 3),
        torch.zeros(2, 0),
        torch.zeros(6),
        torch.zeros(2, 3, 1),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(2, 2),  # token 2 is outside
    ],
    ids=lambda rows: f"{rows.dtype}{list(rows.shape)}",
)
def test_rows_that_do_not_fit_the_tree_are_refused(backend: Any, rows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"rows|outside|vocabulary"):
        walk(DraftTree([0, 2], [-1, 0]), rows, backend=backend, **GOOD)


def test_native_refuses_rows_that_it_would_have_to_copy() -> None:
    with pytest.raises(ValueError, match="C-contiguous"):
        walk(DraftTree([0, 2], [-1, 0]), torch.zeros(3, 2).T, **GOOD)
    with pytest.raises(ValueError, match="on meta"):
        walk(DraftTree([0], [-1]), torch.zeros(1, 3, device="meta"), **GOOD)
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        walk(DraftTree([0], [-1]), torch.zeros(1, 3), backend="cuda", **GOOD)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([], [], "1 to 4096 nodes"),
        ([0] * 4097, [-1] * 4097, "1 to 4096 nodes"),
        ([1, 2], [-1], "as many parents"),
        ([1], [0], "node 0 is the root"),
        ([1, 2], [-1, 1], "node 1 has parent 1"),
        ([1, 2], [-1, -1], "node 1 has parent -1"),
        ([1, -2], [-1, 0], "token id"),
        ([1, 2**32], [-1, 0], "token id"),
    ],
)
def test_what_is_no_tree_is_refused(tokens: list[int], parents: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftTree(tokens, parents)


@given(st.lists(st.integers(-3, 2**33), max_size=12), st.lists(st.integers(-3, 12), max_size=12))
def test_garbage_is_a_tree_or_a_value_error(tokens: list[int], parents: list[int]) -> None:
    try:
        tree = DraftTree(tokens, parents)
    except ValueError:
        return
    rows = np.zeros((len(tree), 4), dtype=np.float32)
    if max(tokens) < 4:
        assert walk(tree, rows, **GOOD).tokens
    else:
        with pytest.raises(ValueError, match="the vocabulary has 4"):
            walk(tree, rows, **GOOD)


@given(st.data())
def test_heads_and_shallow_parts_are_trees(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    parents = [-1] + [data.draw(st.integers(0, node - 1)) for node in range(1, size)]
    tree = DraftTree(range(size), parents, [1.0] + [0.5] * (size - 1))
    depth = data.draw(st.integers(0, 12))
    shallow = tree.shallow(depth)
    assert max(shallow.depths) == min(depth, max(tree.depths))
    assert [t for t, d in zip(tree.tokens, tree.depths, strict=True) if d <= depth] == list(shallow.tokens)
    edges = {(tree.tokens[p], t) for p, t in zip(tree.parents[1:], tree.tokens[1:], strict=True)}
    assert {
        (shallow.tokens[p], t) for p, t in zip(shallow.parents[1:], shallow.tokens[1:], strict=True)
    } <= edges
    nodes = data.draw(st.integers(1, 14))
    assert list(tree.head(nodes).tokens) == list(range(min(size, nodes)))
