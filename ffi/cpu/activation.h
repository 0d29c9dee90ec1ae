// Elementwise activations: x read once, y written once. See ffi/kernels/activation.h.
#pragma once

#include "ffi/cpu/activation_table.h"
#include "ffi/cpu/math.h"
#include "ffi/cpu/parallel.h"
#include "ffi/kernels/activation.h"

namespace zenith::ZENITH_ISA {

/// The standard normal distribution at a >= 0, as factors, which underflow only when multiplied
/// out.
struct NormalTail {
  F32 ratio;    // (1 - Phi(a)) / density, in (0, 1/2]
  F32 density;  // exp(-a^2 / 2)
  F32 tail() const { return ratio * density; }
};
ZENITH_INLINE NormalTail UpperTail(F32 a) {
  // a^2 / 2 in two floats: at a = 6 the rounding of one would cost 18 ulp. The upper 12 bits of a
  // have an exact square.
  const F32 high = (F32)((I32)a & ~0xfff);
  const F32 density = Exp(high * high * -0.5f, (high - a) * (high + a) * 0.5f);
  // erfcx(a / sqrt 2) / 2 = t * polynomial(t), t = 1 / (1 + a / 4), relative error 1e-8.
  const F32 t = Reciprocal(Fma(a, 0.25f, Splat(1.0f)));
  F32 p = Splat(0.017673869543388496f);
  p = Fma(p, t, Splat(-0.0688619242111722f));
  p = Fma(p, t, Splat(0.06625996378609772f));
  p = Fma(p, t, Splat(0.008454557023577884f));
  p = Fma(p, t, Splat(0.02979888894005376f));
  p = Fma(p, t, Splat(0.07720193768029682f));
  p = Fma(p, t, Splat(0.07537830897833506f));
  p = Fma(p, t, Splat(0.09476504277938784f));
  p = Fma(p, t, Splat(0.09958649649167564f));
  p = Fma(p, t, Splat(0.09974286396140501f));
  return {p * t, density};
}

/// 2 sqrt(2 / pi) (x + 0.044715 x^3), so that gelu(tanh) is x * Sigmoid of it, and its derivative.
inline constexpr float kTwoSqrt2OverPi = 1.5957691216057308f;
inline constexpr float kCubic = 0.044715f;

/// Beyond +-16 the normal tail is 0 in float32, and beyond +-128 so are the other activations'
/// tails. Clamping there keeps inf * 0 out of the formulas; Value puts that of -inf back.
template <Activation kKind>
inline constexpr float kSaturated = kKind == Activation::kGeluErf ? 16.0f : 128.0f;

template <Activation kKind>
ZENITH_INLINE F32 Value(F32 x) {
  const F32 nan_of_minus_infinity = Min(x, F32{}) * 0.0f;
  if constexpr (kKind == Activation::kGeluErf) {
    // x * Phi(x), without the cancellation of 1 + erf in the lower tail.
    const F32 a = Min(Splat(kSaturated<kKind>), Abs(x));
    const NormalTail normal = UpperTail(a);
    return Max(F32{}, x) - a * normal.ratio * normal.density + nan_of_minus_infinity;
  } else {
    x = Max(Splat(-kSaturated<kKind>), x);
    F32 u = x;
    if constexpr (kKind == Activation::kGeluTanh) {
      u = x * Fma(x * x, kCubic * kTwoSqrt2OverPi, Splat(kTwoSqrt2OverPi));
    }
    const SigmoidFactors s = Sigmoid(u);
    return x * s.large * s.small + nan_of_minus_infinity;
  }
}

template <Activation kKind>
ZENITH_INLINE F32 Derivative(F32 x) {
  x = Min(Splat(kSaturated<kKind>), Max(Splat(-kSaturated<kKind>), x));
  if constexpr (kKind == Activation::kGeluErf) {
    // Phi(x) + x phi(x)
    const NormalTail normal = UpperTail(Abs(x));
    const F32 phi = Select(x > 0.0f, 1.0f - normal.tail(), normal.tail());
    return Fma(x * 0.3989422804014327f, normal.density, phi);
  } else {
    // d/dx x s(u) = s + x s (1 - s) u'
    F32 u = x, slope = x;
    if constexpr (kKind == Activation::kGeluTanh) {
      const F32 square = x * x;
      u = x * Fma(square, kCubic * kTwoSqrt2OverPi, Splat(kTwoSqrt2OverPi));
      slope = x * Fma(square, 3.0f * kCubic * kTwoSqrt2OverPi, Splat(kTwoSqrt2OverPi));
    }
    const SigmoidFactors s = Sigmoid(u);
    return Fma(slope * s.value(), s.complement(), s.value());
  }
}

/// Calls body with the kind as a compile-time constant.
template <Activation kKind>
struct ActivationConstant {
  static constexpr Activation kValue = kKind;
};
template <typename Body>
void WithActivation(Activation kind, Body body) {
  switch (kind) {
    case Activation::kGeluErf:
      return body(ActivationConstant<Activation::kGeluErf>{});
    case Activation::kGeluTanh:
      return body(ActivationConstant<Activation::kGeluTanh>{});
    case Activation::kSilu:
      return body(ActivationConstant<Activation::kSilu>{});
  }
}

template <Activation kKind>
struct Forward {
  ZENITH_INLINE static F32 Exact(F32 x) { return Value<kKind>(x); }
#if defined(ZENITH_AVX512)
  static constexpr const ActivationTable& kTable = kKind == Activation::kGeluErf    ? kGeluErfTable
                                                   : kKind == Activation::kGeluTanh ? kGeluTanhTable
                                                                                    : kSiluTable;
  ZENITH_INLINE static F32 FromTail(F32 x, F32 a, F32 tail) { return Max(F32{}, x) - a * tail; }
#endif
};
template <Activation kKind>
struct Backward {
  ZENITH_INLINE static F32 Exact(F32 x) { return Derivative<kKind>(x); }
#if defined(ZENITH_AVX512)
  static constexpr const ActivationTable& kTable =
      kKind == Activation::kGeluErf    ? kGeluErfDerivativeTable
      : kKind == Activation::kGeluTanh ? kGeluTanhDerivativeTable
                                       : kSiluDerivativeTable;
  ZENITH_INLINE static F32 FromTail(F32 x, F32, F32 tail) {
    return Select(x < 0.0f, tail, 1.0f - tail);
  }
#endif
};

#if defined(ZENITH_AVX512)
/// A table in registers: 17 operations for each vector, where Exact has 35 to 40.
template <typename Function>
struct Segments {
  static constexpr const ActivationTable& kTable = Function::kTable;
  static constexpr float kEnd = 31.49f / kTable.scale;  // not 31.5, which rounds to segment 32 = 0

