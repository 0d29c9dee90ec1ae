// A linear layer with integer weights. See ffi/kernels/quantized_linear.h.
//
// Weights are read once and widened in registers, so that a product of few rows costs their bytes.
// A task is a panel of columns; x is widened to float32 ahead of all tasks. For more rows the tiles
// of linear.h are faster, for which a chunk of 8-bit weights is widened into the second-level
// cache.
#pragma once

#include "ffi/cpu/linear.h"
#include "ffi/cpu/parallel.h"
#include "ffi/kernels/quantized_linear.h"

namespace zenith::ZENITH_ISA {

typedef int8_t I8 __attribute__((vector_size(kLanes)));

/// kLanes bytes, sign-extended. By intrinsics: g++ 12 takes a conversion of vectors apart.
ZENITH_INLINE I32 LoadBytes(const int8_t* p) {
#if defined(ZENITH_AVX512)
  return (I32)_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p));
#elif defined(ZENITH_AVX2)
  return (I32)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  I8 v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, I32);
#endif
}
ZENITH_INLINE I32 LoadBytes(const int8_t* p, Whole) { return LoadBytes(p); }
ZENITH_INLINE I32 LoadBytes(const int8_t* p, Part part) {
  int8_t lanes[kLanes] = {};
  for (int64_t i = 0; i < part.n; ++i) lanes[i] = p[i];
  return LoadBytes(lanes);
}

/// kLanes bytes of weights of kBits as 8 / kBits vectors: of 4 bits the lower halves, which are the
/// even elements, and the upper ones.
template <int kBits, typename PartOrWhole>
ZENITH_INLINE void LoadWeights(const int8_t* p, PartOrWhole part, F32 (&w)[8 / kBits]) {
  const I32 bytes = LoadBytes(p, part);
  if constexpr (kBits == 8) {
    w[0] = __builtin_convertvector(bytes, F32);
  } else {
    w[0] = __builtin_convertvector((bytes << 28) >> 28, F32);
    w[1] = __builtin_convertvector(bytes >> 4, F32);
  }
}

struct QuantizedOperands {
  int64_t rows, k, n, groups;
  const float* x;  // (rows, k); for transposed 4-bit weights each row's even elements first
  const int8_t* w;
  const void *scale, *bias;
  bool is_wide;  // scale and bias are float32
  DType dtype;
  void* y;
};

template <typename T>
ZENITH_INLINE float Element(const T* p, int64_t i) {
  return Load(p + i, Part{1})[0];
}
/// Element i of scale or bias.
ZENITH_INLINE float Parameter(const QuantizedOperands& args, const void* p, int64_t i) {
  if (args.is_wide) return static_cast<const float*>(p)[i];
  return args.dtype == DType::kBF16 ? Element(static_cast<const BFloat16*>(p), i)
                                    : Element(static_cast<const Half*>(p), i);
}

/// y[row, columns] = sums + bias.
ZENITH_INLINE void StoreResults(const QuantizedOperands& args, int64_t row, int64_t column,
                                int64_t columns, float* sums) {
  if (args.bias != nullptr) {
    for (int64_t j = 0; j < columns; ++j) sums[j] += Parameter(args, args.bias, column + j);
  }
  WithStorage(args.dtype, [&](auto type) {
    auto* const y = static_cast<decltype(type)*>(args.y) + row * args.n + column;
    ForVectors(columns, [&](int64_t j, auto part) {
      F32 v{};
      __builtin_memcpy(&v, sums + j, sizeof(float) * static_cast<size_t>(Min(kLanes, columns - j)));
      Store(y + j, v, part);
    });
  });
}

inline constexpr int64_t kQuantizedVectors = 4;             // of bytes, side by side in a panel
inline constexpr int64_t kQuantizedPanel = 4 * 2 * kLanes;  // columns, at most
inline constexpr int64_t kQuantizedAhead = 24;              // rows of w fetched ahead

