"""Every custom-call target, called directly: right values, and an exception for whatever does not fit together.

Values of one small case for each target; the ops' own tests go through shapes, dtypes and transformations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from zenith_jax import native

RNG = np.random.default_rng(20260101)
B, R, D = 3, 5, 37  # batch, rows, features: none a multiple of a vector width
EPS = 1e-3  # large enough to matter
LEFT_OPEN = 1 << 40


@dataclasses.dataclass(frozen=True)
class Case:
    """A call that is right. operands: by name, in order; results: name -> (shape, dtype); expected: of float64
    operands, the results in order, None for scratch."""

    operands: dict[str, np.ndarray]
    results: dict[str, tuple[tuple[int, ...], Any]]
    expected: Callable[..., tuple[np.ndarray | None, ...]]
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


# ---- Oracles, from the formulas in ffi/kernels/*.h, in NumPy and float64 ---------------------------------------------


def norm(x: np.ndarray, *, centre: bool) -> tuple[np.ndarray, np.ndarray]:
    x = x - x.mean(-1, keepdims=True) if centre else x
    rstd = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
    return x * rstd, rstd


def norm_forward(x, scale, bias=0.0, *, centre):
    return (norm(x, centre=centre)[0] * scale + bias,)


def norm_backward(x, scale, dy, dsum=0.0, *, centre):
    xhat, rstd = norm(x, centre=centre)
    g = dy * scale
    mean_g = g.mean(-1, keepdims=True) if centre else 0.0
    dx = rstd * (g - mean_g - xhat * (g * xhat).mean(-1, keepdims=True)) + dsum
    return (dx, of_groups(dy * xhat)) + ((of_groups(dy),) if centre else ())


def of_groups(terms):
    """Sums over two groups of R rows, one row longer than the other."""
    return np.stack([terms[..., : R // 2, :].sum(-2), terms[..., R // 2 :, :].sum(-2)], -2)


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


ACTIVATIONS = {
    "gelu_erf": lambda x: x / 2 * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def derivative(function, x, step=1e-6):
    """Central difference: error step^2, far below float32's."""
    return (function(x + step) - function(x - step)) / (2 * step)


def attention(query, key, value, mask, bias, interval, query_segments, key_segments, *, scale, softcap, left, right):
    t, s = np.arange(query.shape[-2])[:, None], np.arange(key.shape[-2])
    allowed = (s - t >= -left) & (s - t <= right) & mask.astype(bool)
    if interval.size:
        allowed = allowed & (interval[..., :1] <= s) & (s < interval[..., 1:])
    if query_segments.size:
        allowed = allowed & (query_segments[:, :, None, :, None] == key_segments[:, :, None, None])
    logits, slope = scale * np.einsum("bkgtd,bksd->bkgts", query, key), 1.0
    if softcap:
        slope = 1 - np.tanh(logits / softcap) ** 2
        logits = softcap * np.tanh(logits / softcap)
    logits = np.where(allowed, logits + bias, -np.inf)
    lse = np.log(np.exp(logits).sum(-1))
    p = np.exp(logits - lse[..., None])
    return np.einsum("bkgts,bkse->bkgte", p, value), lse, p, slope


def attention_backward(query, key, value, mask, bias, *rest, scale, **band):
    *structure, out, _, _, dout, dlse = rest
    _, _, p, slope = attention(query, key, value, mask, bias, *structure, scale=scale, **band)
    dp = np.einsum("bkgte,bkse->bkgts", dout, value)
    delta = (dout * out).sum(-1) - (dlse if dlse.size else 0)
    dlogits = p * (dp - delta[..., None])
    dproducts = scale * dlogits * slope
    dquery = np.einsum("bkgts,bksd->bkgtd", dproducts, key)
    dkey = np.einsum("bkgts,bkgtd->bksd", dproducts, query)
    dvalue = np.einsum("bkgts,bkgte->bkse", p, dout)
    return dquery, dkey, dvalue, None, dlogits


# ---- One case for each target ----------------------------------------------------------------------------------------

F32 = np.float32


def norm_cases() -> dict[str, Case]:
    x, residual, dy, dsum = (normal(B, R, D) for _ in range(4))
    scale, bias = normal(D), normal(D)
    full, partial = ((B, R, D), F32), ((B, 2, D), F32)
    eps = {"eps": np.float32(EPS)}

    def forward(*, centre, add):
        def expected(x, *rest):
            if not add:
                return norm_forward(x, *rest, centre=centre)
            residual, *parameters = rest
            return (*norm_forward(x + residual, *parameters, centre=centre), x + residual)

        operands = {"x": x, **({"residual": residual} if add else {}), "scale": scale}
        operands |= {"bias": bias} if centre else {}
        return Case(operands, {"y": full} | ({"sum": full} if add else {}), expected, eps)

    def backward(*, centre, add):
        operands = {"x": x, "scale": scale, "dy": dy} | ({"dsum": dsum} if add else {})
        results = {"dx": full, "dscale": partial} | ({"dbias": partial} if centre else {})
        return Case(operands, results, lambda *a: norm_backward(*a, centre=centre), eps)

    cases = {}
    for prefix, add in (("", False), ("add_", True)):
        for kind, centre in (("layer_norm", True), ("rms_norm", False)):
            cases[f"{prefix}{kind}_fwd"] = forward(centre=centre, add=add)
            cases[f"{prefix}{kind}_bwd"] = backward(centre=centre, add=add)
    return cases


