"""One process, all layers, one thread: our plain decoding beside Hugging Face's, and what a wider pass costs."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# SmolLM2-135M's shape: with random weights the time is the same, and nothing is fetched.
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, how long, how often."""
    parser.add_argument(
        "--model", type=Path, help="a model's folder; default: random weights of SmolLM2-135M's shape"
    )
    parser.add_argument("--tokens", type=int, default=48, help="decoded in one run")
    parser.add_argument("--runs", type=int, default=5, help="of each, in turn")
    parser.add_argument("--threads", type=int, default=1)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield decoding speeds and their ratio, then the cost of T tokens in one pass relative to one."""
    import torch
    import transformers

    from lattica_infer.model.config import ModelConfig
    from lattica_infer.model.transformer import Stage

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.model:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        settings = json.loads((args.model / "config.json").read_text())
    else:
        settings = SHAPE
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    theirs.eval()
    config = ModelConfig.from_dict(settings)
    weights = dict(theirs.state_dict())
    stage = Stage(config, weights, range(config.num_layers))
    prompt = torch.randint(3, 1000, (64,))

    def ours() -> tuple[float, list[int]]:
        cache = stage.new_cache(64 + args.tokens + 1)
        token = stage.forward(prompt, cache, rows=torch.tensor([63]))[-1].argmax()
        cache.commit(range(64))
        return _timed(args.tokens, lambda last: _step(stage, cache, last), token)

    def huggingface() -> tuple[float, list[int]]:
        with torch.inference_mode():
            out = theirs(prompt[None], use_cache=True)
            past = [out.past_key_values]

            def step(last: Any) -> Any:
                out = theirs(last.view(1, 1), past_key_values=past[0], use_cache=True)
                past[0] = out.past_key_values
                return out.logits[0, -1].argmax()

            return _timed(args.tokens, step, out.logits[0, -1].argmax())

    speeds: dict[str, list[float]] = {"ours": [], "huggingface": []}
    for _ in range(args.runs):
        mine, my_tokens = ours()
        other, other_tokens = huggingface()
        if my_tokens != other_tokens:
            raise SystemExit("the two gave different tokens")
        speeds["ours"].append(mine)
        speeds["huggingface"].append(other)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["huggingface"], strict=True)]
    yield {
        "bench": "decode",
        "class": stage.numeric_class,
        "threads": args.threads,
        "tokens": args.tokens,
        "tokens_per_second": round(medians["ours"], 1),
        "huggingface_fp32_tokens_per_second": round(medians["huggingface"], 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
    }
    costs = {}
    for count in (1, 2, 4, 8, 16, 32, 64):
        cache = stage.new_cache(512)
        stage.forward(prompt, cache)
        cache.commit(range(64))
        tokens = torch.randint(3, 1000, (count,))
        times = []
        for _ in range(12):
            started = time.perf_counter()
            stage.forward(tokens, cache)
            times.append(time.perf_counter() - started)
        costs[count] = statistics.median(times)
    yield {
        "bench": "decode.width",
        "milliseconds_of_one": round(costs[1] * 1e3, 1),
        "relative": {str(count): round(cost / costs[1], 2) for count, cost in costs.items()},
    }


def _step(stage: Any, cache: Any, last: Any) -> Any:
    token = stage.forward(last.view(1), cache)[-1].argmax()
    cache.commit([0])
    return token


def _timed(count: int, step: Callable[[Any], Any], token: Any) -> tuple[float, list[int]]:
    """Tokens per second of `count` steps, and the tokens."""
    tokens = []
    started = time.perf_counter()
    for _ in range(count):
        token = step(token)
        tokens.append(int(token))
    return count / (time.perf_counter() - started), tokens
