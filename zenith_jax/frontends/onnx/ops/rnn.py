"""RNN, GRU and LSTM as scans: https://onnx.ai/onnx/operators/onnx__LSTM.html and its neighbours.

Letters: t steps, b batch, i inputs, n hidden units, r directions, g gates. Within a scan a step sees (b, ...) only; the
products with the inputs of all steps are one matrix product before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from zenith_jax.frontends.onnx.errors import OnnxError
from zenith_jax.frontends.onnx.ops._arrays import in_jax
from zenith_jax.frontends.onnx.registry import operator

# --- activations ------------------------------------------------------------------------------------------------------
# name -> (defaults of alpha and beta, None where it has none; the function)

_ACTIVATIONS: dict[str, tuple[tuple[float | None, float | None], Callable[..., Any]]] = {
    "affine": ((1.0, 0.0), lambda x, a, b: a * x + b),
    "elu": ((1.0, None), lambda x, a, b: jnp.where(x < 0, a * jnp.expm1(jnp.minimum(x, 0)), x)),
    "hardsigmoid": ((0.2, 0.5), lambda x, a, b: jnp.clip(a * x + b, 0, 1)),
    "leakyrelu": ((0.01, None), lambda x, a, b: jnp.where(x < 0, a * x, x)),
    "relu": ((None, None), lambda x, a, b: jnp.maximum(x, 0)),
    "scaledtanh": ((1.0, 1.0), lambda x, a, b: a * jnp.tanh(b * x)),
    "sigmoid": ((None, None), lambda x, a, b: lax.logistic(x)),
    "softplus": ((None, None), lambda x, a, b: jax.nn.softplus(x)),
    "softsign": ((None, None), lambda x, a, b: x / (1 + jnp.abs(x))),
    "tanh": ((None, None), lambda x, a, b: jnp.tanh(x)),
    "thresholdedrelu": ((1.0, None), lambda x, a, b: jnp.where(x > a, x, 0)),
}


def _activations(
    names: Sequence[str], alphas: Sequence[float] | None, betas: Sequence[float] | None, clip: float | None
) -> Iterator[Callable[[Any], Any]]:
    """The functions of x; `alphas` and `betas` are taken in turn by those that have one."""
    alpha_list, beta_list = list(alphas or ()), list(betas or ())

    def taken(values: list[float], default: float | None) -> float | None:
        return default if default is None or not values else values.pop(0)

    for name in names:
        if name.lower() not in _ACTIVATIONS:
            raise OnnxError(f"activation {name!r} is none of {sorted(_ACTIVATIONS)}")
        (alpha, beta), function = _ACTIVATIONS[name.lower()]
        yield _clipped(function, taken(alpha_list, alpha), taken(beta_list, beta), clip)


def _clipped(function: Callable[..., Any], alpha: Any, beta: Any, clip: float | None) -> Callable[[Any], Any]:
    if clip is None:
        return lambda x: function(x, alpha, beta)
    return lambda x: function(jnp.clip(x, -clip, clip), alpha, beta)


# --- what the three share ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Direction:
    """The operands of one direction: x (t, b, g * n) already multiplied with w, recurrent weights, biases, states."""

    inputs: Any
    recurrent: Any  # (g * n, n)
    recurrent_bias: Any  # (g * n,)
    peepholes: Any  # (3 * n,) or None
    state: tuple[Any, ...]  # each (b, n)


Step = Callable[[_Direction, Any, tuple[Any, ...], Sequence[Callable]], tuple[Any, ...]]


def _recurrent(
    step: Step,
    states: int,
    default: Sequence[str],
    operands: tuple[Any, ...],
    *,
    activation_alpha: Any,
    activation_beta: Any,
    activations: Any,
    clip: float | None,
    direction: str,
    layout: int,
) -> tuple[Any, ...]:
    """(all hidden states, last of each state) of a recurrence over the first axis of x.

    operands: x, w, r, b, sequence_lens, peepholes, then the initial states, None where absent.
    A sequence that has ended keeps its state and gives zeros; reversed, it starts at its own end.
    """
    x, w, r, b, lengths, peepholes, *initial = operands
    if direction not in ("forward", "reverse", "bidirectional"):
        raise OnnxError(f"direction must be forward, reverse or bidirectional, got {direction!r}")
    if layout:
        x = jnp.swapaxes(x, 0, 1)
        initial = [None if s is None else jnp.swapaxes(s, 0, 1) for s in initial]
    steps, batch = x.shape[:2]
    directions, gates_n, n = r.shape
    functions = list(_activations(activations or tuple(default) * directions, activation_alpha, activation_beta, clip))
    outputs, last = [], []
    for index in range(directions):
        reverse = direction == "reverse" or index == 1
        bias = jnp.zeros(2 * gates_n, x.dtype) if b is None else b[index]
        start = tuple(jnp.zeros((batch, n), x.dtype) if s is None else s[index] for s in initial[:states])
        part = _Direction(
            jnp.einsum("tbi,gi->tbg", x, w[index]) + bias[:gates_n],
            r[index],
            bias[gates_n:],
            None if peepholes is None else peepholes[index],
            start,
        )
        count = len(default)
        y, final = _scanned(step, part, functions[index * count : (index + 1) * count], lengths, steps, reverse)
        outputs.append(y)
        last.append(final)
    y = jnp.stack(outputs, axis=1)  # (t, r, b, n)
    finals = [jnp.stack(state) for state in zip(*last, strict=True)]  # (r, b, n)
    if layout:
        y, finals = jnp.transpose(y, (2, 0, 1, 3)), [jnp.swapaxes(s, 0, 1) for s in finals]
    return y, *finals


def _scanned(
    step: Step, part: _Direction, functions: Sequence[Callable], lengths: Any, steps: int, reverse: bool
) -> tuple[Any, tuple[Any, ...]]:
    def body(state: tuple[Any, ...], at: Any) -> tuple[Any, Any]:
        inputs, time = at
        new = step(part, inputs, state, functions)
        if lengths is None:
            return new, new[0]
        running = (time < lengths)[:, None]
        kept = tuple(jnp.where(running, a, b) for a, b in zip(new, state, strict=True))
        return kept, jnp.where(running, new[0], 0)

    # Backwards the steps behind a sequence's end come first, and leave its initial state as it is.
    final, y = lax.scan(body, part.state, (part.inputs, jnp.arange(steps)), reverse=reverse)
    return y, final


# --- the operators ----------------------------------------------------------------------------------------------------


def _rnn_step(part: _Direction, inputs: Any, state: tuple[Any, ...], functions: Sequence[Callable]) -> tuple[Any, ...]:
    (h,) = state
    return (functions[0](inputs + h @ part.recurrent.T + part.recurrent_bias),)


@operator("RNN")
@in_jax
def rnn(
    x,
    w,
    r,
    b=None,
    sequence_lens=None,
    initial_h=None,
    *,
    activation_alpha=None,
    activation_beta=None,
    activations=None,
    clip=None,
    direction="forward",
    hidden_size=None,
    layout=0,
    output_sequence=0,
):
    """h' = f(x w^T + h r^T + both biases). Returns (all h, the last one)."""
    del hidden_size, output_sequence  # that of r; whether the first output is read
    return _recurrent(
        _rnn_step,
        1,
        ("Tanh",),
        (x, w, r, b, sequence_lens, None, initial_h),
        activation_alpha=activation_alpha,
        activation_beta=activation_beta,
        activations=activations[: r.shape[0]] if activations else None,  # the default holds two, whatever direction
        clip=clip,
        direction=direction,
        layout=layout,
    )