def group_norm_cases(*, last: bool) -> dict[str, Case]:
    """x (B, R, G, K), or (B, G, K, R) with channels first; silu after one of both."""
    g, k = 2, 3
    axes = (1, 3) if last else (2, 3)
    shape = (B, R, g, k) if last else (B, g, k, R)
    along = (g, k) if last else (g, k, 1)
    x, dy, scale, bias = normal(*shape) + 1, normal(*shape), normal(g * k) + 1, normal(g * k)
    mean = x.mean(axes)
    rstd = F32(1 / np.sqrt(x.var(axes) + EPS))
    full, groups, partial = (shape, F32), ((B, g), F32), ((B, g * k), F32)
    attributes = {"channels_last": np.int32(last), "silu": np.int32(not last)}

    def before_silu(x, scale, bias, mean, rstd):
        spread = lambda v: np.expand_dims(v, axes)  # noqa: E731
        xhat = (x - spread(mean)) * spread(rstd)
        z = xhat * scale.reshape(along) + bias.reshape(along)
        return xhat, z, (np.ones_like(z) if last else 1 / (1 + np.exp(-z)))

    def forward(x, scale, bias):
        mean, rstd = x.mean(axes), 1 / np.sqrt(x.var(axes) + EPS)
        _, z, s = before_silu(x, scale, bias, mean, rstd)
        return z * s, mean, rstd

    def backward(x, scale, bias, dy, mean, rstd):
        xhat, z, s = before_silu(x, scale, bias, mean, rstd)
        dz = dy * (s if last else s + z * s * (1 - s))
        of_g, of_gx = ((dz * scale.reshape(along) * v).mean(axes, keepdims=True) for v in (1, xhat))
        dx = np.expand_dims(rstd, axes) * (dz * scale.reshape(along) - of_g - xhat * of_gx)
        rows = 1 if last else 3
        return dx, (dz * xhat).sum(rows).reshape(B, -1), dz.sum(rows).reshape(B, -1)

    name = "group_norm" if last else "group_norm_first"
    operands = {"x": x, "scale": scale, "bias": bias}
    return {
        f"{name}_fwd": Case(
            operands, {"y": full, "mean": groups, "rstd": groups}, forward, attributes | {"eps": F32(EPS)}
        ),
        f"{name}_bwd": Case(
            operands | {"dy": dy, "mean": mean, "rstd": rstd},
            {"dx": full, "dscale": partial, "dbias": partial},
            backward,
            attributes,
        ),
    }


def softmax_cases() -> dict[str, Case]:
    x, dy = 3 * normal(B, R, D), normal(B, R, D)
    y = softmax(x)
    full = ((B, R, D), F32)
    return {
        "softmax_fwd": Case({"x": x}, {"y": full}, lambda x: (softmax(x),)),
        "softmax_bwd": Case(
            {"y": y, "dy": dy}, {"dx": full}, lambda y, dy: (y * (dy - (dy * y).sum(-1, keepdims=True)),)
        ),
    }


def cross_entropy_cases() -> dict[str, Case]:
    logits, labels = 3 * normal(B, R, D), RNG.integers(D, size=(B, R)).astype(np.int32)
    labels[0, :2] = -1, D  # no classes
    dlse, dpicked, dtotal = (normal(B, R) for _ in range(3))
    hot = labels[..., None] == np.arange(D)
    lse = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    rows = ((B, R), F32)

    def backward(logits, labels, lse, dlse, dpicked, dtotal):
        p = np.exp(logits - lse[..., None])
        return (dlse[..., None] * p + dpicked[..., None] * hot + dtotal[..., None],)

    operands = {"logits": logits, "labels": labels}
    return {
        "cross_entropy_fwd": Case(
            operands,
            {"lse": rows, "picked": rows, "total": rows},
            lambda x, labels: (lse, (x * hot).sum(-1), x.sum(-1)),
        ),
        "cross_entropy_bwd": Case(
            operands | {"lse": F32(lse), "dlse": dlse, "dpicked": dpicked, "dtotal": dtotal},
            {"dlogits": ((B, R, D), F32)},
            backward,
        ),
    }


def activation_cases() -> dict[str, Case]:
    x, dy = 3 * normal(B, R, D), normal(B, R, D)
    full = ((B, R, D), F32)
    cases = {}
    for name, f in ACTIVATIONS.items():
        cases[f"{name}_fwd"] = Case({"x": x}, {"y": full}, lambda x, f=f: (f(x),))
        cases[f"{name}_bwd"] = Case({"x": x, "dy": dy}, {"dx": full}, lambda x, dy, f=f: (dy * derivative(f, x),))
    return cases


