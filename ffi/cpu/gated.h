// Gated activations: gate and value read once, the result written once. See ffi/kernels/gated.h.
#pragma once

#include "ffi/cpu/activation.h"
#include "ffi/kernels/gated.h"

namespace zenith::ZENITH_ISA {

template <Activation kKind, typename T>
ZENITH_NOINLINE void GatedRange(int64_t size, const T* gate, const T* value, T* y) {
  ForVectorsOf<Forward<kKind>>(size, gate, [=](int64_t i, auto part, F32 f) {
    Store(y + i, f * Load(value + i, part), part);
  });
}

/// f and f' are two sweeps over what is in the first-level cache.
template <Activation kKind, typename T>
ZENITH_NOINLINE void GatedBackwardRange(int64_t size, const T* gate, const T* value, const T* dy,
                                        T* dgate, T* dvalue) {
  constexpr int64_t kBlock = 64 * kLanes;  // ForVectorsOf's
  for (int64_t first = 0; first < size; first += kBlock) {
    const int64_t count = Min(kBlock, size - first);
    const T* const x = gate + first;
    const T* const cotangent = dy + first;
    ForVectorsOf<Backward<kKind>>(count, x, [=](int64_t i, auto part, F32 slope) {
      Store(dgate + first + i, Load(cotangent + i, part) * Load(value + first + i, part) * slope,
            part);
    });
    ForVectorsOf<Forward<kKind>>(count, x, [=](int64_t i, auto part, F32 f) {
      Store(dvalue + first + i, Load(cotangent + i, part) * f, part);
    });
  }
}

/// Runs body(row, first, last) on pieces of rows that cover all elements: of long rows parts, of
/// short ones some together.
template <typename Body>
void ForPieces(const Launch& launch, int64_t rows, int64_t cols, Body body) {
  const int64_t pieces = Max<int64_t>(1, CeilDiv(cols, kTaskElements));
  const int64_t piece = CeilDiv(cols, pieces);
  ForRows(launch, rows * pieces, piece, [=](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / pieces, begin = i % pieces * piece;
      if (begin < cols) body(row, begin, Min(begin + piece, cols));
    }
  });
}

inline Status GatedForward(const GatedForwardArgs& args, const Launch& launch) {
  WithStorage(args.dtype, [&]<typename T>(T) {
    WithActivation(args.kind, [&]<typename Kind>(Kind) {
      const T* const gate = static_cast<const T*>(args.gate);
      const T* const value = static_cast<const T*>(args.value);
      T* const y = static_cast<T*>(args.y);
      const int64_t cols = args.cols, stride = args.stride;
      ForPieces(launch, args.rows, cols, [=](int64_t row, int64_t first, int64_t last) {
        const int64_t at = row * stride + first;
        GatedRange<Kind::kValue>(last - first, gate + at, value + at, y + row * cols + first);
      });
    });
  });
  return {};
}

inline Status GatedBackward(const GatedBackwardArgs& args, const Launch& launch) {
  WithStorage(args.dtype, [&]<typename T>(T) {
    WithActivation(args.kind, [&]<typename Kind>(Kind) {
      const T* const gate = static_cast<const T*>(args.gate);
      const T* const value = static_cast<const T*>(args.value);
      const T* const dy = static_cast<const T*>(args.dy);
      T* const dgate = static_cast<T*>(args.dgate);
      T* const dvalue = static_cast<T*>(args.dvalue);
      const int64_t cols = args.cols, stride = args.stride;
      ForPieces(launch, args.rows, cols, [=](int64_t row, int64_t first, int64_t last) {
        const int64_t at = row * stride + first;
        GatedBackwardRange<Kind::kValue>(last - first, gate + at, value + at,
                                         dy + row * cols + first, dgate + at, dvalue + at);
      });
    });
  });
  return {};
}

}  // namespace zenith::ZENITH_ISA
