"""What would take too much memory or time is refused, with the node's name, before it takes it."""

import os
import time

import jax
import numpy as np
import pytest
from onnx_models import BOOL, FLOAT, INT, STRING, graph, i64, info, leaf, model, node, onnx, refused

from zenith_jax.frontends import onnx as zenith_onnx
from zenith_jax.frontends.onnx import limits

HUGE = 10**13  # bytes or more: ten terabytes
INT64 = np.iinfo(np.int64)

# --- sizes ------------------------------------------------------------------------------------------------------------

X = np.ones((2, 3), np.float32)
IMAGE = np.ones((1, 2, 3, 3), np.float32)
ROW, COLUMN = np.ones((1, 3_000_000), np.float32), np.ones((3_000_000, 1), np.float32)


# Operator, inputs by position ("x": the graph's input), attributes.
OVERSIZED = {
    "AffineGrid": ([np.ones((1, 2, 3), np.float32), i64(1, 1, HUGE, HUGE)], {}),
    "AveragePool": (["image"], dict(kernel_shape=[2, 2], pads=[HUGE, 0, 0, 0])),
    "CenterCropPad": (["x", i64(HUGE, 3)], {}),
    "Col2Im": ([np.ones((1, 4, 1), np.float32), i64(HUGE, 2), i64(2, 2)], {}),
    "ConstantOfShape": ([i64(HUGE, HUGE)], {}),
    "Conv": (["image", np.ones((2, 2, 1, 1), np.float32)], dict(pads=[HUGE, HUGE, 0, 0])),
    "ConvTranspose": (["image", np.ones((2, 2, 1, 1), np.float32)], dict(output_shape=[HUGE, 3])),
    "DFT": ([np.ones((1, 4, 1), np.float32), i64(HUGE)], {}),
    "Expand": (["x", i64(HUGE, 2, 3)], {}),
    "Gather": ([np.ones((1, 1), np.float32), "indices"], {}),
    "HannWindow": ([np.array(HUGE)], {}),
    "LRN": (["image"], dict(size=HUGE)),
    "MaxPool": (["image"], dict(kernel_shape=[2, 2], pads=[0, 0, HUGE, HUGE])),
    "MaxRoiPool": (["image", np.ones((1, 5), np.float32)], dict(pooled_shape=[HUGE, 2])),
    "MaxUnpool": (["image", np.zeros((1, 2, 3, 3), np.int64), i64(1, 2, HUGE, HUGE)], dict(kernel_shape=[2, 2])),
    "MelWeightMatrix": ([np.array(HUGE), np.array(8), np.array(8), np.float32(0), np.float32(4)], {}),
    "OneHot": (["indices", np.array(HUGE), np.array([0, 1], np.float32)], {}),
    "Pad": (["x", i64(0, 0, HUGE, 0)], {}),
    "RandomNormal": ([], dict(shape=[HUGE, 2])),
    "RandomUniform": ([], dict(shape=[HUGE, 2])),
    "Range": ([np.array(0), np.array(HUGE), np.array(1)], {}),
    "Resize": (["image", "", "", i64(1, 2, HUGE, 3)], {}),
    "RoiAlign": (["image", np.ones((1, 4), np.float32), i64(0)], dict(output_height=HUGE)),
    "Tile": (["x", i64(HUGE, 1)], {}),
}
# More: what becomes too large only by two operands together.
PAIRS = {
    "Add": (ROW, COLUMN),
    "MatMul": (COLUMN, ROW),
    "Where": (ROW > 0, COLUMN, ROW),
    "Mul": (ROW, COLUMN),
}


def one_node(op_type, operands, attributes):
    given = {"x": X, "image": IMAGE, "indices": np.zeros((2_000_000, 1), np.int64)}
    names, weights, inputs = [], {}, []
    for place, operand in enumerate(operands):
        if isinstance(operand, str):
            names.append(operand)
            if operand:
                array = given[operand]
                inputs.append(info(operand, INT if array.dtype == np.int64 else FLOAT, None))
        else:
            names.append(f"w{place}")
            weights[f"w{place}"] = operand
    proto = model([node(op_type, names, ["y"], **attributes)], inputs, **weights)
    return proto, [given[i.name] for i in inputs]


@pytest.mark.parametrize("op_type", OVERSIZED)
def test_absurd_size_is_refused_before_memory_is_asked_for(op_type):
    operands, attributes = OVERSIZED[op_type]
    if op_type == "Gather":  # (2000000, 1) indices, each of which reads a row of 3000000
        operands = [ROW, "indices"]
    proto, inputs = one_node(op_type, operands, attributes)
    refused(proto, *inputs, match=f"node {op_type} 'the_{op_type}'.*the limit is")


