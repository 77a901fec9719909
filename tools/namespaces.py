"""Network namespaces without a trace: no name, no file; the kernel drops one with its last process. Linux only."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

_CLONE_NEWUSER = 0x10000000  # linux/sched.h
_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914  # linux/sockios.h
_IFF_UP = 1


def enter_fresh() -> None:
    """Move this process, and what it starts from now on, to a network namespace with nothing but loopback.

    Without root it takes a user namespace with it, where the system allows that. The process must have one
    thread.

    Raises:
        OSError: this system or this user cannot make one.
    """
    if os.geteuid() == 0:
        _unshare(_CLONE_NEWNET)
    else:
        user, group = os.getuid(), os.getgid()
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    raise_loopback()


def raise_loopback() -> None:
    """Bring lo up in the namespace that this process is in."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH22x", b"lo", 0)
        flags = struct.unpack("16sH22x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))


def _unshare(flags: int) -> None:
    unshare = getattr(ctypes.CDLL(None, use_errno=True), "unshare", None)
    if unshare is None:
        raise OSError("this system has no network namespaces")
    if unshare(flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"no network namespace: {os.strerror(number)}")
