"""Rotary position embeddings: pairs of a head's features, rotated by angles of their position.

Su et al. 2021, arXiv:2104.09864. Canonical shapes: x (*b, d), a head's features in each row; cos and sin (*b, w), with
size 1 along the batch dimensions that share their angles. A pair is (j, j + h) of the first 2 h features, or (2 j,
2 j + 1) where `interleaved`. w is h, or 2 h: then each feature has a coefficient of its own, in the order of x.

Nothing here needs cos and sin to be a cosine and a sine: the op is y0 = x0 * c0 - x1 * s0, y1 = x1 * c1 + x0 * s1 for
any coefficients. It is linear in x, and `transposed` is its transpose: with one pair of coefficients the rotation back.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp

from zenith_jax.errors import DTypeError, Refusal, ShapeError, refuse
from zenith_jax.ops._op import as_batches, check_kernel_dtype, kernel, widened

MAX_TABLE_RUNS = 4  # TableRows::kRank in ffi/kernels/rope.h


def _supports(avals: Any, platform: str, **_: Any) -> Refusal | None:
    del platform
    x, cos, sin = avals
    tables = jnp.broadcast_shapes(cos.shape, sin.shape)
    # Neighbouring axes that the tables have, or lack, together.
    lacks = [m != n for m, n in zip(tables[:-1], x.shape[:-1], strict=True) if n != 1]
    runs = sum(1 for _ in itertools.groupby(lacks))
    if runs > MAX_TABLE_RUNS:
        reason = "cos and sin have or lack the axes of x in {runs} runs; the kernel takes {n}"
        return refuse(reason, runs=runs, n=MAX_TABLE_RUNS)
    return check_kernel_dtype("rope", x.dtype)


def _parts(x: Any, interleaved: bool) -> tuple[Any, Any]:
    """Both members of each pair along the last axis."""
    if interleaved:
        pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
        return pairs[..., 0], pairs[..., 1]
    first, second = jnp.split(x, 2, axis=-1)
    return first, second


def _joined(first: Any, second: Any, interleaved: bool) -> Any:
    """The inverse of `_parts`."""
    if interleaved:
        return jnp.stack((first, second), axis=-1).reshape(*first.shape[:-1], 2 * first.shape[-1])
    return jnp.concatenate((first, second), axis=-1)


def _rotated(x: Any, cos: Any, sin: Any, features: int, *, interleaved: bool, transposed: bool) -> Any:
    whole = cos.shape[-1] == features
    (c0, c1), (s0, s1) = ((_parts(t, interleaved) if whole else (t, t)) for t in (cos, sin))
    x0, x1 = _parts(x[..., :features], interleaved)
    if transposed:
        y0, y1 = x0 * c0 + x1 * s1, x1 * c1 - x0 * s0
    else:
        y0, y1 = x0 * c0 - x1 * s0, x1 * c1 + x0 * s1
    rotated, rest = _joined(y0, y1, interleaved), x[..., features:]
    return rotated if rest.shape[-1] == 0 else jnp.concatenate((rotated, rest), axis=-1)


def _backward(operands, results, cotangents, needed, **attributes):
    """The cotangent of x does not read x, which may be None; those of the tables are XLA's sums."""
    del results
    x, *tables = operands
    (dy,) = cotangents
    found = {}
    if 0 in needed:
        found[0] = rope_kernel(dy, *tables, **attributes | dict(transposed=not attributes["transposed"]))[0]
    if needed != (0,):
        found |= dict(enumerate(_table_cotangents(widened(x), widened(dy), *tables, **attributes), start=1))
    return found