/// Columns from `column` on of kRows rows of x, where w is (k, n). Its rows are walked in order.
template <int kBits, int kRows, typename PartOrWhole, int kVectors>
ZENITH_NOINLINE void QuantizedColumns(const QuantizedOperands& args, int64_t row, int64_t column,
                                      PartOrWhole part) {
  constexpr int kHalves = 8 / kBits;
  const int64_t stride = args.n / kHalves, group = args.k / args.groups;
  const int8_t* w = args.w + column / kHalves;
  const float* const x = args.x + row * args.k;
  float sums[kRows][kVectors * kHalves * kLanes] = {};
  const int64_t columns = Min(kVectors * kHalves * kLanes, args.n - column);
  for (int64_t g = 0; g < args.groups; ++g) {
    F32 acc[kRows][kVectors][kHalves] = {};
    for (int64_t k = g * group; k < (g + 1) * group; ++k, w += stride) {
      F32 b[kVectors][kHalves];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) LoadWeights<kBits>(w + v * kLanes, part, b[v]);
      __builtin_prefetch(w + kQuantizedAhead * stride, 0, 2);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const F32 a = Splat(x[i * args.k + k]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 2
          for (int h = 0; h < kHalves; ++h) acc[i][v][h] = Fma(a, b[v][h], acc[i][v][h]);
        }
      }
    }
    float parts[kRows][kVectors][kHalves][kLanes];  // acc, for a run-time index
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 2
        for (int h = 0; h < kHalves; ++h) Store(parts[i][v][h], acc[i][v][h]);
      }
    }
    for (int64_t j = 0; j < columns; ++j) {
      const float scale = Parameter(args, args.scale, g * args.n + column + j);
      const int64_t v = j / (kHalves * kLanes), at = j % (kHalves * kLanes);
      for (int i = 0; i < kRows; ++i) sums[i][j] += scale * parts[i][v][at % kHalves][at / kHalves];
    }
  }
  for (int i = 0; i < kRows; ++i) StoreResults(args, row + i, column, columns, sums[i]);
}

inline constexpr int kQuantizedTogether = 4;  // columns whose sums overlap, and share loads of x

/// The same where w is (n, k): products along kColumns of its rows.
template <int kBits, int kRows, int kColumns>
ZENITH_INLINE void QuantizedProducts(const QuantizedOperands& args, int64_t row, int64_t column,
                                     float (&total)[kRows][kColumns]) {
  constexpr int kHalves = 8 / kBits;
  const int64_t group = args.k / args.groups, row_bytes = args.k / kHalves;
  for (int64_t g = 0; g < args.groups; ++g) {
    F32 acc[kRows][kColumns] = {};
    const int64_t first = g * group / kHalves;
    const int8_t* const w = args.w + column * row_bytes + first;
    const float* const x = args.x + row * args.k + first;
    ForVectors(group / kHalves, [&](int64_t i, auto part) {
      F32 b[kColumns][kHalves];
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) LoadWeights<kBits>(w + j * row_bytes + i, part, b[j]);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int h = 0; h < kHalves; ++h) {
          const F32 a = Load(x + r * args.k + h * row_bytes + i, part);
#pragma GCC unroll 4
          for (int j = 0; j < kColumns; ++j) acc[r][j] = Fma(a, b[j][h], acc[r][j]);
        }
      }
    });
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      const float scale = Parameter(args, args.scale, g * args.n + column + j);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) total[r][j] += scale * Sum(acc[r][j]);
    }
  }
}

template <int kBits, int kRows>
ZENITH_NOINLINE void QuantizedRows(const QuantizedOperands& args, int64_t row, int64_t column,
                                   int64_t columns) {
  float sums[kRows][kQuantizedPanel] = {};
  const auto products = [&](int64_t j, auto count) {
    float total[kRows][count.value] = {};
    QuantizedProducts<kBits, kRows, count.value>(args, row, column + j, total);
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < count.value; ++i) sums[r][j + i] = total[r][i];
    }
  };
  int64_t j = 0;
  for (; j + kQuantizedTogether <= columns; j += kQuantizedTogether) {
    products(j, std::integral_constant<int, kQuantizedTogether>{});
  }
  for (; j < columns; ++j) products(j, std::integral_constant<int, 1>{});
  for (int r = 0; r < kRows; ++r) StoreResults(args, row + r, column, columns, sums[r]);
}

template <int kBits, int kRows>
ZENITH_INLINE void QuantizedPanel(const QuantizedOperands& args, bool transposed, int64_t row,
                                  int64_t column, int64_t columns) {
  if (transposed) return QuantizedRows<kBits, kRows>(args, row, column, columns);
  constexpr int64_t kVectorColumns = 8 / kBits * kLanes;
  const int64_t last = column + columns;
  if (columns == kQuantizedVectors * kVectorColumns) {
    return QuantizedColumns<kBits, kRows, Whole, kQuantizedVectors>(args, row, column, Whole{});
  }
  for (; column + kVectorColumns <= last; column += kVectorColumns) {
    QuantizedColumns<kBits, kRows, Whole, 1>(args, row, column, Whole{});
  }
  if (column < last) {
    const Part part{(last - column) / (8 / kBits)};
    QuantizedColumns<kBits, kRows, Part, 1>(args, row, column, part);
  }
}

template <int kBits>
void QuantizedTask(const QuantizedOperands& args, bool transposed, int64_t column) {
  const int64_t panel = kQuantizedVectors * 8 / kBits * kLanes;
  const int64_t columns = Min(panel, args.n - column);
  int64_t row = 0;
  for (; row + 4 <= args.rows; row += 4) {
    QuantizedPanel<kBits, 4>(args, transposed, row, column, columns);
  }
  for (; row + 2 <= args.rows; row += 2) {
    QuantizedPanel<kBits, 2>(args, transposed, row, column, columns);
  }
  if (row < args.rows) QuantizedPanel<kBits, 1>(args, transposed, row, column, columns);
}