def _gru_step(linear_before_reset: bool) -> Step:
    def step(part: _Direction, inputs: Any, state: tuple[Any, ...], functions: Sequence[Callable]) -> tuple[Any, ...]:
        (h,) = state
        n = h.shape[-1]
        f, g = functions
        both = h @ part.recurrent[: 2 * n].T + part.recurrent_bias[: 2 * n]
        z, reset = jnp.split(f(inputs[:, : 2 * n] + both), 2, axis=-1)
        weights, bias = part.recurrent[2 * n :].T, part.recurrent_bias[2 * n :]
        hidden = reset * (h @ weights + bias) if linear_before_reset else (reset * h) @ weights + bias
        return ((1 - z) * g(inputs[:, 2 * n :] + hidden) + z * h,)

    return step


@operator("GRU")
@in_jax
def gru(
    x,
    w,
    r,
    b=None,
    sequence_lens=None,
    initial_h=None,
    *,
    activation_alpha=None,
    activation_beta=None,
    activations=None,
    clip=None,
    direction="forward",
    hidden_size=None,
    layout=0,
    linear_before_reset=0,
    output_sequence=0,
):
    """Gates z (update), r (reset) and h, in this order. Returns (all h, the last one)."""
    del hidden_size, output_sequence
    return _recurrent(
        _gru_step(bool(linear_before_reset)),
        1,
        ("Sigmoid", "Tanh"),
        (x, w, r, b, sequence_lens, None, initial_h),
        activation_alpha=activation_alpha,
        activation_beta=activation_beta,
        activations=activations,
        clip=clip,
        direction=direction,
        layout=layout,
    )


def _lstm_step(input_forget: bool) -> Step:
    def step(part: _Direction, inputs: Any, state: tuple[Any, ...], functions: Sequence[Callable]) -> tuple[Any, ...]:
        h, c = state
        f, g, final = functions
        i, o, forget, cell = jnp.split(inputs + h @ part.recurrent.T + part.recurrent_bias, 4, axis=-1)
        peep = None if part.peepholes is None else jnp.split(part.peepholes, 3)
        i = f(i if peep is None else i + peep[0] * c)
        forget = 1 - i if input_forget else f(forget if peep is None else forget + peep[2] * c)
        c = forget * c + i * g(cell)
        o = f(o if peep is None else o + peep[1] * c)
        return o * final(c), c

    return step


@operator("LSTM")
@in_jax
def lstm(
    x,
    w,
    r,
    b=None,
    sequence_lens=None,
    initial_h=None,
    initial_c=None,
    p=None,
    *,
    activation_alpha=None,
    activation_beta=None,
    activations=None,
    clip=None,
    direction="forward",
    hidden_size=None,
    input_forget=0,
    layout=0,
    output_sequence=0,
):
    """Gates i (input), o (output), f (forget) and c (cell), in this order. Returns (all h, the last h, the last c)."""
    del hidden_size, output_sequence
    return _recurrent(
        _lstm_step(bool(input_forget)),
        2,
        ("Sigmoid", "Tanh", "Tanh"),
        (x, w, r, b, sequence_lens, p, initial_h, initial_c),
        activation_alpha=activation_alpha,
        activation_beta=activation_beta,
        activations=activations,
        clip=clip,
        direction=direction,
        layout=layout,
    )
