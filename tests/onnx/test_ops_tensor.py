"""Tensor operators where the official suite is silent: empty, 0-d, negative, out of range, old versions, float16.

Oracles: ONNX Runtime where it implements the case, else NumPy as the specification spells it.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from onnx_one_node import model, runtime, zenith

from zenith_jax.frontends import onnx as zenith_onnx
from zenith_jax.frontends.onnx import registry
from zenith_jax.frontends.onnx.ops import cast

onnx = pytest.importorskip("onnx")

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
EMPTY = np.zeros((0, 3, 4), np.float32)


def ints(*values):
    return np.array(values, np.int64)


def operator(name, opset=21, domain=""):
    """The function of an operator on values, for what is no matter of a whole model."""
    entry = registry.lookup(name, domain, opset)
    node = registry.Node(name, name, domain, opset, (True,) * 4)
    return lambda *inputs, **attributes: entry(node, inputs, attributes)


# (operator, inputs, attributes, opset, positions of the inputs that decide a shape)
AGAINST_RUNTIME = {
    "reshape_empty_batch": ("Reshape", [EMPTY, ints(0, 12)], {}, 21, (1,)),
    "reshape_attribute": ("Reshape", [X], {"shape": [4, -1]}, 1, ()),
    "reshape_scalar": ("Reshape", [np.float32(3), ints(1, 1)], {}, 21, (1,)),
    "reshape_to_scalar": ("Reshape", [np.ones((1, 1), np.float32), ints()], {}, 21, (1,)),
    "squeeze_all": ("Squeeze", [X[:1, :, :1]], {}, 21, ()),
    "squeeze_attribute": ("Squeeze", [X[:, :1]], {"axes": [-2]}, 11, ()),
    "unsqueeze_negative": ("Unsqueeze", [X, ints(-1, 0)], {}, 21, (1,)),
    "flatten_0d_side": ("Flatten", [X], {"axis": 0}, 21, ()),
    "flatten_negative": ("Flatten", [X], {"axis": -1}, 21, ()),
    "expand_both_ways": ("Expand", [X[:, :1], ints(3, 1)], {}, 21, (1,)),
    "expand_scalar": ("Expand", [np.float32(2), ints(2, 0)], {}, 21, (1,)),
    "tile_zero": ("Tile", [X, ints(1, 0, 2)], {}, 21, (1,)),
    "split_uneven": ("Split", [X], {"axis": -1, "num_outputs": 3}, 18, ()),
    "split_attribute": ("Split", [X], {"axis": 2, "split": [1, 0, 3]}, 11, ()),
    "slice_attribute": ("Slice", [X], {"starts": [-2], "ends": [2**31 - 1], "axes": [2]}, 9, ()),
    "slice_backwards_to_start": ("Slice", [X, ints(-1), ints(-(2**63)), ints(-1), ints(-2)], {}, 21, (1, 2, 3, 4)),
    "slice_beyond": ("Slice", [X, ints(7), ints(100), ints(1)], {}, 21, (1, 2, 3)),
    "pad_negative": ("Pad", [X, ints(0, -1, 1, 0, 0, -2), np.float32(7)], {}, 21, (1,)),
    "pad_reflect": ("Pad", [X, ints(0, 2, 3, 0, 1, 2)], {"mode": "reflect"}, 21, (1,)),
    "pad_edge_axes": ("Pad", [X, ints(2, 1), None, ints(-1)], {"mode": "edge"}, 21, (1, 3)),
    "pad_wrap": ("Pad", [X, ints(0, 1, 5, 0, 2, 0)], {"mode": "wrap"}, 21, (1,)),
    "pad_old": ("Pad", [X], {"pads": [0, 0, 1, 0, 0, 1], "value": 2.5}, 2, ()),
    "gather_negative": ("Gather", [X, np.array([[-1, 0], [2, -3]])], {"axis": 1}, 21, ()),
    "gather_scalar_index": ("Gather", [X, np.array(-1)], {"axis": 2}, 21, ()),
    "gather_nothing": ("Gather", [X, ints()], {"axis": 1}, 21, ()),
    "gather_elements": ("GatherElements", [X, np.array([[[-1, 2]], [[0, -4]]])], {"axis": 2}, 21, ()),
    "gather_nd_batch": ("GatherND", [X, np.array([[[-1, 0]], [[2, -2]]])], {"batch_dims": 1}, 21, ()),
    "scatter_elements_add_duplicates": (
        "ScatterElements",
        [X, np.zeros((2, 2, 4), np.int64) - 1, np.ones((2, 2, 4), np.float32)],
        {"axis": 1, "reduction": "add"},
        18,
        (),
    ),
    "scatter_nd_max": (
        "ScatterND",
        [X, np.array([[-1], [-1]]), np.stack([X[0], -X[1]])],
        {"reduction": "max"},
        18,
        (),
    ),
    "top_k_smallest_ties": ("TopK", [np.float32([[1, 0, 1, 0, 2]]), ints(4)], {"largest": 0}, 21, (1,)),
    "top_k_first_axis": ("TopK", [X, ints(1)], {"axis": 0}, 21, (1,)),
    "top_k_attribute": ("TopK", [X], {"k": 2}, 1, ()),
    "trilu_offset": ("Trilu", [X, np.array(-1)], {"upper": 0}, 21, ()),
    "depth_to_space": ("DepthToSpace", [np.arange(48, dtype=np.float32).reshape(1, 8, 2, 3)], {"blocksize": 2}, 9, ()),
    "one_hot_negative": ("OneHot", [ints(-1, 1, 5), ints(3), np.float32([2, 7])], {"axis": 0}, 11, (1,)),
    "eye_like": ("EyeLike", [X[0]], {"k": -1, "dtype": 1}, 21, ()),
    "quantize_saturates": ("QuantizeLinear", [X * 1e9 - 5e9, np.float32(0.1), np.int8(3)], {}, 21, ()),
    "dequantize_axis": (
        "DequantizeLinear",
        [np.int8([[1, -128, 127]] * 2), np.float32([0.1, 0.2, 0.3]), np.int8([0, -5, 9])],
        {"axis": -1},
        21,
        (),
    ),
    "dynamic_quantize_zeros": ("DynamicQuantizeLinear", [np.zeros(3, np.float32)], {}, 21, ()),
    "dynamic_quantize_negative": ("DynamicQuantizeLinear", [-X - 1.3], {}, 21, ()),
    "resize_10_down": ("Resize", [X[None], np.float32([1, 1, 0.6, 0.5])], {}, 10, (1,)),
    "resize_10_linear": ("Resize", [X[None], np.float32([1, 1, 1.5, 2])], {"mode": "linear"}, 10, (1,)),
    "upsample_9": ("Upsample", [X[None], np.float32([1, 1, 2, 3])], {"mode": "linear"}, 9, (1,)),
    "resize_cubic": (
        "Resize",
        [X[None], None, None, ints(1, 2, 5, 3)],
        {"mode": "cubic", "coordinate_transformation_mode": "align_corners"},
        19,
        (3,),
    ),
    "resize_float_scale": ("Resize", [np.ones((1, 10), np.float32), None, np.float32([1, 0.7])], {}, 19, (2,)),
    "range_down": ("Range", [np.float32(5), np.float32(-1), np.float32(-1.5)], {}, 21, (0, 1, 2)),
    "range_empty": ("Range", [np.int64(5), np.int64(1), np.int64(2)], {}, 21, (0, 1, 2)),
    "reverse_sequence": ("ReverseSequence", [X[0], ints(1, 2, 3, 0)], {"time_axis": 0, "batch_axis": 1}, 21, ()),
    "compress": ("Compress", [X, np.array([False, True])], {"axis": -1}, 21, (1,)),
}
OUTPUTS = {"Split": 3, "TopK": 2, "DynamicQuantizeLinear": 3}


@pytest.mark.parametrize("name", AGAINST_RUNTIME)
def test_agrees_with_onnx_runtime(name):
    op_type, inputs, attributes, opset, static = AGAINST_RUNTIME[name]
    inputs = [None if v is None else np.asarray(v) for v in inputs]
    proto = model(op_type, inputs, attributes, outputs=OUTPUTS.get(op_type, 1), domain="", opset=opset)
    for got, wanted in zip(zenith(proto, inputs, static=static), runtime(proto, inputs), strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["reshape_empty_batch", "slice_backwards_to_start", "pad_negative", "gather_negative"])
def test_static_inputs_give_static_results_of_the_same_values(name):
    op_type, inputs, attributes, opset, static = AGAINST_RUNTIME[name]
    (folded,) = operator(op_type, opset)(*inputs, **attributes)
    assert isinstance(folded, np.ndarray)
    proto = model(op_type, inputs, attributes, outputs=1, domain="", opset=opset)
    np.testing.assert_array_equal(folded, zenith(proto, inputs, static=static)[0])


def test_shapes_are_static_int64_even_of_traced_arrays():
    def shape_of(x):
        (shape,) = operator("Shape")(x, start=-2)
        (count,) = operator("Size")(x)
        assert isinstance(shape, np.ndarray) and shape.dtype == count.dtype == np.int64
        assert shape.tolist() == [3, 4] and count == 24
        return x

    jax.jit(shape_of)(X)


def test_garbage_indices_read_the_nearest_element_and_write_nothing():
    far = np.array([-100, 2**31 - 1, 1])
    for x in (X[0, 0], jnp.asarray(X[0, 0])):
        assert np.asarray(operator("Gather")(x, far)[0]).tolist() == [0, 3, 1]
        (written,) = operator("ScatterElements")(x, far, np.float32([7, 8, 9]))
        assert np.asarray(written).tolist() == [0, 9, 2, 3]


@pytest.mark.parametrize(
    "name,inputs,attributes,text",
    [
        ("Reshape", [X, ints(5, -1)], {}, r"Reshape of \(2, 3, 4\) to \(5, -1\): the number of elements differs"),
        ("Reshape", [X, ints(-1, -1)], {}, "at most one dimension may be -1"),
        ("Reshape", [X, ints(2, 3, 4, 0)], {}, "copies a dimension"),
        ("Slice", [X, ints(0), ints(1), ints(0), ints(0)], {}, "a step of 0"),
        ("Split", [X, ints(1, 1)], {"axis": 2}, "axis 2 of .2, 3, 4. has 4 elements"),
        ("TopK", [X, ints(5)], {}, "TopK of 5"),
        ("Resize", [X], {}, "needs scales or sizes"),
        ("Resize", [X, None, np.float32([1, 1, 2])], {"mode": "sinc"}, "no mode 'sinc'"),
        ("Range", [np.int64(0), np.int64(3), np.int64(0)], {}, "a delta of 0"),
        ("DequantizeLinear", [X.astype(np.int8), np.float32([1, 2])], {}, "a scale of 2 elements for axis 1"),
        ("SequenceAt", [[X], ints(1)], {}, "position 1 is outside of a sequence of 1"),
        ("ScatterND", [X, ints(0)[:, None], X[:1]], {"reduction": "xor"}, "no reduction 'xor'"),
    ],
)
def test_errors_name_the_invariant(name, inputs, attributes, text):
    with pytest.raises(zenith_onnx.OnnxError, match=text):
        operator(name)(*inputs, **attributes)


# --- as many as the data decides --------------------------------------------------------------------------------------

DATA_DEPENDENT = {
    "non_zero": ("NonZero", [np.float32([[0, 2], [3, 0]])], {}),
    "non_zero_scalar": ("NonZero", [np.float32(3)], {}),
    "compress": ("Compress", [X, np.array([True, False, True])], {"axis": 1}),
    "unique": ("Unique", [np.float32([2, 1, 1, 3, 4, 3])], {}),
    "unique_unsorted": ("Unique", [np.float32([2, 1, 1, 3, 4, 3])], {"sorted": 0}),
    "unique_axis": ("Unique", [np.float32([[2, 1, 2], [0, 1, 0]])], {"axis": 1}),
    "nms": (
        "NonMaxSuppression",
        [
            np.float32([[[0, 0, 1, 1], [0, 0.1, 1, 1.1], [0, 10, 1, 11], [1, 10.1, 0, 11]]]),
            np.float32([[[0.9, 0.75, 0.6, 0.95], [0.1, 0.2, 0.2, 0.05]]]),
            ints(2),
            np.float32([0.5]),
            np.float32([0.08]),
        ],
        {},
    ),
}


@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_sizes_that_depend_on_data_are_exact_outside_of_jit_and_bounded_inside(name):
    op_type, inputs, attributes = DATA_DEPENDENT[name]
    inputs = [np.asarray(v) for v in inputs]
    count = 4 if op_type == "Unique" else 1
    proto = model(op_type, inputs, attributes, outputs=count, domain="", opset=21)
    # "for scalar input, NonZero produces output shape (0, N) instead of (1, N)"; ONNX Runtime gives the latter.
    scalar = name == "non_zero_scalar"
    expected = [np.zeros((0, 1), np.int64)] if scalar else runtime(proto, inputs)
    given = {f"in{i}": jnp.asarray(v) for i, v in enumerate(inputs)}
    exact = zenith_onnx.load(proto).apply({}, **given)
    for got, wanted in zip(exact, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    with pytest.raises(zenith_onnx.NotStaticError, match=op_type):
        _jitted(zenith_onnx.load(proto), given)
    for size in (7, 1):
        bounded = _jitted(zenith_onnx.load(proto, size_bounds={"out0": size}), given)
        axis = {"NonZero": 1, "Compress": 1, "Unique": attributes.get("axis", 0)}.get(op_type, 0)
        for i, (got, wanted) in enumerate(zip(bounded, expected, strict=True)):
            if op_type == "Unique" and (i == 2 or (size == 1 and attributes.get("sorted") == 0)):
                continue  # positions of values in the result: none for those that were cut off
            along = axis if i == 0 else 0
            assert got.shape[along] == size
            both = min(size, wanted.shape[along])
            np.testing.assert_array_equal(np.take(got, np.arange(both), along), np.take(wanted, np.arange(both), along))
            assert not np.take(got, np.arange(both, size), along).any(), "what is missing is zeros"


def _jitted(loaded, given):
    decided = {k: np.asarray(v) for k, v in given.items() if k in loaded.static_inputs}
    traced = {k: v for k, v in given.items() if k not in decided}
    return [np.asarray(v) for v in jax.jit(lambda t: loaded.apply({}, **t, **decided))(traced)]


# --- types ------------------------------------------------------------------------------------------------------------

FLOAT8 = [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", [*FLOAT8, ml_dtypes.float8_e8m0fnu, ml_dtypes.int4, ml_dtypes.uint2, np.uint8])
def test_casts_of_static_and_traced_values_agree(dtype):
    values = np.float32([0, 0.3, 1, 1.5, 2.5, 3, 7, 300, 1e5, 1e30])
    if np.dtype(dtype).name in ("int4", "uint2", "uint8"):
        values = values[:6]  # beyond the range ONNX leaves the result open
    for saturate in (True, False):
        folded = cast.convert(values, dtype, saturate=saturate)
        traced = jax.jit(lambda x, s=saturate: cast.convert(x, dtype, saturate=s))(values)
        assert folded.dtype == traced.dtype == dtype
        np.testing.assert_array_equal(folded.astype(np.float32), np.asarray(traced).astype(np.float32))


def test_saturating_cast_keeps_nan_and_ends_infinity():
    for dtype in FLOAT8:
        result = cast.convert(np.float32([np.nan, np.inf, -np.inf]), dtype).astype(np.float32)
        largest = float(ml_dtypes.finfo(dtype).max)
        np.testing.assert_array_equal(result, [np.nan, largest, -largest])


def test_strings_are_cast_while_tracing():
    text = np.array(["1.5", "-INF", "nan", "1e3"], object)
    np.testing.assert_array_equal(cast.convert(text, np.float32), np.float32([1.5, -np.inf, np.nan, 1000]))
    assert cast.convert(np.array(["7", "2.0"], object), np.int64).tolist() == [7, 2]
    assert cast.convert(np.array([True, False]), object).tolist() == ["1", "0"]
    with pytest.raises(zenith_onnx.NotStaticError):
        jax.jit(lambda x: cast.convert(x, object))(X)


def test_blocks_may_end_short():
    x = np.arange(10, dtype=np.int8).reshape(2, 5)
    scale = np.float32([[1, 10, 100], [2, 20, 200]])
    (y,) = operator("DequantizeLinear")(x, scale, axis=1, block_size=2)
    np.testing.assert_array_equal(y, x * np.repeat(scale, 2, 1)[:, :5])


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,more,attributes",
    [
        ("Resize", (None, np.float32([1, 2, 1.5])), {"mode": "linear"}),
        ("Pad", (ints(0, 1, -1, 0, 2, 1),), {}),
        ("ScatterElements", (np.array([[[1]], [[0]]]), np.float32([[[5]], [[6]]])), {"axis": 1, "reduction": "add"}),
        ("TopK", (ints(2),), {}),
    ],
)
def test_gradient_is_the_directional_difference(name, more, attributes):
    x = np.random.default_rng(0).permutation(24).astype(np.float32).reshape(2, 3, 4)
    direction = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)

    def loss(v):
        return jnp.sum(jnp.sin(operator(name)(v, *more, **attributes)[0]))

    slope = jnp.vdot(jax.grad(loss)(jnp.asarray(x)), direction)
    difference = (loss(jnp.asarray(x + 1e-2 * direction)) - loss(jnp.asarray(x - 1e-2 * direction))) / 2e-2
    np.testing.assert_allclose(slope, difference, rtol=1e-2)  # a central difference of float32
