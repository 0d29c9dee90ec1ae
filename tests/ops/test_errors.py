"""Wrong calls of the ops: an exception that names the op, the invariant, what came and what to do."""

from __future__ import annotations

import functools as ft

import jax
import jax.numpy as jnp
import pytest

from zenith_jax import ops
from zenith_jax.errors import DTypeError, ShapeError

f32 = ft.partial(jnp.zeros, dtype=jnp.float32)
WRONG = {
    "layer_norm: scale": (
        ShapeError,
        lambda: ops.layer_norm(f32((2, 5, 8)), f32(7)),
        "layer_norm: scale must have shape (8,) to match x of shape (2, 5, 8), got (7,)",
    ),
    "layer_norm: bias": (
        ShapeError,
        lambda: ops.layer_norm(f32((2, 8)), f32(8), f32((1, 8))),
        "layer_norm: bias must have shape (8,) to match x of shape (2, 8), got (1, 8)",
    ),
    "layer_norm: rank": (ShapeError, lambda: ops.layer_norm(f32(())), "layer_norm: x must have at least one axis"),
    "layer_norm: dtype": (
        DTypeError,
        lambda: ops.layer_norm(jnp.zeros((2, 8), jnp.int32)),
        "layer_norm: x must have a real floating dtype, got int32; convert it first",
    ),
    "rms_norm: complex": (
        DTypeError,
        lambda: ops.rms_norm(jnp.zeros((2, 8), jnp.complex64)),
        "rms_norm: x must have a real floating dtype, got complex64",
    ),
    "add_layer_norm: residual": (
        ShapeError,
        lambda: ops.add_layer_norm(f32((2, 8)), f32((8,))),
        "residual must have the shape and dtype of x, (2, 8) float32, got (8,) float32",
    ),
    "add_rms_norm: dtype": (
        ShapeError,
        lambda: ops.add_rms_norm(f32((2, 8)), jnp.zeros((2, 8), jnp.bfloat16)),
        "got (2, 8) bfloat16",
    ),
    "group_norm: groups": (
        ShapeError,
        lambda: ops.group_norm(f32((2, 5, 8)), groups=3),
        "group_norm: groups must divide the 8 channels of axis 2 of x, of shape (2, 5, 8), got 3",
    ),
    "group_norm: scale": (
        ShapeError,
        lambda: ops.group_norm(f32((2, 8, 5)), f32(5), groups=2, channel_axis=1),
        "group_norm: scale must have shape (8,) to match x of shape (2, 8, 5), got (5,)",
    ),
    "group_norm: axis": (
        ShapeError,
        lambda: ops.group_norm(f32((8, 5, 5)), groups=2, channel_axis=0),
        "channel_axis must be one of the axes 1 to 2 of x, of shape (8, 5, 5), whose axis 0 is the batch, got 0",
    ),
    "group_norm: rank": (
        ShapeError,
        lambda: ops.group_norm(f32(8), groups=2),
        "x must have a batch axis and a channel axis, got shape (8,)",
    ),
    "group_norm: activation": (
        ValueError,
        lambda: ops.group_norm(f32((2, 8)), groups=2, activation="relu"),
        "activation must be None or one of ['none', 'silu'], got 'relu'",
    ),
    "group_norm: dtype": (
        DTypeError,
        lambda: ops.group_norm(jnp.zeros((2, 8), jnp.int32), groups=2),
        "group_norm: x must have a real floating dtype, got int32; convert it first",
    ),
    "softmax: axis": (
        ShapeError,
        lambda: ops.softmax(f32((2, 8)), axis=2),
        "softmax: axis must be in [-2, 2) for x of shape (2, 8), got 2",
    ),
    "softmax: dtype": (DTypeError, lambda: ops.softmax(jnp.zeros((2, 8), bool)), "softmax: x must have a real"),
    "gelu: dtype": (DTypeError, lambda: ops.gelu(jnp.zeros(3, jnp.int8)), "gelu_tanh: x must have a real floating"),
    "gated_activation: shapes": (
        ShapeError,
        lambda: ops.gated_activation(f32((2, 3)), f32((2, 4))),
        "gate and value must have one shape and dtype, got (2, 3) float32 and (2, 4) float32",
    ),
    "gated_activation: name": (
        ValueError,
        lambda: ops.gated_activation(f32(3), f32(3), activation="relu"),
        "activation must be one of gelu_erf, gelu_tanh, silu, got 'relu'",
    ),
    "gated_activation_of_halves: odd": (
        ShapeError,
        lambda: ops.gated_activation_of_halves(f32((2, 3))),
        "the last axis of x must be even and gate_half 0 or 1, got (2, 3) and 0",
    ),
    "quantized_linear: weights": (
        DTypeError,
        lambda: ops.quantized_linear(f32((2, 3)), f32((3, 4)), f32(4)),
        "quantized_linear: w must be int8 or int4, got float32",
    ),
    "quantized_linear: layout": (
        ShapeError,
        lambda: ops.quantized_linear(f32((2, 3)), jnp.zeros((3, 4), jnp.int8), f32(4), transposed=True),
        "w must have shape (n, k) to match x of shape (*b, k), got x (2, 3) and w (3, 4)",
    ),
    "quantized_linear: scale": (
        ShapeError,
        lambda: ops.quantized_linear(f32((2, 3)), jnp.zeros((3, 4), jnp.int8), f32((2, 4))),
        "scale must have shape (4,), or (g, 4) where g divides 3, got (2, 4)",
    ),
    "quantized_linear: bias": (
        ShapeError,
        lambda: ops.quantized_linear(f32((2, 3)), jnp.zeros((3, 4), jnp.int8), f32(4), f32(3)),
        "bias must have shape (4,), got (3,)",
    ),
    "rope: odd": (
        ShapeError,
        lambda: ops.rope(f32((2, 3)), f32(1), f32(1)),
        "an even number of x's last axis must be rotated, got x (2, 3) and rotary_dim None",
    ),
    "rope: width": (
        ShapeError,
        lambda: ops.rope(f32((2, 8)), f32(2), f32(2)),
        "the last axis of cos and sin must be 4, a coefficient for each pair, or 8, one for each feature; got cos (2,)",
    ),
    "rope: batch": (
        ShapeError,
        lambda: ops.rope(f32((2, 5, 3, 8)), f32((5, 4)), f32((5, 4))),
        "cos (5, 4) and sin (5, 4) for x (2, 5, 3, 8); is an axis of heads missing, cos[:, None]?",
    ),
    "rope: dtype": (
        DTypeError,
        lambda: ops.rope(jnp.zeros((2, 8), jnp.int32), f32(4), f32(4)),
        "rope: x must have a real floating dtype, got int32; convert it first",
    ),
    "silu: dtype": (DTypeError, lambda: ops.silu(jnp.zeros(3, jnp.uint8)), "silu: x must have a real floating"),
    "attention: rank": (
        ShapeError,
        lambda: ops.attention(f32((2, 4)), f32((2, 4)), f32((2, 4))),
        "attention: query, key and value must have rank 4 (or all rank 3), got shapes (2, 4)",
    ),
    "attention: features": (
        ShapeError,
        lambda: ops.attention(f32((1, 3, 2, 4)), f32((1, 3, 2, 5)), f32((1, 3, 2, 4))),
        "must have the same number of features, got query (1, 3, 2, 4) and key (1, 3, 2, 5)",
    ),
    "attention: lengths": (
        ShapeError,
        lambda: ops.attention(f32((1, 3, 2, 4)), f32((1, 5, 2, 4)), f32((1, 6, 2, 4))),
        "key and value must agree in batch, length and heads",
    ),
    "attention: batch": (
        ShapeError,
        lambda: ops.attention(f32((1, 3, 2, 4)), f32((2, 5, 2, 4)), f32((2, 5, 2, 4))),
        "query and key must agree in batch",
    ),
    "attention: heads": (
        ShapeError,
        lambda: ops.attention(f32((1, 3, 3, 4)), f32((1, 5, 2, 4)), f32((1, 5, 2, 4))),
        "must be a multiple of the key/value heads",
    ),
    "attention: mask": (
        ShapeError,
        lambda: ops.attention(*[f32((1, 3, 2, 4))] * 3, mask=jnp.ones((1, 2, 3, 4), bool)),
        "mask must be broadcastable to (batch, heads, query length, key length) = (1, 2, 3, 3), got",
    ),
    "attention: mask dtype": (
        DTypeError,
        lambda: ops.attention(*[f32((1, 3, 2, 4))] * 3, mask=f32((1, 2, 3, 3))),
        "mask must be bool (True = attend), got float32; an additive mask is a bias",
    ),
    "attention: bias": (
        DTypeError,
        lambda: ops.attention(*[f32((1, 3, 2, 4))] * 3, bias=jnp.ones((3, 3), bool)),
        "bias must have a real floating dtype, got bool",
    ),
    "attention: dtypes": (
        DTypeError,
        lambda: ops.attention(f32((1, 3, 2, 4)), *[jnp.zeros((1, 3, 2, 4), jnp.bfloat16)] * 2),
        "must have one real floating dtype, got float32, bfloat16, bfloat16; convert them first",
    ),
    "attention: window": (
        ShapeError,
        lambda: ops.attention(*[f32((1, 3, 2, 4))] * 3, local_window_size=(-1, 0)),
        "local_window_size must not be negative, got (-1, 0)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call_names_op_invariant_and_what_came(name):
    error, call, text = WRONG[name]
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)
    with pytest.raises(error):
        jax.jit(call)()
