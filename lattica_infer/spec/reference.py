"""The walk in torch, written to be read: what the native one must equal bit for bit.

Nothing is pruned or fused. Every operation is an IEEE 754 double addition, subtraction, multiplication or
division, a comparison, or an integer one, in the order that docs/wire.md ("Seeded noise") gives; so any
device and any library version gives the same bits.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor

from lattica_infer.spec.tree import DraftTree
from lattica_infer.spec.verify import walk_with

__all__ = ["draw", "exp", "gumbel", "log", "logprob", "philox", "walk_rows"]

BLOCK: Final = 128  # tokens whose largest noise is drawn first
_OF_BLOCK: Final = 0
_OF_TOKEN: Final = 1
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_LOW: Final = 0xFFFFFFFF

_LN2_HI: Final = 6.93147180369123816490e-01
_LN2_LO: Final = 1.90821492927058770002e-10
_LOG2_E: Final = 1.4426950408889634
_LG: Final = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
_EXP_FLOOR: Final = -700.0


def log(x: Tensor) -> Tensor:
    """Natural logarithm of positive, normal, finite doubles; fdlibm's `e_log.c` without its branches."""
    shifted = x.view(torch.int64) + (0x3FF0000000000000 - 0x3FE6A09E00000000)
    k = ((shifted >> 52) - 1023).double()
    m = ((shifted & 0x000FFFFFFFFFFFFF) + 0x3FE6A09E00000000).view(torch.float64)  # x = 2**k * m
    f = m - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    even = w * (_LG[1] + w * (_LG[3] + w * _LG[5]))
    odd = z * (_LG[0] + w * (_LG[2] + w * (_LG[4] + w * _LG[6])))
    rest = odd + even
    half_square = (0.5 * f) * f
    return s * (half_square + rest) + k * _LN2_LO - half_square + f + k * _LN2_HI


def exp(x: Tensor) -> Tensor:
    """Exponential of doubles <= 0: powers of two and a Taylor series of degree 13; 0 below -700."""
    clamped = x.clamp(min=_EXP_FLOOR)
    k = (clamped * _LOG2_E).round()  # ties to even
    r = (clamped - k * _LN2_HI) - k * _LN2_LO
    p = torch.full_like(r, 1.0 / math.factorial(13))
    for n in range(12, -1, -1):
        p = p * r + 1.0 / math.factorial(n)
    power = ((k.long() + 1023) << 52).view(torch.float64)
    return torch.where(x < _EXP_FLOOR, 0.0, p * power)


