"""Which functions of a model call which: a model whose functions call themselves has no end."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping

from zenith_jax.frontends.onnx.errors import OnnxError
from zenith_jax.frontends.onnx.graph import FunctionDef, Graph
from zenith_jax.frontends.onnx.interpret import MAX_CALL_DEPTH

Key = tuple[str, str, str]  # of a function: domain, name, overload


def check(functions: Mapping[Key, FunctionDef]) -> None:
    """Raises OnnxError where a function calls itself, directly or through others, or where calls nest too deep."""
    calls = {key: list(_called(function.graph, functions)) for key, function in functions.items()}
    waiting = {key: set(called) for key, called in calls.items()}
    depth = dict.fromkeys(functions, 1)
    ready = [key for key, called in waiting.items() if not called]
    callers = collections.defaultdict(set)
    for key, called in calls.items():
        for other in called:
            callers[other].add(key)
    while ready:
        done = ready.pop()
        del waiting[done]
        for caller in callers[done]:
            depth[caller] = max(depth[caller], depth[done] + 1)
            waiting[caller].discard(done)
            if not waiting[caller]:
                ready.append(caller)
    if waiting:
        raise OnnxError(f"a function calls itself, directly or through others: {names(waiting)}")
    if max(depth.values(), default=0) > MAX_CALL_DEPTH:
        raise OnnxError(f"functions call each other more than {MAX_CALL_DEPTH} deep")


def _called(graph: Graph, functions: Mapping[Key, FunctionDef]) -> Iterator[Key]:
    for node in graph.nodes:
        key = node.domain, node.op_type, node.overload
        if key in functions:
            yield key
        for inner in node.graphs:
            yield from _called(inner, functions)


def names(keys: Iterable[Key]) -> str:
    return ", ".join(sorted(".".join(k for k in key if k) for key in keys))
