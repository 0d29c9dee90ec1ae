# pyright: reportMissingImports=false
"""A module and the tensors of one call -> torch.export's program of it, checked for what an export would lose.

An exported graph is a pure function. What is not pure in the module is found here: buffers and inputs written in place
come out as further results, outputs that are inputs or views of them are named as such, and what depends on a random
generator or on the statistics of the batch is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from zenith_jax.frontends.torch.errors import TorchError


@dataclasses.dataclass(frozen=True)
class Fresh:
    """An output that the program computes: its result number `index`."""

    index: int


@dataclasses.dataclass(frozen=True)
class Alias:
    """An output in the memory of a tensor that the call has: ("input", its number) or ("weight", its name).

    strided: (size, stride, offset) of a view; None: the tensor itself.
    """

    of: tuple[str, int | str]
    strided: tuple[Any, Any, Any] | None


@dataclasses.dataclass(frozen=True)
class Constant:
    """An output that is no tensor."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Captured:
    """program: its inputs are the tensors, its results the fresh outputs and then the new values of `written`.

    weights: the module's parameters, buffers and other tensors that it reads, by their name in the program.
    dtypes: of the results.
    written: what the call changes, ("input", number) or ("weight", name).
    outputs, spec: how the module's own return value is put together.
    """

    program: torch.export.ExportedProgram
    weights: dict[str, torch.Tensor]
    written: tuple[tuple[str, int | str], ...]
    dtypes: tuple[torch.dtype, ...]
    outputs: tuple[Fresh | Alias | Constant, ...]
    spec: pytree.TreeSpec


class NotDynamicError(TorchError):
    """The module was captured with dynamic sizes and needs fixed ones."""


def capture(
    function: Callable[..., Any],
    module: torch.nn.Module,
    tensors: Sequence[torch.Tensor],
    dynamic: Sequence[Sequence[int]],
    autocast: tuple[str, torch.dtype] | None,
) -> Captured:
    """function(*tensors) calls the module. dynamic: for each tensor the axes whose size may differ in later calls."""
    if any(t.is_inference() for t in _tensors(module).values()):
        raise TorchError("it was made under torch.inference_mode(), where torch does not track what is written")
    with torch.inference_mode(False):
        # Clones also where two inputs share memory: the program is made for inputs that do not.
        storages = [t.untyped_storage()._cdata for t in tensors]
        alone = [storages.count(s) == 1 and not t.is_inference() for s, t in zip(storages, tensors, strict=True)]
        tensors = [t.detach() if a else t.detach().clone() for a, t in zip(alone, tensors, strict=True)]
    flat = _Flat(function, module, autocast)
    auto = tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) for axes in dynamic)
    try:
        with _exporting():
            program = torch.export.export(flat, tuple(tensors), dynamic_shapes={"tensors": auto})
    except TorchError:
        raise
    except Exception as error:  # torch.export raises what Dynamo, the fake tensors and the module itself raise
        raise TorchError(f"torch.export cannot capture it: {_first_line(error)}") from error
    _check_deterministic(program)
    weights = {
        **dict(program.named_parameters()),
        **dict(program.named_buffers()),
        **{k: v for k, v in program.constants.items() if isinstance(v, torch.Tensor)},
    }
    unread = _unread(program)
    return Captured(
        program,
        {name: flat.real(name, tensor) for name, tensor in weights.items() if name not in unread},
        tuple(flat.written),
        _dtypes(program),
        tuple(flat.outputs),
        flat.spec,
    )


def _unread(program: torch.export.ExportedProgram) -> set[str]:
    """The counters of batch norms in inference. Not other tensors without users: a result may depend on their shapes
    and dtypes, or they may be other names of tensors that are used."""
    used = {n.name for n in program.graph.nodes if n.op == "placeholder" and n.users}
    buffers = program.graph_signature.inputs_to_buffers
    return {b for i, b in buffers.items() if b.endswith(".num_batches_tracked") and i not in used}


def _dtypes(program: torch.export.ExportedProgram) -> tuple[torch.dtype, ...]:
    """torch's dtypes of the results."""
    # In a graph of Dynamo's that enters autocast, values have the dtypes from before that until it is decomposed. Not
    # decomposed otherwise: it costs a second trace.
    if any("wrap_with_autocast" in str(n.target) for n in program.graph.nodes):
        program = program.run_decompositions({})
    values = {n.name: n.meta.get("val") for n in program.graph.nodes}
    return tuple(values[name].dtype for name in program.graph_signature.user_outputs)  # type: ignore[union-attr]