@pytest.mark.parametrize("op_type", PAIRS)
def test_broadcast_of_two_operands_is_refused_before_memory_is_asked_for(op_type):
    weights = {f"w{i}": v for i, v in enumerate(PAIRS[op_type])}
    proto = model([node(op_type, list(weights), ["y"])], **weights)
    refused(proto, match=f"node {op_type} 'the_{op_type}'.*the limit is")


def test_tensors_that_double_are_stopped_at_the_limit():
    for make in (
        lambda i: [node("Concat", [f"t{i}"] * 2, [f"t{i + 1}"], f"double{i}", axis=0)],
        lambda i: [
            node("SequenceConstruct", [f"t{i}"] * 2, [f"s{i}"], f"sequence{i}"),
            node("ConcatFromSequence", [f"s{i}"], [f"t{i + 1}"], f"double{i}", axis=0),
        ],
    ):
        proto = model([n for i in range(60) for n in make(i)], outputs=["t60"], t0=np.ones(4, np.float32))
        loaded = zenith_onnx.load(proto, max_bytes=1 << 20)
        with pytest.raises(zenith_onnx.OnnxError, match=r"'double16'.*2 MB, the limit is 1 MB: load\(max_bytes="):
            loaded.apply(loaded.params)


def test_strings_that_double_are_stopped_at_the_limit():
    nodes = [node("StringConcat", [f"t{i}"] * 2, [f"t{i + 1}"], f"double{i}") for i in range(60)]
    constant = onnx.helper.make_tensor("c", STRING, [1], [b"word"])
    proto = model([node("Constant", [], ["t0"], value=constant), *nodes], outputs=[info("t60", STRING)])
    loaded = zenith_onnx.load(proto, max_bytes=1 << 20)
    with pytest.raises(zenith_onnx.OnnxError, match=r"'double1\d'.*the limit is 1 MB"):
        loaded.apply(loaded.params)


@pytest.mark.parametrize("op_type", ["Reshape", "Expand", "Unsqueeze"])
def test_shape_of_a_million_dimensions_is_refused(op_type):
    proto = model([node(op_type, ["x", "s"], ["y"])], [info("x", FLOAT)], s=np.ones(1_000_000, np.int64))
    refused(proto, np.ones(1, np.float32), match=f"node {op_type} 'the_{op_type}'.*100000. dimensions, more than 64")


def test_limit_does_not_outlive_the_call():
    proto, _ = one_node("ConstantOfShape", [i64(1 << 20)], {})
    with pytest.raises(zenith_onnx.OnnxError, match="4 MB, the limit is 1 kB"):
        zenith_onnx.load(proto, max_bytes=1024).apply({})
    assert zenith_onnx.load(proto).apply({})[0].shape == (1 << 20,)


@pytest.mark.parametrize(("text", "limit"), [("4096\n", 1024), ("max\n", None), (None, None)])
def test_default_limit_knows_what_a_container_may_have(text, limit, tmp_path, monkeypatch):
    if text is not None:
        (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(limits, "_CONTAINER_LIMIT", tmp_path / "memory.max")
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    assert limits.default_max_bytes() == (limit or whole)


def test_default_limit_is_less_than_the_machine_has():
    assert 1 << 20 < limits.default_max_bytes() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize("data_type", [FLOAT, INT, BOOL, onnx.TensorProto.INT4, onnx.TensorProto.BFLOAT16])
def test_initializer_that_claims_ten_terabytes_has_too_few_bytes(data_type):
    proto = model([node("Identity", ["w"], ["y"])])
    proto.graph.initializer.add(name="w", data_type=data_type, dims=[HUGE], raw_data=b"1234")
    refused(proto, match="tensor 'w' has 4 bytes of data")
    proto.graph.initializer[0].ClearField("raw_data")
    refused(proto, match=r"tensor 'w' has 0 .*(10|5)000000000000")  # two of 4 bits are in a byte


def test_sparse_initializer_is_not_made_dense_beyond_reason():
    proto = model([node("Identity", ["w"], ["y"])])
    sparse = proto.graph.sparse_initializer.add(dims=[HUGE])
    sparse.values.CopyFrom(onnx.numpy_helper.from_array(np.ones(1, np.float32), "w"))
    sparse.indices.CopyFrom(onnx.numpy_helper.from_array(i64(0), "i"))
    refused(proto, match=r"sparse tensor 'w'.*would not fit")


# --- time -------------------------------------------------------------------------------------------------------------


def endless(name, **weights):
    """A loop whose condition stays true."""
    body = graph(
        [node("Identity", ["go"], ["again"]), node("Add", ["v", "one"], ["next"])],
        [info("i", INT, []), info("go", BOOL, []), info("v", INT, [])],
        [info("again", BOOL, []), info("next", INT, [])],
        "body",
    )
    return model(
        [node("Loop", [name, "true", "zero"], ["y"], body=body)],
        true=np.array(True),
        zero=np.array(0),
        one=np.array(1),
        **weights,
    )


def test_loop_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr(limits, "MAX_NODES", 3000)
    loaded = zenith_onnx.load(endless(""))
    with pytest.raises(zenith_onnx.OnnxError, match=r"node Loop 'the_Loop'.*more than 3000 nodes would run"):
        loaded.apply({})
    loaded = zenith_onnx.load(endless("trips", trips=np.array(INT64.max)))
    with pytest.raises(zenith_onnx.OnnxError, match=r"node Loop 'the_Loop'.*more than 3000 nodes would run"):
        loaded.apply({})


def calling(name, *called, domain="my"):
    nodes = [node(c, ["a" if i == 0 else f"t{i - 1}"], [f"t{i}"], domain=domain) for i, c in enumerate(called)]
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(domain, 1)]
    return onnx.helper.make_function(domain, name, ["a"], [f"t{len(called) - 1}"], nodes, opsets)


