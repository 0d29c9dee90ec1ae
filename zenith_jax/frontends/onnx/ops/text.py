"""Operators on strings, which exist only while tracing, as NumPy object arrays; TfIdfVectorizer also on numbers."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np

from zenith_jax.frontends.onnx import regex
from zenith_jax.frontends.onnx.limits import check_size
from zenith_jax.frontends.onnx.registry import operator
from zenith_jax.frontends.onnx.values import OnnxError, static, xp


def _objects(values: Any, shape: tuple[int, ...]) -> np.ndarray:
    result = np.empty(len(values), object)
    result[:] = values
    return result.reshape(shape)


def _each(function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    first, *others = np.broadcast_arrays(*(static(a, "input") for a in arrays))
    return _objects([function(*v) for v in zip(first.flat, *(o.flat for o in others), strict=True)], first.shape)


@operator("StringConcat", since=20)
def string_concat(x, y):
    longest = sum(max((len(str(text)) for text in static(v, "input").flat), default=0) for v in (x, y))
    check_size((*np.broadcast_shapes(x.shape, y.shape), longest), np.int32)
    return _each(lambda a, b: str(a) + str(b), x, y)


@operator("StringSplit", since=20)
def string_split(x, *, delimiter=None, maxsplit=None):
    """Parts along a new last axis, filled up with "", and how many there are. No delimiter is any white space."""
    parts = _each(lambda text: str(text).split(delimiter or None, -1 if maxsplit is None else maxsplit), x)
    counts = np.array([len(p) for p in parts.flat], np.int64).reshape(parts.shape)
    longest = int(counts.max(initial=0))
    filled = [text for p in parts.flat for text in [*p, *[""] * (longest - len(p))]]
    return _objects(filled, (*parts.shape, longest)), counts


@operator("RegexFullMatch", since=20)
def regex_full_match(x, *, pattern):
    """Whether each text as a whole matches, by RE2's rules."""
    compiled = regex.Pattern(pattern)
    return _each(lambda text: compiled.fullmatch(str(text)), x).astype(bool)


@operator("StringNormalizer", since=10)
def string_normalizer(x, *, case_change_action="NONE", is_case_sensitive=0, locale=None, stopwords=None):
    """Of a row of words: accents off, stop words out, case changed. An empty result is one "".

    Case follows Unicode; `locale` is not needed for that.
    """
    change = {"LOWER": str.lower, "UPPER": str.upper, "NONE": str}.get(case_change_action)
    if change is None:
        raise OnnxError(f"StringNormalizer has no case_change_action {case_change_action!r}")
    x = static(x, "input")
    if x.ndim not in (1, 2) or (x.ndim == 2 and x.shape[0] != 1):
        raise OnnxError(f"StringNormalizer takes a row of words, got shape {x.shape}")
    fold = str if is_case_sensitive else str.lower
    stop = {fold(word) for word in stopwords or ()}
    words = [_without_accents(str(word)) for word in x.reshape(-1)]
    words = [" ".join(part for part in word.split(" ") if fold(part) not in stop) if stop else word for word in words]
    words = [change(word) for word in words if word] or [""]
    return _objects(words, (1, len(words)) if x.ndim == 2 else (len(words),))


def _without_accents(text: str) -> str:
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


@operator("TfIdfVectorizer", since=9)
def tf_idf_vectorizer(
    x,
    *,
    mode,
    min_gram_length,
    max_gram_length,
    max_skip_count,
    ngram_counts,
    ngram_indexes,
    pool_int64s=None,
    pool_strings=None,
    weights=None,
):
    """How often each n-gram of the pool occurs in each row: TF the count, IDF its weight if it occurs, TFIDF both.

    The pool holds all 1-grams, then all 2-grams, ...; `ngram_counts[n - 1]` is where the n-grams start in it. Elements
    of an n-gram may be up to `max_skip_count` others apart, evenly.
    """
    pool = np.asarray(pool_strings if pool_int64s is None else pool_int64s)
    m = np if pool_int64s is None else xp(x)
    x = static(x, "input").astype(str) if pool_int64s is None else x
    rows = x.reshape(1, -1) if x.ndim < 2 else x
    length = rows.shape[1]
    starts = [*ngram_counts, len(pool)]
    indexes = np.asarray(ngram_indexes)
    check_size((int(indexes.max()) + 1,) * 2, np.int32)
    found: Any = np.zeros((rows.shape[0], int(indexes.max()) + 1), np.int32)
    passed = 0  # n-grams of smaller n
    for n in range(1, len(starts)):
        grams = pool[starts[n - 1] : starts[n]].reshape(-1, n)
        at, passed = indexes[passed : passed + len(grams)], passed + len(grams)
        if not len(grams) or not min_gram_length <= n <= max_gram_length:
            continue
        for skip in range(max_skip_count + 1 if n > 1 else 1):
            windows = length - (n - 1) * (skip + 1)
            if windows < 1:
                break
            same: Any = True
            for i in range(n):
                begin = i * (skip + 1)
                same = same & (rows[:, begin : begin + windows, None] == grams[:, i])
            place = np.eye(found.shape[1], dtype=np.int32)[at]  # two n-grams may count for one output
            found = found + m.matmul(same.sum(1).astype(m.int32), place)
    found = found.astype(np.float32)
    if mode in ("IDF", "TFIDF"):
        weight = np.ones(found.shape[1], np.float32)
        if weights is not None and len(weights):
            weight = np.zeros(found.shape[1], np.float32)
            weight[: len(weights)] = weights
        found = (found if mode == "TFIDF" else (found > 0)) * weight
    elif mode != "TF":
        raise OnnxError(f"TfIdfVectorizer has no mode {mode!r}; its modes are TF, IDF and TFIDF")
    return found[0] if x.ndim < 2 else found