def _table_cotangents(x, dy, cos, sin, *, features, interleaved, transposed):
    """(dcos, dsin). By hand, not by the transpose of `_rotated`: inside a function that is being fused that is found to
    be a rotation."""
    (x0, x1), (dy0, dy1) = (_parts(a[..., :features], interleaved) for a in (x, dy))
    ds0, ds1 = (-dy1 * x0, dy0 * x1) if transposed else (-dy0 * x1, dy1 * x0)

    def summed(d0: Any, d1: Any, table: Any) -> Any:
        d = _joined(d0, d1, interleaved) if table.shape[-1] == features else d0 + d1
        shared = [axis for axis, (n, m) in enumerate(zip(table.shape, d.shape, strict=True)) if n != m]
        return d.sum(shared, keepdims=True).astype(table.dtype)

    return summed(dy0 * x0, dy1 * x1, cos), summed(ds0, ds1, sin)


@kernel(
    "rope",
    "*b d, ?*b w, ?*b w -> *b d",
    (0,),
    backward=_backward,
    linear=True,
    supports=_supports,
    strided=True,
    adapted=lambda operands, platform, **_: (operands[0], *jnp.broadcast_arrays(*operands[1:])),
    partitioned=False,  # tables with some sizes of 1 would be written out for the partitioner, as large as x
)
def rope_kernel(x, cos, sin, *, features, interleaved, transposed):
    y = _rotated(widened(x), cos, sin, features, interleaved=interleaved, transposed=transposed)
    return (y.astype(x.dtype),)


def rope(x, cos, sin, *, interleaved: bool = False, rotary_dim: int | None = None):
    """Rotary position embedding: each pair (x0, x1) of features becomes (x0 * c - x1 * s, x1 * c + x0 * s).

    x: (*b, d), float32, float16 or bfloat16 (float64 runs as XLA code); the result has its shape and dtype. Computed in
    float32, rounded once.
    cos, sin: (*b, w), broadcast against x as NumPy does it: (t, 1, w) for x (b, t, h, d), (t, w) for (b, h, t, d). w is
    rotary_dim / 2, one coefficient for each pair, or rotary_dim, one for each feature in the order of x.
    interleaved: pairs are neighbours, as in GPT-J; otherwise feature j goes with j + rotary_dim / 2, as in Llama.
    rotary_dim: the first features, which are rotated; the others stay. Default: all.

    Its gradient by x is the rotation back and does not keep x. Raises ShapeError or DTypeError.
    """
    d = x.shape[-1] if x.ndim else 0
    features = d if rotary_dim is None else rotary_dim
    for name, a in (("x", x), ("cos", cos), ("sin", sin)):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise DTypeError(f"rope: {name} must have a real floating dtype, got {a.dtype}; convert it first")
    if x.ndim == 0 or features % 2 or not 0 <= features <= d:
        raise ShapeError(
            f"rope: an even number of x's last axis must be rotated, got x {x.shape} and rotary_dim {rotary_dim}"
        )
    widths = {t.shape[-1] if t.ndim else 0 for t in (cos, sin)}
    if len(widths) != 1 or not widths <= {features // 2, features}:
        raise ShapeError(
            f"rope: the last axis of cos and sin must be {features // 2}, a coefficient for each pair, or {features}, "
            f"one for each feature; got cos {cos.shape} and sin {sin.shape} for x {x.shape}"
        )
    try:
        batch = jnp.broadcast_shapes(cos.shape[:-1], sin.shape[:-1])
        fits = jnp.broadcast_shapes(batch, x.shape[:-1]) == x.shape[:-1]
    except ValueError:
        batch, fits = (), False
    if not fits:
        raise ShapeError(
            "rope: cos and sin must broadcast to the batch of x, got "
            f"cos {cos.shape} and sin {sin.shape} for x {x.shape}; is an axis of heads missing, cos[:, None]?"
        )
    canonical = as_batches(x, 1)
    shape = (*(1,) * (canonical.ndim - 1 - len(batch)), *batch, *widths)
    tables = (jnp.broadcast_to(t, (*batch, *widths)).reshape(shape).astype(widened(x).dtype) for t in (cos, sin))
    attributes = dict(features=features, interleaved=interleaved, transposed=False)
    return rope_kernel(canonical, *tables, **attributes)[0].reshape(x.shape)