def test_function_that_calls_itself_is_refused():
    call = node("A", ["x"], ["y"], domain="my")
    refused(model([call], ["x"], functions=[calling("A", "A")], domains=["my"]), X, match=r"calls itself.*my\.A")
    circle = [calling("A", "B"), calling("B", "C"), calling("C", "A")]
    refused(model([call], ["x"], functions=circle, domains=["my"]), X, match=r"calls itself.*my\.A, my\.B, my\.C")


def test_functions_that_call_each_other_twice_are_given_up(monkeypatch):
    monkeypatch.setattr(limits, "MAX_NODES", 2000)
    functions = [calling(f"F{i}", f"F{i + 1}", f"F{i + 1}") for i in range(50)] + [leaf("F50")]
    proto = model([node("F0", ["x"], ["y"], domain="my")], ["x"], functions=functions, domains=["my"])
    start = time.perf_counter()
    loaded = zenith_onnx.load(proto)  # 2**50 calls, each function looked at once
    with pytest.raises(zenith_onnx.OnnxError, match="more than 2000 nodes would run"):
        loaded.apply({}, X)
    assert time.perf_counter() - start < 30


def test_chain_of_a_thousand_functions_is_refused():
    functions = [calling(f"F{i}", f"F{i + 1}") for i in range(1000)] + [leaf("F1000")]
    proto = model([node("F0", ["x"], ["y"], domain="my")], ["x"], functions=functions, domains=["my"])
    refused(proto, X, match="functions call each other more than 64 deep")


def nested_ifs(depth):
    """Built in place: protobuf copies nothing that is nested deeper than 100 messages."""
    proto = model([], [info("c", BOOL, []), "x"], ["t0"])
    inner = proto.graph
    for level in range(depth):
        inner.node.add(op_type="If", name=f"if{level}", input=["c"], output=[f"t{level}"])
        otherwise = inner.node[0].attribute.add(name="else_branch", type=onnx.AttributeProto.GRAPH).g
        otherwise.node.add(op_type="Identity", input=["x"], output=["e"])
        otherwise.output.add(name="e")
        inner = inner.node[0].attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
        inner.output.add(name=f"t{level + 1}")
    inner.node.add(op_type="Relu", name="innermost", input=["x"], output=[f"t{depth}"])
    return proto


def field(number, *content):
    """A field of a protobuf message that holds bytes."""
    body = b"".join(content)
    length, size = bytearray(), len(body)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2]) + bytes(length) + bytes([size]) + body


def test_a_thousand_nested_ifs_are_refused():
    refused(nested_ifs(1000), np.array(True), X, match="more than 32 graphs deep")
    inner = b""  # as a file, which no encoder of protobuf would write
    for _ in range(1000):
        attribute = field(5, field(1, b"then_branch"), b"\xa0\x01\x05", field(6, inner))
        inner = field(1, field(1, b"c"), field(2, b"t"), field(4, b"If"), attribute)
    refused(field(7, inner, field(12, field(1, b"t"))), match="cannot be read as an ONNX model")


def test_nesting_up_to_the_limit_runs():
    """Also with a traced condition, where each graph is traced once and not once for each of those around it."""
    proto = nested_ifs(32)
    loaded = zenith_onnx.load(proto)
    (y,) = loaded.apply({}, np.array(True), -X)
    np.testing.assert_array_equal(y, 0 * X)
    (y,) = jax.jit(lambda c, x: loaded.apply({}, c, x))(True, -X)
    np.testing.assert_array_equal(y, 0 * X)


def test_types_nested_a_thousand_deep_are_refused():
    proto = model([node("Identity", ["x"], ["y"])], ["x"])
    kind = proto.graph.input[0].type
    kind.Clear()
    for _ in range(1000):
        kind = kind.sequence_type.elem_type
    kind.tensor_type.elem_type = FLOAT
    refused(proto, [X], match=r"the type of the tensor 'x'.*nested more than")
