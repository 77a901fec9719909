"""A stage is given up when it is silent or cut off, and never because it computes for long."""

from __future__ import annotations

from lattica_infer.client.watch import SILENT_SECONDS, STUCK_SECONDS, StageWatch
from lattica_infer.messages import Alive


def test_a_stage_that_answers_is_kept() -> None:
    watch = StageWatch(2, now=0)
    for now in range(100):
        for stage in range(2):
            watch.answered(stage, Alive(3, 3, 0), now=now)
        assert watch.lost(sent=3, now=now) is None


def test_a_silent_stage_is_named() -> None:
    watch = StageWatch(3, now=0)
    for stage in (0, 2):
        watch.answered(stage, Alive(0, 0, 0), now=SILENT_SECONDS)
    assert watch.lost(sent=0, now=SILENT_SECONDS) is None
    assert watch.lost(sent=0, now=SILENT_SECONDS + 0.1) == (1, "silent for 5 s")


def test_a_verdict_is_an_answer_too() -> None:
    watch = StageWatch(1, now=0)
    watch.heard(0, now=4)
    assert watch.lost(sent=0, now=SILENT_SECONDS + 1) is None


def test_a_frame_that_never_arrives_is_noticed_at_the_stage_behind_the_link() -> None:
    watch = StageWatch(2, now=0)
    for now in range(int(STUCK_SECONDS) + 2):
        watch.answered(0, Alive(5, 5, 0), now=now)
        watch.answered(1, Alive(4, 4, 0), now=now)
        lost = watch.lost(sent=5, now=now)
        assert lost == (None if now <= STUCK_SECONDS else (1, "a frame has been on the way to it for 16 s"))


def test_a_stage_that_computes_for_minutes_is_kept() -> None:
    watch = StageWatch(2, now=0)
    for now in range(300):
        watch.answered(0, Alive(4, 4, 0), now=now)
        watch.answered(1, Alive(2, 1, 0), now=now)  # two frames more wait behind the one it works on
        assert watch.lost(sent=4, now=now) is None


def test_bytes_of_all_stages_are_added_up() -> None:
    watch = StageWatch(2, now=0)
    watch.answered(0, Alive(1, 1, 100), now=0)
    watch.answered(1, Alive(1, 1, 20), now=0)
    watch.answered(0, Alive(2, 2, 150), now=1)
    assert watch.bytes_sent == 170
