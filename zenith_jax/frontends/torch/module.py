# pyright: reportMissingImports=false
"""`zenith.torch.compile`: a torch module whose inference runs in JAX with Zenith's kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from zenith_jax.frontends.torch.capture import capture
from zenith_jax.frontends.torch.errors import TorchError, warn_fallback
from zenith_jax.frontends.torch.program import Executable, Program
from zenith_jax.frontends.torch.repeated import MISSED, Repeated, after
from zenith_jax.frontends.torch.state import CAPTURED, exporting, runs_in_torch
from zenith_jax.frontends.torch.weights import Changed, finder
from zenith_jax.report import Report

_SCALARS = (bool, int, float, str, type(None), torch.dtype, torch.device)


class Engine:
    """Calls of one module: each is looked up by its structure, dtypes, sizes and the state of torch that it depends on.

    dynamic: a function from the tensors to the axes of each whose size may differ in later calls.
    repeats: calls like the latest take the short way of repeated.py.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        function: Callable[..., Any],
        *,
        dynamic: Callable[[Sequence[torch.Tensor]], Sequence[Sequence[int]]],
        frozen: bool = False,
        repeats: bool = True,
    ):
        self.module, self.function, self.dynamic, self.frozen = module, function, dynamic, frozen
        self.repeats = repeats
        self.reset()

    def reset(self) -> None:
        """Forgets every program."""
        self.repeated: Repeated | None = None
        self.ready: dict[Any, Executable] = {}
        self.programs: dict[Any, list[Program]] = {}
        self.refused: dict[Any, str] = {}
        self.place = finder(_Root(self.module))
        self.modules = list(self.module.modules())
        self.children = [(m._modules, name, child) for m in self.modules for name, child in m._modules.items()]

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's return value. Raises TorchError where it does not run in JAX."""
        if (repeated := self.repeated) is not None and not kwargs:
            result = repeated.call(args)
            if result is not MISSED:
                return result
        if reason := runs_in_torch():
            raise TorchError(reason)
        if not self.frozen and any(held.get(name) is not child for held, name, child in self.children):
            with exporting:
                self.reset()
        tensors, structure = _flatten(args, kwargs)
        if any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing():
            raise TorchError(CAPTURED)
        training = () if self.frozen else tuple([m.training for m in self.modules])
        key = (structure, tuple([(t.dtype, t.device, t.shape) for t in tensors]), _autocast(tensors), training)
        executable = self.ready.get(key)
        if executable is None:
            executable = self._prepared(key, tensors, args, kwargs)
        try:
            result = executable(tensors, frozen=self.frozen)
        except Changed:
            with exporting:
                self.reset()
            return self._prepared(key, tensors, args, kwargs)(tensors)
        if self.repeats and not kwargs and all(type(x) is torch.Tensor for x in args):
            modules, children = ((), ()) if self.frozen else (self.modules, self.children)
            self.repeated = after(
                executable, args, range(len(args)), modules=modules, children=children, frozen=self.frozen
            )
        return result

    def program(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """The program for calls like this one, not yet compiled."""
        tensors, _ = _flatten(args, kwargs)
        if not tensors:
            raise TorchError("it is called without a tensor")
        with exporting:
            return self._captured(tensors, args, kwargs, _autocast(tensors))

    def _prepared(self, key: Any, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> Executable:
        with exporting:
            if key in self.ready:
                return self.ready[key]
            if key in self.refused:
                raise TorchError(self.refused[key])
            try:
                self.ready[key] = executable = self._executable(key, tensors, args, kwargs)
            except TorchError as error:
                self.refused[key] = str(error)
                raise
            return executable

    def _executable(self, key: Any, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> Executable:
        structure, kinds, autocast, training = key
        general = (structure, tuple((dtype, device, len(shape)) for dtype, device, shape in kinds), autocast, training)
        shapes = [tuple(t.shape) for t in tensors]
        programs = self.programs.setdefault(general, [])
        program = next((p for p in programs if p.accepts(shapes)), None)
        if program is None:
            if not tensors:
                raise TorchError("it is called without a tensor")
            program = self._captured(tensors, args, kwargs, autocast)
            programs.append(program)
        return program.executable(shapes)

    def _captured(self, tensors: list[torch.Tensor], args: Any, kwargs: Any, autocast: Any) -> Program:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

        def call(*flat: torch.Tensor) -> Any:
            merged = list(leaves)
            for place, tensor in zip(places, flat, strict=True):
                merged[place] = tensor
            inner_args, inner_kwargs = pytree.tree_unflatten(merged, spec)
            return self.function(*inner_args, **inner_kwargs)

        axes = self.dynamic(tensors)
        try:
            return self._program(call, tensors, axes, autocast)
        except TorchError:
            if not any(axes):
                raise
        # What cannot be captured for all sizes may be captured for these.
        return self._program(call, tensors, no_axes(tensors), autocast)

    def _program(self, call: Callable[..., Any], tensors: Any, axes: Any, autocast: Any) -> Program:
        return Program(capture(call, self.module, tensors, axes, autocast), tensors, self.place)


class _Root(torch.nn.Module):
    """The module under the name that it has in captured programs."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module


def _flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[torch.Tensor], Any]:
    """The tensors of a call and, as a key, all else about it."""
    if len(args) == 1 and not kwargs and type(args[0]) is torch.Tensor:
        return [args[0]], (1, (), torch.Tensor)
    tensors: list[torch.Tensor] = []
    structure: list[Any] = [tuple(kwargs)]
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            structure.append(torch.Tensor)
        elif isinstance(value, _SCALARS):
            structure.append((type(value), value))
        else:
            leaves, spec = pytree.tree_flatten(value)
            structure.append(spec)
            for leaf in leaves:
                if isinstance(leaf, torch.Tensor):
                    tensors.append(leaf)
                    structure.append(torch.Tensor)
                elif isinstance(leaf, _SCALARS):
                    structure.append((type(leaf), leaf))
                else:
                    raise TorchError(
                        f"an argument of type {type(leaf).__name__} is neither a tensor, a Python value nor a "
                        "container of these that torch.utils._pytree knows"
                    )
    return tensors, (len(args), *structure)


def _autocast(tensors: Sequence[torch.Tensor]) -> tuple[str, torch.dtype] | None:
    if not tensors:
        return None
    kind = tensors[0].device.type
    if kind not in ("cpu", "cuda"):
        return None  # torch raises for a device that has no autocast
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None


def all_axes(tensors: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(range(t.ndim)) for t in tensors]


def no_axes(tensors: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    return [()] * len(tensors)


class CompiledModule(torch.nn.Module):
    """A module that computes what `module` does, in JAX where it can. Made by `zenith.torch.compile`.

    It has the module's own parameters, buffers and submodules: state_dict, to, parameters, train and all attributes are
    the module's.
    """

    _engine: Engine

    def __init__(self, module: torch.nn.Module, *, dynamic: bool | None, strict: bool, frozen: bool):
        super().__init__()
        own = vars(self)
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            own[shared] = vars(module)[shared]
        own.update(training=module.training, _module=module, _dynamic=dynamic, _strict=strict, _frozen=frozen)
        own["_engine"] = Engine(module, module, dynamic=no_axes if dynamic is False else all_axes, frozen=frozen)

    @property
    def module(self) -> torch.nn.Module:
        """The module that was compiled."""
        return vars(self)["_module"]

    @property
    def report(self) -> Report:
        """What the call that was compiled last runs in Zenith's kernels, and why not the rest."""
        ready = list(self._engine.ready.values())
        if not ready:
            raise TorchError("nothing is compiled yet: call the module once, or see its warning")
        return ready[-1].report

    @property
    def compilations(self) -> tuple[int, int]:
        """(how often the module was exported, for how many combinations of sizes it was compiled)."""
        return sum(map(len, self._engine.programs.values())), len(self._engine.ready)

    @property
    def copied_weights(self) -> list[str]:
        """Weights that JAX has its own copy of, because they are not dense or not aligned to 64 bytes."""
        programs = [p for ps in self._engine.programs.values() for p in ps]
        return sorted({n.removeprefix("module.") for p in programs for n in p.weights.copied_names})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return _between_graphs(self, args, kwargs)  # pyright: ignore[reportCallIssue]
        return self._run(args, kwargs)

    def _run(self, args: Any, kwargs: Any) -> Any:
        if torch.is_grad_enabled() and (reason := _needs_gradients(self.module, args, kwargs)):
            return self._fallback(reason, args, kwargs)
        try:
            return self._engine(args, kwargs)
        except TorchError as error:
            return self._fallback(str(error), args, kwargs, error)

    def __reduce__(self) -> Any:
        """A copy, or one that was pickled, compiles at its first call."""
        own = vars(self)
        made_again = {"_engine", "_module", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
        state = {key: value for key, value in own.items() if key not in made_again}
        return _compiled, (self.module, own["_dynamic"], own["_strict"], own["_frozen"]), state

    def train(self, mode: bool = True) -> CompiledModule:
        self.module.train(mode)
        vars(self)["training"] = mode
        return self

    def _fallback(self, reason: str, args: Any, kwargs: Any, cause: TorchError | None = None) -> Any:
        if vars(self)["_strict"]:
            raise TorchError(f"{type(self.module).__name__}: {reason}") from cause
        warn_fallback(type(self.module).__name__, reason, 7)  # torch's own calls are two of them
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


@torch.compiler.disable
def _between_graphs(compiled: CompiledModule, args: Any, kwargs: Any) -> Any:
    """The call, which an outer torch.compile leaves out of its graphs."""
    return compiled._run(args, kwargs)


def _compiled(module: torch.nn.Module, dynamic: bool | None, strict: bool, frozen: bool) -> CompiledModule:
    return CompiledModule(module, dynamic=dynamic, strict=strict, frozen=frozen)


def _needs_gradients(module: torch.nn.Module, args: Any, kwargs: Any) -> str:
    if any(p.requires_grad for p in module.parameters()):
        what = "a parameter"
    elif any(t.requires_grad for t in _flatten(args, kwargs)[0]):
        what = "an input"
    else:
        return ""
    return (
        f"gradients are on and {what} requires them, which Zenith's inference does not compute: "
        "call it under torch.inference_mode() or torch.no_grad()"
    )
