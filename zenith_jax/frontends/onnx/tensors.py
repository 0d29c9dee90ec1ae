"""TensorProto -> NumPy, for files that nobody vouches for: sizes are checked before memory is taken.

External data is mapped, not read, and cannot leave the model's folder.
https://onnx.ai/onnx/api/classes.html#tensorproto, https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

import math
import pathlib
from typing import Any

import numpy as np

from zenith_jax.errors import DTypeError
from zenith_jax.frontends.onnx import dtypes
from zenith_jax.frontends.onnx.errors import OnnxError, UnsupportedError

_EXTERNAL = 1  # TensorProto.DataLocation
# The field that holds the elements where raw_data does not, by TensorProto.DataType; int32_data for all others.
_FIELDS = {1: "float_data", 7: "int64_data", 10: "int32_data", 11: "double_data", 12: "uint64_data", 13: "uint64_data"}
_FIELDS |= {14: "float_data", 15: "double_data"}


def to_numpy(tensor: Any, folder: pathlib.Path | None, *, raw: np.ndarray | None = None) -> np.ndarray:
    """The array that a TensorProto holds.

    folder: where external data may lie, None: nowhere. raw: the bytes of raw_data, if they were left outside the proto.
    Raises OnnxError where type, dimensions and data do not fit together.
    """
    name = tensor.name or "?"  # bytes where a damaged file has no UTF-8
    try:
        dtype = dtypes.from_onnx(tensor.data_type)
    except DTypeError as error:
        raise OnnxError(f"tensor {name!r}: {error}") from None
    if tensor.HasField("segment"):
        raise UnsupportedError(f"tensor {name!r} is one segment of several; join them before loading")
    shape = tuple(tensor.dims)
    if any(d < 0 for d in shape):
        raise OnnxError(f"tensor {name!r} has negative dimensions {shape}")
    if tensor.data_type == dtypes.STRING:
        return _strings(tensor.string_data, shape, name)
    if tensor.data_location == _EXTERNAL:
        return _from_bytes(_external(tensor, folder, name), dtype, shape, name)
    if raw is not None:
        return _from_bytes(raw, dtype, shape, name)
    if tensor.HasField("raw_data"):
        return _from_bytes(np.frombuffer(tensor.raw_data, np.uint8), dtype, shape, name)
    return _from_field(tensor, dtype, shape, name)


def _strings(values: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    _check_count(len(values), shape, name, "strings")
    array = np.empty(len(values), object)
    array[:] = [v.decode("utf-8", errors="surrogateescape") for v in values]
    return array.reshape(shape)


def _from_bytes(raw: np.ndarray, dtype: np.dtype, shape: tuple[int, ...], name: str) -> np.ndarray:
    needed = (math.prod(shape) * dtypes.bits(dtype) + 7) // 8
    if raw.size != needed:
        raise OnnxError(f"tensor {name!r} has {raw.size} bytes of data, {dtype} {shape} needs {needed}")
    if dtypes.bits(dtype) < 8:
        return _unpacked(raw, dtypes.bits(dtype), math.prod(shape)).view(dtype).reshape(shape)
    return raw.view(dtype).reshape(shape)  # files are little-endian, as every machine that JAX runs on


def _unpacked(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """Elements of `width` bits, the first in the lowest bits, as one byte each."""
    if 8 % width:  # an element may straddle two bytes
        digits = np.unpackbits(packed, bitorder="little")[: count * width].reshape(count, width)
        return np.packbits(digits, axis=1, bitorder="little").reshape(count)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    return ((packed[:, None] >> shifts) & np.uint8(2**width - 1)).reshape(-1)[:count]


def _from_field(tensor: Any, dtype: np.dtype, shape: tuple[int, ...], name: str) -> np.ndarray:
    values = getattr(tensor, _FIELDS.get(tensor.data_type, "int32_data"))
    width = dtypes.bits(dtype)
    if width < 8:
        data = np.fromiter(values, np.int64, len(values)).astype(np.uint8)
        if 8 % width == 0:
            _check_count(len(values), ((math.prod(shape) * width + 7) // 8,), name, "packed bytes")
            return _unpacked(data, width, math.prod(shape)).view(dtype).reshape(shape)
        _check_count(len(values), shape, name, "elements")
        return (data & np.uint8(2**width - 1)).view(dtype).reshape(shape)
    parts = 2 if dtype.kind == "c" else 1
    _check_count(len(values), (math.prod(shape) * parts,), name, "elements")
    if dtype.kind == "c":
        return np.array(values, dtype=np.float32 if dtype.itemsize == 8 else np.float64).view(dtype).reshape(shape)
    if dtype.kind in "iu" or dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        return np.array(values, dtype=dtype).reshape(shape)
    # bool, float16, bfloat16 and the 8-bit floats are kept as bit patterns in integers
    pattern = np.dtype(f"u{dtype.itemsize}")
    return np.array(values, dtype=np.int64).astype(pattern).view(dtype).reshape(shape)


def _check_count(count: int, shape: tuple[int, ...], name: str, what: str) -> None:
    if count != math.prod(shape):
        raise OnnxError(f"tensor {name!r} has {count} {what}, its dimensions {shape} need {math.prod(shape)}")


def _external(tensor: Any, folder: pathlib.Path | None, name: str) -> np.ndarray:
    """The bytes of external data, mapped copy-on-write: nothing is read before it is used."""
    where: dict[str, Any] = {entry.key: entry.value for entry in tensor.external_data}
    location = where.get("location", "")
    if folder is None:
        raise OnnxError(
            f"tensor {name!r} is in the external file {location!r}, but this model was not loaded from a file: "
            f"pass its folder, load(model, folder=...)"
        )
    path = _inside(folder, location, name)
    size = path.stat().st_size
    try:
        offset = int(where.get("offset", 0))
        length = int(where["length"]) if "length" in where else size - offset
    except ValueError:
        raise OnnxError(f"tensor {name!r}: offset and length of its external data must be numbers: {where}") from None
    if offset < 0 or length < 0 or offset + length > size:
        raise OnnxError(
            f"tensor {name!r} claims bytes {offset} to {offset + length} of {location!r}, which has {size}: truncated?"
        )
    if length == 0:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, mode="c", offset=offset, shape=(length,))


def _inside(folder: pathlib.Path, location: str, name: str) -> pathlib.Path:
    """The regular file at `location`, which must lie in `folder` after all symbolic links are followed."""
    relative = pathlib.PurePosixPath(location.replace("\\", "/"))
    if not location or "\0" in location or relative.is_absolute() or ".." in relative.parts:
        problem = "is not a path within the model's folder"
    else:
        root = folder.resolve()
        try:
            path = (root / relative).resolve()
            is_file = path.is_file()
        except (OSError, RuntimeError):  # a name that is too long; links in a circle
            path, is_file = root, False
        if is_file and path.is_relative_to(root):
            return path
        problem = f"is no file in {folder}" if path.is_relative_to(root) else "is a link that leaves the model's folder"
    raise OnnxError(f"tensor {name!r}: external data {location!r} {problem}")
