"""activation(x @ w + bias) + residual, read upwards from the product.

  out[*b, *n] = act(sum over *k of x[*b, *k] * w[*k, *n]  + bias[*n]) + residual[*b, *n]

*k and *n may each be several dimensions, which become one. Between product and result are only casts and reshapes of
*b, each value used by the next step alone. The kernel rounds once, where the program may round the product, the sum and
the activation.
A product alone is no site: XLA's is as good. In float32, which the CPU's kernel computes, so is a layer of fewer than
`LEAST_WEIGHTS`, and one that is declined goes unmentioned.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax.numpy as jnp

from zenith_jax.errors import Refusal, refuse
from zenith_jax.ir import _compat
from zenith_jax.ir._compat import JaxprEqn, Var
from zenith_jax.ir.graph import Atom, Graph
from zenith_jax.ir.term import ELEMENTWISE, Axis, Term, Terms
from zenith_jax.ops.linear import ACTIVATIONS, LEAST_WEIGHTS, linear
from zenith_jax.passes.match import activation as activations
from zenith_jax.passes.match._match import CASTS, Match

_MAX_CLIMB = 6  # equations from the product's sum to the anchor of its activation
_RELU = re.compile(r"relu at .*[/\\]jax[/\\]_src[/\\]nn[/\\]functions\.py:")
_RESHAPES = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim")


@dataclasses.dataclass(frozen=True)
class Layer:
    """What has been read so far: `top` is its result. free: axes of x's other dimensions and of w's, as in `top`."""

    x: Var
    w: Var
    transposed: bool
    rows: tuple[Axis | None, ...]
    features: tuple[Axis | None, ...]
    contracted: int
    product: Var
    top: Var
    inner: tuple[JaxprEqn, ...]
    bias: Atom | None = None
    activation: str = "none"
    residual: Atom | None = None

    @property
    def parts(self) -> str:
        names = (self.activation.replace("none", ""), "bias" * (self.bias is not None))
        return ", ".join(n for n in (*names, "residual" * (self.residual is not None)) if n)

    def above(self, eqn: JaxprEqn, *path: JaxprEqn, **found: Any) -> Layer:
        return dataclasses.replace(self, top=eqn.outvars[0], inner=(*self.inner, *path, eqn), **found)


def match(graph: Graph, eqn: JaxprEqn) -> Match | Refusal | None:
    """`eqn` is the product."""
    if eqn.primitive.name != "dot_general" or not _is_computed(eqn.invars[0].aval.dtype, eqn.invars[1].aval.size):
        return None
    terms = Terms(graph)
    bare = product(terms, eqn)
    if bare is None or is_computed_again(graph, bare.product):
        return None
    layers = [bare]
    for step in (_biased, _activated, _added, _biased):  # r + x @ w + bias has the bias last
        higher = step(terms, viewed(terms, layers[-1]))
        if higher is not None:
            layers.append(higher)
    if len(layers) == 1:
        return None
    found: Match | Refusal | None = None
    for layer in layers[1:]:
        narrow = _narrowed(graph, layer)
        if narrow is not None:
            simpler = found if isinstance(found, Match) else None
            found = _build(graph, eqn, narrow, simpler) or found
        elif found is None:
            found = refuse(
                "the result is {wide}, and the kernel writes {dtype}",
                wide=layer.top.aval.dtype.name,
                dtype=layer.x.aval.dtype.name,
                advice="cast the result, or let the product have its operands' dtype",
            )
    return found


def _is_computed(dtype: Any, weights: int) -> bool:
    return dtype in (jnp.bfloat16, jnp.float16) or (dtype == jnp.float32 and weights >= LEAST_WEIGHTS)


def product(terms: Terms, eqn: JaxprEqn) -> Layer | None:
    """x[*b, *k] @ w[*k, *n] or w[*n, *k], whose dimensions lie in this order."""
    (left, right), (batch, _) = eqn.params["dimension_numbers"]
    x, w = eqn.invars[:2]
    if eqn.params.get("out_sharding") is not None or not _is_summed_in(eqn, x.aval.dtype):
        return None
    if any(_compat.explicit_sharding(a.aval) is not None for a in (x, w)):
        return None  # XLA splits the product over the devices, as it is written
    if batch or not isinstance(x, Var) or not isinstance(w, Var) or x.aval.dtype != w.aval.dtype:
        return None
    left, right = zip(*sorted(zip(left, right, strict=True)), strict=True) if left else ((), ())
    rank, count = len(x.aval.shape), len(left)
    if tuple(left) != tuple(range(rank - count, rank)) or rank == count or len(w.aval.shape) == count:
        return None
    dims = tuple(right)
    path = [eqn]
    while (below := terms.graph.producer(w)) is not None and below.primitive.name == "transpose":
        if not isinstance(below.invars[0], Var):
            return None
        order = below.params["permutation"]
        dims = tuple(order[d] for d in dims)
        free = [order[d] for d in range(len(order)) if order[d] not in dims]
        if free != sorted(free):
            return None
        path.append(below)
        w = below.invars[0]
    features = len(w.aval.shape) - count
    first, last = tuple(range(count)), tuple(range(features, features + count))
    if dims not in (first, last):
        return None
    top = eqn.outvars[0]
    axes = terms.of(top).axes
    size = math.prod(x.aval.shape[rank - count :])
    return Layer(
        x, w, dims == last, axes[: rank - count], axes[rank - count :], size, top, top, tuple(reversed(path))
    )  # fmt: skip


def _is_summed_in(eqn: JaxprEqn, dtype: Any) -> bool:
    return eqn.outvars[0].aval.dtype in (dtype, jnp.float32)


def is_computed_again(graph: Graph, product: Var) -> bool:
    """Whether the program has the product twice: XLA computes it once."""
    first = graph.numbers.get(product, product)
    return first is not product or any(v is first for v in graph.numbers.values())


def viewed(terms: Terms, layer: Layer, reshapes: bool = True) -> Layer:
    """Above its casts between the operands' dtype and float32, which only round, and reshapes of its rows."""
    while (user := terms.graph.only_user(layer.top)) is not None:
        if user.primitive.name in CASTS and _is_summed_in(user, layer.x.aval.dtype):
            layer = layer.above(user)
        elif reshapes and _is_reshape_of_rows(user, len(layer.features)):
            axes = terms.of(user.outvars[0]).axes
            rows = len(axes) - len(layer.features)
            layer = layer.above(user, rows=axes[:rows], features=axes[rows:])
        else:
            break
    return layer


