"""ai.onnx.ml: preprocessing and linear models. Decision trees are in `trees`; maps have no arrays and are left out.

https://onnx.ai/onnx/operators/index.html#ai-onnx-ml
"""

from __future__ import annotations

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from zenith_jax.frontends.onnx import dtypes
from zenith_jax.frontends.onnx.limits import check_size
from zenith_jax.frontends.onnx.registry import ML, operator
from zenith_jax.frontends.onnx.values import OnnxError, UnsupportedError, static, xp

ml_operator = ft.partial(operator, domain=ML)


def _floats(x: Any) -> Any:
    return x if dtypes.is_floating(x) else x.astype(xp(x).float32)


@ml_operator("Scaler")
def scaler(x, *, offset=None, scale=None):
    x = _floats(x)
    x = x if offset is None else x - np.asarray(offset, x.dtype)
    return x if scale is None else x * np.asarray(scale, x.dtype)


@ml_operator("Normalizer")
def normalizer(x, *, norm="MAX"):
    """Of rows of numbers. MAX divides by the largest value, not the largest size, as the specification says."""
    x = _floats(x)
    m = xp(x)
    if norm == "MAX":
        size = x.max(-1, keepdims=True)
    elif norm in ("L1", "L2"):
        size = m.abs(x).sum(-1, keepdims=True) if norm == "L1" else m.sqrt(m.square(x).sum(-1, keepdims=True))
    else:
        raise OnnxError(f"Normalizer has no norm {norm!r}; they are MAX, L1 and L2")
    return x / m.where(size == 0, m.ones((), x.dtype), size)


@ml_operator("Binarizer")
def binarizer(x, *, threshold=0.0):
    return (x > np.asarray(threshold, x.dtype)).astype(x.dtype)


@ml_operator("Imputer")
def imputer(
    x, *, imputed_value_floats=None, imputed_value_int64s=None, replaced_value_float=0.0, replaced_value_int64=0
):
    """Values equal to the replaced one (NaN equals NaN here) become the imputed one of their column."""
    m = xp(x)
    if dtypes.is_floating(x):
        new, old = imputed_value_floats, replaced_value_float
    else:
        new, old = imputed_value_int64s, replaced_value_int64
    missing = m.isnan(x) if old != old else x == np.asarray(old, x.dtype)
    return m.where(missing, np.asarray(new, x.dtype), x)


@ml_operator("FeatureVectorizer")
def feature_vectorizer(*values, inputdimensions=None):
    widths = inputdimensions or [None] * len(values)
    parts = [
        _fitted(v.reshape(v.shape[0], -1) if v.ndim > 1 else v.reshape(1, -1), w)
        for v, w in zip(values, widths, strict=True)
    ]
    parts = [p.astype(np.float32) for p in parts]
    return xp(*parts).concatenate(parts, 1)


def _fitted(rows: Any, width: int | None) -> Any:
    if width is None or rows.shape[1] == width:
        return rows
    return xp(rows).pad(rows[:, :width], ((0, 0), (0, max(width - rows.shape[1], 0))))


@ml_operator("OneHotEncoder")
def one_hot_encoder(x, *, cats_int64s=None, cats_strings=None, zeros=1):
    """A new last axis with a 1 at the category's place; all zeros for an unknown one."""
    check_size((*x.shape, len(cats_int64s or cats_strings or ())), np.float32)
    if cats_strings is not None:
        hot = static(x, "input").astype(str)[..., None] == np.asarray(cats_strings, str)
    else:
        hot = dtypes.cast(x, np.int64)[..., None] == np.asarray(cats_int64s, np.int64)
    return hot.astype(np.float32)


@ml_operator("CategoryMapper")
def category_mapper(x, *, cats_int64s, cats_strings, default_int64=-1, default_string="_Unused"):
    if dtypes.is_string(x.dtype):
        return _mapped(x, cats_strings, np.asarray(cats_int64s, np.int64), default_int64)
    return _mapped(x, cats_int64s, np.asarray(cats_strings, object), default_string)


@ml_operator("LabelEncoder")
def label_encoder_of_strings(x, *, classes_strings, default_int64=-1, default_string="_Unused"):
    codes = np.arange(len(classes_strings))
    if dtypes.is_string(x.dtype):
        return _mapped(x, classes_strings, codes, default_int64)
    return _mapped(x, codes, np.asarray(classes_strings, object), default_string)