/// x in float32, the even elements of each row first if `halves` is 2.
inline void WidenRows(const QuantizedLinearArgs& args, int64_t halves, float* wide) {
  WithStorage(args.dtype, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(args.x);
    for (int64_t i = 0; i < args.rows; ++i, x += args.k, wide += args.k) {
      ForVectors(args.k, [&](int64_t j, auto part) {
        const F32 v = Load(x + j, part);
        if (halves == 1) return Store(wide + j, v, part);
        for (int64_t lane = 0; lane < kLanes && j + lane < args.k; ++lane) {
          wide[(j + lane) % 2 * (args.k / 2) + (j + lane) / 2] = v[lane];
        }
      });
    }
  });
}

inline constexpr int64_t kQuantizedFewRows = 16;  // up to which a product is bound by its weights

/// Rows [first, last) of the panel at `column`; as LinearPanel, but that chunks are widened first.
inline void QuantizedChunks(const LinearOperands& args, const int8_t* weights, int64_t column,
                            int64_t first, int64_t last, float* packed, float* values,
                            float* activated) {
  LinearChunk chunk{args, column, Min(kPanel, args.n - column), packed, values, activated};
  chunk.packed = packed;
  const int64_t width = RoundUp(chunk.columns, kLanes);
  const auto widened = [](const int8_t* p, auto part) {
    return __builtin_convertvector(LoadBytes(p, part), F32);
  };
  for (int64_t k = 0; k == 0 || k < args.k; k += kChunk) {
    chunk.first_k = k;
    chunk.depth = Min(kChunk, args.k - k);
    chunk.is_last = k + kChunk >= args.k;
    if (args.layout == WeightLayout::kColumns) {
      const int8_t* const w = weights + column * args.k + k;
      GatherLaneTile(
          chunk.columns, chunk.depth, packed, width,
          [&](int64_t j, int64_t i, auto part) { return widened(w + j * args.k + i, part); });
    } else {
      const int8_t* w = weights + k * args.n + column;
      for (int64_t i = 0; i < chunk.depth; ++i, w += args.n) {
        __builtin_prefetch(w + kQuantizedAhead * args.n, 0, 2);
        ForVectors(chunk.columns, [&](int64_t j, auto part) {
          Store(packed + i * width + j, widened(w + j, part));
        });
      }
    }
    LinearBlock(chunk, first, last);
  }
}

inline Status QuantizedManyRows(const QuantizedLinearArgs& args, const Launch& launch) {
  const LinearOperands operands{Epilogue::kNone,
                                args.transposed ? WeightLayout::kColumns : WeightLayout::kRows,
                                args.k,
                                args.n,
                                static_cast<const float*>(args.x),
                                nullptr,
                                static_cast<const float*>(args.bias),
                                nullptr,
                                static_cast<float*>(args.y),
                                nullptr,
                                static_cast<const float*>(args.scale)};
  const auto* const w = static_cast<const int8_t*>(args.w);
  return LinearTasks(args.rows, args.n, launch,
                     [&](int64_t column, int64_t, auto... rows_and_scratch) {
                       QuantizedChunks(operands, w, column, rows_and_scratch...);
                     });
}

inline Status QuantizedLinear(const QuantizedLinearArgs& args, const Launch& launch) {
  if (args.rows == 0) return {};
  const bool is_4_bit = args.bits == 4;
  const bool odd_groups = is_4_bit && args.transposed && (args.k / args.groups) % 2 != 0;
  if (odd_groups) return {"groups of 4-bit weights along the rows of w must have an even size"};
  if (args.rows > kQuantizedFewRows && !is_4_bit && args.groups == 1 && args.dtype == DType::kF32 &&
      args.param_dtype == DType::kF32) {
    return QuantizedManyRows(args, launch);
  }
  Scratch scratch(Scratch::Size(args.rows * args.k));
  if (!scratch.ok()) return kOutOfMemory;
  float* const x = scratch.Take(args.rows * args.k);
  WidenRows(args, is_4_bit && args.transposed ? 2 : 1, x);
  const QuantizedOperands operands{args.rows,   args.k,    args.n,
                                   args.groups, x,         static_cast<const int8_t*>(args.w),
                                   args.scale,  args.bias, args.param_dtype == DType::kF32,
                                   args.dtype,  args.y};
  const int64_t panel = kQuantizedVectors * 8 / args.bits * kLanes;
  launch.ParallelFor(CeilDiv(args.n, panel), [&](int64_t task) {
    if (is_4_bit) {
      QuantizedTask<4>(operands, args.transposed, task * panel);
    } else {
      QuantizedTask<8>(operands, args.transposed, task * panel);
    }
  });
  return {};
}

}  // namespace zenith::ZENITH_ISA
