"""(params, inputs) -> outputs, both flat, as one executable with its parameters bound."""

from __future__ import annotations

import functools as ft
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from zenith_jax import native
from zenith_jax.errors import InputError
from zenith_jax.ir import _compat
from zenith_jax.telemetry import compiling

logger = logging.getLogger("zenith_jax")

Program = Callable[[Sequence[Any]], Sequence[Any]]

MODES = ("default", "reduce-overhead", "max-autotune")

# A parameter up to this size becomes a constant of the program in "reduce-overhead": an argument costs 0.3 us of host
# time a call, whatever its size (AMD EPYC, 2026-11). Biases and norms, three quarters of a transformer's parameters.
CONSTANT_BYTES = 16384


class Relaid:
    """Arrays in the order in which programs of one model read them, each made once for all its programs."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, Any], tuple[Any, Any]] = {}  # an array, kept so that its id stays its, and another

    def __call__(self, array: Any, wanted: Any) -> Any:
        key = id(array), wanted.layout
        if key not in self._made:
            made = _compat.relaid(array, wanted)
            if made is array:
                return array
            self._made[key] = array, made
        return self._made[key][1]


def program(jitted: Any, params: Sequence[Any], structs: Any, mode: str, relaid: Relaid, since: float) -> Program:
    """Compiles `jitted(params, inputs)`, a `jax.jit` function, for inputs like `structs`.

    since: when it began to be traced, by time.perf_counter.
    """

    @ft.wraps(jitted)
    def traced(params: Sequence[Any], inputs: Sequence[Any]) -> Any:
        compiling.resume(since)
        return jitted(params, inputs)

    if mode == "reduce-overhead":
        return _least_overhead(traced, params, structs, relaid)
    if _compat.free_layouts(params, native.default_platform()) is None:
        return ft.partial(jitted.lower(params, structs).compile(), params)
    return ft.partial(*_compiled(traced, params, structs, relaid))


def _compiled(
    function: Any,
    params: Sequence[Any],
    structs: Sequence[Any],
    relaid: Relaid,
    options: Callable[[Any], Any] = lambda lowered: None,
) -> tuple[Any, Sequence[Any]]:
    """`function(params, inputs)`, and its parameters, filters among them in the order in which XLA reads them."""
    layouts = _compat.free_layouts(params, native.default_platform())
    if layouts is None:
        lowered = jax.jit(function).lower(params, structs)
        return lowered.compile(options(lowered)), params
    lowered = jax.jit(function, in_shardings=(layouts, None)).lower([_aval(p) for p in params], structs)
    executable = lowered.compile(options(lowered))
    return executable, list(map(relaid, params, executable.input_formats[0][0]))


def _aval(x: jax.Array) -> jax.ShapeDtypeStruct:
    """Its type and where it is; an array, whose order is known, may not be given where the order is free."""
    sharding = x.sharding if x.committed else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=x.weak_type)


def _constant(x: jax.Array) -> np.ndarray | None:
    """Its elements, where it is to be a constant.

    Not a matrix of one number: XLA's compiler for CPUs makes one pass of a maximum and a product by it, whose results
    are wrong (jaxlib 0.10.2 and 0.12; a head that starts with zeros gave 1e23).
    """
    if x.nbytes > CONSTANT_BYTES:
        return None
    elements = np.asarray(x)
    return None if x.ndim > 1 and x.size and (elements == elements.flat[0]).all() else elements


def _least_overhead(function: Any, params: Sequence[Any], structs: Sequence[Any], relaid: Relaid) -> Program:
    """Small parameters in the program, the others as one list for the runtime, which checks only the inputs."""
    constants = [_constant(p) for p in params]
    arguments = [p for p, c in zip(params, constants, strict=True) if c is None]

    @ft.wraps(function)
    def with_constants(arguments: Sequence[Any], inputs: Sequence[Any]) -> Any:
        remaining = iter(arguments)
        return function([next(remaining) if c is None else c for c in constants], inputs)

    options = ft.partial(_compat.least_launches, platform=native.default_platform())
    executable, arguments = _compiled(with_constants, arguments, structs, relaid, options)
    execute = _compat.direct_execution(executable, arguments)
    if execute is None:
        logger.info("reduce-overhead: this program has effects or several devices, and is called the usual way")
        return ft.partial(executable, arguments)
    (device,) = {d for x in arguments for d in x.devices()} or {native.default_device()}
    sharding = jax.sharding.SingleDeviceSharding(device)
    expected = [(s.shape, np.dtype(s.dtype), _compat.abstract(s.shape, s.dtype)) for s in structs]
    seen = sharding  # of the latest array: most have the same object, whose comparison is Python's

    def call(inputs: Sequence[Any]) -> Sequence[Any]:
        nonlocal seen
        placed = []
        for x, (shape, dtype, aval) in zip(inputs, expected, strict=True):
            if isinstance(x, np.ndarray) and x.dtype == dtype and x.shape == shape:
                placed.append(_compat.array_of_numpy(x, aval, sharding, device))
                continue
            if not isinstance(x, jax.Array):
                x = jax.device_put(x, sharding)
            elif (given := x.sharding) is not seen:
                if given == sharding:
                    seen = given
                else:
                    x = jax.device_put(x, sharding)
            if x.shape != shape or x.dtype != dtype:
                raise InputError(f"expected an array of {dtype}{list(shape)}, got {x.dtype}{list(x.shape)}")
            placed.append(x)
        return execute(placed)

    return call
