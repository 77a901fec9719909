"""Run one of the benches in tools/benches and print its figures as JSON lines.

usage: python tools/bench.py NAME [options]      python tools/bench.py      (lists them)

A bench is a module with a docstring, `add_arguments(parser)` and `run(args) -> Iterator[dict]`. Figures that
matter are ratios measured in one run; absolute times say more about the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent / "benches"


def load(name: str) -> ModuleType:
    """The bench module `name`, from its file."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", FOLDER / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"no bench {name!r} in {FOLDER}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Print a line for each result of the bench that the command line names."""
    sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]  # a bench may use tools/prompts.py and its neighbours
    names = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # A bench's own imports (torch) are paid for only when it is the one that was asked for.
    asked = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    benches = parser.add_subparsers(dest="bench", metavar="NAME", required=True)
    for name in names:
        if name != asked:
            benches.add_parser(name, help=first_line(FOLDER / f"{name}.py"))
            continue
        module = load(name)
        bench = benches.add_parser(
            name,
            help=first_line(FOLDER / f"{name}.py"),
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(bench)
        bench.set_defaults(run=module.run)
    if len(sys.argv) == 1:
        parser.print_help()
        return
    arguments = parser.parse_args()
    for result in arguments.run(arguments):
        print(json.dumps(result), flush=True)


def first_line(path: Path) -> str:
    """The first line of a module's docstring, without importing it."""
    return path.read_text(encoding="utf-8").partition("\n")[0].strip().strip('"')


if __name__ == "__main__":
    main()
