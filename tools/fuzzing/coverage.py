"""Which lines of a decoder a run reaches, by sys.settrace: no tool to install, and slow, so for short runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from fuzzing.engine import Report, Target, run


def lines_reached(
    target: Target, *, seed: int, inputs: int | None, seconds: float | None
) -> tuple[Report, list[str]]:
    """A run's report, and a line of text for each of the target's modules.

    Counted are lines inside functions: those of the module itself run at its import.
    """
    modules = {name: importlib.import_module(name) for name in target.modules}
    files = {module.__file__: name for name, module in modules.items()}
    reached: dict[str, set[int]] = {name: set() for name in modules}

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        name = files.get(frame.f_code.co_filename)
        if name is None:
            return None
        lines = reached[name]

        def step(frame: FrameType, event: str, argument: Any) -> Any:
            lines.add(frame.f_lineno)
            return step

        return step(frame, event, argument)

    sys.settrace(enter)
    try:
        report = run(target, seed=seed, inputs=inputs, seconds=seconds)
    finally:
        sys.settrace(None)
    texts = []
    for name, module in modules.items():
        assert module.__file__ is not None
        with open(module.__file__, encoding="utf-8") as file:
            lines = set(_lines(compile(file.read(), module.__file__, "exec"), is_module=True))
        missed = sorted(lines - reached[name])
        texts.append(
            f"{name}: {len(lines) - len(missed)} of {len(lines)} lines; not reached: {_ranges(missed)}"
        )
    return report, texts


def _lines(code: CodeType, *, is_module: bool = False) -> Iterator[int]:
    """The lines of all functions in a compiled module."""
    if not is_module and code.co_flags & 0x02:  # CO_NEWLOCALS: a function, not a class body
        yield from (line for _, _, line in code.co_lines() if line)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _lines(constant)


def _ranges(lines: list[int]) -> str:
    """`[1, 2, 3, 7]` as "1-3 7"."""
    words: list[list[int]] = []
    for line in lines:
        if words and words[-1][-1] == line - 1:
            words[-1].append(line)
        else:
            words.append([line])
    return " ".join(f"{word[0]}-{word[-1]}" if len(word) > 1 else f"{word[0]}" for word in words) or "none"
