"""The native parts, compiled from `native/`. Nothing here needs torch."""

from collections.abc import Sequence

from typing_extensions import Buffer

def walk(
    tokens: Sequence[int],
    parents: Sequence[int],
    rows: Buffer,
    *,
    position: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    logprobs: bool,
) -> tuple[list[int], list[int], list[float]]:
    """Emitted tokens, accepted nodes and log-probabilities; see `lattica_infer.spec.walk`, which calls this.

    `rows`: float32, [nodes, vocabulary], C-contiguous; read in place while the GIL is released, so nobody may
        write to it meanwhile. `position` and `seed` are unsigned 64-bit integers.

    Raises:
        ValueError: a tree, shape, setting or visited row that cannot be walked.
        OverflowError: an integer outside its range.
    """

def gumbel(seed: int, position: int, token: int) -> float:
    """Standard Gumbel noise of one token: docs/wire.md, "Seeded noise".

    For tests; the walk never leaves Rust.
    """
