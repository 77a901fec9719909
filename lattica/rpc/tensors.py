"""Tensors as they cross the wire: a dtype, a shape and the numbers' bytes, little-endian and row-major.

numpy arrays and torch tensors are understood where they are there; torch is never imported from here, only
looked up among the modules that the program has loaded itself. No I/O.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lattica.errors import LocalProtocolError

if TYPE_CHECKING:
    import numpy as np

ALIGNMENT: Final = 64  # bytes; a cache line, and what AVX-512 and torch's own allocator use
# Wire name -> (bytes a number, numpy's name; bfloat16 has none)
DTYPES: Final[dict[str, tuple[int, str | None]]] = {
    "f32": (4, "float32"),
    "f64": (8, "float64"),
    "f16": (2, "float16"),
    "bf16": (2, None),
    "i8": (1, "int8"),
    "i16": (2, "int16"),
    "i32": (4, "int32"),
    "i64": (8, "int64"),
    "u8": (1, "uint8"),
    "u16": (2, "uint16"),
    "u32": (4, "uint32"),
    "u64": (8, "uint64"),
    "bool": (1, "bool"),
}
_WIRE_NAMES: Final = {name: wire for wire, (_, name) in DTYPES.items() if name} | {"bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """Numbers as they travel: `data` holds them little-endian and row-major, as plain bytes.

    What arrives shares memory with the frame that it came in and must not be written to.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def numpy(self) -> np.ndarray[Any, Any]:
        """The same memory as a read-only numpy array; bfloat16, which numpy lacks, as its bits in uint16."""
        import numpy as np

        name = DTYPES[self.dtype][1] or "uint16"
        array: np.ndarray[Any, Any] = np.ndarray(self.shape, np.dtype(name).newbyteorder("<"), self.data)
        array.flags.writeable = False
        return array

    def torch(self) -> Any:
        """The same memory as a torch tensor. LocalProtocolError when the program has not imported torch."""
        torch = _torch()
        if torch is None:
            raise LocalProtocolError("a torch tensor was asked for where torch is not imported; import torch")
        kind = getattr(torch, {wire: name for name, wire in _WIRE_NAMES.items()}[self.dtype])
        if not self.data.nbytes:
            return torch.empty(self.shape, dtype=kind)
        data = bytearray(self.data) if self.data.readonly else self.data  # torch has no read-only tensors
        return torch.frombuffer(data, dtype=kind).reshape(self.shape)


def aligned_buffer(size_bytes: int) -> memoryview:
    """A buffer that starts at a multiple of ALIGNMENT. Its pages become real only as they are written."""
    import numpy as np

    room = np.empty(size_bytes + ALIGNMENT, np.uint8)  # unlike bytearray(n), not filled with zeros
    start = -room.ctypes.data % ALIGNMENT
    return room.data[start : start + size_bytes]


def as_tensor(value: object) -> Tensor | None:
    """A numpy array or torch tensor as a Tensor, without a copy where its layout allows; None for others.

    Raises LocalProtocolError for element types that do not travel (objects, complex numbers, text, dates).
    """
    if isinstance(value, Tensor):
        return _checked(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return _from_numpy(value)
    torch = _torch()
    if torch is not None and isinstance(value, torch.Tensor):
        return _from_torch(torch, value)
    return None


def arrived(tensor: Tensor) -> Any:
    """What a program gets for a tensor that arrived: a read-only numpy array.

    bfloat16 comes as a torch tensor where torch is loaded, else as the Tensor itself.
    """
    if tensor.dtype != "bf16":
        return tensor.numpy()
    return tensor if _torch() is None else tensor.torch()


def to_torch(value: object) -> Any:
    """What arrived (an array, a Tensor) as a torch tensor that shares its memory; other values unchanged."""
    tensor = as_tensor(value)
    torch = _torch()
    if tensor is None or torch is None or isinstance(value, torch.Tensor):
        return value
    # An array that arrived is a read-only view of a writable frame buffer, its base. torch has no read-only
    # tensors and would have it copied: give it the buffer.
    base = getattr(value, "base", None)
    if (
        base is not None
        and getattr(base, "dtype", None) == "uint8"
        and base.ndim == 1
        and base.flags.writeable
    ):
        start = value.ctypes.data - base.ctypes.data  # type: ignore[attr-defined]
        tensor = Tensor(tensor.dtype, tensor.shape, base.data[start : start + tensor.nbytes])
    return tensor.torch()


def _torch() -> Any | None:
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "frombuffer") else None  # it may be half way through its own import


def _checked(tensor: Tensor) -> Tensor:
    width = DTYPES.get(tensor.dtype, (0, None))[0]
    if not width:
        raise LocalProtocolError(f"no dtype {tensor.dtype!r} travels; use one of {', '.join(DTYPES)}")
    if any(size < 0 for size in tensor.shape) or math.prod(tensor.shape) * width != tensor.data.nbytes:
        raise LocalProtocolError(
            f"a {tensor.dtype} tensor of shape {list(tensor.shape)} has not {tensor.data.nbytes} bytes"
        )
    return tensor


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    wire = _WIRE_NAMES.get(array.dtype.name)
    if wire is None:
        raise LocalProtocolError(
            f"numpy arrays of dtype {array.dtype} do not travel; use {', '.join(DTYPES)}"
        )
    shape = array.shape
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.astype(array.dtype.newbyteorder("<"))
    if not array.flags.c_contiguous:
        array = array.copy(order="C")
    return Tensor(wire, shape, array.reshape(-1).view("uint8").data)


def _from_torch(torch: Any, tensor: Any) -> Tensor:
    wire = _WIRE_NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if wire is None or tensor.layout != torch.strided:
        raise LocalProtocolError(
            f"torch tensors of {tensor.dtype}, {tensor.layout} do not travel;"
            f" use a dense one of {', '.join(DTYPES)}"
        )
    shape = tuple(tensor.shape)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return Tensor(wire, shape, flat.view(torch.uint8).numpy().data)
