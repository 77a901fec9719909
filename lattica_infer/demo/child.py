"""One node process of the demo: `lattica node start`, which also ends when its parent is gone.

The parent holds the other end of our stdin; it closes when the parent dies, however it dies. Then we stop as if
somebody had pressed Ctrl-C, so that not even `kill -9` of the demo leaves a process behind.

usage: python -m lattica_infer.demo.child [options of `lattica node start`]
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from lattica.cli import main


def _stop_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_with_parent, name="parent watch", daemon=True).start()
    sys.argv[1:1] = ["node", "start"]
    main()
