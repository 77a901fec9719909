"""The fuzzer finds what is there to find: each kind of mistake, planted."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from fuzzing import draw, engine
from fuzzing.coverage import lines_reached
from fuzzing.engine import Finding, Report, Target
from fuzzing.mutate import Mutator
from fuzzing.snapshot import Snapshot

from lattica.net.noise import NoiseSession

VALID = b"\x05hello\x00\x01\x02\x03"


def planted(run: Callable[[bytes], bool], **bounds: float) -> Report:
    target = Target("planted", "", lambda random: VALID, run, (), **bounds)  # type: ignore[arg-type]
    return engine.run(target, seed=0, inputs=1000)


def only(report: Report) -> Finding:
    (finding,) = report.findings
    return finding


def test_a_sound_decoder_gives_no_finding() -> None:
    report = planted(lambda data: data == VALID)
    assert (report.inputs, report.findings) == (1000, [])
    assert 16 <= report.accepted < 500


def test_an_undocumented_error_is_found_and_its_input_made_short() -> None:
    def run(data: bytes) -> bool:
        if 0x7F in data:
            raise IndexError("planted")
        return True

    finding = only(planted(run))
    assert "IndexError: planted" in finding.what
    assert finding.data == b"\x7f"


def test_a_panic_is_found_though_it_is_no_exception() -> None:
    class Panic(BaseException):
        """As pyo3's."""

    def run(data: bytes) -> bool:
        if len(data) < 4:
            raise Panic("planted")
        return True

    assert "Panic: planted" in only(planted(run)).what


def test_errors_from_two_places_are_two_findings() -> None:
    def run(data: bytes) -> bool:
        if data[:1] != VALID[:1]:
            raise KeyError("one")
        if data[-1:] != VALID[-1:]:
            raise KeyError("two")
        return True

    assert len(planted(run).findings) == 2


def test_memory_out_of_proportion_is_found() -> None:
    def run(data: bytes) -> bool:
        return bool(bytearray(1 << 20 if data != VALID else 1))

    assert "a peak of more than" in only(planted(run)).what


def test_an_input_that_takes_long_is_found() -> None:
    def run(data: bytes) -> bool:
        return data != b"" or sum(range(100_000)) > 0

    assert " s for 0 bytes" in only(planted(run, seconds=1e-4)).what


def test_an_input_that_never_ends_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(data: bytes) -> bool:
        while len(data) > 20:
            pass
        return True

    monkeypatch.setattr(engine, "_HANG_SECONDS", 0.2)
    finding = planted(run).findings[0]
    assert "no end after" in finding.what
    assert len(finding.data) > 20


def test_a_batch_that_is_slow_as_a_whole_does_not_end_a_run_unnoticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(data: bytes) -> bool:
        return sum(range(20_000)) > 0 and data == VALID

    monkeypatch.setattr(engine, "_HANG_SECONDS", 0.01)
    report = planted(run)
    assert "no end after" in report.findings[-1].what
    assert report.inputs < 1000


def test_a_decoder_that_refuses_what_is_valid_is_found() -> None:
    finding = only(planted(lambda data: False))
    assert "a valid message was refused" in finding.what


def test_the_same_seed_gives_the_same_inputs() -> None:
    def inputs(seed: int) -> list[bytes]:
        seen: list[bytes] = []

        def run(data: bytes) -> bool:
            seen.append(data)
            return True

        engine.run(Target("same", "", lambda random: random.randbytes(9), run, ()), seed=seed, inputs=1200)
        return seen

    assert inputs(1) == inputs(1) != inputs(2)


def test_changed_inputs_are_many_and_bounded() -> None:
    random = Random(0)
    mutator = Mutator(random, (b"word",), max_bytes=100)
    changed = {mutator.mutate(VALID, b"other") for _ in range(2000)}
    assert len(changed) > 1500
    assert max(map(len, changed)) == 100
    assert any(b"word" in data for data in changed)


@pytest.mark.parametrize("size", [0, 1, 100, 20_000])
def test_cuts_lose_nothing(size: int) -> None:
    for number in range(50):
        data = Random(number).randbytes(size)
        assert b"".join(draw.cuts(data)) == data


def test_a_snapshot_puts_back_what_changed() -> None:
    session = NoiseSession(send_key=bytes(32), receive_key=bytes(32))
    first = session.encrypt([b"text"])
    reader = NoiseSession(send_key=bytes(32), receive_key=bytes(32))
    snapshot = Snapshot(reader)
    for _ in range(2):
        snapshot.restore()
        assert reader.receive(first + b"\x00") == [b"text"]


def test_lines_that_no_input_reaches_are_named() -> None:
    def run(data: bytes) -> bool:
        Random(0).choice(data + b".")
        return True

    target = Target("lines", "", lambda random: VALID, run, ("random",))
    _, (text,) = lines_reached(target, seed=0, inputs=10, seconds=None)
    reached, _, rest = text.removeprefix("random: ").partition(" of ")
    assert 0 < int(reached) < 50 < int(rest.split()[0])
