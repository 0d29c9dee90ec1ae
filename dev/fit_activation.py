"""Makes ffi/cpu/activation_table.h: piecewise polynomials of the activations' tails. Needs NumPy only.

    python dev/fit_activation.py > ffi/cpu/activation_table.h

All three activations are x * F(x) with F(-x) = 1 - F(x), so that F is known from its tail F(-a), a >= 0:

    x F(x)            = max(0, x) - a F(-a)
    d/dx (x F(x))     = D(-a) for x < 0, 1 - D(-a) for x > 0,    D(x) = F(x) + x F'(x)

F(-a) and D(-a) are fitted in 32 segments of one width around the centres i / scale: a polynomial of degree 5 in
t = a * scale - i, |t| <= 1/2, of least largest relative error. Where D has its zero, the error is relative to
F + |x F'|. The segments end at 31.5 / scale, where the largest of the errors is about 3e-7 (GELU's tails fall faster
and faster, so that wider segments would need a higher degree).
"""

import math

import numpy as np

SEGMENTS = 32  # float32 lanes of two AVX-512 registers
DEGREE = 5

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def normal(a):
    """F(-a) and a * F'(a) of gelu_erf."""
    return math.erfc(a / math.sqrt(2)) / 2, a * math.exp(-a * a / 2) / math.sqrt(2 * math.pi)


def logistic(u, slope):
    """F(-a) = 1 / (1 + exp(u(a))) and a * F'(a), slope = a * u'(a)."""
    tail = math.exp(-u) / (1 + math.exp(-u))
    return tail, slope * tail / (1 + math.exp(-u))


def tanh(a):
    return logistic(2 * SQRT_2_OVER_PI * (a + CUBIC * a**3), 2 * SQRT_2_OVER_PI * (a + 3 * CUBIC * a**3))


def silu(a):
    return logistic(a, a)


# Name in C++, function, segments per unit of a: exact in float32.
ACTIVATIONS = (("GeluErf", normal, 5.75), ("GeluTanh", tanh, 6.5), ("Silu", silu, 2.0))


def fit(t, values, weights):
    """Coefficients c0, c1, ... with the least max |weights * (polynomial - values)|, by Lawson's iteration."""
    powers = t[:, None] ** np.arange(DEGREE + 1)
    lawson = np.ones_like(t)
    best, best_error = None, math.inf
    for _ in range(60):
        scale = weights * np.sqrt(lawson)
        coefficients = np.linalg.lstsq(powers * scale[:, None], values * scale, rcond=None)[0]
        errors = np.abs(weights * (powers @ coefficients - values))
        if errors.max() < best_error:
            best, best_error = coefficients, errors.max()
        lawson *= errors + 1e-3 * errors.max()
        lawson /= lawson.mean()
    return best


def tables(function, scale):
    """Float32 coefficients (DEGREE + 1, SEGMENTS) and largest relative error of F(-a), and of D(-a)."""
    forward, backward = [], []
    forward_error = backward_error = 0.0
    for i in range(SEGMENTS):
        # Chebyshev points, ends included; a >= 0 leaves half of the first segment.
        t = 0.5 * np.cos(np.linspace(0, math.pi, 201))
        t = t / 2 + 0.25 if i == 0 else t
        tail, product = np.array([function(a) for a in (t + i) / scale]).T
        for columns, values, size in ((forward, tail, tail), (backward, tail - product, tail + product)):
            coefficients = fit(t, values, 1 / size).astype(np.float32)
            powers = t[:, None] ** np.arange(DEGREE + 1)
            error = (np.abs(powers @ coefficients.astype(np.float64) - values) / size).max()
            if columns is forward:
                forward_error = max(forward_error, error)
            else:
                backward_error = max(backward_error, error)
            columns.append(coefficients)
    return (np.array(forward).T, forward_error), (np.array(backward).T, backward_error)


def literal(x):
    text = f"{x:.9g}"
    return (text if any(c in text for c in ".e") else text + ".0") + "f"


def main():
    print(
        f"""\
// Tails of the activations in {SEGMENTS} segments. Made by dev/fit_activation.py: edit there.
// clang-format off
#pragma once

#include "ffi/cpu/simd.h"

namespace zenith::ZENITH_ISA {{

/// On [0, 31.5 / scale]: at a = (i + t) / scale, |t| <= 1/2, the sum of t^k * coefficients[k][i].
struct ActivationTable {{
  float scale;
  alignas(64) float coefficients[{DEGREE + 1}][{SEGMENTS}];
}};"""
    )
    for name, function, scale in ACTIVATIONS:
        for suffix, (table, error) in zip(("", "Derivative"), tables(function, scale), strict=True):
            print(f"\n/// Relative error {error:.1g}.")
            print(f"inline constexpr ActivationTable k{name}{suffix}Table = {{")
            print(f"    {literal(scale)},")
            rows = []
            for k in range(DEGREE + 1):
                words = [literal(x) for x in table[k]]
                lines, line = [], "     {" if k else "    {{"
                for j, word in enumerate(words):
                    piece = word + ("," if j < SEGMENTS - 1 else "}")
                    if len(line) + 1 + len(piece) > 97:
                        lines.append(line)
                        line = "      " + piece
                    else:
                        line += piece if line.endswith("{") else " " + piece
                rows.append("\n".join([*lines, line]))
            print(",\n".join(rows) + "}};")
    print("\n}  // namespace zenith::ZENITH_ISA")


if __name__ == "__main__":
    main()
