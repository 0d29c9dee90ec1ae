"""zenith.compile's modes: least host work a call, and measured choices that are kept on disk."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh_process import run_script

import zenith_jax as zenith
from zenith_jax.compiled import program
from zenith_jax.errors import InputError
from zenith_jax.ir import _compat

X = np.sin(np.arange(3 * 8, dtype=np.float32)).reshape(3, 8)
PARAMS = {"w": jnp.cos(jnp.arange(8 * 1024.0)).reshape(8, 1024), "b": jnp.arange(1024.0), "unused": jnp.ones((99, 99))}


def apply(params, x, y):
    return {"p": jax.nn.softmax(x @ params["w"] + params["b"]), "y": y}


def test_least_overhead_answers_as_the_default(tmp_path):
    want = zenith.compile((apply, PARAMS), X, X)(X, X)
    compiled = zenith.compile((apply, PARAMS), X, X, mode="reduce-overhead")
    for x in (X, jnp.asarray(X), jax.device_put(X, jax.devices()[-1])):
        got = compiled(x, X)
        np.testing.assert_allclose(got["p"], want["p"], atol=1e-6)
        np.testing.assert_array_equal(got["y"], X)
    loaded = zenith.load(compiled.save(tmp_path / "m.zenith"))
    assert loaded.mode == "reduce-overhead"
    np.testing.assert_allclose(loaded(X, X)["p"], want["p"], atol=1e-6)
    assert loaded.params["b"].shape == (1024,)


def test_least_overhead_calls_the_runtime_directly():
    compiled = jax.jit(lambda params, inputs: [params[0] + inputs[1]]).lower([X], [X, X]).compile()
    direct = _compat.direct_execution(compiled, [jnp.asarray(X)])
    assert direct is not None, "this JAX has other internals: see ir/_compat.py"
    np.testing.assert_array_equal(direct([jnp.zeros_like(X), jnp.asarray(X)])[0], X + X)


def test_direct_calls_let_go_of_what_the_runtime_puts_aside(monkeypatch):
    """Also in a loop in which Python's collector never starts."""
    collected = []
    monkeypatch.setattr(_compat._jax, "collect_garbage", lambda: collected.append(1))
    read = jax.jit(lambda params, inputs: [params[0] + x for x in inputs]).lower([X], [X, X]).compile()
    unused = jax.jit(lambda params, inputs: [params[0] + inputs[1]]).lower([X], [X, X]).compile()
    for compiled in (read, unused):
        direct = _compat.direct_execution(compiled, [jnp.asarray(X)])
        assert direct is not None
        collected.clear()
        inputs = [jnp.asarray(X), jnp.asarray(X)]
        for _ in range(2 * _compat._COLLECTED_CALLS):
            direct(inputs)
        assert len(collected) == 2


def test_least_overhead_looks_at_inputs():
    compiled = zenith.compile((apply, PARAMS), X, X, mode="reduce-overhead")
    for wrong, message in (
        (X[:2], r"x has shape \(2, 8\)"),
        (X.astype(np.int32), "x is int32"),
        ([1.0], "got 2 arguments"),
    ):
        with pytest.raises(InputError, match=message):
            compiled(wrong, X)


def test_programs_with_callbacks_are_called_the_usual_way():
    seen = []
    compiled = zenith.compile(
        lambda x: jax.pure_callback(
            lambda v: seen.append(1) or np.asarray(v) * 2, jax.ShapeDtypeStruct((3, 8), "f4"), x
        ),
        X,
        mode="reduce-overhead",
    )
    np.testing.assert_allclose(compiled(X), X * 2)
    assert seen


def test_small_parameters_are_constants_of_the_program():
    sizes = [p.nbytes <= program.CONSTANT_BYTES for p in (PARAMS["b"], PARAMS["w"])]
    assert sizes == [True, False]


SPLAT = """
import jax.numpy as jnp, numpy as np
import zenith_jax as zenith
x = np.sin(np.arange(2 * 8 * 8 * 96, dtype=np.float32)).reshape(2, 8, 8, 96)
for head in (np.zeros((4, 96)), np.full((4, 96), 0.5), np.cos(np.arange(384.0)).reshape(4, 96)):
    model = lambda params, x: jnp.max(x, axis=(1, 2)) @ params[0].T
    compiled = zenith.compile((model, [jnp.asarray(head, jnp.float32)]), x, mode="reduce-overhead")
    np.testing.assert_allclose(compiled(x), x.max(axis=(1, 2)) @ np.float32(head.T), rtol=1e-5, atol=1e-5)
"""


def test_constants_are_none_that_xla_computes_wrong_with(tmp_path):
    """As users compile: XLA gives 1e23 where a maximum is followed by a product by a constant of one number."""
    run_script(SPLAT, tmp_path, XLA_FLAGS="")


def test_unknown_modes_are_told():
    with pytest.raises(ValueError, match=r"mode must be one of \('default', 'reduce-overhead'"):
        zenith.compile(apply, X, X, mode="fast")
