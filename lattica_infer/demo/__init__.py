"""`lattica demo`: a whole mesh on this machine. `command` is what the command line loads; `run` does it."""