def gated_cases() -> dict[str, Case]:
    """Halves with the gate behind, then before the value."""
    gate, value, dy = 3 * normal(B, R, D), normal(B, R, D), normal(B, R, D)
    full, halves = ((B, R, D), F32), ((B, R, 2, D), F32)
    cases = {}
    for half, (name, f) in enumerate((n, f) for n, f in ACTIVATIONS.items()):
        half = half % 2
        order = [value, gate] if half else [gate, value]

        def forward(gate, value, f=f):
            return (f(gate) * value,)

        def backward(gate, value, dy, f=f):
            return dy * value * derivative(f, gate), dy * f(gate)

        def of_halves(x, *dy, half=half, forward=forward, backward=backward):
            gate, value = x[..., half, :], x[..., 1 - half, :]
            if not dy:
                return forward(gate, value)
            both = backward(gate, value, *dy)
            return (np.stack(both[::-1] if half else both, axis=-2),)

        x, attributes = np.stack(order, axis=-2), {"gate_half": np.int64(half)}
        of_two = {"gate": gate, "value": value}
        cases[f"gated_{name}_fwd"] = Case(of_two, {"y": full}, forward)
        cases[f"gated_{name}_bwd"] = Case({**of_two, "dy": dy}, {"dgate": full, "dvalue": full}, backward)
        cases[f"gated_{name}_halves_fwd"] = Case({"x": x}, {"y": full}, of_halves, attributes)
        cases[f"gated_{name}_halves_bwd"] = Case({"x": x, "dy": dy}, {"dx": halves}, of_halves, attributes)
    return cases


