"""Which operator or function body computes a node: ours, a lower version's, or the one in ONNX's own schema."""

from __future__ import annotations

import functools as ft
from collections.abc import Sequence
from typing import Any

import numpy as np

from zenith_jax.frontends.onnx import dtypes, registry
from zenith_jax.frontends.onnx import ops as _ops  # noqa: F401  registers the operators
from zenith_jax.frontends.onnx.errors import OnnxError, UnsupportedError
from zenith_jax.frontends.onnx.graph import FunctionDef, NodeDef, Parser

NEWEST = 1 << 30  # a version later than all


def operator_for(domain: str, op_type: str, opset: int) -> registry.Operator | None:
    """The operator in force.

    A node that its declared opset does not have yet (torch's exporter at opset >= 26 declares 18 and writes nodes of
    23) gets the first version that there is.
    """
    found = registry.lookup(op_type, domain, opset)
    if found is None and _first_version(domain, op_type) > opset:
        return registry.lookup(op_type, domain, _first_version(domain, op_type))
    return found


def is_known(domain: str, op_type: str, opset: int) -> bool:
    """Whether anything computes such a node."""
    if operator_for(domain, op_type, opset) is not None:
        return True
    schema = _schema(domain, op_type, opset)
    return schema is not None and (schema.has_function or schema.has_context_dependent_function)


def body_of(node: NodeDef, opset: int, inputs: Sequence[Any]) -> FunctionDef:
    """The function body in the node's schema. Some bodies depend on attributes and the inputs' types."""
    schema = _schema(node.domain, node.op_type, opset)
    if schema is not None:
        version = max(opset if opset != NEWEST else 0, schema.since_version)
        if schema.has_function:
            return _parsed(schema.get_function_with_opset_version(version))
        if schema.has_context_dependent_function and node.proto:
            types = [_type_proto(value) for value in inputs]
            body = schema.get_context_dependent_function_with_opset_version(version, node.proto, types)
            if body:
                return _parsed(body)
    domain = f"domain {node.domain!r}" if node.domain else "ONNX"
    versions = f"opset {opset}" if opset != NEWEST else "an opset that the model does not declare"
    raise UnsupportedError(
        f"no operator {node.op_type} of {domain} at {versions} is implemented; "
        f"register one with @zenith.onnx.operator({node.op_type!r}, domain={node.domain!r})"
    )


@ft.lru_cache(maxsize=256)
def _parsed(body: bytes) -> FunctionDef:
    import onnx

    proto = onnx.FunctionProto()
    proto.ParseFromString(body)
    return Parser().function(proto)


@ft.cache
def _schema(domain: str, op_type: str, opset: int) -> Any:
    """The schema in force, of a later opset if there was none yet, or None."""
    import onnx.defs

    for version in (opset if opset != NEWEST else onnx.defs.onnx_opset_version(), _first_version(domain, op_type)):
        try:
            return onnx.defs.get_schema(op_type, version, domain)
        except onnx.defs.SchemaError:
            continue
    return None


@ft.cache
def _first_versions() -> dict[tuple[str, str], int]:
    import onnx.defs

    first: dict[tuple[str, str], int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        key = schema.domain, schema.name
        first[key] = min(schema.since_version, first.get(key, NEWEST))
    return first


def _first_version(domain: str, op_type: str) -> int:
    """The version that introduced the operator; 0 where ONNX does not know it."""
    return _first_versions().get((domain, op_type), 0)


def _type_proto(value: Any) -> bytes:
    import onnx

    proto = onnx.TypeProto()
    _fill(proto, value)
    return proto.SerializeToString()


def _fill(proto: Any, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, list | tuple):
        if not value:
            raise OnnxError("the type of an empty sequence is not known, and this function body depends on it")
        _fill(proto.sequence_type.elem_type, value[0])
        return
    proto.tensor_type.elem_type = dtypes.to_onnx(value.dtype)
    for size in np.shape(value):
        proto.tensor_type.shape.dim.add().dim_value = int(size)
