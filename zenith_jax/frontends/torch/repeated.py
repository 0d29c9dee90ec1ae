# pyright: reportMissingImports=false
"""A call like an earlier one, past all that need not be looked at again.

A call costs tens of microseconds of Python beside the program: the key that finds it, each weight, arrays for the
inputs, tensors for the results. The second call of the same tensors' memory needs none of that if nothing has changed,
which the native module finds out in 1 to 2 us (`exchange.watch`). Whatever it does not know for certain is `MISSED`,
and goes the usual way, `module.Engine` and `program.Executable`.
"""

from __future__ import annotations

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import torch

from zenith_jax.frontends.torch import exchange
from zenith_jax.frontends.torch.program import Executable
from zenith_jax.frontends.torch.state import FLAGS, REFUSALS, is_usual
from zenith_jax.frontends.torch.tensors import jax_dtype
from zenith_jax.ir import _compat

MISSED = object()


class Repeated:
    """Calls of an executable with positional tensors of one dtype, size and device each. Made by `after`.

    call: (the tuple of arguments) -> the return value; MISSED where the call is not like the earlier one.
    """

    def __init__(
        self,
        executable: Executable,
        positions: Sequence[int],
        inlets: list[Any],
        outlets: list[Any],
        watch: Any,
        count: int,
    ):
        self.executable, self.positions, self.inlets, self.count = executable, positions, inlets, count
        kind = "cpu" if executable.ordinal is None else "cuda"
        refusals = [ft.partial(torch.is_autocast_enabled, kind), *REFUSALS]
        before, after = None, None
        if executable.ordinal is not None:
            refusals.append(torch.cuda.is_current_stream_capturing)
            before, after = _ordered(executable)
        packed: Any = executable.packed
        if executable.is_single:
            packed = None
        elif executable.is_tuple and executable.order == list(range(len(outlets))):
            packed = tuple
        self.call: Callable[[tuple[Any, ...]], Any] = exchange.repeated(
            inlets=inlets,
            outlets=outlets,
            watch=watch,
            count=count,
            refusals=tuple(refusals),
            run=executable.run,
            before=before,
            after=after,
            packed=packed,
            missed=MISSED,
        )

    def learn(self, args: tuple[Any, ...]) -> None:
        """Takes over the arrays of the inputs' memory that the usual way has made."""
        for native, inlet, position in zip(self.inlets, self.executable.inlets, self.positions, strict=True):
            address = args[position].data_ptr()
            array = inlet.known.get((address, args[position].shape))
            if array is not None:
                native.keep(address, array)


def _ordered(executable: Executable) -> tuple[Callable[[], bool], Callable[[], None]]:
    """What orders a program of a GPU after what torch's stream has had to do, and that stream after it. The first says
    whether it cannot."""
    gpu, stream, wait = executable.ordinal, executable.outlet.stream, executable.outlet.wait
    assert gpu is not None
    current = torch._C._cuda_getCurrentRawStream

    def before() -> bool:
        if _compat.execution_stream_id():
            return True
        wait(stream, current(gpu), gpu)
        return False

    return before, lambda: wait(current(gpu), stream, gpu)


def after(
    executable: Executable,
    args: tuple[Any, ...],
    positions: Sequence[int],
    *,
    weights: Sequence[int] = (),
    modules: Sequence[torch.nn.Module] = (),
    children: Sequence[Any] = (),
    frozen: bool = False,
) -> Repeated | None:
    """For calls like this one, which the executable has answered; None where each must be looked at, and in autocast.

    positions: of the inputs among the arguments. weights: of the module's own tensors among them.
    modules: whose train/eval state the program depends on. frozen: as of zenith.torch.compile.
    """
    if torch.is_autocast_enabled("cpu" if executable.ordinal is None else "cuda") or not is_usual():
        return None
    if executable.repeated is None or executable.repeated[0] is not executable.run:
        made = _made(executable, args, positions, weights, modules, children, frozen)
        executable.repeated = executable.run, made
    repeated = executable.repeated[1]
    if repeated is not None:
        repeated.learn(args)
    return repeated


def _made(
    executable: Executable,
    args: tuple[Any, ...],
    positions: Sequence[int],
    weights: Sequence[int],
    modules: Sequence[torch.nn.Module],
    children: Sequence[Any],
    frozen: bool,
) -> Repeated | None:
    if not executable.is_plain or executable.to_clone is None or executable.to_clone:
        return None
    if executable.ordinal is not None and executable.outlet.stream is None:
        return None
    outlets = executable.outlet.native()
    if outlets is None:
        return None
    inlets = []
    for inlet, position in zip(executable.inlets, positions, strict=True):
        if inlet.pair is not None and not inlet.on_gpu:
            return None  # the range of each call's integers is looked at
        tensor = args[position]
        inlets.append(exchange.inlet(position, jax_dtype(tensor.dtype), inlet.device, tuple(tensor.shape)))
    if None in inlets:
        return None
    watch = exchange.watch()
    for i in weights:  # another module's tensors come to the same graph, frozen or not
        watch.argument(i, args[i], args[i].data_ptr())
    if not frozen:
        _watch_module(watch, executable, args, weights, modules)
    for held, name, value in (*children, *FLAGS):
        watch.value(held, name, value)
    if executable.folded is not None:
        _watch_writes(watch, executable.folded.followed)
    if not watch.holds(args):  # a tensor that it cannot read
        return None
    return Repeated(executable, positions, inlets, outlets, watch, len(args))


def _watch_module(
    watch: Any,
    executable: Executable,
    args: tuple[Any, ...],
    arguments: Sequence[int],
    modules: Sequence[torch.nn.Module],
) -> None:
    """What `Weights.current` and the key of a call look at."""
    weights = executable.program.weights
    passed = {id(args[i]) for i in arguments}
    constants = [(weights.place(name), tensor) for name, (tensor, _) in weights.constants.items()]
    for (holder, key), tensor in (*zip(weights.places, weights.tensors, strict=True), *constants):
        if id(tensor) not in passed:
            watch.tensor(holder, key, tensor, tensor.data_ptr())
    _watch_writes(watch, [*(tensor for _, tensor in constants), *(weights.tensors[i] for i in weights.copied)])
    for module in modules:
        watch.value(vars(module), "training", module.training)


def _watch_writes(watch: Any, tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        if not tensor.is_inference():  # whose writes torch does not count
            watch.version(tensor, tensor._version)