def rope_cases() -> dict[str, Case]:
    """Neighbours of the first features, rotated back, by tables that lack two of three axes of x."""
    x = normal(2, B, R, 10)
    cos, sin = normal(1, B, 1, 4), normal(1, B, 1, 4)

    def back(x, cos, sin):
        pairs = x[..., :8].reshape(*x.shape[:-1], 4, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (cos - 1j * sin)
        pairs = np.stack([turned.real, turned.imag], -1).reshape(*x.shape[:-1], 8)
        return (np.concatenate([pairs, x[..., 8:]], -1),)

    attributes = {"features": np.int64(8), "interleaved": True, "transposed": True}
    return {"rope": Case({"x": x, "cos": cos, "sin": sin}, {"y": (x.shape, F32)}, back, attributes)}


STRUCTURE = ("interval", "query_segments", "key_segments", "dlse")


def attention_cases(structured: bool = False) -> dict[str, Case]:
    """structured: with a cap, intervals, segments and the cotangent of lse."""
    b, k, g, t, s, d, e = 2, 3, 2, 11, 13, 8, 12
    query, key, value = normal(b, k, g, t, d), normal(b, k, s, d), normal(b, k, s, e)
    mask = RNG.random((1, k, 1, t, s)) < 0.8  # kv_head, query and key: bits 2, 8 and 16
    mask[..., 0] = True
    bias = normal(b, 1, g, 1, s)  # batch, group and key: bits 1, 4 and 16
    band = {"scale": 0.4, "softcap": 1.5 * structured, "left": LEFT_OPEN, "right": 2}
    interval, query_segments, key_segments, dlse = (np.zeros(0, F32 if n == "dlse" else np.int32) for n in STRUCTURE)
    if structured:
        first = RNG.integers(3, size=(b, 1, g, t))  # batch, group, query, and the bounds along the key's bit
        interval = np.stack([first, RNG.integers(8, s + 3, size=first.shape)], -1).astype(np.int32)
        query_segments, key_segments = np.zeros((b, 1, t), np.int32), np.zeros((1, k, s), np.int32)
        query_segments[1, :, 6:] = key_segments[..., 8:] = -5
        mask[..., 3:8] = True  # no row without a key
        band["right"] = 8
        dlse = normal(b, k, g, t)
    attributes = {
        "scale": np.float32(band["scale"]),
        "softcap": np.float32(band["softcap"]),
        "left": np.int64(band["left"]),
        "right": np.int64(band["right"]),
        "masked_row": np.int32(0),
        "layout": np.int32(0),
        "allow_tf32": np.int32(0),
        "mask_axes": np.int64(2 + 8 + 16),
        "bias_axes": np.int64(1 + 4 + 16),
        "interval_axes": np.int64(1 + 4 + 8 + 16 if structured else -1),
        "query_segments_axes": np.int64(1 + 8 if structured else -1),
        "key_segments_axes": np.int64(2 + 16 if structured else -1),
    }
    operands = {"query": query, "key": key, "value": value, "mask": mask, "bias": bias}
    operands |= {"interval": interval, "query_segments": query_segments, "key_segments": key_segments}
    out, lse, *_ = attention(*operands.values(), **band)
    rows, scratch = ((b, k, g, t), F32), {"scratch": ((b, k, 5), np.uint32)}
    residuals = {"out": F32(out), "lse": F32(lse), "lse_rest": np.zeros(lse.shape, F32)}
    backward_operands = operands | residuals | {"dout": normal(b, k, g, t, e), "dlse": dlse}
    cotangents = {"dquery": (query.shape, F32), "dkey": (key.shape, F32), "dvalue": (value.shape, F32), "delta": rows}
    scores = {"dbias": ((b, k, g, t, s), F32)}
    return {
        "attention_fwd": Case(
            operands,
            {"out": (out.shape, F32), "lse": rows, "lse_rest": rows} | scratch,
            lambda *a: (*attention(*a, **band)[:2], None, None),
            attributes,
        ),
        "attention_bwd": Case(
            backward_operands,
            cotangents | scratch,
            lambda *a: (*attention_backward(*a, **band)[:4], None),
            attributes,
        ),
        "attention_bias_bwd": Case(
            backward_operands,
            cotangents | scores | scratch,
            lambda *a: (*attention_backward(*a, **band), None),
            attributes,
        ),
    }


def paged_attention(query, key_pages, value_pages, table, interval, *, scale, softcap):
    """Of one query and one sequence of each pool: arrays as they lie are their logical shapes."""
    out, lse = np.zeros((*query.shape[:-1], value_pages.shape[-1])), np.zeros(query.shape[:-1])
    for o, k in np.ndindex(query.shape[:2]):
        pages = np.where(table[o, 0, 0] < 0, table[o, 0, 0] + key_pages.shape[2], table[o, 0, 0])
        pages = np.clip(pages, 0, key_pages.shape[2] - 1)
        first, last = interval[o, k, 0, 0]
        key, value = (np.concatenate(x[o, k][pages])[first:last] for x in (key_pages, value_pages))
        logits = softcap * np.tanh(scale * query[o, k, 0, :, 0] @ key.T / softcap)
        lse[o, k, 0, :, 0] = np.log(np.exp(logits).sum(-1))
        out[o, k, 0, :, 0] = softmax(logits) @ value
    return out, lse, None


def paged_attention_case() -> Case:
    o, k, g, p, c, m, d, e = 2, 3, 5, 7, 6, 4, 8, 12
    table = np.array([5, -1, 40, 2, 0, 3, -40, 1], np.int32).reshape(o, 1, 1, m)
    first = RNG.integers(3, size=(o, k, 1, 1))
    interval = np.stack([first, first + RNG.integers(1, 30, size=first.shape)], -1).astype(np.int32)
    operands = {
        "query": normal(o, k, 1, g, 1, d),
        "key_pages": normal(o, k, p, c, d),
        "value_pages": normal(o, k, p, c, e),
        "table": table,
        "interval": interval,
    }
    attributes = {
        "scale": np.float32(0.4),
        "softcap": np.float32(1.5),
        "left": np.int64(LEFT_OPEN),
        "right": np.int64(LEFT_OPEN),
        "empty_row": np.int32(2),
        "heads_axis": np.int32(0),
        "nan_outside": np.bool_(False),
        "shapes_in_layout": np.bool_(False),
    }
    rows = ((o, k, 1, g, 1), F32)
    return Case(
        operands,
        {"out": ((o, k, 1, g, 1, e), F32), "lse": rows, "lse_rest": rows},
        lambda *a: paged_attention(*a, scale=0.4, softcap=1.5),
        attributes,
    )


def linear_cases(dtype: Any) -> dict[str, Case]:
    """Of small integers, whose sums every dtype holds exactly."""
    k, n = 24, 40
    x, w, residual = (RNG.integers(-3, 4, size=s).astype(dtype) for s in ((B, R, k), k * n, (B, R, n)))
    bias = RNG.integers(-3, 4, size=n).astype(F32)
    full = ((B, R, n), dtype)

    def expected(x, w, bias, residual):
        pre = x.astype(np.float64) @ w.astype(np.float64).reshape(n, k).T + bias
        return np.maximum(pre, 0) + residual, pre

    operands = {"x": x, "w": w, "bias": bias, "residual": residual}
    attributes = {"activation": np.int32(1), "layout": np.int32(1)}
    return {
        "linear_fwd": Case(operands, {"y": full}, lambda *a: expected(*a)[:1], attributes),
        "linear_pre_fwd": Case(operands, {"y": full, "pre": full}, expected, attributes),
    }


def conv_case() -> Case:
    """Of small integers; a filter that passes every edge, 2 x 3 elements, those of a row 2 apart."""
    c, n = 3, 7
    x, w, residual = (RNG.integers(-3, 4, size=s).astype(F32) for s in ((B, R, 4, c), 6 * c * n, (B, 3, 5, n)))
    scale, bias = (RNG.integers(-3, 4, size=n).astype(F32) for _ in range(2))

    def expected(x, w, scale, bias, residual):
        x = np.pad(x, ((0, 0), (1, 1), (3, 2), (0, 0)))
        y = np.zeros((B, 3, 5, n))
        for i, j in np.ndindex(2, 3):
            y += x[:, i : i + 5 : 2, 2 * j : 2 * j + 5] @ w.reshape(2, 3, c, n)[i, j]
        return (np.maximum(y * scale + bias + residual, 0),)

    pairs = {"kernel": (2, 3), "strides": (2, 1), "dilation": (1, 2), "before": (1, 3), "pool": (1, 1)}
    attributes = {name: np.asarray(pair, np.int64) for name, pair in pairs.items()} | {"relu": np.int32(1)}
    operands = {"x": x, "w": w, "scale": scale, "bias": bias, "residual": residual}
    return Case(operands, {"y": ((B, 3, 5, n), F32)}, expected, attributes)


def gated_linear_cases() -> dict[str, Case]:
    """Of integers so small that float16 holds both products; the results are rounded."""
    k, n = 16, 24
    x, w_gate, w_value = (RNG.integers(-2, 3, size=s).astype(np.float16) for s in ((B, R, k), k * n, k * n))

    def expected(x, w_gate, w_value):
        gate, value = (x.astype(np.float64) @ w.astype(np.float64).reshape(n, k).T for w in (w_gate, w_value))
        return gate / (1 + np.exp(-gate)) * value, gate, value

    operands = {"x": x, "w_gate": w_gate, "w_value": w_value}
    attributes = {"activation": np.int32(4), "transposed": np.int32(1)}
    y, both = {"y": ((B, R, n), np.float16)}, dict.fromkeys(("gate", "value"), ((B, R, n), np.float16))
    return {
        "gated_linear_fwd": Case(operands, y, lambda *a: expected(*a)[:1], attributes),
        "gated_linear_pre_fwd": Case(operands, y | both, expected, attributes),
    }


def linear_backward_case() -> Case:
    pre, dy = normal(B, R, D), normal(B, R, D)

    def expected(pre, dy):
        dpre = dy * derivative(ACTIVATIONS["silu"], pre)
        return dpre, dpre.sum(-2)

    results = {"dpre": ((B, R, D), F32), "dbias": ((B, D), F32)}
    return Case({"pre": pre, "dy": dy}, results, expected, {"activation": np.int32(2)})


def quantized_case(dtype: Any) -> Case:
    """Of small integers and two groups of k; sizes that the GPU's kernel takes."""
    k, n, rng = 32, 48, np.random.default_rng(3)
    x = rng.integers(-3, 4, size=(B, R, k)).astype(dtype)
    w, scale = rng.integers(-128, 128, size=k * n).astype(np.int8), rng.integers(-2, 3, size=2 * n).astype(F32)
    bias = rng.integers(-3, 4, size=n).astype(F32)

    def expected(x, w, scale, bias):
        wide = w.astype(np.float64).reshape(k, n) * np.repeat(scale.reshape(2, n), k // 2, axis=0)
        return (x.astype(np.float64) @ wide + bias,)

    attributes = {"n": np.int64(n), "transposed": np.int32(0)}
    return Case({"x": x, "w": w, "scale": scale, "bias": bias}, {"y": ((B, R, n), dtype)}, expected, attributes)


STRUCTURED = attention_cases(structured=True)
LINEAR = {"cpu": linear_cases(F32), "cuda": linear_cases(np.float16)}
GATED_LINEAR = gated_linear_cases()
QUANTIZED = {"cpu": quantized_case(F32), "cuda": quantized_case(np.float16)}
CHANNELS_FIRST = group_norm_cases(last=False)
CASES = (
    norm_cases()
    | group_norm_cases(last=True)
    | CHANNELS_FIRST
    | softmax_cases()
    | cross_entropy_cases()
    | activation_cases()
    | gated_cases()
    | rope_cases()
    | attention_cases()
    | {"paged_attention_fwd": paged_attention_case()}
    | {"linear_bwd": linear_backward_case()}
)
CONV = conv_case()
ON_GPU_ONLY, ON_CPU_ONLY = set(GATED_LINEAR), {"conv_fwd"}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], autouse=True)
def device(request):
    """Every test runs on the CPU and, where there is one, on the GPU."""
    if request.param == "cpu" and request.node.callspec.params.get("name") in ON_GPU_ONLY:
        pytest.skip("the CPU's module has no such target: there it is two products of XLA's and gated_*_fwd")
    if request.param == "cuda" and request.node.callspec.params.get("name") in ON_CPU_ONLY:
        pytest.skip("the GPU's module has no such target: there it is cuDNN's")
    native.ensure_registered(request.param)
    with jax.default_device(jax.devices(request.param)[0]):
        yield request.param


