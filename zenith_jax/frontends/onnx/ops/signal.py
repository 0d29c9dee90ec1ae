"""Fourier transforms, windows and the mel scale: https://onnx.ai/onnx/operators/

Forward transforms are computed in float64 where `jax_enable_x64` allows it, inverse ones in the dtype of the input (or
float32): so were the expected values of the official suite, whose atol of 1e-7 is below float32's rounding of them.
Complex numbers have a last axis of 2.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import dtypes

from zenith_jax.frontends.onnx.dtypes import from_onnx
from zenith_jax.frontends.onnx.errors import OnnxError
from zenith_jax.frontends.onnx.limits import check_size
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.frontends.onnx.values import static


def _scalar(x: Any, name: str) -> int:
    return int(static(x, name).reshape(()))


def _as_complex(x: Any, dtype: Any = np.float64) -> Any:
    """x (..., 1) as real, or x (..., 2) as complex numbers, at least as wide as dtype."""
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, dtypes.canonicalize_dtype(dtype)))
    if x.shape[-1] not in (1, 2):
        raise OnnxError(f"the last axis holds real and imaginary part and must be 1 or 2, got shape {x.shape}")
    return x[..., 0] if x.shape[-1] == 1 else x[..., 0] + 1j * x[..., 1]


def _as_pairs(y: Any, dtype: Any) -> Any:
    parts = [y.real, y.imag] if jnp.iscomplexobj(y) else [y]
    return jnp.stack(parts, axis=-1).astype(dtype)


def _transform(x: Any, dft_length: Any, axis: int, inverse: int, onesided: int) -> Any:
    signal = _as_complex(x, np.float32 if inverse else np.float64)
    axis = axis % x.ndim
    if axis == x.ndim - 1:
        raise OnnxError(f"DFT: the axis may not be the last, which holds real and imaginary part; got {axis}")
    n = None if dft_length is None else _scalar(dft_length, "dft_length")
    if n is not None:
        check_size([n if i == axis else d for i, d in enumerate(x.shape)], np.complex128)
    if inverse and onesided:
        return _as_pairs(jnp.fft.irfft(signal, n, axis), x.dtype)
    if inverse:
        return _as_pairs(jnp.fft.ifft(signal, n, axis), x.dtype)
    if onesided:
        return _as_pairs(jnp.fft.rfft(signal, n, axis), x.dtype)
    return _as_pairs(jnp.fft.fft(signal, n, axis), x.dtype)


@operator("DFT", since=17)
def dft_axis_attribute(x, dft_length=None, *, axis=1, inverse=0, onesided=0):
    return _transform(x, dft_length, axis, inverse, onesided)


@operator("DFT", since=20)
def dft(x, dft_length=None, axis=None, *, inverse=0, onesided=0):
    return _transform(x, dft_length, -2 if axis is None else _scalar(axis, "axis"), inverse, onesided)


@operator("STFT", since=17)
def stft(signal, frame_step, window=None, frame_length=None, *, onesided=1):
    """signal: (batch, length, 1 or 2) -> (batch, frames, bins, 2)."""
    samples = _as_complex(signal)
    if frame_length is not None:
        length = _scalar(frame_length, "frame_length")
    else:
        length = samples.shape[1] if window is None else window.shape[0]
    step = _scalar(frame_step, "frame_step")
    if step < 1 or not 1 <= length <= samples.shape[1]:
        raise OnnxError(f"STFT of {samples.shape[1]} samples in steps of {step} and frames of {length}")
    starts = np.arange((samples.shape[1] - length) // step + 1) * step
    check_size((samples.shape[0], starts.size, length), np.complex128)
    frames = samples[:, starts[:, None] + np.arange(length)]
    if window is not None:
        frames = frames * jnp.asarray(window).astype(frames.real.dtype)
    spectrum = jnp.fft.rfft(frames) if onesided and not jnp.iscomplexobj(frames) else jnp.fft.fft(frames)
    return _as_pairs(spectrum[..., : length // 2 + 1] if onesided else spectrum, signal.dtype)


# --- windows, computed while tracing ----------------------------------------------------------------------------------


def _register_window(name: str, coefficients: tuple[float, ...]) -> None:
    """A sum of cosines: sum (-1)^k coefficients[k] cos(2 pi k i / n), n the size, or one less if not periodic."""

    @operator(name, since=17)
    def window(size, *, output_datatype=1, periodic=1):
        size = _scalar(size, "size")
        check_size((size, len(coefficients)), np.float64)
        angle = 2 * np.pi * np.arange(size) / max(size if periodic else size - 1, 1)
        terms = [(-1) ** k * c * np.cos(k * angle) for k, c in enumerate(coefficients)]
        return np.sum(terms, axis=0).astype(from_onnx(output_datatype))


_register_window("HannWindow", (0.5, 0.5))
_register_window("HammingWindow", (25 / 46, 21 / 46))
_register_window("BlackmanWindow", (0.42, 0.5, 0.08))


@operator("MelWeightMatrix", since=17)
def mel_weight_matrix(num_mel_bins, dft_length, sample_rate, lower_edge_hertz, upper_edge_hertz, *, output_datatype=1):
    """Triangles over the bins of a spectrum, equally wide on the mel scale 2595 log10(1 + f/700), with maximum 1."""
    bins = _scalar(num_mel_bins, "num_mel_bins")
    length = _scalar(dft_length, "dft_length")
    rate = _scalar(sample_rate, "sample_rate")
    check_size((length // 2 + 1, bins + 2), np.float64)
    edges = [float(static(e, n).reshape(())) for e, n in ((lower_edge_hertz, "lower"), (upper_edge_hertz, "upper"))]
    low, high = (2595 * np.log10(1 + edge / 700) for edge in edges)
    mel = np.arange(bins + 2) * ((high - low) / (bins + 2)) + low
    at = ((length + 1) * (700 * (10 ** (mel / 2595) - 1)) // rate).astype(np.int64)
    left, middle, right = at[:-2], at[1:-1], at[2:]
    frequency = np.arange(length // 2 + 1)[:, None]
    rising = (frequency - left) / np.maximum(middle - left, 1)
    falling = (right - frequency) / np.maximum(right - middle, 1)
    inside = (frequency >= left) & (frequency < right)
    weights = np.where(frequency <= middle, np.where(middle == left, 1, rising), falling)
    return np.where(inside | (frequency == middle), np.maximum(weights, 0), 0).astype(from_onnx(output_datatype))
