"""Which stage of a pipeline has fallen silent, and which frame never arrived. Pure: `now` is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lattica_infer.messages import Alive

RENEW_SECONDS: Final = 1.0  # how often each stage is asked; a twentieth of its lease
SILENT_SECONDS: Final = 5.0  # five renewals without an answer, while its event loop never computes
STUCK_SECONDS: Final = 15.0  # a frame between two stages; 1 MB at a slow home uplink's 100 kB/s, and some


@dataclass(slots=True)
class _Seen:
    heard: float
    moved: float  # when it last took a frame, or had none to take
    alive: Alive


class StageWatch:
    """Judges the stages of one session by their answers to renewals.

    A stage that computes is not late: it has received more than it has passed on. One that is idle while
    the stage before it has sent more than arrived sits behind a broken link.
    """

    def __init__(self, stages: int, *, now: float) -> None:
        self._seen = [_Seen(now, now, Alive(0, 0, 0)) for _ in range(stages)]

    def heard(self, stage: int, *, now: float) -> None:
        """Anything came from this stage."""
        self._seen[stage].heard = now

    def answered(self, stage: int, alive: Alive, *, now: float) -> None:
        """Its answer to a renewal."""
        seen = self._seen[stage]
        if alive.received > seen.alive.received or alive.received > alive.sent:
            seen.moved = now
        seen.alive = alive
        seen.heard = now

    def lost(self, *, sent: int, now: float) -> tuple[int, str] | None:
        """The first stage to give up on, and why; None while all is well.

        Args:
            sent: frames that the coordinator has sent to the first stage.
        """
        expected = sent
        for stage, seen in enumerate(self._seen):
            if now - seen.heard > SILENT_SECONDS:
                return stage, f"silent for {now - seen.heard:.0f} s"
            if seen.alive.received >= expected:
                seen.moved = now
            elif now - seen.moved > STUCK_SECONDS:
                return stage, f"a frame has been on the way to it for {now - seen.moved:.0f} s"
            expected = seen.alive.sent
        return None

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that the stages have sent, as far as they have told."""
        return sum(seen.alive.bytes_sent for seen in self._seen)
