"""Files that were made to do harm, or were damaged: an OnnxError that says where, and never anything else.

ZENITH_ONNX_FLIPS=20000 pytest tests/onnx/test_hostile.py -k flipped     damages more files
"""

import json
import os
import random
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh_process import run_script
from onnx_models import BOOL, FLOAT, INT, graph, i64, info, leaf, model, node, onnx, refused

from zenith_jax.frontends import onnx as zenith_onnx

HUGE = 10**13
INT64 = np.iinfo(np.int64)
X = np.ones((2, 3), np.float32)
FLIPS = int(os.environ.get("ZENITH_ONNX_FLIPS", 300))

# --- structure --------------------------------------------------------------------------------------------------------

A, B = node("Relu", ["b"], ["a"], "first"), node("Relu", ["a"], ["b"], "second")
STRUCTURES = {
    "cycle": (model([A, B], outputs=["a"]), "node Relu '(first|second)'.*depends on its own result"),
    "self_loop": (model([node("Relu", ["y"], ["y"])]), "node Relu 'the_Relu'.*its own result"),
    "missing_input": (model([node("Relu", ["nowhere"], ["y"])]), "node Relu 'the_Relu' reads 'nowhere'"),
    "missing_output": (model([], ["x"]), "the output 'y' is computed by no node"),
    "missing_in_subgraph": (
        model(
            [node("If", ["c"], ["y"], then_branch=graph([B], outputs=["b"]), else_branch=graph([B], outputs=["b"]))],
            [info("c", BOOL, [])],
        ),
        "node If 'the_If' reads 'a'",
    ),
    "output_twice": (
        model([node("Relu", ["x"], ["y"], "one"), node("Neg", ["x"], ["y"], "two")], ["x"]),
        "node Neg 'two'.*'y' is already",
    ),
    "output_is_input": (model([node("Relu", ["x"], ["x"])], ["x"], ["x"]), "node Relu 'the_Relu'.*'x' is already"),
    "input_twice": (model([node("Relu", ["x"], ["y"])], ["x", "x"]), "two inputs of the same name"),
    "attribute_twice": (
        model(
            [
                onnx.NodeProto(
                    op_type="Elu",
                    name="e",
                    input=["x"],
                    output=["y"],
                    attribute=[onnx.helper.make_attribute("alpha", 1.0)] * 2,
                )
            ],
            ["x"],
        ),
        "node 'e' .Elu.: attribute 'alpha' is given twice",
    ),
    "unknown_operator": (model([node("Evil", ["x"], ["y"])], ["x"]), "node Evil 'the_Evil'.*no operator Evil"),
    "unknown_domain": (
        model([node("Relu", ["x"], ["y"], domain="evil")], ["x"]),
        "node evil.Relu 'the_Relu'.*no operator",
    ),
    "unknown_attribute": (model([node("Relu", ["x"], ["y"], beta=1)], ["x"]), "node Relu 'the_Relu'.*beta"),
    "attribute_of_wrong_kind": (model([node("Concat", ["x"], ["y"], axis="first")], ["x"]), "node Concat 'the_Concat'"),
    "graph_for_a_number": (
        model([node("Concat", ["x"], ["y"], axis=graph([]))], ["x"]),
        "node Concat 'the_Concat'|computed by no node",
    ),
    "number_for_a_graph": (
        model([node("If", ["c"], ["y"], then_branch=1, else_branch=1)], [info("c", BOOL, [])]),
        "node If 'the_If'",
    ),
    "too_many_inputs": (model([node("Relu", ["x"] * 5, ["y"])], ["x"]), "node Relu 'the_Relu'.*5 inputs"),
    "too_few_inputs": (model([node("MatMul", ["x"], ["y"])], ["x"]), "node MatMul 'the_MatMul'.*1 inputs"),
    "too_many_outputs": (
        model([node("Relu", ["x"], ["y", "z"])], ["x"], ["y", "z"]),
        "node Relu 'the_Relu'.*'z' is not computed",
    ),
    "string_for_a_number": (
        model([node("Constant", [], ["s"], value_string="a"), node("Add", ["s", "x"], ["y"])], ["x"]),
        "node Add 'the_Add'",
    ),
    "axis_out_of_range": (model([node("Concat", ["x", "x"], ["y"], axis=99)], ["x"]), "node Concat 'the_Concat'"),
    "axis_beyond_int64": (
        model([node("Softmax", ["x"], ["y"], axis=int(INT64.max))], ["x"]),
        "node Softmax 'the_Softmax'",
    ),
    "split_into_many": (
        model([node("Split", ["x"], ["y"], num_outputs=HUGE)], ["x"]),
        "node Split 'the_Split'.*num_outputs",
    ),
    "reshape_overflow": (
        model([node("Reshape", ["x", "s"], ["y"])], ["x"], s=i64(2**62, 2**62)),
        "node Reshape 'the_Reshape'",
    ),
    "negative_shape": (
        model([node("ConstantOfShape", ["s"], ["y"])], s=i64(-5)),
        "node ConstantOfShape.*negative dimension",
    ),
    "type_unknown": (model([node("Cast", ["x"], ["y"], to=999)], ["x"]), "node Cast 'the_Cast'.*999"),
    "function_twice": (
        model([node("F", ["x"], ["y"], domain="my")], ["x"], functions=[leaf("F"), leaf("F")], domains=["my"]),
        "function my.F is defined twice",
    ),
    "function_reads_nothing": (
        model(
            [node("F", ["x"], ["y"], domain="my")],
            ["x"],
            domains=["my"],
            functions=[onnx.helper.make_function("my", "F", ["a"], ["b"], [node("Relu", ["nowhere"], ["b"])], [])],
        ),
        r"function my.F reads \['nowhere'\]",
    ),
    "opset_zero": (model([node("Relu", ["x"], ["y"])], ["x"], opset=0), "opset versions start at 1"),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_malformed_graph_is_refused(name):
    proto, match = STRUCTURES[name]
    inputs = [np.array(True) if i.name == "c" else X for i in proto.graph.input]
    refused(proto, *inputs[: len({i.name for i in proto.graph.input})], match=match)


NO_MODELS = {
    "empty": b"",
    "zeros": bytes(100),
    "text": b"not a model",
    "no_graph": b"\x08\x0a",
    "noise": random.Random(0).randbytes(200),
}


def test_products_and_factors_may_lack_operands_and_results():
    """What passes over the graph look at before any node runs."""
    dequantized = [node("DequantizeLinear", [n, "s"], [f"{n}_"], f"dequantize_{n}") for n in "ab"]
    for inputs in (["a_"], [], ["a_", "", "b_"]):
        proto = model([*dequantized, node("MatMul", inputs, ["y"])], ["a", "b"], s=np.float32(1))
        refused(proto, X, X, match="node (DequantizeLinear|MatMul)")
    nameless = node("DequantizeLinear", ["x", "s"], [])
    (y,) = zenith_onnx.load(model([nameless, node("Relu", ["x"], ["y"])], ["x"], s=np.float32(1))).apply({}, -X)
    np.testing.assert_array_equal(y, 0 * X)


@pytest.mark.parametrize("name", NO_MODELS)
def test_bytes_that_are_no_model(name):
    with pytest.raises(zenith_onnx.OnnxError, match=r"cannot be read as an ONNX model|the file holds no graph"):
        zenith_onnx.load(NO_MODELS[name])


def test_wrong_arguments_of_load():
    with pytest.raises(zenith_onnx.OnnxError, match=r"takes a path, bytes or an onnx.ModelProto, got int"):
        zenith_onnx.load(3)
    with pytest.raises(zenith_onnx.OnnxError, match="there is no file"):
        zenith_onnx.load("/nowhere/model.onnx")


# --- external data ----------------------------------------------------------------------------------------------------


def external(location, **more):
    proto = model([node("Identity", ["w"], ["y"])])
    weight = proto.graph.initializer.add(name="w", data_type=FLOAT, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in dict(location=location, **more).items():
        weight.external_data.add(key=key, value=str(value))
    return proto


@pytest.fixture
def folder(tmp_path):
    """A model's folder, with a secret beside it that no model may read."""
    inside = tmp_path / "model"
    inside.mkdir()
    np.arange(4, dtype=np.float32).tofile(inside / "w.bin")
    (tmp_path / "secret.bin").write_bytes(b"0123456789abcdef")
    (inside / "link.bin").symlink_to(tmp_path / "secret.bin")
    (inside / "folder").symlink_to(tmp_path)
    (inside / "good_link.bin").symlink_to(inside / "w.bin")
    os.mkfifo(inside / "pipe")
    return inside


@pytest.mark.parametrize("location", ["w.bin", "./w.bin", "good_link.bin"])
def test_external_data_within_the_folder_is_read(folder, location):
    onnx.save(external(location), folder / "model.onnx")
    loaded = zenith_onnx.load(folder / "model.onnx")
    np.testing.assert_array_equal(loaded.params["w"], np.arange(4, dtype=np.float32))


@pytest.mark.parametrize(
    "location",
    [
        "../secret.bin", "a/../../secret.bin", "/etc/passwd", "link.bin", "folder/secret.bin", "..\\secret.bin", "",
        ".", "pipe", "nowhere.bin", "w.bin\0.txt", "/dev/zero", "//etc/passwd", "file:///etc/passwd", "x" * 5000,
    ],
)  # fmt: skip
def test_external_data_cannot_leave_its_folder(folder, location):
    with pytest.raises(zenith_onnx.OnnxError, match=r"tensor 'w'"):
        zenith_onnx.load(external(location), folder=folder)


@pytest.mark.parametrize(
    "more",
    [
        dict(offset=-1), dict(offset=HUGE), dict(length=HUGE), dict(length=-1), dict(offset=8), dict(length=3),
        dict(offset="x"), dict(length="1e3"), dict(offset="9" * 5000), dict(offset=INT64.max, length=INT64.max),
    ],
    ids=str,
)  # fmt: skip
def test_external_data_outside_of_its_file_is_refused(folder, more):
    with pytest.raises(zenith_onnx.OnnxError, match=r"tensor 'w'"):
        zenith_onnx.load(external("w.bin", **more), folder=folder)


def test_external_data_of_a_model_without_folder_is_refused():
    with pytest.raises(zenith_onnx.OnnxError, match=r"tensor 'w'.*not loaded from a file"):
        zenith_onnx.load(external("w.bin").SerializeToString())


def test_external_data_in_attributes_cannot_leave_its_folder_either(folder):
    proto = external("../secret.bin")
    tensor = proto.graph.initializer.pop()
    constant = node("Constant", [], ["w"])
    constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    proto.graph.node.insert(0, constant)
    with pytest.raises(zenith_onnx.OnnxError, match=r"node 'the_Constant'.*tensor 'w'.*within the model's folder"):
        zenith_onnx.load(proto, folder=folder)


def test_loading_runs_no_code_and_opens_no_other_file(folder):
    """Python's audit events say what a load does: it opens the model and its data, and neither compiles nor starts."""
    nodes = [
        node("PyOp", ["w"], ["y"], domain="com.microsoft.extensions", code="__import__('os').system('true')"),
        node("__import__('os').system('true')", ["w"], ["z"], "eval(1)"),
    ]
    proto = external("w.bin")
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.metadata_props.add(key="exec", value="import os; os.system('true')")
    onnx.save(proto, folder / "model.onnx")
    (folder / "benign.onnx").write_bytes(small().SerializeToString())
    script = """
        import json, sys
        import zenith_jax as zenith
        zenith.onnx.load("benign.onnx")  # imports what is imported once
        seen = []
        sys.addaudithook(lambda event, arguments: seen.append((event, str(arguments))))
        try:
            model = zenith.onnx.load("model.onnx", max_bytes=1 << 30)  # else the limit of the container is read
            model.apply(model.params)
        except zenith.onnx.UnsupportedError as error:
            seen.append(("refused", str(error)))
        print(json.dumps([e for e in seen if e[0].split(".")[0] in
            "exec compile open os subprocess socket ctypes marshal pickle refused".split()]))
    """
    output = run_script(textwrap.dedent(script), folder)
    events = json.loads(output.splitlines()[-1])
    assert events[-1][0] == "refused", events
    opened = [arguments for event, arguments in events[:-1] if event == "open"]
    assert all("model.onnx" in o or "w.bin" in o for o in opened) and opened, events
    allowed = ("open", "os.listdir", "os.scandir")
    assert not [e for e in events[:-1] if e[0] not in allowed], events


# --- damage -----------------------------------------------------------------------------------------------------------


def small():
    """A model with a bit of everything: weights of each kind, constants, a function, If, Loop, attributes."""
    rng = np.random.default_rng(0)
    attribute = onnx.AttributeProto(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="alpha")
    leaky = node("LeakyRelu", ["a"], ["b"], "leaky")
    leaky.attribute.append(attribute)
    function = onnx.helper.make_function(
        "my", "F", ["a"], ["b"], [leaky], [onnx.helper.make_opsetid("", 18)], ["alpha"]
    )
    body = graph(
        [node("Add", ["v", "w"], ["next"], "add"), node("Identity", ["go"], ["again"], "same")],
        [info("i", INT, []), info("go", BOOL, []), info("v")],
        [info("again", BOOL, []), "next"],
        "body",
    )
    nodes = [
        node("MatMul", ["x", "w"], ["m"], "product"),
        node("Constant", [], ["k"], "true", value=onnx.numpy_helper.from_array(np.array(True), "k")),
        node(
            "If", ["k"], ["r"], "if",
            then_branch=graph([node("Relu", ["m"], ["t"], "relu")], outputs=["t"], name="then"),
            else_branch=graph([node("Neg", ["m"], ["e"], "neg")], outputs=["e"], name="else"),
        ),
        node("Constant", [], ["n"], "three", value_int=3),
        node("Loop", ["n", "k", "r"], ["l"], "loop", body=body),
        node("F", ["l"], ["f"], "call", domain="my", alpha=0.5),
        node("Constant", [], ["p"], "pads", value_ints=[0, 0, 2, 0]),
        node("Pad", ["f", "p"], ["q"], "pad"),
        node("Reshape", ["q", "s"], ["y"], "reshape"),
        node("Conv", ["image", "kernel"], ["z"], "conv", pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
    ]  # fmt: skip
    weights = dict(
        w=rng.normal(size=(4, 4)).astype(np.float32),
        s=i64(2, -1),
        image=rng.normal(size=(1, 1, 5, 5)).astype(np.float32),
        kernel=rng.normal(size=(2, 1, 3, 3)).astype(np.float32),
    )
    made = model(nodes, [info("x", FLOAT, ["batch", 4])], ["y", "z"], 18, [function], ["my"], **weights)
    made.metadata_props.add(key="author", value="nobody")
    return made


def attempt(content):
    """Loads and runs what may be a model: whether it worked. Anything but an OnnxError is raised."""
    try:
        loaded = zenith_onnx.load(content, max_bytes=1 << 24)
        jax.block_until_ready(loaded.apply(loaded.params, *[np.ones((4, 4), np.float32) for _ in loaded.inputs]))
    except zenith_onnx.OnnxError as error:
        words = (
            "node ",
            "tensor ",
            "input",
            "output",
            "initializer",
            "opset",
            "cannot be read",
            "no graph",
            "function",
        )
        assert any(word in str(error) for word in words), f"does not say where: {error}"
        return False
    return True


def test_the_small_model_is_sound():
    assert attempt(small().SerializeToString())


def test_file_cut_off_at_any_length_is_an_error_or_a_whole_model():
    content = small().SerializeToString()
    whole = [cut for cut in range(len(content)) if attempt(content[:cut])]
    # What comes after the graph, such as metadata, may be missing.
    assert all(cut > 0.9 * len(content) for cut in whole)


def test_file_with_flipped_bytes_is_an_error_or_another_model():
    content = small().SerializeToString()
    source = random.Random(0)
    for _ in range(FLIPS):
        damaged = bytearray(content)
        for _ in range(source.choice([1, 1, 2, 4, 8])):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        try:
            attempt(bytes(damaged))
        except Exception as error:
            raise AssertionError(f"this file raises {type(error).__name__}: {bytes(damaged)!r}") from error


def test_names_that_are_no_utf8_are_shown_escaped():
    content = small().SerializeToString().replace(b"product", b"prod\xffct").replace(b"MatMul", b"Mat\xfful")
    with pytest.raises(zenith_onnx.OnnxError, match=r"node Mat\\xfful 'prod\\\\xffct'"):
        loaded = zenith_onnx.load(content)
        loaded.apply(loaded.params, jnp.ones((4, 4)))