def call(name: str, operands: dict[str, Any], results: dict[str, Any], attributes: dict[str, Any], **kwargs: Any):
    types_ = [jax.ShapeDtypeStruct(*r) for r in results.values()]
    with jax.enable_x64(True):  # lets float64 and int64 operands come through as they are
        function = jax.ffi.ffi_call(native.target(name), types_, **kwargs)
        return jax.block_until_ready(function(*map(jnp.asarray, operands.values()), **attributes))


def expected(case: Case) -> tuple[np.ndarray | None, ...]:
    wide = [x.astype(np.float64) if x.dtype == np.float32 else x for x in case.operands.values()]
    return case.expected(*wide)


# ---- Values ----------------------------------------------------------------------------------------------------------


def test_every_target_has_a_case(device):
    names = {*CASES, *LINEAR[device], *GATED_LINEAR, "conv_fwd", "quantized_linear_fwd"}
    elsewhere = ON_GPU_ONLY if device == "cpu" else ON_CPU_ONLY
    assert {native.target(name) for name in names - elsewhere} == set(native.module(device).targets())


@pytest.mark.parametrize("name", CASES)
def test_target_computes_its_formula(device, name):
    if device == "cuda" and name in CHANNELS_FIRST:
        pytest.skip("on a GPU the channels are last")
    case = CASES[name]
    for actual, wanted in zip(call(name, case.operands, case.results, case.attributes), expected(case), strict=True):
        if wanted is not None:
            # Sums of up to 40 products of size 1 to 10 in float32: 2e-5 is 10 times what was seen.
            np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", LINEAR["cpu"])
