"""What the contestants with a blocking face share: a thread for each caller, and the client's loop."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import _lines as lines


def work(client: Any) -> None:
    """Do the bench's jobs, each by the client's method of its name, until the bench goes."""
    lines.say({"ready": True})
    while (job := lines.next_job()) is not None:
        lines.say(getattr(client, job["work"])(job))
    os._exit(0)


def calls(job: lines.Job, call: Callable[[bytes], bytes]) -> lines.Result:
    """Call in a loop from as many threads as the job says."""
    data = bytes(job["bytes"])
    tally = lines.Tally(job["seconds"])

    def caller() -> None:
        while tally.open():
            with tally.piece():
                reply = call(data)
            assert len(reply) == len(data)

    callers = [threading.Thread(target=caller) for _ in range(job["callers"])]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    return tally.result()
