"""The Unix socket by which commands ask a running node, and both of its ends.

The same calls as between peers (`lattica.rpc`), over a socket that only this user can open: 0600, and whoever
connects must have our user id, where the kernel tells. The client imports neither libp2p nor torch.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

from lattica.errors import ConfigError, DeadlineError, LatticaError, StreamError
from lattica.folder import holder
from lattica.ids import PeerId
from lattica.net.local import LocalStream
from lattica.protocols import DEFAULT_TIMEOUT_SECONDS
from lattica.rpc.service import ClientStream, Rpc
from lattica.telemetry import Log

_BACKLOG: Final = 64  # commands that connect in the same moment
# Stands for the node at the other end: calls are kept apart by peer, and here there is only one.
_NODE: Final = PeerId.from_public_key(bytes(32))


class NodeNotRunningError(LatticaError):
    """No node runs on this data folder. `folder` says which."""

    exit_code = 3

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"no node is running on {folder}; start one with `lattica node start --data {folder}`,"
            " or name another folder with --data"
        )
        self.folder = folder


# The node's end.


@asynccontextmanager
async def serve(path: Path, rpc: Rpc, *, log: Log) -> AsyncIterator[None]:
    """Answer commands at `path` while the block runs. A socket that was left there is replaced.

    Raises:
        ConfigError: the socket cannot be made.
    """
    listener = trio.SocketListener(_listen(path))

    async def answer(stream: trio.SocketStream) -> None:
        if not _is_ours(stream.socket):
            log.warning("another user's process tried the control socket", path=path)
            await stream.aclose()
            return
        await rpc.handle(LocalStream(stream))

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, answer, [listener])
            yield
            nursery.cancel_scope.cancel()
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _listen(path: Path) -> trio.socket.SocketType:
    """A listening socket at `path`, closed to others from its first moment; a dead node's is replaced.

    Made under another name, its mode set before it listens, then renamed: a umask would be the process's.
    """
    draft = path.with_name(path.name + ".new")
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        raw.bind(os.fspath(draft))
        draft.chmod(0o600)
        raw.listen(_BACKLOG)
        draft.rename(path)
    except OSError as error:
        raw.close()
        raise ConfigError(f"cannot make the control socket {path}: {error.strerror}") from None
    return trio.socket.from_stdlib_socket(raw)


def _is_ours(sock: trio.socket.SocketType) -> bool:
    """Whether the process at the other end runs as our user; the mode 0600 has to do where nobody tells."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return True
    layout = struct.Struct("3i")  # pid, uid, gid: struct ucred, unix(7)
    _, uid, _ = layout.unpack(sock.getsockopt(socket.SOL_SOCKET, option, layout.size))
    return bool(uid == os.getuid())


# The command's end.


class ControlClient:
    """Asks a running node. Made by `open_client`."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc

    async def call(self, method: str, *args: object, timeout: float | None = DEFAULT_TIMEOUT_SECONDS) -> Any:
        """Call one of the node's control methods; raises as `Rpc.call` does."""
        try:
            return await self._rpc.call(_NODE, method, *args, timeout=timeout)
        except StreamError as error:
            raise StreamError(f"the node stopped before it answered {method}") from error
        except DeadlineError as error:
            if str(_NODE) not in str(error):  # time was up further on, and the words say where
                raise
            raise DeadlineError(f"the node did not answer {method} in time", method=method) from error

    def stream(
        self, method: str, *args: object, timeout: float | None = None
    ) -> AbstractAsyncContextManager[ClientStream]:
        """Call one that answers with items: `async with client.stream(...) as items`."""
        return self._rpc.stream(_NODE, method, *args, timeout=timeout)


@asynccontextmanager
async def open_client(data_dir: str | os.PathLike[str]) -> AsyncIterator[ControlClient]:
    """The running node of a data folder.

    Raises:
        NodeNotRunningError: there is none.
        ConfigError: it is another user's.
    """
    folder = Path(data_dir)
    first = await _connect(folder)  # at once, so that a node that doesn't run is not a failed call later
    waiting = [first]

    async def open_stream(peer: PeerId) -> LocalStream:
        return waiting.pop() if waiting else await _connect(folder)

    rpc = Rpc(local=None, open_stream=open_stream)
    try:
        yield ControlClient(rpc)
    finally:
        rpc.close()
        first.reset()


async def _connect(folder: Path) -> LocalStream:
    running = holder(folder)
    if running is None:
        raise NodeNotRunningError(folder)
    try:
        return LocalStream(await trio.open_unix_socket(str(running.control)))
    except PermissionError:
        raise ConfigError(
            f"the node on {folder} runs as another user; run this command as that user"
        ) from None
    except OSError:  # the node was killed, or is only just starting
        raise NodeNotRunningError(folder) from None