def test_linear_computes_its_formula_and_refuses_other_operands(device, name):
    case = LINEAR[device][name]
    actual = call(name, case.operands, case.results, case.attributes)
    for a, wanted in zip(actual, expected(case), strict=True):
        np.testing.assert_array_equal(a, wanted)
    for operand in case.operands:
        refuse_others(name, case, operand)
    for attribute, text in (
        ("activation", "activation must be 0 to 6, got 7"),
        ("layout", "layout must be 0 to 2, got 7"),
    ):
        attributes = case.attributes | {attribute: np.int32(7)}
        assert text in refusal(name, case.operands, case.results, attributes)


@pytest.mark.parametrize("name", ON_CPU_ONLY)
def test_conv_computes_its_formula_and_refuses_other_operands(name):
    (actual,) = call(name, CONV.operands, CONV.results, CONV.attributes)
    np.testing.assert_array_equal(actual, expected(CONV)[0])
    for absent, value in (("scale", 1), ("residual", 0)):
        given, without = (
            CONV.operands | {absent: x} for x in (np.full_like(CONV.operands[absent], value), np.zeros(0, F32))
        )
        (actual,), (wanted,) = (call(name, o, CONV.results, CONV.attributes) for o in (without, given))
        np.testing.assert_array_equal(actual, wanted)
    for operand in ("w", "scale", "bias", "residual"):  # any height and width of x goes with some padding
        refuse_others(name, CONV, operand)
    for attribute, value, text in (
        ("kernel", np.asarray([2, 0]), "kernel must be positive, got 0"),
        ("strides", np.asarray([0, 1]), "strides must be positive, got 0"),
        ("dilation", np.asarray([1, -1]), "dilation must be positive, got -1"),
        ("pool", np.asarray([1, 0]), "pool must be positive, got 0"),
        ("pool", np.asarray([1, 2]), "with a residual there is no maximum, pool must be 1, got 2"),
        ("before", np.asarray([1]), "an attribute must have 2 elements, got 1"),
        ("relu", np.int32(2), "relu must be 0 or 1, got 2"),
    ):
        assert text in refusal(name, CONV.operands, CONV.results, CONV.attributes | {attribute: value})


@pytest.mark.parametrize("name", GATED_LINEAR)
def test_gated_linear_computes_its_formula_and_refuses_other_operands(device, name):
    case = GATED_LINEAR[name]
    actual = call(name, case.operands, case.results, case.attributes)
    for a, wanted in zip(actual, expected(case), strict=True):
        np.testing.assert_allclose(a, wanted, rtol=2**-10, atol=1e-5)  # one rounding; sums of exact terms
    for operand in case.operands:
        refuse_others(name, case, operand)
    for attribute, text in (
        ("activation", "activation must be 4 to 6, got 3"),
        ("transposed", "must be 0 or 1, got 3"),
    ):
        attributes = case.attributes | {attribute: np.int32(3)}
        assert text in refusal(name, case.operands, case.results, attributes)


def test_quantized_linear_computes_its_formula_and_refuses_other_operands(device):
    name, case = "quantized_linear_fwd", QUANTIZED[device]
    (actual,) = call(name, case.operands, case.results, case.attributes)
    # Sums of up to 32 * 3 * 128 * 2, of which float16 holds every 16th.
    np.testing.assert_allclose(actual, expected(case)[0], rtol=2**-11 if device == "cuda" else 0)
    for operand in ("x", "w", "bias"):  # a longer scale has more groups
        refuse_others(name, case, operand)
    for scale, text in (
        (np.ones(47, F32), "scale must have a positive multiple of n elements, got 47"),
        (np.ones(5 * 48, F32), "the number of groups must divide k, got 5"),
        (np.ones((2, 48), F32), "scale must have rank 1, got 2"),
    ):
        assert text in refusal(name, case.operands | {"scale": scale}, case.results, case.attributes)
    for attribute, value, text in (
        ("n", np.int64(0), "n must be positive, got 0"),
        ("transposed", np.int32(7), "transposed must be 0 or 1, got 7"),
    ):
        assert text in refusal(name, case.operands, case.results, case.attributes | {attribute: value})
    odd = {
        "x": case.operands["x"][..., :3],
        "w": jnp.zeros(9, jnp.int4),
        "scale": np.ones(3, F32),
        "bias": np.ones(3, F32),
    }
    text = refusal(name, odd, {"y": ((B, R, 3), case.operands["x"].dtype)}, case.attributes | {"n": np.int64(3)})
    assert "rows of 4-bit weights must have an even size, got 3" in text