def _is_reshape_of_rows(eqn: JaxprEqn, features: int) -> bool:
    """Whether the last `features` dimensions stay: (*b, *n) -> (*c, *n), as exporters of 2-D products write it."""
    if eqn.primitive.name not in _RESHAPES:
        return False
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.primitive.name == "broadcast_in_dim" and math.prod(before) != math.prod(after):
        return False
    return len(after) > features and before[-features:] == after[-features:]


def _addend(terms: Terms, layer: Layer) -> tuple[JaxprEqn, Term] | None:
    """The sum in which the layer is used, and the other operand, at the layer's axes."""
    user = terms.graph.only_user(layer.top)
    if user is None or user.primitive.name != "add" or user.outvars[0].aval.shape != layer.top.aval.shape:
        return None
    if not _is_summed_in(user, layer.x.aval.dtype):
        return None
    operands = terms.operands(Term(user.outvars[0], (*layer.rows, *layer.features)), user)
    other = operands[user.invars[0] is layer.top]
    return None if terms.graph.depends_on([other.atom], layer.product) else (user, other)


def _biased(terms: Terms, layer: Layer) -> Layer | None:
    """A sum with a vector along all of the features and nothing else."""
    sum_ = _addend(terms, layer) if layer.bias is None and layer.activation == "none" else None
    if sum_ is None:
        return None
    path: list[JaxprEqn] = []
    bias = terms.peel(sum_[1], path)
    axes = tuple(a for a in layer.features if a is not None)
    if not isinstance(bias.atom, Var) or tuple(a for a in bias.axes if a is not None) != axes or not axes:
        return None
    if bias.dtype not in (layer.x.aval.dtype, jnp.float32):
        return None
    return layer.above(sum_[0], *path, bias=bias.atom)


def _added(terms: Terms, layer: Layer) -> Layer | None:
    """A sum with an array of the result's shape."""
    sum_ = _addend(terms, layer)
    if sum_ is None:
        return None
    residual = sum_[1].atom
    if not isinstance(residual, Var) or residual.aval.shape != layer.top.aval.shape:
        return None
    if terms.producer(sum_[1], "broadcast_in_dim") is not None:
        return None  # XLA reads what is repeated once, and the kernel every element
    return layer.above(sum_[0], residual=residual) if residual.aval.dtype == layer.x.aval.dtype else None


def _activated(terms: Terms, layer: Layer) -> Layer | None:
    graph = terms.graph
    user = graph.only_user(layer.top)
    if user is not None and user.primitive.name == "tanh":
        return layer.above(user, activation="tanh")
    if user is not None and (is_relu(user) or is_maximum(graph, user)):
        # They differ in their derivative at 0: that of maximum is 1/2.
        relu = layer.above(user, activation="relu" if is_relu(user) else "maximum")
        squares = {id(e): e for e in graph.users_of(relu.top)}  # twice the one equation, for r * r
        squared = squares.popitem()[1] if len(squares) == 1 and not graph.is_output(relu.top) else None
        if squared is not None and _is_square(squared):
            return relu.above(squared, activation="relu_squared")
        return relu
    for anchor in anchors(graph, layer.top):
        found = activations.match(graph, anchor)
        if isinstance(found, Match) and found.op not in ACTIVATIONS:
            continue  # a gate, which is a site of its own
        if isinstance(found, Match) and is_of(graph, found.leaves[0], layer):
            root = graph.producer(found.results[0])
            assert root is not None
            known = [root, *layer.inner]
            more = [e for e in found.inner if not any(e is k for k in known)]
            return layer.above(root, *more, activation=found.op)
    return None