@ml_operator("LabelEncoder", since=2)
def label_encoder(
    x,
    *,
    keys_tensor=None,
    keys_strings=None,
    keys_int64s=None,
    keys_floats=None,
    values_tensor=None,
    values_strings=None,
    values_int64s=None,
    values_floats=None,
    default_tensor=None,
    default_string="_Unused",
    default_int64=-1,
    default_float=-0.0,
):
    keys = next((k for k in (keys_tensor, keys_strings, keys_int64s, keys_floats) if k is not None), None)
    choices = [
        (values_tensor, None, default_tensor),
        (values_strings, object, default_string),
        (values_int64s, np.int64, default_int64),
        (values_floats, np.float32, default_float),
    ]
    chosen = next(((np.asarray(v, dtype), default) for v, dtype, default in choices if v is not None), None)
    if keys is None or chosen is None:
        raise OnnxError("LabelEncoder needs keys and values")
    values, default = chosen
    if default is None:  # a tensor of values without a default: as for the typed attributes
        default = {"O": "_Unused", "i": -1, "u": 0, "b": False}.get(values.dtype.kind, -0.0)
    return _mapped(x, keys, values, np.asarray(default).reshape(-1)[0])


def _mapped(x: Any, keys: Any, values: np.ndarray, default: Any) -> Any:
    """values[i] where x equals keys[i], else `default`. NaN is a key like any other."""
    keys = np.asarray(keys)
    if dtypes.is_string(x.dtype) or dtypes.is_string(values.dtype):
        table = dict(zip(keys.tolist(), values.tolist(), strict=True))
        flat = [table.get(v, default) for v in static(x, "input").reshape(-1).tolist()]
        result = np.empty(len(flat), values.dtype)
        result[:] = flat
        return result.reshape(x.shape)
    m = xp(x)
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order].astype(x.dtype), values[order]
    at = m.searchsorted(m.asarray(keys), x).clip(0, len(keys) - 1)
    found = m.asarray(keys)[at] == x
    if dtypes.is_floating(x) and np.isnan(keys).any():
        found = found | (m.isnan(x) & m.isnan(m.asarray(keys)[at]))
    return m.where(found, m.asarray(values)[at], m.asarray(np.asarray(default, values.dtype)))


@ml_operator("LinearRegressor")
def linear_regressor(x, *, coefficients, intercepts=None, targets=1, post_transform="NONE"):
    scores = _linear(x, coefficients, intercepts, targets)
    return post_transformed(scores, post_transform)


def _linear(x: Any, coefficients: Any, intercepts: Any, rows: int) -> Any:
    x = jnp.asarray(_floats(x))
    x = x.reshape(1, -1) if x.ndim == 1 else x
    weights = np.asarray(coefficients, x.dtype).reshape(rows, -1)
    scores = jnp.matmul(x, weights.T, precision="highest")
    return scores if intercepts is None else scores + np.asarray(intercepts, x.dtype)


@ml_operator("LinearClassifier")
def linear_classifier(
    x,
    *,
    coefficients,
    intercepts=None,
    classlabels_ints=None,
    classlabels_strings=None,
    multi_class=0,
    post_transform="NONE",
):
    """Labels and scores. One row of coefficients for two classes gives the scores -s and s."""
    features = x.shape[-1]
    scores = _linear(x, coefficients, intercepts, len(coefficients) // features)
    labels = classlabels_strings or classlabels_ints or ()
    best = None
    if scores.shape[1] == 1:
        best = (scores[:, 0] > 0).astype(jnp.int32)
        if len(labels) == 2:
            scores = jnp.concatenate([-scores, scores], 1)
    best = jnp.argmax(scores, 1) if best is None else best
    return label_of(best, labels), post_transformed(scores, post_transform)


def label_of(index: Any, labels: Any) -> Any:
    """The labels at `index`; without labels the index."""
    if not len(labels):
        return dtypes.cast(index, np.int64)
    if isinstance(labels[0], str):
        return np.asarray(labels, object)[static(index, "the class, whose label is a string")]
    return dtypes.cast(jnp.asarray(np.asarray(labels, dtypes.held(np.int64)))[index], np.int64)


def post_transformed(scores: Any, kind: str) -> Any:
    scores = jnp.asarray(scores)
    match kind:
        case "NONE" | "" | None:
            return scores
        case "LOGISTIC":
            return jax.nn.sigmoid(scores)
        case "SOFTMAX":
            return jax.nn.softmax(scores, -1)
        case "SOFTMAX_ZERO":  # exact zeros stay zero
            some = jnp.abs(scores) > 1e-7
            terms = jnp.where(some, jnp.exp(scores - scores.max(-1, keepdims=True)), 0)
            return terms / jnp.maximum(terms.sum(-1, keepdims=True), jnp.finfo(scores.dtype).tiny)
        case "PROBIT":
            return ndtri(scores)
    raise UnsupportedError(f"post_transform {kind!r} is not known")