class _Flat(torch.nn.Module):
    """The module as a function of tensors that returns only new tensors, and remembers what it left out."""

    module: torch.nn.Module
    function: Any
    autocast: Any
    real_tensors: Any
    outputs: Any
    spec: Any
    written: Any

    def __init__(self, function: Callable[..., Any], module: torch.nn.Module, autocast: Any):
        super().__init__()
        self.module = module
        # Past nn.Module's own attributes: none of these is part of the program.
        self.__dict__.update(function=function, autocast=autocast, real_tensors=_tensors(module))

    def real(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self.real_tensors.get(name.removeprefix("module."), tensor)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        before = {name: (t, t._version) for name, t in _tensors(self.module).items()}
        versions = [t._version for t in tensors]
        with _autocast(self.autocast):
            result = self.function(*tensors)
        leaves, spec = pytree.tree_flatten(result)
        after = _tensors(self.module)
        written: dict[Any, torch.Tensor] = {("input", i): t for i, t in enumerate(tensors) if t._version != versions[i]}
        for name, t in after.items():
            if name not in before or t is not before[name][0] or t._version != before[name][1]:
                written["weight", name] = t
        known: dict[Any, torch.Tensor] = {("input", i): t for i, t in enumerate(tensors)}
        known.update((("weight", name), t) for name, (t, _) in before.items())
        fresh: dict[int, torch.Tensor] = {}
        outputs = [_described(leaf, known, fresh) for leaf in leaves]
        results = (*fresh.values(), *written.values())
        if not results:
            raise TorchError("it computes no new tensor")
        self.__dict__.update(outputs=outputs, spec=spec, written=list(written))
        return results


def _described(leaf: Any, known: dict[Any, torch.Tensor], fresh: dict[int, torch.Tensor]) -> Fresh | Alias | Constant:
    if isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise NotDynamicError("an output is a size")
    if not isinstance(leaf, torch.Tensor):
        return Constant(leaf)
    storage = leaf.untyped_storage()._cdata
    for key, tensor in known.items():
        if leaf is tensor:
            return Alias(key, None)
        if tensor.untyped_storage()._cdata == storage:
            strided = (tuple(leaf.shape), leaf.stride(), leaf.storage_offset())
            if strided == (tuple(tensor.shape), tensor.stride(), tensor.storage_offset()):
                return Alias(key, None)
            if leaf.dtype != tensor.dtype:
                raise TorchError("an output is a view of an input with another dtype")
            if not all(isinstance(x, int) for x in (*strided[0], *strided[1], strided[2])):
                raise NotDynamicError("an output is a view of an input")
            return Alias(key, strided)
    if id(leaf) not in fresh:
        fresh[id(leaf)] = leaf
    return Fresh(list(fresh).index(id(leaf)))


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, and tensors that are plain attributes."""
    found: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))  # type: ignore[arg-type]
    found.update(module.named_buffers(remove_duplicate=False))
    for prefix, inner in module.named_modules():
        for name, value in vars(inner).items():
            if isinstance(value, torch.Tensor):
                found[f"{prefix}.{name}".lstrip(".")] = value
    return found


@contextlib.contextmanager
def _autocast(state: tuple[str, torch.dtype] | None) -> Iterator[None]:
    # An autocast that surrounds the export is not recorded, one inside of the module is.
    if state is None:
        yield
        return
    with torch.autocast(state[0], dtype=state[1]):
        yield


@contextlib.contextmanager
def _exporting() -> Iterator[None]:
    """Without gradients, autocast and the exporter's remarks."""
    quiet = [logging.getLogger(name) for name in ("torch.export", "torch.onnx", "torch._export", "onnxscript")]
    levels = [logger.level for logger in quiet]
    for logger in quiet:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            warnings.simplefilter("ignore")
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                yield
    finally:
        for logger, level in zip(quiet, levels, strict=True):
            logger.setLevel(level)


# Operators with a random generator that do not use it where these arguments say so: (name, value that is harmless).
_QUIET_ARGUMENTS = {
    "dropout": (("train", False), ("p", 0.0)),
    "dropout_": (("train", False), ("p", 0.0)),
    "feature_dropout": (("train", False), ("p", 0.0)),
    "feature_dropout_": (("train", False), ("p", 0.0)),
    "alpha_dropout": (("train", False), ("p", 0.0)),
    "alpha_dropout_": (("train", False), ("p", 0.0)),
    "feature_alpha_dropout": (("train", False), ("p", 0.0)),
    "feature_alpha_dropout_": (("train", False), ("p", 0.0)),
    "native_dropout": (("train", False), ("p", 0.0)),
    "scaled_dot_product_attention": (("dropout_p", 0.0),),
    "rrelu": (("training", False),),
    "rrelu_": (("training", False),),
    "lstm": (("train", False), ("dropout", 0.0)),
    "gru": (("train", False), ("dropout", 0.0)),
    "rnn_tanh": (("train", False), ("dropout", 0.0)),
    "rnn_relu": (("train", False), ("dropout", 0.0)),
}


def _check_deterministic(program: torch.export.ExportedProgram) -> None:
    for graph_module in program.graph_module.modules():
        if not isinstance(graph_module, torch.fx.GraphModule):
            continue
        for node in graph_module.graph.nodes:
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            name = node.target._schema.name.removeprefix("aten::")
            arguments = _arguments(node)
            if name in ("batch_norm", "instance_norm") and arguments.get("training", False):
                raise TorchError(
                    f"{name} uses the statistics of the batch, {node.name}: call module.eval() for inference"
                )
            if torch.Tag.nondeterministic_seeded in node.target.tags:
                quiet = _QUIET_ARGUMENTS.get(name, ())
                if not any(arguments.get(argument, value) == value for argument, value in quiet):
                    raise TorchError(
                        f"{name} draws random numbers, which torch's generator decides: "
                        "call module.eval() for inference"
                    )


def _arguments(node: torch.fx.Node) -> dict[str, Any]:
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return {**{a.name: value for a, value in zip(schema, node.args, strict=False)}, **node.kwargs}


def to_onnx(program: torch.export.ExportedProgram) -> Any:
    """The program as torch.onnx.ONNXProgram.

    Opset 23 is the first in which attention, RMS norm and RoPE are one node each. Not optimised: a weight that is still
    an initializer would be folded into copies of itself.
    """
    try:
        with _exporting():
            return torch.onnx.export(program, opset_version=23, optimize=False, verbose=False)
    except Exception as error:
        chain = f"{error} {error.__cause__} {error.__cause__ and error.__cause__.__cause__}"
        if missing := re.findall(r"No ONNX function found for <OpOverload\(op='([^']+)'", chain):
            raise TorchError(f"the operator {missing[0]} has no ONNX form") from error
        raise TorchError(f"torch.onnx cannot convert it: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # the exporters wrap what went wrong into advice on reporting it
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