  F32 low[6], high[6];
  ZENITH_INLINE Segments() {
    for (int k = 0; k < 6; ++k) {
      low[k] = Load(kTable.coefficients[k]);
      high[k] = Load(kTable.coefficients[k] + kLanes);
    }
  }
  /// For a = |x| <= kEnd; anything beyond, NaN for NaN.
  ZENITH_INLINE F32 operator()(F32 x, F32 a) const {
    // As RoundToInteger: the sum's low bits are the integer.
    const F32 magic = Splat(12582912.0f);
    const F32 sum = Fma(a, kTable.scale, magic);
    const F32 t = Fma(a, kTable.scale, magic - sum);
    F32 tail = Lookup((I32)sum, low[5], high[5]);
    for (int k = 4; k >= 0; --k) tail = Fma(tail, t, Lookup((I32)sum, low[k], high[k]));
    return Function::FromTail(x, a, tail);
  }
};

/// Calls store(i, part, f(x)) again for the vectors of which a lane is beyond the segments.
template <typename Function, typename T, typename Store>
ZENITH_NOINLINE void ForVectorsBeyond(int64_t size, const T* x, Store store) {
  const Segments<Function> segments;
  ForVectors(size, [&](int64_t i, auto part) {
    const F32 v = Load(x + i, part), a = Abs(v);
    const I32 beyond = a > segments.kEnd;
    // Lane by lane: what a number gives does not depend on its neighbours.
    if (Any(beyond)) store(i, part, Select(beyond, Function::Exact(v), segments(v, a)));
  });
}
#endif

/// Calls store(i, part, f(x)) for all vectors, for some of them twice: x and the result must not
/// overlap.
template <typename Function, typename T, typename Store>
ZENITH_INLINE void ForVectorsOf(int64_t size, const T* x, Store store) {
#if defined(ZENITH_AVX512)
  constexpr int64_t kBlock = 64 * kLanes;  // stays in the first-level cache
  const Segments<Function> segments;
  for (int64_t first = 0; first < size; first += kBlock) {
    const int64_t count = Min(kBlock, size - first);
    F32 largest = {};
    ForVectors(count, [&](int64_t i, auto part) {
      const F32 v = Load(x + first + i, part), a = Abs(v);
      largest = Max(a, largest);  // passes over NaN
      store(first + i, part, segments(v, a));
    });
    if (__builtin_expect(Any(largest > segments.kEnd), 0)) {
      ForVectorsBeyond<Function>(count, x + first,
                                 [=](int64_t i, auto part, F32 f) { store(first + i, part, f); });
    }
  }
#else
  ForVectors(size,
             [&](int64_t i, auto part) { store(i, part, Function::Exact(Load(x + i, part))); });
#endif
}

template <Activation kKind, typename T>
ZENITH_NOINLINE void ActivationRange(int64_t size, const T* x, T* y) {
  ForVectorsOf<Forward<kKind>>(size, x,
                               [=](int64_t i, auto part, F32 f) { Store(y + i, f, part); });
}
template <Activation kKind, typename T>
ZENITH_NOINLINE void ActivationBackwardRange(int64_t size, const T* x, const T* dy, T* dx) {
  ForVectorsOf<Backward<kKind>>(
      size, x, [=](int64_t i, auto part, F32 f) { Store(dx + i, Load(dy + i, part) * f, part); });
}

inline Status ActivationForward(const ActivationForwardArgs& args, const Launch& launch) {
  WithStorage(args.dtype, [&]<typename T>(T) {
    WithActivation(args.kind, [&]<typename Kind>(Kind) {
      const T* const x = static_cast<const T*>(args.x);
      T* const y = static_cast<T*>(args.y);
      ForRows(launch, args.size, 1, [=](int64_t first, int64_t last) {
        ActivationRange<Kind::kValue>(last - first, x + first, y + first);
      });
    });
  });
  return {};
}

inline Status ActivationBackward(const ActivationBackwardArgs& args, const Launch& launch) {
  WithStorage(args.dtype, [&]<typename T>(T) {
    WithActivation(args.kind, [&]<typename Kind>(Kind) {
      const T* const x = static_cast<const T*>(args.x);
      const T* const dy = static_cast<const T*>(args.dy);
      T* const dx = static_cast<T*>(args.dx);
      ForRows(launch, args.size, 1, [=](int64_t first, int64_t last) {
        ActivationBackwardRange<Kind::kValue>(last - first, x + first, dy + first, dx + first);
      });
    });
  });
  return {};
}

}  // namespace zenith::ZENITH_ISA
