"""The walk: how far the target model agrees with a draft tree, and what it says instead.

Every token is the target's own: the argmax of its warped logits plus Gumbel noise that is a pure function of
(seed, position, token). So the output depends on neither drafter nor tree, and a seed gives the same text
with speculation and without. Source: the shared noise of arXiv 2408.07978; byte-exact definition in
docs/wire.md, "Seeded noise".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from lattica import _native
from lattica_infer.spec.tree import MAX_NODES, DraftTree

__all__ = ["Verdict", "walk", "walk_with"]

_END_OF_POSITIONS = 2**63 - 1 - MAX_NODES  # positions stay signed 64-bit integers along any path


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a walk emitted.

    `tokens`: the accepted ids, then the correction or bonus one; never empty. `path`: the accepted nodes
        without node 0, so `len(tokens) == len(path) + 1`. `logprobs`: natural log-probability of each emitted
        token before temperature and warping, float32; empty unless asked for.
    """

    tokens: list[int]
    path: list[int]
    logprobs: list[float] = field(default_factory=list)


def walk_with(tree: DraftTree, draw: Callable[[int], int]) -> tuple[list[int], list[int]]:
    """Walk with any source of target tokens: `draw(node)` is what the target says after the path to `node`.

    Returns emitted tokens and accepted nodes, as in `Verdict`. `draw` is asked once for each node on the way.
    """
    children = tree.children
    tokens: list[int] = []
    path: list[int] = []
    node = 0
    while True:
        token = draw(node)
        tokens.append(token)
        following = next((child for child in children[node] if tree.tokens[child] == token), None)
        if following is None:
            return tokens, path
        path.append(following)
        node = following


def _buffer(rows: Any) -> Any:
    """What has a buffer interface: a torch tensor shows its memory through numpy, others as they are."""
    if not hasattr(rows, "detach"):
        return rows
    if rows.device.type != "cpu":
        raise ValueError(f"rows are on {rows.device}; copy them to the CPU or ask for backend='torch'")
    return rows.detach().numpy()


def walk(
    tree: DraftTree,
    rows: Any,
    *,
    position: int,
    seed: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    backend: Literal["native", "torch"] = "native",
    logprobs: bool = False,
) -> Verdict:
    """Walk the draft tree as far as the target model agrees.

    Lossless: the emitted tokens are what plain decoding with this seed emits. Warping is in this order:
    temperature, top-k, top-p; temperature 0 is the argmax. Ties go to the lowest id. Both backends give the
    same bits.

    Args:
        rows: target logits, [nodes, vocabulary], float32; row i follows node i. "native": a C-contiguous
            array, torch CPU tensor or buffer, read without a copy and without the GIL (do not write to it
            meanwhile). "torch": a tensor on any device, or what `torch.as_tensor` takes. -inf masks a token.
        position: where node 0 stands in the text; the first emitted token is at position + 1.
        seed: 0 <= seed < 2**64.
        top_k: keep this many tokens; 0 or at least the vocabulary keeps all.
        top_p: keep the likeliest tokens that together hold this share, 0 < top_p <= 1.
        logprobs: also fill `Verdict.logprobs`; costs one exponential per logit of each visited row.

    Raises:
        ValueError: a shape does not match the tree; a token is outside the vocabulary; a visited row holds
            NaN or +inf or masks everything (rows that the walk does not visit are not read); a setting is out
            of range.
    """
    if not 0 <= position <= _END_OF_POSITIONS:
        raise ValueError(f"position is {position}; it is at least 0 and below 2**63 - {MAX_NODES}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; 0 <= seed < 2**64")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it is finite and at least 0")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it is at least 0 (0: all tokens)")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}; 0 < top_p <= 1")
    if backend == "native":
        return Verdict(
            *_native.walk(
                tree.tokens,
                tree.parents,
                _buffer(rows),
                position=position,
                seed=seed,
                temperature=temperature,
                top_k=min(top_k, 2**32),
                top_p=top_p,
                logprobs=logprobs,
            )
        )
    if backend == "torch":
        from lattica_infer.spec.reference import walk_rows  # torch is imported where it is asked for

        return Verdict(
            *walk_rows(
                tree,
                rows,
                position=position,
                seed=seed,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                logprobs=logprobs,
            )
        )
    raise ValueError(f"backend is {backend!r}; it is 'native' or 'torch'")
