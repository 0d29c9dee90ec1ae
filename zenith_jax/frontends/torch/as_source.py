# pyright: reportMissingImports=false
"""A torch module as a Source, for `zenith.compile(module, *inputs)` and files that are loaded without torch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils import _pytree as pytree

from zenith_jax.errors import FrontendError
from zenith_jax.frontends._source import Source
from zenith_jax.frontends.torch.capture import Alias, Constant, Fresh
from zenith_jax.frontends.torch.errors import TorchError
from zenith_jax.frontends.torch.module import Engine, all_axes
from zenith_jax.frontends.torch.program import ordinal
from zenith_jax.frontends.torch.state import CAPTURED
from zenith_jax.frontends.torch.tensors import WIDE, Inlet, Outlet, inlet_of, order_after_torch
from zenith_jax.ops._lower import compute_stream

_64_BITS = (torch.int64, *WIDE)


def source(module: torch.nn.Module, *example_inputs: Any) -> Source:
    """The module's inference as a function of its weights and of tensors, all other arguments bound."""
    examples = tuple(map(_as_tensor, example_inputs))
    name = type(module).__name__
    engine = Engine(module, module, dynamic=all_axes)
    try:
        program = engine.program(examples, {})
    except TorchError as error:
        raise FrontendError(f"{name} does not run in JAX: {error}") from error
    captured = program.captured
    if captured.written or any(isinstance(o, Alias) for o in captured.outputs):
        raise FrontendError(
            f"{name} writes into its buffers or inputs, or returns them: a compiled model is a pure function. "
            "zenith.torch.compile(module) keeps what it writes"
        )
    if program.wide and not jax.config.read("jax_enable_x64"):
        raise FrontendError(f"{name} computes in float64: set jax_enable_x64, or use zenith.torch.compile(module)")
    weights = program.weights

    def function(params: dict[str, Any], *args: Any) -> Any:
        given = dict(zip(program.input_names, jax.tree.leaves(args), strict=True))
        for key, inlet, tensor in zip(weights.names, weights.inlets, weights.tensors, strict=True):
            given[key] = inlet.traced(params[key], tuple(tensor.shape))
        results = program.onnx.apply({key: params[key] for key in program.more}, **given)
        first, *others = results
        return results if others else first

    is_single = captured.spec.is_leaf() and len(captured.outputs) == 1 and captured.outputs[0] == Fresh(0)
    gpu = ordinal(program)
    outlet = Outlet(program.inlets[0].device, captured.dtypes)

    def restore(results: Any) -> Any:
        if is_single and isinstance(results, jax.Array):
            return outlet([results])[0]
        flat = outlet(jax.tree.leaves(results))
        leaves: list[Any] = []
        for output in captured.outputs:
            assert not isinstance(output, Alias)  # refused above
            leaves.append(output.value if isinstance(output, Constant) else flat[output.index])
        return pytree.tree_unflatten(leaves, captured.spec)

    stream = None if gpu is None else compute_stream(program.inlets[0].device)

    def adapt(args: tuple[Any, ...]) -> tuple[Any, ...]:
        if gpu is not None and torch.cuda.is_current_stream_capturing():
            raise FrontendError(f"{name} cannot be called now: {CAPTURED}")
        is_ordered = gpu is None or order_after_torch(stream, gpu)
        return tuple([_as_array(x, is_ordered) for x in args])

    return Source(
        function=function,
        params={**dict(zip(weights.names, weights.arrays, strict=True)), **program.more},
        name=name,
        framework="torch",
        adapt=adapt,
        restore=restore,
    )


def _as_tensor(value: Any) -> Any:
    """An example as torch takes it: arrays of JAX and NumPy too, and shapes without values."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return torch.zeros(value.shape, dtype=getattr(torch, np.dtype(value.dtype).name))
    if isinstance(value, np.ndarray | jax.Array):
        return torch.from_numpy(np.array(value))
    return value


def _as_array(value: Any, is_ordered: bool) -> Any:
    """A tensor as an array, without a copy but for 64-bit integers; containers of tensors leaf by leaf.

    is_ordered: what reads the array comes after what torch's stream has to do.
    """
    if isinstance(value, torch.Tensor):
        dtype = value.dtype
        if dtype in _64_BITS and not jax.config.read("jax_enable_x64"):
            if dtype != torch.int64:
                raise FrontendError(f"the input is {dtype}, which JAX has only with jax_enable_x64 set")
            Inlet(value, False).check_range(value)
            return inlet_of(torch.int32, value.device, True)(value.to(torch.int32))
        if value.layout is not torch.strided or value.is_quantized:
            return Inlet(value, True)(value)  # which says why not
        return inlet_of(dtype, value.device, True).of_call(value, is_ordered)
    if isinstance(value, list | tuple):
        return type(value)([_as_array(v, is_ordered) for v in value])
    if isinstance(value, dict):
        return {key: _as_array(v, is_ordered) for key, v in value.items()}
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value