@pytest.mark.parametrize("name", STRUCTURED)
def test_attention_computes_caps_intervals_segments_and_takes_a_cotangent_of_lse(name):
    case = STRUCTURED[name]
    for actual, wanted in zip(call(name, case.operands, case.results, case.attributes), expected(case), strict=True):
        if wanted is not None:
            np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=2e-5)


LENGTH_MAJOR = {5: (0, 3, 1, 2, 4), 4: (0, 2, 1, 3)}  # query, out: b t k g d; key, value: b s k d


@pytest.mark.parametrize("name", ["attention_fwd", "attention_bwd", "attention_bias_bwd"])
def test_attention_reads_and_writes_length_major_arrays(name):
    case = CASES[name]
    dense = {"mask", "bias", *STRUCTURE, "lse", "lse_rest", "delta", "dbias", "scratch"}
    attributes = case.attributes | {"layout": np.int32(1)}
    actual = call(
        name,
        case.operands,
        case.results,
        attributes,
        input_layouts=[None if n in dense else LENGTH_MAJOR[x.ndim] for n, x in case.operands.items()],
        output_layouts=[None if n in dense else LENGTH_MAJOR[len(shape)] for n, (shape, _) in case.results.items()],
    )
    for a, wanted in zip(actual, expected(case), strict=True):
        if wanted is not None:
            np.testing.assert_allclose(a, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["attention_fwd", "attention_bwd", "attention_bias_bwd"])
def test_attention_takes_shapes_as_the_arrays_lie(name):
    case = CASES[name]
    dense = {"mask", "bias", *STRUCTURE, "lse", "lse_rest", "delta", "dbias", "scratch"}
    operands = {n: x if n in dense else x.transpose(LENGTH_MAJOR[x.ndim]) for n, x in case.operands.items()}
    results = {
        n: (shape, dtype) if n in dense else (tuple(shape[i] for i in LENGTH_MAJOR[len(shape)]), dtype)
        for n, (shape, dtype) in case.results.items()
    }
    actual = call(name, operands, results, case.attributes | {"layout": np.int32(2)})
    for n, a, wanted in zip(results, actual, expected(case), strict=True):
        if wanted is not None:
            wanted = wanted if n in dense else wanted.transpose(LENGTH_MAJOR[wanted.ndim])
            np.testing.assert_allclose(a, wanted, rtol=2e-5, atol=2e-5)
    assert "must have shape" in refusal(name, case.operands, case.results, case.attributes | {"layout": np.int32(2)})


@pytest.mark.parametrize("heads_axis", [0, 1, 2])
def test_paged_attention_takes_shapes_as_the_arrays_lie(heads_axis):
    case = CASES["paged_attention_fwd"]
    pages = [(0, 1, 2, 3, 4), (0, 2, 1, 3, 4), (0, 2, 3, 1, 4)][heads_axis]
    rows = (0, 2, 1, 3, 4)
    orders = {"query": (0, 2, 4, 1, 3, 5), "key_pages": pages, "value_pages": pages, "table": (0, 2, 1, 3)}
    orders |= {"interval": rows, "out": (0, 2, 4, 1, 3, 5), "lse": rows, "lse_rest": rows}
    operands = {n: x.transpose(orders[n]) for n, x in case.operands.items()}
    results = {n: (tuple(shape[i] for i in orders[n]), dtype) for n, (shape, dtype) in case.results.items()}
    attributes = case.attributes | {"heads_axis": np.int32(heads_axis), "shapes_in_layout": np.bool_(True)}
    actual = call("paged_attention_fwd", operands, results, attributes)
    for n, a, wanted in zip(results, actual, expected(case), strict=True):
        if wanted is not None:
            np.testing.assert_allclose(a, wanted.transpose(orders[n]), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["attention_fwd", "attention_bwd", "attention_bias_bwd"])
def test_attention_without_mask_and_bias(name):
    case = CASES[name]
    t, s = 11, 13
    neutral = {"mask": np.ones((1, 1, 1, t, s), bool), "bias": np.zeros((1, 1, 1, 1, 1), F32)}
    plain = dataclasses.replace(case, operands=case.operands | neutral)
    out, lse, *_ = attention(*list(plain.operands.values())[:8], scale=0.4, softcap=0, left=LEFT_OPEN, right=2)
    if name != "attention_fwd":
        plain = dataclasses.replace(plain, operands=plain.operands | {"out": F32(out), "lse": F32(lse)})
    absent = {"mask": np.zeros((0,), bool), "bias": np.zeros((0,), F32)}
    absent |= {"lse_rest": np.zeros((0,), F32)} if name != "attention_fwd" else {}
    attributes = case.attributes | {"mask_axes": np.int64(-1), "bias_axes": np.int64(-1)}
    actual = call(name, plain.operands | absent, case.results, attributes)
    for a, wanted in zip(actual, expected(plain), strict=True):
        if wanted is not None:
            np.testing.assert_allclose(a, wanted, rtol=2e-5, atol=2e-5)


