"""Operators by name, domain and version.

    @operator("Gemm", since=7)
    def gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0): ...

Inputs are positional (None where an optional one is left out), attributes are keywords with ONNX's names and defaults.
An input is a NumPy array where its value is known while tracing ("static"), a JAX array else; a sequence is a list.
A parameter `node` receives the `Node`. The result is a value, or a tuple for several outputs.

The function in force for a model is the one with the largest `since` up to the model's opset. ONNX gives an operator a
new version mostly to widen its types; a function is registered again only where the meaning changes.
"""

from __future__ import annotations

import bisect
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

MICROSOFT = "com.microsoft"
ML = "ai.onnx.ml"


@dataclasses.dataclass(frozen=True)
class Node:
    """What an operator may ask about the node that it computes.

    wanted: for each output whether somebody reads it. opset: the version of the node's domain in force.
    size_bound: for an output whose size depends on data, the size that the user allows inside `jax.jit`, or None. Under
    it the result has exactly that size: what is too much is cut off, what is missing is filled with zeros.
    """

    name: str
    op_type: str
    domain: str
    opset: int
    wanted: tuple[bool, ...]
    size_bound: int | None = None

    def __str__(self) -> str:
        return f"{self.domain + '.' if self.domain else ''}{self.op_type} {self.name!r}"


@dataclasses.dataclass(frozen=True)
class Operator:
    name: str
    since: int
    function: Callable[..., Any]
    takes_node: bool

    def __call__(self, node: Node, inputs: Any, attributes: dict[str, Any]) -> tuple[Any, ...]:
        more = {"node": node} if self.takes_node else {}
        result = self.function(*inputs, **attributes, **more)
        return result if isinstance(result, tuple) else (result,)


_operators: dict[tuple[str, str], list[Operator]] = {}  # sorted by `since`


def operator(name: str, *, since: int = 1, domain: str = "") -> Callable[[Callable], Callable]:
    """Registers a function for `name` from opset `since` of `domain` on; a second one with the same key replaces it.

    >>> @zenith.onnx.operator("ScaledTanh", domain="my.domain")
    ... def scaled_tanh(x, scale=None, *, alpha=1.0):
    ...     y = jnp.tanh(alpha * x)
    ...     return y if scale is None else y * scale

    Inputs come by position, None for one left out, attributes by name; give them the defaults of the operator's
    specification. An input that is known while tracing is a NumPy array and may decide a shape, another one is a JAX
    array. Return an array, or a tuple of them. A parameter named `node` gets the `Node`. Raise NotImplementedError for
    what the function does not cover. A function with the same name inside of a model comes before it.
    """

    def register(function: Callable) -> Callable:
        entry = Operator(name, since, function, "node" in inspect.signature(function).parameters)
        versions = _operators.setdefault((_canonical(domain), name), [])
        versions[:] = sorted([o for o in versions if o.since != since] + [entry], key=lambda o: o.since)
        return function

    return register


def lookup(name: str, domain: str, opset: int) -> Operator | None:
    """The operator in force at `opset`, or None: nothing is registered for so early a version."""
    versions = _operators.get((_canonical(domain), name), [])
    index = bisect.bisect_right([o.since for o in versions], opset)
    return versions[index - 1] if index else None


def _canonical(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
