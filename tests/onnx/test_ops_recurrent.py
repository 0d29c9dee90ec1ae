"""RNN, GRU and LSTM where the official suite is silent: lengths, directions, peepholes, against loops in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx_nodes import call, f32

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def naive_lstm(x, w, r, b, p, h, c):
    """One sequence (t, i), one direction; the equations of onnx__LSTM.html."""
    n, outputs = r.shape[1], []
    for step in x:
        gates = w @ step + r @ h + b[: 4 * n] + b[4 * n :]
        i, f = sigmoid(gates[:n] + p[:n] * c), sigmoid(gates[2 * n : 3 * n] + p[2 * n :] * c)
        c = f * c + i * np.tanh(gates[3 * n :])
        h = sigmoid(gates[n : 2 * n] + p[n : 2 * n] * c) * np.tanh(c)
        outputs.append(h)
    return outputs, h, c


def naive_gru(x, w, r, b, linear_before_reset, h):
    n, outputs = r.shape[1], []
    wb, rb = b[: 3 * n], b[3 * n :]
    for step in x:
        z, reset = (sigmoid((w @ step + r @ h + wb + rb)[s]) for s in (slice(n), slice(n, 2 * n)))
        last = slice(2 * n, None)
        inner = reset * (r[last] @ h + rb[last]) if linear_before_reset else r[last] @ (reset * h) + rb[last]
        h = (1 - z) * np.tanh(w[last] @ step + wb[last] + inner) + z * h
        outputs.append(h)
    return outputs, h


LENGTHS = np.array([4, 2, 0], np.int32)


def both_directions(x, run):
    """(t, 2, b, n) and the final states of `run(sequence, direction, batch index)` over each sequence's own length."""
    outputs, finals = np.zeros((x.shape[0], 2, x.shape[1], 5)), {}
    for direction, index in itertools.product(range(2), range(x.shape[1])):
        sequence = x[: LENGTHS[index], index]
        ys, *final = run(sequence[::-1] if direction else sequence, direction, index)
        for t, y in enumerate(reversed(ys) if direction else ys):
            outputs[t, direction, index] = y
        finals[direction, index] = final
    return outputs, finals


@pytest.mark.parametrize("layout", [0, 1])
def test_lstm_of_two_directions_with_lengths_and_peepholes(layout):
    x, w, r, b, p = normal(4, 3, 2), normal(2, 20, 2), normal(2, 20, 5), normal(2, 40), normal(2, 15)
    h, c = normal(2, 3, 5), normal(2, 3, 5)
    wide = [v.astype(float) for v in (w, r, b, p)]
    run = lambda s, d, i: naive_lstm(s, *(v[d] for v in wide), h[d, i].astype(float), c[d, i].astype(float))  # noqa: E731
    expected, finals = both_directions(x.astype(float), run)
    swap = (lambda v: np.swapaxes(v, 0, 1)) if layout else (lambda v: v)
    y, last_h, last_c = map(
        np.asarray,
        call(
            "LSTM", swap(x), w, r, b, LENGTHS, swap(h), swap(c), p, direction="bidirectional", layout=layout, outputs=3
        ),
    )
    y = np.transpose(y, (1, 2, 0, 3)) if layout else y
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    for (direction, index), (final_h, final_c) in finals.items():
        np.testing.assert_allclose(swap(last_h)[direction, index], final_h, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(swap(last_c)[direction, index], final_c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("linear_before_reset", [0, 1])
def test_gru_of_two_directions_with_lengths(linear_before_reset):
    x, w, r, b, h = normal(4, 3, 2), normal(2, 15, 2), normal(2, 15, 5), normal(2, 30), normal(2, 3, 5)
    wide = [v.astype(float) for v in (w, r, b)]
    run = lambda s, d, i: naive_gru(s, *(v[d] for v in wide), linear_before_reset, h[d, i].astype(float))  # noqa: E731
    expected, finals = both_directions(x.astype(float), run)
    y, last = call(
        "GRU", x, w, r, b, LENGTHS, h, direction="bidirectional", linear_before_reset=linear_before_reset, outputs=2
    )
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    for (direction, index), (final,) in finals.items():
        np.testing.assert_allclose(np.asarray(last)[direction, index], final, rtol=1e-4, atol=1e-5)


def test_parameters_of_activations_are_taken_in_turn_and_clip_is_before_them():
    x, w, r = f32(2).reshape(1, 1, 1), f32(1, 3).reshape(2, 1, 1), np.zeros((2, 1, 1), np.float32)
    y = call(
        "RNN",
        x,
        w,
        r,
        direction="bidirectional",
        activations=("Affine", "LeakyRelu"),
        activation_alpha=(0.5, 0.1),
        activation_beta=(1.0,),
        clip=4.0,
    )
    np.testing.assert_allclose(np.asarray(y).reshape(-1), [0.5 * 2 + 1, 4])


def test_recurrences_are_differentiable_with_finite_gradients():
    x, w, r = normal(3, 2, 2), normal(1, 20, 2), normal(1, 20, 5)
    gradient = jax.grad(lambda w: call("LSTM", x, w, r, jnp.zeros((1, 40)), LENGTHS[:2] - 1).sum())(w)
    assert np.isfinite(gradient).all() and np.asarray(gradient).any()
