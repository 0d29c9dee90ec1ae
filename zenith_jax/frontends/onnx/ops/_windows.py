"""Geometry of sliding windows, for convolution and pooling: axes are spatial, sizes are Python integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from zenith_jax.frontends.onnx.limits import check_size


@dataclasses.dataclass(frozen=True)
class Windows:
    """Window o of an axis covers start[o] + dilation * (0 .. size-1) of the input, start[o] = stride * o - before.

    before, after: elements added in front and behind for just these windows; ceil_mode makes `after` differ from
    `pad_after`, what the model asks for: more for a window that it adds, less for one that it drops. outputs: how many.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    pad_after: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def padding(self) -> list[tuple[int, int]]:
        return list(zip(self.before, self.after, strict=True))


def check_fits(x: Any, geometry: Windows) -> None:
    """Raises OnnxError where the windows of x, whose spatial axes are its last, or x with its padding are too large."""
    outer = x.shape[: x.ndim - len(geometry.size)]
    padded = [n + low + high for n, (low, high) in zip(x.shape[len(outer) :], geometry.padding, strict=True)]
    check_size((*outer, *padded), x.dtype)
    check_size((*outer, *geometry.outputs), x.dtype)


def per_axis(values: Sequence[int] | None, rank: int, default: int = 1) -> tuple[int, ...]:
    return (default,) * rank if values is None else tuple(int(v) for v in values)


def windows(
    inputs: Sequence[int],
    size: Sequence[int],
    *,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
) -> Windows:
    """The windows of Conv and of all pooling operators over axes of the sizes `inputs`."""
    rank = len(size)
    size = tuple(int(v) for v in size)
    strides, dilations = per_axis(strides, rank), per_axis(dilations, rank)
    pads = per_axis(pads, 2 * rank, 0)
    before, after, pad_after, outputs = [], [], [], []
    for i, n in enumerate(inputs):
        extent = (size[i] - 1) * dilations[i] + 1
        front, back = pads[i], pads[i + rank]
        if auto_pad == "VALID":
            front = back = 0
        elif auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            count = -(-n // strides[i])
            total = max((count - 1) * strides[i] + extent - n, 0)
            front = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
            back = total - front
        count = (n + front + back - extent) // strides[i] + 1
        if ceil_mode:
            count = -(-(n + front + back - extent) // strides[i]) + 1
            if (count - 1) * strides[i] >= n + front:  # a window that starts in the padding behind does not count
                count -= 1
        before.append(front)
        pad_after.append(back)
        after.append(max(0, (count - 1) * strides[i] + extent - n - front) if ceil_mode else back)
        outputs.append(count)
    return Windows(size, strides, dilations, *map(tuple, (before, after, pad_after, outputs)))
