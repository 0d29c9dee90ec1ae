"""Convolution, pooling, norms and attention where the official suite is silent.

Expected values come from loops in NumPy, in float64, or from a property.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx_models import FLOAT, i64, info, model, node, onnx
from onnx_nodes import call, f32

from zenith_jax.frontends import onnx as zenith_onnx

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


# --- windows ----------------------------------------------------------------------------------------------------------


def windows_of(x, kernel, stride, dilation, pads, outputs):
    """For each window of x (h, w): its output index and the indices of x that it covers, padding left out."""
    for out in itertools.product(*map(range, outputs)):
        covered = []
        for tap in itertools.product(*map(range, kernel)):
            at = tuple(o * s + t * d - p for o, s, t, d, p in zip(out, stride, tap, dilation, pads, strict=False))
            if all(0 <= a < n for a, n in zip(at, x.shape, strict=True)):
                covered.append(at)
        yield out, covered


POOLS = [
    # size, kernel, stride, dilation, pads, ceil_mode, expected number of windows
    ((7, 6), (3, 2), (2, 2), (1, 1), (0, 0, 0, 0), 0, (3, 3)),
    ((7, 6), (3, 3), (2, 2), (1, 1), (1, 0, 1, 2), 1, (4, 3)),  # a fourth column would start in the padding
    ((6, 6), (2, 2), (2, 2), (2, 2), (1, 1, 1, 1), 0, (3, 3)),
    ((4, 4), (1, 1), (2, 2), (1, 1), (0, 0, 1, 1), 1, (2, 2)),  # so would a third window
    ((5, 5), (2, 2), (3, 3), (1, 1), (0, 0, 0, 0), 1, (2, 2)),
]


@pytest.mark.parametrize("size, kernel, stride, dilation, pads, ceil_mode, outputs", POOLS)
def test_pooling_against_loops(size, kernel, stride, dilation, pads, ceil_mode, outputs):
    x = np.round(normal(1, 2, *size) * 2)  # with ties
    attributes = dict(kernel_shape=kernel, strides=stride, dilations=dilation, pads=pads, ceil_mode=ceil_mode)
    largest, index = call("MaxPool", x, outputs=2, **attributes)
    by_column = call("MaxPool", x, outputs=2, storage_order=1, **attributes)[1]
    mean = np.asarray(call("AveragePool", x, **attributes))
    norm = np.asarray(call("LpPool", x, p=3, **attributes))
    assert largest.shape == mean.shape == norm.shape == (1, 2, *outputs)
    for channel in range(2):
        image, offset = x[0, channel], channel * x[0, 0].size
        for out, covered in windows_of(image, kernel, stride, dilation, pads, outputs):
            values = np.array([image[at] for at in covered])
            at = (0, channel, *out)
            row, column = covered[int(values.argmax())]  # the first of equal ones, in the order of the window
            assert largest[at] == values.max()
            assert index[at] == offset + row * size[1] + column
            assert by_column[at] == offset + column * size[0] + row
            np.testing.assert_allclose(mean[at], values.mean(), rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(norm[at], (np.abs(values) ** 3).sum() ** (1 / 3), rtol=1e-5)


def test_average_counts_the_padding_it_is_told_to_but_not_what_ceil_mode_adds():
    x = np.ones((1, 1, 4), np.float32)
    y = call("AveragePool", x, kernel_shape=(3,), strides=(2,), pads=(1, 1), count_include_pad=1, ceil_mode=1)
    # Windows at -1, 1, 3: two elements of three; three; one element, one of padding, one that ceil_mode adds.
    np.testing.assert_allclose(y, [[[2 / 3, 1, 1 / 2]]], rtol=1e-6)


def test_mean_of_half_floats_is_summed_in_float32():
    x = np.full((1, 1, 64, 64), 100, np.float16)
    assert call("AveragePool", x, kernel_shape=(64, 64)).item() == 100


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_max_pool_of_integers_pads_with_the_lowest(dtype):
    x = np.full((1, 1, 2), np.iinfo(dtype).min, dtype)
    y = call("MaxPool", x, kernel_shape=(3,), pads=(1, 1))
    assert y.dtype == dtype and (np.asarray(y) == np.iinfo(dtype).min).all()


def test_pooled_values_have_a_gradient_though_their_indices_have_none():
    pooled = lambda x: call("MaxPool", x, kernel_shape=(2,), strides=(2,), outputs=2)[0].sum()  # noqa: E731
    np.testing.assert_array_equal(jax.grad(pooled)(f32(1, 3, 2, 0).reshape(1, 1, 4)), [[[0, 1, 1, 0]]])


CONVOLUTIONS = [
    dict(),
    dict(strides=(2, 3), pads=(1, 0, 2, 1)),
    dict(dilations=(2, 1), group=2),
    dict(auto_pad="SAME_UPPER", strides=(2, 2)),
    dict(auto_pad="SAME_LOWER", strides=(2, 2)),
    dict(group=4, strides=(2, 1), dilations=(1, 2), pads=(1, 0, 2, 1)),  # depthwise, two filters to a channel
]


def naive_conv(x, w, *, strides=(1, 1), pads=None, dilations=(1, 1), group=1, auto_pad="NOTSET"):
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    if auto_pad != "NOTSET":
        total = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(x.shape[2:], strides, reach, strict=True)]
        front = [t // 2 if auto_pad == "SAME_UPPER" else -(-t // 2) for t in total]
        pads = (*front, *(t - f for t, f in zip(total, front, strict=True)))
    pads = pads or (0, 0, 0, 0)
    x = np.pad(x, [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
    outputs = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, strides, strict=True)]
    y = np.zeros((x.shape[0], w.shape[0], *outputs), x.dtype)
    per = w.shape[0] // group
    for m, i, j in itertools.product(range(w.shape[0]), *map(range, outputs)):
        channels = slice(m // per * w.shape[1], (m // per + 1) * w.shape[1])
        rows = slice(i * strides[0], i * strides[0] + reach[0], dilations[0])
        columns = slice(j * strides[1], j * strides[1] + reach[1], dilations[1])
        y[:, m, i, j] = (x[:, channels, rows, columns] * w[m]).sum((1, 2, 3))
    return y


@pytest.mark.parametrize("attributes", CONVOLUTIONS)
def test_convolution_against_loops(attributes):
    x, w, b = normal(2, 4, 7, 8), normal(8, 4 // attributes.get("group", 1), 3, 2), normal(8)
    expected = naive_conv(x.astype(float), w.astype(float), **attributes) + b.reshape(-1, 1, 1)
    np.testing.assert_allclose(call("Conv", x, w, b, **attributes), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [2, 4])
def test_convolution_of_thin_groups_is_one_loop_on_the_cpu_with_the_same_gradient(group):
    """XLA's own convolution is many times slower there."""
    x, w = normal(2, 4, 7, 8), normal(8, 4 // group, 3, 2)
    attributes = dict(group=group, strides=(2, 1), pads=(1, 0, 2, 1))
    ours = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(call("Conv", x, w, **attributes))), (0, 1)))
    plain = lambda x, w: jax.lax.conv_general_dilated(  # noqa: E731
        x, w, (2, 1), [(1, 2), (0, 1)], feature_group_count=group
    )
    expected = jax.grad(lambda x, w: jnp.sum(jnp.sin(plain(x, w))), (0, 1))(x.astype(float), w.astype(float))
    for got, wanted in zip(ours(x, w), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)  # sums of 100 terms of size 1
    assert "stablehlo.convolution" not in ours.lower(x, w).as_text()
    np.testing.assert_allclose(
        jax.vmap(plain)(x[None], w[None]), [call("Conv", x, w, **attributes)], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("attributes", CONVOLUTIONS)
@pytest.mark.parametrize("types", [(np.uint8, np.int8), (np.int8, np.uint8)])
def test_integer_convolution_is_exact_with_zero_points_and_padding(attributes, types):
    low, high = map(np.iinfo, types)
    x = RNG.choice([low.min, low.max, 3], (1, 4, 7, 8)).astype(types[0])
    w = RNG.choice([high.min, high.max, 5], (8, 4 // attributes.get("group", 1), 3, 2)).astype(types[1])
    x_zero, w_zero = np.array(77, types[0]), RNG.integers(high.min, high.max, 8).astype(types[1])
    wide = naive_conv(x.astype(int) - 77, w.astype(int) - w_zero.astype(int).reshape(-1, 1, 1, 1), **attributes)
    y = jax.jit(lambda *v: call("ConvInteger", *v, **attributes))(x, w, x_zero, w_zero)
    assert y.dtype == np.int32
    np.testing.assert_array_equal(y, wide)


@pytest.mark.parametrize(
    "attributes",
    [
        dict(),
        dict(strides=(2, 3), pads=(1, 0, 2, 1), output_padding=(1, 2)),
        dict(dilations=(2, 1), group=2),
        dict(pads=(3, 0, 3, 0)),  # more than the kernel reaches: the input's border is cut off
    ],
)
def test_transposed_convolution_is_the_adjoint_of_convolution(attributes):
    x, w = normal(2, 6, 5, 4), normal(6, 4 // attributes.get("group", 1), 3, 2)
    y = np.asarray(call("ConvTranspose", x, w, **attributes), np.float64)
    other = normal(*y.shape).astype(float)
    conv = {k: v for k, v in attributes.items() if k != "output_padding"}
    back = naive_conv(other, w.astype(float), **conv)[:, :, :5, :4]
    np.testing.assert_allclose((y * other).sum(), (x * back).sum(), rtol=1e-4)


def test_output_shape_decides_the_padding():
    x, w = normal(1, 1, 3, 3), normal(1, 1, 3, 3)
    full = np.asarray(call("ConvTranspose", x, w, strides=(2, 2)))  # 7 x 7
    lower = call("ConvTranspose", x, w, strides=(2, 2), output_shape=(6, 6))
    upper = call("ConvTranspose", x, w, strides=(2, 2), output_shape=(6, 6), auto_pad="SAME_UPPER")
    np.testing.assert_allclose(lower, full[:, :, 1:, 1:], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(upper, full[:, :, :-1, :-1], rtol=1e-5, atol=1e-6)


def test_deformable_convolution_with_whole_offsets_reads_shifted_elements():
    x, w = normal(1, 2, 6, 6), normal(3, 2, 3, 3)
    offset = np.zeros((1, 18, 4, 4), np.float32)
    offset[:, 1::2] = 1  # one column to the right; the last column reads zeros
    shifted = np.pad(x, [(0, 0), (0, 0), (0, 0), (0, 1)])[..., 1:]
    expected = naive_conv(shifted.astype(float), w.astype(float))
    np.testing.assert_allclose(call("DeformConv", x, w, offset), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_traced_regions_are_sampled_as_known_ones(mode):
    x, rois, images = normal(2, 3, 9, 9), f32(0, 0, 8, 5, 2, 1, 3, 9).reshape(2, 4), np.array([0, 1])
    align = lambda rois: call("RoiAlign", x, rois, images, output_height=2, output_width=2, mode=mode)  # noqa: E731
    np.testing.assert_allclose(jax.jit(align)(rois), align(rois), rtol=1e-5)
    # Regions 4 x 2.5 and 0.5 x 4 elements to a bin: 4 x 3 and 1 x 4 points.
    first = lambda r, **k: np.asarray(call("RoiAlign", x, rois[r : r + 1], images[r : r + 1], mode=mode, **k))  # noqa: E731
    sampled = first(1, output_height=2, output_width=1, sampling_ratio=0)
    assert sampled.shape == (1, 3, 2, 1) and np.isfinite(sampled).all()


def test_max_roi_pool_of_whole_bins():
    x = np.arange(36, dtype=np.float32).reshape(1, 1, 6, 6)
    y = call("MaxRoiPool", x, f32(0, 0, 0, 3, 3).reshape(1, 5), pooled_shape=(2, 2))
    np.testing.assert_array_equal(y[0, 0], [[7, 9], [19, 21]])


# --- norms ------------------------------------------------------------------------------------------------------------


def test_batch_norm_in_training_moves_the_running_statistics():
    x, (scale, bias, mean, variance) = normal(4, 3, 5), (np.abs(normal(3)) + 0.1 for _ in range(4))
    wide = x.astype(float)
    m, v = wide.mean((0, 2)), wide.var((0, 2))
    expected = (wide - m[:, None]) / np.sqrt(v + 1e-5)[:, None] * scale[:, None] + bias[:, None]
    y, new_mean, new_variance = call(
        "BatchNormalization", x, scale, bias, mean, variance, opset=15, outputs=3, training_mode=1, momentum=0.7
    )
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new_mean, 0.7 * mean + 0.3 * m, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new_variance, 0.7 * variance + 0.3 * v, rtol=1e-5)
    old = call("BatchNormalization", x, scale, bias, mean, variance, opset=9, outputs=5, momentum=0.7)
    np.testing.assert_allclose(old[1], new_mean, rtol=1e-6)
    np.testing.assert_allclose(old[4], v, rtol=1e-5)
    inference = call("BatchNormalization", x, scale, bias, mean, variance, opset=9)
    by_hand = (wide - mean[:, None]) / np.sqrt(variance + 1e-5)[:, None] * scale[:, None] + bias[:, None]
    np.testing.assert_allclose(inference, by_hand, rtol=1e-4, atol=1e-5)


def test_batch_norm_without_spatial_has_statistics_of_each_element():
    x, (scale, bias, mean, variance) = normal(2, 3, 2), (np.abs(normal(3, 2)) for _ in range(4))
    y = call("BatchNormalization", x, scale, bias, mean, variance, opset=7, spatial=0)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 1e-5) * scale + bias, rtol=1e-4, atol=1e-5)


def test_scale_of_group_norm_is_by_group_until_opset_21():
    x, scale, bias = normal(2, 4, 3), f32(1, 2), f32(0, 1)
    groups = x.astype(float).reshape(2, 2, 6)
    y = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
    y = y.reshape(2, 4, 3) * np.repeat(scale, 2)[:, None] + np.repeat(bias, 2)[:, None]
    np.testing.assert_allclose(call("GroupNormalization", x, scale, bias, num_groups=2, opset=18), y, atol=1e-5)
    by_channel = call("GroupNormalization", x, np.repeat(scale, 2), np.repeat(bias, 2), num_groups=2, opset=21)
    np.testing.assert_allclose(by_channel, y, atol=1e-5)


def test_lp_norm_of_zeros_is_zero_with_a_finite_gradient():
    x = f32(0, 0, 3, 4).reshape(2, 2)
    np.testing.assert_allclose(call("LpNormalization", x), [[0, 0], [0.6, 0.8]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: call("LpNormalization", x).sum())(x)).all()


def test_dropout_scales_what_it_keeps_and_repeats_itself():
    x = np.ones((100, 100), np.float32)
    train = lambda on: call("Dropout", x, np.float32(0.25), on, outputs=2)  # noqa: E731
    y, mask = map(np.asarray, train(np.bool_(True)))
    np.testing.assert_allclose(y, np.where(mask, 4 / 3, 0), rtol=1e-6)
    assert abs(mask.mean() - 0.75) < 0.02  # 4.6 standard deviations of 10000 draws
    np.testing.assert_array_equal(train(np.bool_(True))[0], y)
    traced = jax.jit(train)
    np.testing.assert_array_equal(traced(True)[0], y)
    np.testing.assert_array_equal(traced(False)[0], x)
    assert traced(False)[1].all()


# --- attention --------------------------------------------------------------------------------------------------------


def naive_attention(q, k, v, allowed=None, bias=0.0, scale=None):
    q, k, v = (x.astype(float) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    logits = q @ np.swapaxes(k, 2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    allowed = np.broadcast_to(True if allowed is None else allowed, logits.shape) & (logits > -np.inf)
    weights = np.where(allowed, np.exp(logits), 0)
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total == 0, 1, total) @ v


Q, K, V = normal(2, 4, 3, 8), normal(2, 2, 5, 8), normal(2, 2, 5, 6)
POSITIONS = np.arange(5)[None, :] - np.arange(3)[:, None]


@pytest.mark.parametrize(
    "attributes, allowed",
    [
        (dict(), None),
        (dict(is_causal=1), POSITIONS <= 0),
        (dict(left_window_size=1, right_window_size=0), (POSITIONS >= -1) & (POSITIONS <= 0)),
        (dict(left_window_size=0, is_causal=1, scale=-0.5), POSITIONS == 0),
    ],
)
def test_attention_against_numpy(attributes, allowed):
    expected = naive_attention(Q, K, V, allowed, scale=attributes.get("scale"))
    np.testing.assert_allclose(call("Attention", Q, K, V, **attributes), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_without_keys_gives_zeros_and_finite_gradients(kind):
    allowed = RNG.random((2, 1, 3, 5)) < 0.6
    allowed[0, 0, 1] = False
    mask = allowed if kind == "bool" else np.where(allowed, np.float32(0.5), np.float32(-np.inf))
    expected = naive_attention(Q, K, V, allowed)
    np.testing.assert_allclose(call("Attention", Q, K, V, mask), expected, rtol=1e-5, atol=1e-6)
    assert not expected[0, :, 1].any()
    gradients = jax.grad(lambda *v: call("Attention", *v, mask).sum(), (0, 1, 2))(Q, K, V)
    assert all(np.isfinite(g).all() for g in gradients)
    assert not np.asarray(gradients[0])[0, :, 1].any()


def test_a_cache_of_keys_moves_the_causal_frontier():
    y, key, value = call(
        "Attention", Q, K[:, :, 3:], V[:, :, 3:], None, K[:, :, :3], V[:, :, :3], outputs=3, is_causal=1
    )
    np.testing.assert_allclose(y, naive_attention(Q, K, V, POSITIONS <= 3), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(key, K)
    np.testing.assert_array_equal(value, V)


def test_lengths_of_a_cache_hide_the_keys_behind_and_queries_before_it():
    lengths = np.array([5, 2])
    allowed = np.stack([n - 3 >= POSITIONS for n in lengths])[:, None] & (np.arange(5) < lengths.reshape(2, 1, 1, 1))
    y = call("Attention", Q, K, V, None, None, None, lengths, is_causal=1)
    np.testing.assert_allclose(y, naive_attention(Q, K, V, allowed), rtol=1e-5, atol=1e-6)
    assert not np.asarray(y)[1, :, 0].any()  # with two keys and three queries the first has none


def test_heads_may_come_flat_and_masks_short():
    flat = [np.swapaxes(x, 1, 2).reshape(2, x.shape[2], -1) for x in (Q, K, V)]
    mask = np.ones((3, 4), bool)  # of 5 keys: the last is not seen
    y = call("Attention", *flat, mask, q_num_heads=4, kv_num_heads=2)
    expected = naive_attention(Q, K[:, :, :4], V[:, :, :4])
    np.testing.assert_allclose(y, np.swapaxes(expected, 1, 2).reshape(2, 3, 24), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotation_keeps_lengths_and_depends_on_distances_only(interleaved):
    angle = np.arange(6)[:, None] * f32(1, 0.1)
    cos, sin = np.cos(angle)[None], np.sin(angle)[None]  # one row for all of the batch
    x = np.broadcast_to(normal(2, 3, 1, 4), (2, 3, 6, 4))
    y = np.asarray(call("RotaryEmbedding", x, cos, sin, interleaved=interleaved))
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    scores = y @ np.swapaxes(y, 2, 3)
    np.testing.assert_allclose(scores[:, :, :-1, :-1], scores[:, :, 1:, 1:], rtol=1e-4, atol=1e-5)
    by_position = call(
        "RotaryEmbedding", x, cos[0], sin[0], np.broadcast_to(np.arange(6), (2, 6)), interleaved=interleaved
    )
    np.testing.assert_allclose(by_position, y, rtol=1e-6)


def test_convolution_with_weights_of_one_value():
    """Followed by a mean over pixels; compiled more than once, because what was wrong differed."""
    nodes = [
        node("ConstantOfShape", ["s"], ["w"], value=onnx.helper.make_tensor("v", FLOAT, [1], [0.02])),
        node("Conv", ["x", "w"], ["c"]),
        node("Relu", ["c"], ["r"]),
        node("GlobalAveragePool", ["r"], ["y"]),
    ]
    proto = model(nodes, [info("x", FLOAT, [1, 512, 13, 13])], s=i64(1000, 512, 1, 1))
    x = np.random.default_rng(0).normal(size=(1, 512, 13, 13)).astype(np.float32)
    wanted = np.maximum(0.02 * x.sum(1), 0).mean()
    for _ in range(3):
        (y,) = zenith_onnx.load(proto)(x)
        np.testing.assert_allclose(y, np.full((1, 1000, 1, 1), wanted), rtol=1e-4)
