"""What a program writes to be called: a Service with methods, and the Call that each of them is given."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

import trio

from lattica.errors import LocalProtocolError
from lattica.ids import PeerId
from lattica.protocols import MAX_METHOD_BYTES
from lattica.rpc.codec import to_torch

Handler = Callable[..., Any]
_H = TypeVar("_H", bound=Handler)


class Items(Protocol):
    """What a handler iterates to get the caller's items."""

    def __aiter__(self) -> AsyncIterator[Any]: ...

    async def __anext__(self) -> Any: ...


@dataclass(slots=True, eq=False)
class Call:
    """One call, as its handler sees it.

    `peer` made it (None over a node's own control socket), `local` is who we are there, `deadline` is a time
    on trio's clock, None without one. `items` gives what the caller sends, until it says that it is done; a
    caller that sends nothing gives an empty iteration.
    """

    peer: PeerId | None
    local: PeerId | None
    method: str
    deadline: float | None
    trace: str
    items: Items
    is_running: bool = field(default=True, repr=False)
    began: float = field(default=0.0, repr=False)  # on trio's clock

    def remaining(self) -> float | None:
        """Seconds until the deadline, 0 when it has passed, None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - trio.current_time())


# The call that this task works for. Calls made on its behalf end by its deadline at the latest.
current_call: Final[ContextVar[Call | None]] = ContextVar("lattica_call", default=None)


@dataclass(frozen=True, slots=True)
class Method:
    """A handler with what its signature says."""

    handler: Handler
    is_stream: bool  # an async generator: it answers with items
    least: int  # arguments without a default, the Call not counted
    most: int | None
    torch_at: tuple[int, ...]  # arguments that the handler wants as torch tensors

    def refusal(self, args: list[Any]) -> str | None:
        """Why these arguments do not fit, if so."""
        if self.least <= len(args) and (self.most is None or len(args) <= self.most):
            return None
        most = "any number of" if self.most is None else self.most
        wanted = str(self.least) if self.least == self.most else f"{self.least} to {most}"
        return f"takes {wanted} argument{'' if wanted == '1' else 's'}, got {len(args)}"

    def start(self, call: Call, args: list[Any]) -> Any:
        """The handler's coroutine or async generator, not yet begun."""
        for index in self.torch_at:
            if index < len(args):
                args[index] = to_torch(args[index])
        return self.handler(call, *args)


class Service:
    """Methods under one name: `greeter.hello` is the method `hello` of the service `greeter`.

    Raises:
        LocalProtocolError: the name is empty or too long, or holds a dot or a space.
    """

    def __init__(self, name: str) -> None:
        _check_name(name)
        self.name = name
        self.methods: dict[str, Method] = {}

    def method(self, handler: _H) -> _H:
        """Offer a function under its own name; a decorator.

        `async def` answers with what it returns; an async generator with what it yields, item by item. Either
        may read `call.items`. A plain `def`, or generator, does the same in a thread, where it may block. Its
        first parameter is the Call; a parameter annotated `torch.Tensor` is given one.

        Raises:
            LocalProtocolError: not a function, no parameter for the Call, or the name is taken.
        """
        self.add(handler.__name__, handler)
        return handler

    def add(self, name: str, handler: Handler) -> None:
        """Offer a function, or a bound method, under a name of its own. Raises as `method` does."""
        _check_name(name)
        if name in self.methods:
            raise LocalProtocolError(f"{self.name} has a method {name} already")
        self.methods[name] = _inspect(f"{self.name}.{name}", handler)


def _check_name(name: str) -> None:
    if not name or "." in name or any(c.isspace() for c in name) or 2 * len(name.encode()) > MAX_METHOD_BYTES:
        raise LocalProtocolError(f"not a name for a service or method: {name!r:.80}; use one short word")


def _inspect(name: str, handler: Handler) -> Method:
    if not (inspect.isasyncgenfunction(handler) or inspect.iscoroutinefunction(handler)):
        if not inspect.isroutine(handler):
            raise LocalProtocolError(
                f"{name} is not a function; write `async def {name.rpartition('.')[2]}(call, ...)`"
            )
        from lattica.rpc.outside import in_thread  # here: it knows the Call that is defined above

        handler = in_thread(handler)
    is_stream = inspect.isasyncgenfunction(handler)
    try:
        signature = inspect.signature(handler, eval_str=True)
    except Exception:  # an annotation that names what is imported for the type checker only
        signature = inspect.signature(handler)
    positional: list[inspect.Parameter] = []
    most: int | None = 0
    for parameter in signature.parameters.values():
        match parameter.kind:
            case parameter.POSITIONAL_ONLY | parameter.POSITIONAL_OR_KEYWORD:
                positional.append(parameter)
            case parameter.VAR_POSITIONAL:
                most = None
            case parameter.KEYWORD_ONLY if parameter.default is parameter.empty:
                raise LocalProtocolError(
                    f"{name} needs {parameter.name} by keyword; arguments travel by position"
                )
    if not positional:
        raise LocalProtocolError(f"{name} has no parameter for the call; write `async def name(call, ...)`")
    args = positional[1:]
    return Method(
        handler,
        is_stream,
        least=sum(p.default is p.empty for p in args),
        most=None if most is None else len(args),
        torch_at=tuple(i for i, p in enumerate(args) if _is_torch(p.annotation)),
    )


def _is_torch(annotation: object) -> bool:
    if isinstance(annotation, str):
        return annotation == "torch.Tensor"
    return (
        isinstance(annotation, type)
        and f"{annotation.__module__}.{annotation.__qualname__}" == "torch.Tensor"
    )
