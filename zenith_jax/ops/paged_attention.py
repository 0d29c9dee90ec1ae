"""Attention of a few queries over keys and values that lie in pages: a decoding step from a paged cache.

Axes: *o pools of pages, k key/value heads, n sequences of a pool, g query heads to a key/value head, t queries,
p pages, c tokens of a page, d query/key features, e value features, m pages of a sequence.

  page  = table[n, i], counted from the end if negative, then moved into [0, p)
  key   = key_pages[page] of all i, one behind the other: s = m * c keys; value likewise
  out   = attention of ops/attention_kernels.py, where band and interval say which keys a query may see

The kernels look pages up as they go; no array of s keys is made. Its reference, which is also its derivative, gathers
them. The kernels' contract is ffi/kernels/paged_attention.h. Kwon et al. 2023, arXiv:2309.06180.

Sharding: heads are a batch dimension. Sequences are not, since pages have none: a program that shards them over
devices has them gathered, unless each device has a pool of its own, by `jax.shard_map` or a vmap over pools.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zenith_jax.errors import DTypeError, Refusal, ShapeError
from zenith_jax.ops._op import WIDENED, check_kernel_dtype, kernel
from zenith_jax.ops.attention_kernels import (
    HEADS_MAJOR,
    LENGTH_MAJOR,
    MASKED_ROW_MEAN,
    UNBOUNDED,
    attention_canonical,
    with_sink,
)
from zenith_jax.ops.linear import HOPPER, compute_capability

# What a query without any key returns; the first two are those of attention.
EMPTY_ROW_NAN, EMPTY_ROW_MEAN, EMPTY_ROW_ZERO = 0, 1, 2
# Where the axis of heads lies in pages (p, c, d): (k, p, c, d), (p, k, c, d), (p, c, k, d).
HEADS_AXES = (0, 1, 2)
# FitsPagedDecode of cuda/paged_attention.cu.
CUDA_QUERIES, CUDA_ROWS, CUDA_PAGE, CUDA_FEATURES, CUDA_ALIGNED, CUDA_SEQUENCES = 16, 64, 16, 256, 8, 65535


def unsupported(
    platform: str, *, dtype: Any, sequences: int, groups: int, t: int, page_size: int, d: int, e: int
) -> Refusal | None:
    """Why no kernel looks the pages up, so that they are gathered, or None."""
    if platform != "cuda":
        return None
    if jnp.dtype(dtype).itemsize != 2:
        return Refusal("on a GPU pages are looked up in bfloat16 and float16", advice="compute in bfloat16")
    if t > CUDA_QUERIES or t * groups > CUDA_ROWS:
        return Refusal(
            "the kernel is for decoding, up to {t} queries and {rows} with all heads that share keys, got {n} and {m}",
            dict(t=CUDA_QUERIES, rows=CUDA_ROWS, n=t, m=t * groups),
        )
    if page_size < CUDA_PAGE or page_size & (page_size - 1):
        return Refusal(
            "the kernel takes pages of a power of two of keys, at least {least}, got {n}",
            dict(least=CUDA_PAGE, n=page_size),
        )
    if max(d, e) > CUDA_FEATURES or d % CUDA_ALIGNED or e % CUDA_ALIGNED:
        return Refusal(
            "the kernel takes multiples of {step} features up to {most}, got {d} and {e}",
            dict(step=CUDA_ALIGNED, most=CUDA_FEATURES, d=d, e=e),
        )
    if sequences > CUDA_SEQUENCES:
        return Refusal("{n} sequences are more than a grid takes", dict(n=sequences))
    if compute_capability() != HOPPER:
        return Refusal(
            "the kernel needs compute capability {want}, this GPU has {cc}",
            dict(want=HOPPER, cc=compute_capability()),
        )
    return None


def _supports(avals: Any, platform: str, **_: Any) -> Refusal | None:
    query, key, value = avals[:3]
    if not query.dtype == key.dtype == value.dtype:
        return Refusal("query, key and value have different dtypes")
    *outer, _k, n, g, t, d = query.shape
    return check_kernel_dtype("paged attention", query.dtype) or unsupported(
        platform,
        dtype=query.dtype,
        sequences=math.prod(outer) * n,
        groups=g,
        t=t,
        page_size=key.shape[-2],
        d=d,
        e=value.shape[-1],
    )


def _adapted(operands: Any, platform: str, **_: Any) -> list[Any]:
    """Table and interval for each pool: the kernels have one stride for pools and sequences together."""
    del platform
    query, *pages, table, interval = operands
    outer = query.shape[:-5]

    def of_pools(x: Any) -> Any:
        return jnp.broadcast_to(x, (*outer, *x.shape[len(outer) :])) if x.shape[: len(outer)] != outer else x

    return [query, *pages, of_pools(table), of_pools(interval)]


def _ffi(avals: Any, *, scale, softcap, left, right, empty_row, heads_axis, nan_outside) -> dict[str, Any]:
    del avals
    return dict(
        scale=np.float32(scale),
        softcap=np.float32(softcap),
        left=np.int64(left),
        right=np.int64(right),
        empty_row=np.int32(empty_row),
        heads_axis=np.int32(heads_axis),
        nan_outside=np.bool_(nan_outside),
        shapes_in_layout=np.bool_(False),
    )


def _layouts(rank: int, *, heads_axis: int, **_: Any) -> tuple[list, list]:
    """As the arrays come: query (*o, n, t, k, g, d), pages by `heads_axis`, what is of sequences with these first."""
    outer, k = tuple(range(rank - 1)), rank - 1
    query = (*outer, k + 1, k + 3, k, k + 2, k + 4)
    of_page = [k + 1, k + 2, k + 3]
    pages = (*outer, *of_page[:heads_axis], k, *of_page[heads_axis:])
    table, rows = (*outer, k + 1, k, k + 2), (*outer, k + 1, k, k + 2, k + 3)
    return [query, pages, pages, table, rows], [query, rows, rows]


def _merged(operands: Sequence[Any], dims: Sequence[int | None]) -> tuple[list[Any], int] | None:
    """A vmap over sequences alone: they become more sequences of the same pool, where the derived rule would copy the
    pages. Operands, and before which dimension of a result the mapped one is."""
    if dims[1] is not None or dims[2] is not None:
        return None
    size = next(x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None)
    rank = operands[1].ndim - 3

    def merged(x: Any, dim: int | None) -> Any:
        x = jnp.broadcast_to(x, (size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        x = jnp.moveaxis(x, 0, rank)
        return x.reshape(*x.shape[:rank], size * x.shape[rank + 1], *x.shape[rank + 2 :])

    query, key, value, table, interval = operands
    return [merged(query, dims[0]), key, value, merged(table, dims[3]), merged(interval, dims[4])], rank


def _gathered(pages: Any, table: Any, heads_axis: int, nan_outside: bool) -> Any:
    """(*o, n, k, m * c, d) of pages (*o, k, p, c, d) and table (*o, k or 1, n, m); *o of the table may be 1."""
    if pages.ndim > 4:
        table_axis = 0 if table.shape[0] == pages.shape[0] else None
        table = table if table_axis == 0 else table[0]
        function = lambda x, i: _gathered(x, i, heads_axis, nan_outside)  # noqa: E731
        return jax.vmap(function, in_axes=(0, table_axis))(pages, table)
    mode: dict[str, Any] = dict(mode="fill", fill_value=jnp.nan) if nan_outside else dict(mode="clip")
    if table.shape[0] != 1:
        found = jax.vmap(lambda x, i: x.at[i].get(**mode))(pages, table)
        order = (1, 0, 2, 3, 4)
    elif heads_axis == 0:
        found, order = pages.at[:, table[0]].get(**mode), (1, 0, 2, 3, 4)
    else:  # gathered as the pages lie: of a transposed array XLA would make a copy
        found = jnp.moveaxis(pages, 0, heads_axis).at[table[0]].get(**mode)
        order = (0, 2, 1, 3, 4) if heads_axis == 1 else (0, 3, 1, 2, 4)
    n, k, m, c, d = (x := jnp.transpose(found, order)).shape
    return x.reshape(n, k, m * c, d)


@kernel(
    "paged_attention_fwd",
    "*b n g t d, *b p c d, *b p c e, ?*b n m, ?*b n t i -> *b n g t e, *b n g t, *b n g t",
    (0, WIDENED, jnp.float32),
    visible=2,
    scratch=1,
    ffi_attributes=_ffi,
    layouts=_layouts,
    shapes_in_layout=lambda attributes: {"shapes_in_layout": np.bool_(True)},
    supports=_supports,
    adapted=_adapted,
    merged=_merged,
)
def paged_attention_fwd(
    query, key_pages, value_pages, table, interval, *, empty_row, heads_axis, nan_outside, **attributes
):
    """*b is (*o, k)."""
    k = query.ndim - 5
    key, value = (_gathered(pages, table, heads_axis, nan_outside) for pages in (key_pages, value_pages))
    out, lse = attention_canonical(
        jnp.moveaxis(query, k, k + 1),
        key,
        value,
        interval=jnp.moveaxis(interval, k, k + 1)[..., None, :, :],
        masked_row=MASKED_ROW_MEAN if empty_row == EMPTY_ROW_ZERO else empty_row,
        layout=LENGTH_MAJOR if heads_axis == 2 else HEADS_MAJOR,
        **attributes,
    )
    if empty_row == EMPTY_ROW_ZERO:
        out = jnp.where(lse[..., None] == -jnp.inf, 0, out)
    out, lse = jnp.moveaxis(out, k + 1, k), jnp.moveaxis(lse, k + 1, k)
    return out, lse, jnp.zeros(lse.shape, jnp.float32)


def paged_attention_canonical(
    query,
    key_pages,
    value_pages,
    table,
    interval,
    *,
    scale,
    softcap=0.0,
    left=UNBOUNDED,
    right=UNBOUNDED,
    empty_row=EMPTY_ROW_ZERO,
    heads_axis=2,
    nan_outside=False,
):
    """(out, lse) on canonical shapes: query (*o, k, n, g, t, d), pages (*o, k, p, c, d) and (*o, k, p, c, e), which lie
    in memory as `heads_axis` says, table (*o, k or 1, n, m) and interval (*o, k or 1, n, t, 2) in int32.
    nan_outside: whether an entry outside of [-p, p) makes NaN of its keys, or stands for the nearest page.
    lse: (*o, k, n, g, t). No checks beyond shapes: `paged_attention` is the one for people."""
    out, lse, _ = paged_attention_fwd(
        query,
        key_pages,
        value_pages,
        table,
        interval,
        scale=float(scale),
        softcap=float(softcap),
        left=int(left),
        right=int(right),
        empty_row=int(empty_row),
        heads_axis=int(heads_axis),
        nan_outside=bool(nan_outside),
    )
    return out, lse


def paged_attention(
    query,
    key_pages,
    value_pages,
    block_tables,
    lengths,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    is_causal: bool = True,
    local_window_size: int | None = None,
    sinks=None,
    heads_axis: int = 2,
):
    """Attention of the newest queries of sequences over all their keys, which lie in pages that a table names.

    What `attention(query, key_pages[block_tables].reshape(b, -1, k, d), ...)` computes, without that copy of the cache:

      key s of sequence b is key_pages[block_tables[b, s // page_size], s % page_size], for s < lengths[b]

    query: (b, t, h, d), or (b, h, d) for one query each; the queries are the last t tokens, at positions lengths - t to
    lengths - 1, whose keys are in the pages already. key_pages: (pages, page_size, k, d), value_pages: (pages,
    page_size, k, e), h a multiple of k (grouped-query attention: query head i reads key/value head i // (h // k)).
    heads_axis: where k stands in them: 2, or 1 for (pages, k, page_size, d), 0 for (k, pages, page_size, d).
    float32, bfloat16 or float16, all alike. block_tables: (b, m), integers; an entry is taken as JAX takes an index:
    from the end if negative, and one outside of the pages as the nearest. lengths: (b,), integers, of which at most
    m * page_size count. What lies in pages behind a length counts for nothing; their entries may be anything.
    scale: default 1/sqrt(d). softcap: c in c * tanh(logits / c). is_causal: a query sees keys up to its own position;
    otherwise all. local_window_size: how many keys before its own it sees. sinks: (h,), one more logit for each head,
    without a value.
    Returns (b, t, h, e), or (b, h, e), in query's dtype. Sums in float32. A query without any key (a length of 0, or
    below t where causal) returns 0. Bit-reproducible. Differentiable in query, pages and sinks by way of the gathered
    keys. Kernels: on the CPU any; on Hopper GPUs bfloat16 and float16, up to 16 queries and 64 with all heads that
    share keys, pages of a power of two of 16 keys and more; elsewhere the pages are gathered for `attention`'s.
    Raises ShapeError or DTypeError.
    """
    if query.ndim == 3 and key_pages.ndim == 4:
        out = paged_attention(
            query[:, None],
            key_pages,
            value_pages,
            block_tables,
            lengths,
            scale=scale,
            softcap=softcap,
            is_causal=is_causal,
            local_window_size=local_window_size,
            sinks=sinks,
            heads_axis=heads_axis,
        )
        return out[:, 0]
    block_tables, lengths = jnp.asarray(block_tables), jnp.asarray(lengths)
    _check(query, key_pages, value_pages, block_tables, lengths, softcap, local_window_size, sinks, heads_axis)
    b, t, h, d = query.shape
    # Transposed and nothing else: after a reshape XLA makes a copy, of all pages.
    key_pages, value_pages = (jnp.moveaxis(x, heads_axis, 0) for x in (key_pages, value_pages))
    k = key_pages.shape[0]
    out, lse = paged_attention_canonical(
        jnp.transpose(query.reshape(b, t, k, h // k, d), (2, 0, 3, 1, 4)),
        key_pages,
        value_pages,
        block_tables.astype(jnp.int32)[None],
        _interval(lengths, t, is_causal, local_window_size)[None],
        scale=1 / math.sqrt(d) if scale is None else scale,
        softcap=softcap or 0.0,
        heads_axis=heads_axis,
    )
    if sinks is not None:
        out = with_sink(out, lse, sinks.reshape(k, 1, h // k, 1))
    return jnp.transpose(out, (1, 3, 0, 2, 4)).reshape(b, t, h, out.shape[-1])


def _interval(lengths: Any, t: int, is_causal: bool, window: int | None) -> Any:
    """(b, t, 2): the first and behind the last of the keys that each query sees."""
    lengths = jnp.clip(lengths, 0, 1 << 30).astype(jnp.int32)[:, None]
    position = lengths - t + jnp.arange(t, dtype=jnp.int32)
    last = position + 1 if is_causal else jnp.broadcast_to(lengths, position.shape)
    first = jnp.zeros_like(last) if window is None else jnp.maximum(position - min(window, 1 << 30), 0)
    return jnp.stack([first, last], axis=-1)


def _check(query, key_pages, value_pages, tables, lengths, softcap, window, sinks, heads_axis) -> None:
    if heads_axis not in HEADS_AXES:
        raise ShapeError(
            f"paged_attention: heads_axis must be 2 for pages of shape (pages, page_size, heads, features), 1 for "
            f"(pages, heads, page_size, features) or 0 for (heads, pages, page_size, features), got {heads_axis}"
        )
    if query.ndim != 4 or key_pages.ndim != 4 or value_pages.ndim != 4:
        raise ShapeError(
            f"paged_attention: query must have rank 4, (batch, queries, heads, features), or 3 for one query each, and "
            f"pages rank 4, got shapes {query.shape}, {key_pages.shape}, {value_pages.shape}"
        )
    axes = f"with heads_axis={heads_axis} the axis of heads is {heads_axis}; do the pages have another order?"
    if key_pages.shape[:3] != value_pages.shape[:3]:
        raise ShapeError(
            f"paged_attention: key_pages and value_pages must agree in all axes but the last, got {key_pages.shape} "
            f"and {value_pages.shape}"
        )
    if query.shape[-1] != key_pages.shape[-1]:
        raise ShapeError(
            f"paged_attention: query and key_pages must have the same number of features, got {query.shape} and "
            f"{key_pages.shape}"
        )
    b, _, h, _ = query.shape
    k = key_pages.shape[heads_axis]
    if not k or h % k:
        raise ShapeError(
            f"paged_attention: the number of query heads must be a multiple of the key/value heads, got query "
            f"{query.shape} and key_pages {key_pages.shape}; {axes}"
        )
    if 0 in key_pages.shape[:3]:
        raise ShapeError(f"paged_attention: key_pages must hold a page of a key at least, got {key_pages.shape}")
    for name, x, shape in (("block_tables", tables, (b, "pages")), ("lengths", lengths, (b,))):
        if x.ndim != len(shape) or x.shape[0] != b:
            raise ShapeError(
                f"paged_attention: {name} must have shape {shape} to match query {query.shape}, got {x.shape}"
            )
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise DTypeError(f"paged_attention: {name} must be integers, got {x.dtype}")
    if not query.dtype == key_pages.dtype == value_pages.dtype or not jnp.issubdtype(query.dtype, jnp.floating):
        raise DTypeError(
            f"paged_attention: query and pages must have one real floating dtype, got {query.dtype}, "
            f"{key_pages.dtype}, {value_pages.dtype}; convert the query, which is small"
        )
    if softcap is not None and not softcap > 0:
        raise ShapeError(f"paged_attention: softcap must be positive, or None for no cap, got {softcap}")
    if window is not None and window < 0:
        raise ShapeError(f"paged_attention: local_window_size must not be negative, got {window}")
    if sinks is not None and tuple(sinks.shape) != (h,):
        raise ShapeError(
            f"paged_attention: sinks must have one logit for each query head, shape ({h},), got {sinks.shape}"
        )
