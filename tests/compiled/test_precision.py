"""zenith.compile(precision=): parameters and computation narrower, inputs and outputs as before."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import zenith_jax as zenith
from zenith_jax.errors import FrontendError

X = np.sin(np.arange(3 * 8, dtype=np.float32)).reshape(3, 8)
PARAMS = {"w": jnp.cos(jnp.arange(8 * 4.0)).reshape(8, 4), "table": jnp.arange(4)}


def apply(params, x):
    logits = x @ params["w"]
    return {
        "p": jax.nn.softmax(logits),
        "best": logits.argmax(-1),
        "dtype": str(logits.dtype),
        "table": params["table"],
    }


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", jnp.bfloat16), ("f16", jnp.float16)])
def test_computation_is_narrow_and_the_interface_is_not(precision, dtype):
    compiled = zenith.compile((apply, PARAMS), X, precision=precision)
    got, want = compiled(X), apply(PARAMS, X)
    assert got["dtype"] == jnp.dtype(dtype).name
    assert compiled.params["w"].dtype == dtype
    assert compiled.params["table"].dtype == PARAMS["table"].dtype
    assert got["p"].dtype == jnp.float32
    # A sum of 8 products of numbers up to 1, each rounded to the dtype, and its exponential.
    bound = 8 * float(jnp.finfo(dtype).eps)
    assert 0 < np.max(np.abs(got["p"] - want["p"])) < bound
    assert compiled.precision == precision


def test_an_nnx_module_is_cast_too():
    module = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    compiled = zenith.compile(module, X, precision="bf16", dynamic={"batch": (2, 4)})
    got = compiled(X)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, module(X), atol=0.05)
    assert {p.dtype for p in compiled.parameters.values()} == {jnp.dtype(jnp.bfloat16)}
    assert module.kernel.get_value().dtype == jnp.float32


def test_results_out_of_range_are_refused():
    with pytest.raises(FrontendError, match=r"finite in the model's own dtype and not in f16: the range"):
        zenith.compile(lambda x: x * 1e4 * 1e4 * 1e-4, X + 2, precision="f16")
    assert zenith.compile(lambda x: x * 1e4 * 1e4 * 1e-4, X + 2, precision="bf16")(X).shape == (3, 8)
    zenith.compile(lambda x: jnp.log(x), -X * X, precision="f16")  # not finite before either