# ---- What does not fit together is an exception that says so ---------------------------------------------------------


def refusal(name: str, operands, results, attributes) -> str:
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        call(name, operands, results, attributes)
    text = str(error.value)
    assert "INVALID_ARGUMENT: " in text and f"zenith_{name}: " in text, text
    assert "must" in text and "got" in text, text
    return text


def doubled(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])


OPERANDS = [(name, operand) for name, case in CASES.items() for operand, x in case.operands.items() if x.size]
RESULTS = [(name, result) for name, case in CASES.items() for result in case.results]


@pytest.mark.parametrize(("name", "operand"), OPERANDS)
def test_operand_of_another_size_rank_or_dtype_is_refused(name, operand):
    refuse_others(name, CASES[name], operand)


@pytest.mark.parametrize(
    ("name", "operand"), [(n, o) for n, case in STRUCTURED.items() for o in STRUCTURE if o in case.operands]
)
def test_structure_of_another_size_rank_or_dtype_is_refused(name, operand):
    refuse_others(name, STRUCTURED[name], operand)


def refuse_others(name, case, operand):
    x = case.operands[operand]
    for axis in range(x.ndim):
        if (name, operand, axis) == ("cross_entropy_fwd", "logits", x.ndim - 1):
            continue  # nothing else has the number of classes
        if (name, operand, axis) == ("paged_attention_fwd", "table", x.ndim - 1):
            continue  # nor that of a sequence's pages
        refusal(name, case.operands | {operand: np.repeat(x, 2, axis)}, case.results, case.attributes)
    refusal(name, case.operands | {operand: np.stack([x, x], -1)}, case.results, case.attributes)
    refusal(name, case.operands | {operand: x.reshape(-1)[:1]}, case.results, case.attributes)
    for dtype in {np.int32, np.float64} - {x.dtype.type}:
        text = refusal(name, case.operands | {operand: x.astype(dtype)}, case.results, case.attributes)
        assert f"got {np.dtype(dtype).name}" in text


@pytest.mark.parametrize(("name", "result"), RESULTS)
def test_result_of_another_size_rank_or_dtype_is_refused(name, result):
    case = CASES[name]
    shape, dtype = case.results[result]
    for axis in range(len(shape) - (result == "scratch")):  # of which there may be any amount
        if result == "dscale" and name.endswith(("layer_norm_bwd", "rms_norm_bwd")) and axis == len(shape) - 2:
            continue  # nor of groups of rows
        text = refusal(name, case.operands, case.results | {result: (doubled(shape, axis), dtype)}, case.attributes)
        assert f": {result} must have shape {shape}" in text
    refusal(name, case.operands, case.results | {result: ((*shape, 1), dtype)}, case.attributes)
    text = refusal(name, case.operands, case.results | {result: (shape, jnp.int32)}, case.attributes)
    assert f": {result} must be {np.dtype(dtype).name}" in text


def test_sums_of_no_group_are_refused():
    case = CASES["rms_norm_bwd"]
    text = refusal("rms_norm_bwd", case.operands, case.results | {"dscale": ((B, 0, D), F32)}, case.attributes)
    assert "zenith_rms_norm_bwd: dscale must have a group of rows, got 0" in text


def test_error_names_target_operand_invariant_and_what_came():
    case = CASES["rms_norm_fwd"]
    text = refusal("rms_norm_fwd", case.operands | {"scale": normal(7)}, case.results, case.attributes)
    assert "zenith_rms_norm_fwd: scale must have shape (37,) to match x of shape (3, 5, 37), got (7,)" in text


@pytest.mark.parametrize(
    ("attribute", "value", "text"),
    [
        ("layout", np.int32(3), "layout must be 0 to 2, got 3"),
        ("masked_row", np.int32(-1), "masked_row must be 0 or 1, got -1"),
        ("allow_tf32", np.int32(2), "allow_tf32 must be 0 or 1, got 2"),
        ("mask_axes", np.int64(32), "mask_axes must be -1 or a set of 5 bits, got 32"),
        ("bias_axes", np.int64(31), "bias must have 1716 elements"),
        ("mask_axes", np.int64(-1), "mask must have 0 elements (it is absent)"),
        ("softcap", np.float32(-1), "softcap must not be negative or NaN, got -1"),
        ("interval_axes", np.int64(15), "interval_axes must have the bit of the key axis, got 15"),
        ("query_segments_axes", np.int64(1), "segments must be of queries and keys, or of neither, got 1"),
    ],
)
def test_attention_attribute_out_of_range_is_refused(attribute, value, text):
    case = CASES["attention_fwd"]
    assert text in refusal("attention_fwd", case.operands, case.results, case.attributes | {attribute: value})


def test_missing_or_mistyped_attribute_is_an_exception():
    case = CASES["rms_norm_fwd"]
    for attributes in ({}, {"eps": EPS}, {"eps": np.float32(EPS), "more": np.float32(0)}):  # {"eps": EPS} is float64
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            call("rms_norm_fwd", case.operands, case.results, attributes)