def philox(counter: tuple[Tensor, int, int, int], seed: int) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four words a counter, each 32 bits in an int64."""
    x = [counter[0], *(torch.full_like(counter[0], word) for word in counter[1:])]
    key = [seed & _LOW, seed >> 32]
    for _ in range(10):
        # All 64 bits of a product are kept; the highest one merely looks like a sign.
        a, b = x[0] * _MULTIPLIERS[0], x[2] * _MULTIPLIERS[1]
        x = [
            ((b >> 32) & _LOW) ^ x[1] ^ key[0],
            b & _LOW,
            ((a >> 32) & _LOW) ^ x[3] ^ key[1],
            a & _LOW,
        ]
        key = [(key[0] + _WEYL[0]) & _LOW, (key[1] + _WEYL[1]) & _LOW]
    return x


def _uniform(low: Tensor, high: Tensor) -> Tensor:
    """Doubles strictly inside 0..1: the upper 52 of 64 bits, and a half."""
    return (((high << 20) | (low >> 12)).double() + 0.5) * 2.0**-52


def gumbel(seed: int, position: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise of token ids (int64), doubles of the same shape."""
    where = (position & _LOW, position >> 32)
    block = tokens // (8 * BLOCK) * 8 + tokens % 8  # blocks are interleaved by eight
    place = tokens // 8 % BLOCK
    low, high = _pair(philox((block // 2, *where, _OF_BLOCK), seed), block % 2)
    least = -log(_uniform(low, high)) / BLOCK
    at = low & (BLOCK - 1)
    own = -log(
        _uniform(*_pair(philox((block * (BLOCK // 2) + place // 2, *where, _OF_TOKEN), seed), place % 2))
    )
    return -log(torch.where(place == at, least, least + own))


def _pair(words: list[Tensor], odd: Tensor) -> tuple[Tensor, Tensor]:
    """The first two of four words, or the last two."""
    return torch.where(odd == 1, words[2], words[0]), torch.where(odd == 1, words[3], words[1])


def _fold(terms: Tensor) -> Tensor:
    """Sum over the last axis, a power of two long: the upper half is added to the lower until one is left."""
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def _exp_sum(x: Tensor, keep: Tensor) -> Tensor:
    """Sum of exp(x) over kept tokens, blocks of 128 first; x of shape [vocabulary]."""
    blocks = -(-len(x) // BLOCK)
    terms = x.new_zeros((1 << (blocks - 1).bit_length()) * BLOCK)
    terms[: len(x)] = torch.where(keep, exp(x), 0.0)
    return _fold(_fold(terms.view(-1, BLOCK)))


def _kept(logits: Tensor, x: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which tokens top-k, then top-p, leave; a mask of shape [vocabulary]. Masked tokens never stay."""
    keep = logits > -math.inf
    order = torch.sort(logits, descending=True, stable=True).indices  # stable: ties by rising id
    if 0 < top_k < len(logits):
        keep[order[top_k:]] = False
    if top_p < 1.0:
        order = order[keep[order]]
        mass = (top_p * _exp_sum(x, keep)).item()
        sums = list(accumulate(exp(x[order]).tolist()))
        last = next((i for i, total in enumerate(sums) if total >= mass), len(sums) - 1)
        keep[order[last + 1 :]] = False
    return keep


def draw(logits: Tensor, *, position: int, seed: int, temperature: float, top_k: int, top_p: float) -> int:
    """The target's token at `position`, from its logits (doubles, [vocabulary], no NaN and no +inf)."""
    top = logits.max()
    if temperature == 0.0:
        return int((logits == top).nonzero()[0])
    x = (logits - top) / temperature
    keep = _kept(logits, x, top_k, top_p)
    noise = gumbel(seed, position, torch.arange(len(logits), device=logits.device))
    scores = torch.where(keep, x + noise, -math.inf)
    return int((scores == scores.max()).nonzero()[0])


def logprob(logits: Tensor, token: int) -> float:
    """Natural log-probability of `token`, before temperature and warping, rounded to float32."""
    x = logits - logits.max()
    total = _exp_sum(x, logits > -math.inf)
    return float((x[token] - log(total)).float())


def walk_rows(
    tree: DraftTree,
    rows: Any,
    *,
    position: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    logprobs: bool,
) -> tuple[list[int], list[int], list[float]]:
    """`lattica_infer.spec.walk` for rows in torch; arguments and errors as there, settings checked."""
    table = torch.as_tensor(rows)
    if table.dtype != torch.float32 or table.dim() != 2:
        raise ValueError(f"rows are {table.dtype} {list(table.shape)}, not float32 [nodes, vocabulary]")
    nodes, vocabulary = table.shape
    if nodes != len(tree) or vocabulary == 0:
        raise ValueError(f"a tree of {len(tree)} nodes needs rows of shape [{len(tree)}, vocabulary]")
    if max(tree.tokens) >= vocabulary:
        raise ValueError(f"the tree has token {max(tree.tokens)}, the vocabulary has {vocabulary}")
    found: list[float] = []

    def sample(node: int) -> int:
        logits = table[node].double()
        if logits.isnan().any():
            raise ValueError(f"the row of node {node} holds NaN")
        if logits.max() == math.inf:
            raise ValueError(f"the row of node {node} holds +inf")
        if logits.max() == -math.inf:
            raise ValueError(f"the row of node {node} masks every token (all are -inf)")
        token = draw(
            logits,
            position=position + tree.depths[node] + 1,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        if logprobs:
            found.append(logprob(logits, token))
        return token

    tokens, path = walk_with(tree, sample)
    return tokens, path, found
