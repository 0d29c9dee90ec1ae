"""Takes the weights out of a serialised model before protobuf reads it, so that they exist once and may be mapped.

https://protobuf.dev/programming-guides/encoding/ ; field numbers from onnx.proto. Also, protobuf itself stops at 2 GiB.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_GRAPH = 7  # in ModelProto
_INITIALIZER = 5  # in GraphProto
_RAW_DATA = 9  # in TensorProto
_MIN_BYTES = 1024  # smaller weights stay in the proto

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _Malformed(Exception):
    pass


def without_weights(content: np.ndarray) -> tuple[bytes, dict[int, np.ndarray]]:
    """The model without the raw data of the main graph's initializers, and that data by the initializer's position.

    content: the file as bytes (uint8), possibly mapped. What is returned are views of it. Bytes that are no protobuf
    message, or one that gives a field twice, are returned as they are: protobuf has a word for each case.
    """
    try:
        return _model(content)
    except _Malformed:
        return content.tobytes(), {}


def _model(content: np.ndarray) -> tuple[bytes, dict[int, np.ndarray]]:
    parts: list[bytes] = []
    raw: dict[int, np.ndarray] = {}
    graphs = 0
    for number, kind, whole, body in _fields(content):
        if number == _GRAPH and kind == _BYTES:
            graphs += 1
            if graphs > 1:
                raise _Malformed
            graph = _graph(body, raw)
            parts += [_tag(_GRAPH), _varint(len(graph)), graph]
        else:
            parts.append(whole.tobytes())
    return b"".join(parts), raw


def _graph(content: np.ndarray, raw: dict[int, np.ndarray]) -> bytes:
    parts: list[bytes] = []
    position = 0
    for number, kind, whole, body in _fields(content):
        if number == _INITIALIZER and kind == _BYTES:
            tensor = _tensor(body, raw, position) if body.size >= _MIN_BYTES else body.tobytes()
            parts += [_tag(_INITIALIZER), _varint(len(tensor)), tensor]
            position += 1
        else:
            parts.append(whole.tobytes())
    return b"".join(parts)


def _tensor(content: np.ndarray, raw: dict[int, np.ndarray], position: int) -> bytes:
    parts: list[bytes] = []
    for number, kind, whole, body in _fields(content):
        if number == _RAW_DATA and kind == _BYTES and body.size >= _MIN_BYTES:
            if position in raw:
                raise _Malformed
            raw[position] = body
        else:
            parts.append(whole.tobytes())
    return b"".join(parts)


def _fields(content: np.ndarray) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Field number, wire type, the field as a whole, and what it holds."""
    at = 0
    while at < content.size:
        start = at
        tag, at = _read_varint(content, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            body = at
            _, at = _read_varint(content, at)
        elif kind == _FIXED64:
            body, at = at, at + 8
        elif kind == _FIXED32:
            body, at = at, at + 4
        elif kind == _BYTES:
            length, body = _read_varint(content, at)
            at = body + length
        else:
            raise _Malformed
        if at > content.size:
            raise _Malformed
        yield number, kind, content[start:at], content[body:at]


def _read_varint(content: np.ndarray, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= content.size:
            raise _Malformed
        byte = int(content[at])
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise _Malformed


def _tag(number: int) -> bytes:
    return _varint(number << 3 | _BYTES)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
