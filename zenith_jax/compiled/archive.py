"""One file with checksums: small members, and arrays that are mapped into memory instead of read.

A ZIP archive without compression: `unzip` lists it. Nothing in it is executed or unpickled when it is read.
"""

from __future__ import annotations

import pathlib
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.errors import SavedModelError
from zenith_jax.files import replacing

ARRAYS = "parameters.bin"
ALIGNMENT = 64  # bytes; XLA's CPU backend copies arrays that are aligned less
_CHUNK = 1 << 24

# PKWARE's APPNOTE 6.3.10, 4.3.7: sizes of a local file header and of its ZIP64 extra field as `zipfile` writes it.
_LOCAL_HEADER, _ZIP64_EXTRA = 30, 20
_PADDING_ID = 0xD935  # the extra field that Android's zipalign pads with

# What `zipfile` raises where bytes are not what they should be: a wrong version is NotImplementedError, an encrypted
# member RuntimeError, a name that is no text UnicodeDecodeError, an extra field that is cut off struct.error.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError)


def write(path: pathlib.Path, members: Mapping[str, bytes], arrays: Sequence[np.ndarray]) -> None:
    """members by name; arrays one behind the other in ARRAYS, where `offsets(arrays)` says."""
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # without the time: one model, one sequence of bytes
        info = zipfile.ZipInfo(ARRAYS)
        start = file.tell() + _LOCAL_HEADER + len(ARRAYS) + _ZIP64_EXTRA + 4
        padding = -start % ALIGNMENT
        info.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
        with archive.open(info, "w", force_zip64=True) as member:
            position = 0
            for array, offset in zip(arrays, offsets(arrays), strict=True):
                member.write(bytes(offset - position))
                content = _bytes(array)
                for begin in range(0, content.size, _CHUNK):
                    member.write(content[begin : begin + _CHUNK].data)
                position = offset + array.nbytes


def offsets(arrays: Sequence[np.ndarray]) -> list[int]:
    """Where each array starts, aligned, in bytes from the start of ARRAYS."""
    found, position = [], 0
    for array in arrays:
        position += -position % ALIGNMENT
        found.append(position)
        position += array.nbytes
    return found


def checksum(array: np.ndarray) -> int:
    content, value = _bytes(array), 0
    for begin in range(0, content.size, _CHUNK):
        value = zlib.crc32(content[begin : begin + _CHUNK].data, value)
    return value


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class Reader:
    """An archive that is open: `member(name)` and `array(...)`, both checked. Raises SavedModelError."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        if not path.is_file():
            raise SavedModelError(f"there is no file {path}")
        try:
            with zipfile.ZipFile(path) as archive:
                self._infos = {info.filename: info for info in archive.infolist()}
        except _UNREADABLE as error:
            raise self.damaged(
                f"it has no table of contents ({error})", "truncated, or another kind of file"
            ) from error

    def damaged(self, what: str, cause: str = "damaged") -> SavedModelError:
        size = self.path.stat().st_size
        return SavedModelError(f"{self.path} ({size} bytes) is {cause}: {what}. Copy it again, or save the model again")

    def member(self, name: str) -> bytes:
        if name not in self._infos:
            raise self.damaged(f"it holds no {name}", "no saved model, or damaged")
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(name)
        except _UNREADABLE as error:
            raise self.damaged(f"{name} cannot be read ({error})") from error

    def array(self, offset: int, shape: Sequence[int], dtype: Any, crc32: int) -> np.ndarray:
        """A part of ARRAYS, mapped: what is written to it stays in this process."""
        start, size = self._arrays_span()
        dtype, shape = jnp.dtype(dtype), tuple(shape)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if min((offset, *shape), default=0) < 0 or offset + nbytes > size:
            raise self.damaged(f"an array of {nbytes} bytes at {offset} lies outside of {ARRAYS} ({size} bytes)")
        if nbytes == 0:
            return np.zeros(shape, dtype)
        mapped = np.memmap(self.path, np.uint8, mode="c", offset=start + offset, shape=(nbytes,))
        if checksum(mapped) != crc32:
            raise self.damaged(f"the checksum of an array in {ARRAYS} is wrong")
        return mapped.view(dtype).reshape(shape)

    def _arrays_span(self) -> tuple[int, int]:
        if ARRAYS not in self._infos:
            raise self.damaged(f"it holds no {ARRAYS}")
        info = self._infos[ARRAYS]
        with open(self.path, "rb") as file:
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\3\4" or info.compress_type != zipfile.ZIP_STORED:
            raise self.damaged(f"the header of {ARRAYS} is wrong")
        name, extra = struct.unpack("<HH", header[26:30])
        start = info.header_offset + _LOCAL_HEADER + name + extra
        if start + info.file_size > self.path.stat().st_size:
            raise self.damaged(f"{ARRAYS} ends after {info.file_size} bytes, past the end of the file")
        return start, info.file_size


def on_device(array: np.ndarray) -> jax.Array:
    """The array for JAX: on the CPU without a copy where it is aligned and DLPack knows its dtype."""
    if jax.default_backend() == "cpu" and array.nbytes and array.dtype.kind in "iuf" and array.flags.carray:
        if array.ctypes.data % ALIGNMENT == 0 and array.dtype == jax.dtypes.canonicalize_dtype(array.dtype):
            return jax.dlpack.from_dlpack(np.asarray(array))
    return jnp.asarray(array)
