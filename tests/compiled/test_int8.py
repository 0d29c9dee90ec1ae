"""zenith.compile(precision="int8"): which matrices have 8 bits, and by how much results may change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zenith_jax as zenith
from zenith_jax.compiled.int8 import quantized
from zenith_jax.errors import FrontendError

RNG = np.random.default_rng(0)
X = np.float32(RNG.normal(size=(3, 64)))
W = np.float32(RNG.normal(size=(64, 96)) * np.exp(RNG.normal(size=96)))  # columns of unlike sizes


def test_no_result_of_a_layer_changes_by_more_than_the_bound():
    model = zenith.compile(
        (lambda p, x: x @ p["w"] + p["b"], {"w": W, "b": np.ones(96, np.float32)}), X, precision="int8"
    )
    exact = X.astype(np.float64) @ W + 1
    half_step = np.abs(W).max(0) / 254
    bound = np.abs(X).sum(1)[:, None] * half_step
    change = np.abs(np.asarray(model(X)) - exact)
    rounding = 64 * np.finfo(np.float32).eps * (np.abs(X) @ np.abs(W))
    assert (change <= bound + rounding).all()
    assert (change / bound).max() > 0.01  # it is a bound of this, and not of something far larger
    assert model.params["w"]["int8"].dtype == jnp.int8 and model.params["w"]["scale"].shape == (1, 96)
    assert model.parameters["b"].dtype == jnp.float32
    (matrix,) = model.report.narrowed
    lost = np.asarray(model.params["w"]["int8"]) * np.asarray(model.params["w"]["scale"]) - W
    assert matrix.error == pytest.approx(np.sqrt((lost**2).mean() / (W**2).mean()), rel=1e-3)
    assert "1 of 1 matrices are int8" in str(model.report) and "int8, error" in str(model.report)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(70, 64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
        self.conv = nnx.Conv(64, 64, (3,), rngs=rngs)
        self.head = nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        return self.head(self.conv(x + self.attention(x)))


def test_only_dense_layers_are_quantised_and_the_report_says_why_not_the_others(tmp_path):
    module = Model(nnx.Rngs(0))
    module.eval()
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    model = zenith.compile(module, ids, precision="int8", dynamic={"batch": (2, 4)})
    became = {n.name.removesuffix(".value"): n.reason or "int8" for n in model.report.narrowed}
    assert became["attention.query.kernel"] == became["attention.out.kernel"] == "int8"
    assert "gather" in became["embed.embedding"]
    assert "conv_general_dilated" in became["conv.kernel"]
    assert became["head.kernel"] == "512 numbers are too few to be worth it"
    want = module(ids)
    np.testing.assert_allclose(model(ids), want, atol=0.02 * float(jnp.abs(want).max()))
    loaded = zenith.load(model.save(tmp_path / "m.zenith"))
    np.testing.assert_array_equal(loaded(ids), model(ids))
    assert loaded.report.narrowed == model.report.narrowed and loaded.precision == "int8"
    # The head of 64 x 3 of 8 bits in place of 4 x 64 x 64 of 32 bits.
    assert (
        sum(p.nbytes for p in loaded.parameters.values())
        < sum(p.nbytes for p in jax.tree.leaves(nnx.state(module))) / 1.4
    )


def tied(p, x):
    return jnp.take(p["w"], jnp.arange(3), axis=0) @ p["w"].T + x @ p["w"].T


def stacked(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]


SQUARE = np.float32(RNG.normal(size=(64, 64)))


@pytest.mark.parametrize(
    ("function", "w", "reason"),
    [
        (lambda p, x: x @ (p["w"] @ p["w"]), SQUARE, "multiplied with another parameter"),
        (lambda p, x: x @ p["w"] + x @ p["w"].T, SQUARE, "products sum over different dimensions"),
        (lambda p, x: x @ p["w"] + p["w"].sum(0), SQUARE, "it is read by reduce_sum"),
        (lambda p, x: (x @ p["w"], p["w"]), SQUARE, "it is a result"),
        (tied, SQUARE, "it is read by gather"),
        (stacked, np.stack([SQUARE, SQUARE]), "it is read by scan"),
        (lambda p, x: jnp.einsum("bd,edf->ebf", x, p["w"]) * jnp.einsum("ebd,edf->ebf", jnp.stack([x] * 2), p["w"]),
         np.stack([SQUARE, SQUARE]), "one of a batch of products"),
        (lambda p, x: x @ p["w"], np.where(SQUARE > 3, np.inf, SQUARE), "an infinity or a NaN"),
        (lambda p, x: x * 2, SQUARE, "nothing reads it"),
    ],
)  # fmt: skip
def test_what_is_no_dense_layer_stays_a_float(function, w, reason):
    with pytest.raises(FrontendError, match=f"no matrix of a dense layer .*{reason}"):
        zenith.compile((function, {"w": w}), X, precision="int8")


@pytest.mark.parametrize(
    ("function", "shape", "summed"),
    [
        (lambda p, x: x @ p["w"].T, (96, 64), (1,)),
        (lambda p, x: jnp.einsum("bd,hkd->bhk", x, p["w"]), (4, 32, 64), (2,)),
        (lambda p, x: jnp.einsum("bhd,hdn->bn", x.reshape(3, 4, 16), p["w"]), (4, 16, 96), (0, 1)),
        (lambda p, x: x @ p["w"].reshape(64, 96), (4, 16, 96), (0, 1)),
        (lambda p, x: p["w"] @ x.T, (96, 64), (1,)),
    ],
)
def test_scales_run_along_what_is_not_summed(function, shape, summed):
    w = np.float32(RNG.normal(size=shape))
    model = zenith.compile((function, {"w": w}), X, precision="int8")
    assert model.params["w"]["scale"].shape == tuple(1 if d in summed else n for d, n in enumerate(shape))
    want = np.asarray(function({"w": w}, X))
    np.testing.assert_allclose(model(X), want, atol=0.02 * np.abs(want).max())


def test_extremes_of_a_matrix():
    w = np.array([[0.0, 3e-45, -1.0, 3e38], [0.0, -3e-45, 0.25, -3e38]], np.float32)
    q, scale, error = quantized(w, (0,))
    np.testing.assert_array_equal(q, [[0, 0, -127, 127], [0, 0, 32, -127]])
    assert scale[0, :2].tolist() == [0, 0] and np.isfinite(scale).all() and 0 <= error < 0.01


def test_narrow_weights_and_other_sources_keep_their_dtypes():
    w = jnp.asarray(W, jnp.bfloat16)
    model = zenith.compile((lambda p, x: x.astype(jnp.bfloat16) @ p, w), X, precision="int8")
    assert model(X).dtype == jnp.bfloat16
    assert model.parameters and {p.dtype.name for p in model.parameters.values()} == {"int8", "float32"}
