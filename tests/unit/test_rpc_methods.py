"""What a Service takes as a method."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from lattica.errors import LocalProtocolError
from lattica.rpc import Call, Rpc, Service


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match=r"s\.hello is not a function"):
        Service("s").add("hello", "hello")  # type: ignore[arg-type]


def test_a_plain_function_keeps_its_signature() -> None:
    def hello(call: Call, name: str, greeting: str = "hello") -> None: ...

    service = Service("s")
    service.method(hello)
    assert (service.methods["hello"].least, service.methods["hello"].most) == (1, 2)


def test_a_function_without_a_parameter_for_the_call_is_refused() -> None:
    async def hello() -> None: ...

    with pytest.raises(LocalProtocolError, match="parameter for the call"):
        Service("s").method(hello)


def test_a_required_keyword_is_refused() -> None:
    async def hello(call: Call, *, name: str) -> None: ...

    with pytest.raises(LocalProtocolError, match="name by keyword"):
        Service("s").method(hello)


@pytest.mark.parametrize("name", ["", "a.b", "a b", "x" * 200])
def test_names_that_could_not_be_called_are_refused(name: str) -> None:
    async def hello(call: Call) -> None: ...

    with pytest.raises(LocalProtocolError, match="not a name"):
        Service(name)
    with pytest.raises(LocalProtocolError, match="not a name"):
        Service("s").add(name, hello)


def test_a_name_is_taken_once() -> None:
    async def hello(call: Call) -> None: ...

    service = Service("s")
    assert service.method(hello) is hello
    with pytest.raises(LocalProtocolError, match="already"):
        service.method(hello)

    async def never(peer: object) -> Any: ...

    rpc = Rpc(local=None, open_stream=never)
    rpc.register(service)
    with pytest.raises(LocalProtocolError, match="already"):
        rpc.register(Service("s"))


def test_signatures_say_what_fits() -> None:
    service = Service("s")

    @service.method
    async def two(call: Call, a: int, b: int = 0) -> None: ...

    @service.method
    async def many(call: Call, a: int, *rest: int) -> AsyncIterator[int]:
        yield 1

    @service.method
    async def odd(call: NotThere, tensor: torch.Tensor) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    two_, many_, odd_ = (service.methods[name] for name in ("two", "many", "odd"))
    assert (two_.least, two_.most, two_.is_stream) == (1, 2, False)
    assert (many_.least, many_.most, many_.is_stream) == (1, None, True)
    assert many_.refusal([]) == "takes 1 to any number of arguments, got 0"
    assert two_.refusal([1]) is None
    assert odd_.torch_at == (0,)