def is_of(graph: Graph, leaf: Atom, layer: Layer) -> bool:
    """Whether the leaf, which is below casts, is the layer's value."""
    var = layer.top
    while var is not leaf:
        eqn = graph.producer(var)
        if eqn is None or eqn.primitive.name not in CASTS or not isinstance(eqn.invars[0], Var):
            return False
        var = eqn.invars[0]
    return True


def is_relu(eqn: JaxprEqn) -> bool:
    """jax.nn.relu: max(x, 0) with a derivative of its own. A user's function with another one stays."""
    if eqn.primitive.name != "custom_jvp_call" or len(eqn.invars) != 1:
        return False
    if not _RELU.match(_compat.function_source(eqn.params["call_jaxpr"])):
        return False
    inner = Graph.of(eqn.params["call_jaxpr"])
    return len(inner.eqns) == 1 and is_maximum(inner, inner.eqns[0])


def is_maximum(graph: Graph, eqn: JaxprEqn) -> bool:
    return eqn.primitive.name == "max" and any(graph.constant(a) == 0 for a in eqn.invars)


def _is_square(eqn: JaxprEqn) -> bool:
    name = eqn.primitive.name
    return (
        name == "square"
        or (name == "integer_pow" and eqn.params["y"] == 2)
        or (name == "mul" and eqn.invars[0] is eqn.invars[1])
    )


def anchors(graph: Graph, var: Var) -> list[JaxprEqn]:
    """Equations at which `match/activation.py` starts, not far above."""
    found: list[JaxprEqn] = []
    level, seen = [var], {var}
    for _ in range(_MAX_CLIMB):
        users = {id(e): e for v in level for e in graph.users_of(v) if e.outvars[0].aval.shape == var.aval.shape}
        found += [e for e in users.values() if e.primitive.name in activations.ANCHORS and e not in found]
        level = [e.outvars[0] for e in users.values() if len(e.outvars) == 1 and e.outvars[0] not in seen]
        seen.update(level)
        if found or len(level) > 4:  # not an activation's few
            break
    return found


def _narrowed(graph: Graph, layer: Layer) -> Layer | None:
    """The layer with its result in the operands' dtype; None if it has another."""
    dtype = layer.x.aval.dtype
    if layer.top.aval.dtype == dtype:
        return layer
    user = graph.only_user(layer.top)
    if user is None or user.primitive.name != "convert_element_type" or user.outvars[0].aval.dtype != dtype:
        return None
    return layer.above(user)


def _is_in_loop(graph: Graph, var: Var) -> bool:
    """Whether what follows is a loop over the result and another array, as the product of a gated unit is."""
    return any(
        e.primitive.name in ELEMENTWISE
        and any(a is not var and getattr(a.aval, "shape", None) == var.aval.shape for a in e.invars)
        and all(graph.constant(a) is None for a in e.invars)
        for e in graph.users_of(var)
    )


def _build(graph: Graph, product: JaxprEqn, layer: Layer, simpler: Match | None) -> Match | None:
    if graph.escapes(layer.inner, [layer.top]) is not None:
        return None
    root = graph.producer(layer.top)
    assert root is not None
    optional = [a for a in (layer.bias, layer.residual) if a is not None]
    rows, features = (math.prod(a.size for a in axes if a is not None) for axes in (layer.rows, layer.features))
    return Match(
        op="linear",
        root=root,
        results=(layer.top,),
        inner=layer.inner,
        leaves=(layer.x, layer.w, *optional),
        emit=emit,
        static=(
            ("activation", layer.activation),
            ("transposed", layer.transposed),
            ("features", len(layer.features)),
            ("has_bias", layer.bias is not None),
            ("shape", layer.top.aval.shape),
        ),
        detail=layer.parts,
        case=(
            ("dtype", layer.x.aval.dtype.name),
            ("rows", rows),
            ("k", layer.contracted),
            ("n", features),
            ("activation", layer.activation),
            ("parts", layer.parts),
            ("in_loop", _is_in_loop(graph, layer.top)),
        ),
        simpler=simpler,
        yields=True,
        unmentioned=layer.x.aval.dtype == jnp.float32,
    )


def features_of(w: Any, features: int, transposed: bool) -> tuple[int, ...]:
    return w.shape[:features] if transposed else w.shape[w.ndim - features :]


def emit(x, w, *optional, activation: str, transposed: bool, features: int, has_bias: bool, shape: tuple[int, ...]):
    """`features`: the number of dimensions of w that are not contracted."""
    contracted = w.ndim - features
    batch = x.shape[: x.ndim - contracted]
    k, n = math.prod(x.shape[x.ndim - contracted :]), math.prod(features_of(w, features, transposed))
    more = list(optional)
    bias = more.pop(0).reshape(n) if has_bias else None
    residual = more.pop(0).reshape(*batch, n) if more else None
    y = linear(
        x.reshape(*batch, k),
        w.reshape((n, k) if transposed else (k, n)),
        bias,
        residual,
        activation=activation,
        transposed=transposed,
    )
    return (y.reshape(shape),)
