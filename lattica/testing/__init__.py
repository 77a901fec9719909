"""Networks for tests: hosts in one process under a virtual clock, and a delay for real sockets.

`MemoryNetwork` implements `lattica.net.api.Host`, `DelayProxy` stands between two real programs, `endpoint`
puts calls on a host.
"""

from lattica.testing.delay import DelayProxy
from lattica.testing.endpoints import endpoint
from lattica.testing.hosts import MemoryHost
from lattica.testing.memory import MemoryNetwork

__all__ = ["DelayProxy", "MemoryHost", "MemoryNetwork", "endpoint"]
