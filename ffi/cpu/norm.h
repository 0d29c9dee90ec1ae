// Layer and RMS norm by rows, each read from memory once: its later passes find it in cache. See
// ffi/kernels/norm.h.
#pragma once

#include "ffi/cpu/parallel.h"
#include "ffi/kernels/norm.h"

namespace zenith::ZENITH_ISA {

struct RowStatistics {
  float mean;   // 0 for rms
  float scale;  // rstd or rrms
};

template <NormKind kKind, typename T>
RowStatistics Statistics(int64_t cols, float eps, const T* x) {
  const float count = static_cast<float>(cols);
  float mean = 0.0f;
  if constexpr (kKind == NormKind::kLayer) {
    mean = SumOver(cols, [&](int64_t i, auto part) { return Load(x + i, part); }) / count;
  }
  const float variance = SumOver(cols,
                                 [&](int64_t i, auto part) {
                                   const F32 centred = Load(x + i, part) - mean;
                                   return centred * centred;
                                 }) /
                         count;
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

/// Calls body with the storage types of x and of the parameters and the kind as constants.
template <NormKind kKind>
struct NormConstant {
  static constexpr NormKind kValue = kKind;
};
template <typename Args, typename Body>
void WithNorm(const Args& args, Body body) {
  WithStorage(args.dtype, [&]<typename T>(T x) {
    const auto with_parameters = [&](auto parameter) {
      if (args.kind == NormKind::kLayer) {
        body(x, parameter, NormConstant<NormKind::kLayer>{});
      } else {
        body(x, parameter, NormConstant<NormKind::kRms>{});
      }
    };
    if (args.param_dtype == args.dtype) {
      with_parameters(T{});
    } else {
      with_parameters(float{});
    }
  });
}

template <NormKind kKind, typename T, typename P>
ZENITH_NOINLINE void NormRow(const NormForwardArgs& args, int64_t row) {
  const int64_t cols = args.cols;
  const T* x = static_cast<const T*>(args.x) + row * cols;
  const P* const scale = static_cast<const P*>(args.scale);
  const P* const bias = static_cast<const P*>(args.bias);
  T* const y = static_cast<T*>(args.y) + row * cols;
  if (args.residual != nullptr) {
    const T* const residual = static_cast<const T*>(args.residual) + row * cols;
    T* const sum = static_cast<T*>(args.sum) + row * cols;
    ForVectors(cols, [&](int64_t i, auto part) {
      Store(sum + i, Load(x + i, part) + Load(residual + i, part), part);
    });
    x = sum;
  }
  const RowStatistics row_stats = Statistics<kKind>(cols, args.eps, x);
  ForVectors(cols, [&](int64_t i, auto part) {
    const F32 normal = (Load(x + i, part) - row_stats.mean) * row_stats.scale;
    const F32 gain = Load(scale + i, part);
    if constexpr (kKind == NormKind::kLayer) {
      Store(y + i, Fma(normal, gain, Load(bias + i, part)), part);
    } else {
      Store(y + i, normal * gain, part);
    }
  });
}

inline Status NormForward(const NormForwardArgs& args, const Launch& launch) {
  WithNorm(args, [&]<typename T, typename P, typename Kind>(T, P, Kind) {
    ForRows(launch, args.rows, args.cols, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) NormRow<Kind::kValue, T, P>(args, row);
    });
  });
  return {};
}

/// dx of one row; adds the row's terms to dscale and dbias.
template <NormKind kKind, typename T, typename P>
ZENITH_NOINLINE void NormBackwardRow(const NormBackwardArgs& args, int64_t row, float* dscale,
                                     float* dbias) {
  const int64_t cols = args.cols;
  const T* const x = static_cast<const T*>(args.x) + row * cols;
  const T* const dy = static_cast<const T*>(args.dy) + row * cols;
  const P* const scale = static_cast<const P*>(args.scale);
  T* const dx = static_cast<T*>(args.dx) + row * cols;
  const RowStatistics row_stats = Statistics<kKind>(cols, args.eps, x);
  const auto xhat = [&](int64_t i, auto part) {
    return (Load(x + i, part) - row_stats.mean) * row_stats.scale;
  };

  F32 sum_g{}, sum_gx{};
  ForVectors(cols, [&](int64_t i, auto part) {
    // Lanes past a tail hold dy = 0, so they add nothing.
    const F32 cotangent = Load(dy + i, part);
    const F32 product = cotangent * xhat(i, part);
    const F32 gain = Load(scale + i, part);
    Store(dscale + i, Load(dscale + i, part) + product, part);
    sum_gx = Fma(product, gain, sum_gx);
    if constexpr (kKind == NormKind::kLayer) {
      Store(dbias + i, Load(dbias + i, part) + cotangent, part);
      sum_g = Fma(cotangent, gain, sum_g);
    }
  });
  const float mean_g = Sum(sum_g) / static_cast<float>(cols);
  const float mean_gx = Sum(sum_gx) / static_cast<float>(cols);

  const auto write_dx = [&](auto dsum) {
    ForVectors(cols, [&](int64_t i, auto part) {
      const F32 g = Load(dy + i, part) * Load(scale + i, part);
      const F32 value = (g - mean_g - xhat(i, part) * mean_gx) * row_stats.scale;
      Store(dx + i, value + dsum(i, part), part);
    });
  };
  if (args.dsum == nullptr) {
    write_dx([](int64_t, auto) { return F32{}; });
  } else {
    const T* const dsum = static_cast<const T*>(args.dsum) + row * cols;
    write_dx([&](int64_t i, auto part) { return Load(dsum + i, part); });
  }
}

/// How a group's rows are cut for dscale and dbias: by sizes only, so that their sums do not depend
/// on the number of threads. `longest`: rows of the longest group.
struct NormChunks {
  int64_t count, rows;
  explicit NormChunks(const NormBackwardArgs& args) {
    const int64_t longest = Max<int64_t>(1, CeilDiv(args.rows, args.groups));
    constexpr int64_t kMaxCount = 64;
    constexpr int64_t kMinRows = 16;  // adding a chunk's sums costs about what a row costs
    const int64_t wanted = Min(longest * args.cols / (2 * kTaskElements), longest / kMinRows);
    rows = CeilDiv(longest, Max<int64_t>(1, Min(wanted, kMaxCount)));
    count = CeilDiv(longest, rows);
  }
};

/// out[c] = sum over chunks of partial[chunk, c], in order.
inline void AddChunks(const Launch& launch, const NormBackwardArgs& args, int64_t chunks,
                      const float* partial, float* out) {
  const int64_t cols = args.cols;
  constexpr int64_t kBlock = 1024;
  const int64_t blocks = CeilDiv(cols, kBlock);
  ForRows(launch, args.batch * args.groups * blocks, kBlock * chunks,
          [=](int64_t first, int64_t last) {
            for (int64_t task = first; task < last; ++task) {
              const int64_t group = task / blocks, start = task % blocks * kBlock;
              const float* const source = partial + group * chunks * cols + start;
              ForVectors(Min(kBlock, cols - start), [&](int64_t i, auto part) {
                F32 sum{};
                for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                  sum += Load(source + chunk * cols + i, part);
                }
                Store(out + group * cols + start + i, sum, part);
              });
            }
          });
}

inline Status NormBackward(const NormBackwardArgs& args, const Launch& launch) {
  const int64_t cols = args.cols;
  if (args.batch == 0 || cols == 0) return {};
  const NormChunks chunks(args);
  const int64_t all_chunks = args.batch * args.groups * chunks.count;
  const int64_t partial_size = all_chunks * cols;
  float *dscale = args.dscale, *dbias = args.dbias;
  Scratch scratch(chunks.count == 1 ? 0 : 2 * Scratch::Size(partial_size));
  if (!scratch.ok()) return kOutOfMemory;
  if (chunks.count > 1) {
    dscale = scratch.Take(partial_size);
    dbias = scratch.Take(partial_size);
  }
  WithNorm(args, [&]<typename T, typename P, typename Kind>(T, P, Kind) {
    ForRows(launch, all_chunks, chunks.rows * cols, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        float* const dscale_row = dscale + task * cols;
        float* const dbias_row = dbias == nullptr ? nullptr : dbias + task * cols;
        ForVectors(cols, [&](int64_t i, auto part) {
          Store(dscale_row + i, F32{}, part);
          if (Kind::kValue == NormKind::kLayer) Store(dbias_row + i, F32{}, part);
        });
        const int64_t group = task / chunks.count, chunk = task % chunks.count;
        const NormRows rows = RowsOfGroup(args, group);
        const int64_t start = rows.first + chunk * chunks.rows;
        const int64_t end = Min(start + chunks.rows, rows.end);
        for (int64_t row = start; row < end; ++row) {
          NormBackwardRow<Kind::kValue, T, P>(args, row, dscale_row, dbias_row);
        }
      }
    });
  });
  if (chunks.count > 1) {
    AddChunks(launch, args, chunks.count, dscale, args.dscale);
    if (args.kind == NormKind::kLayer) {
      AddChunks(launch, args, chunks.count, dbias, args.dbias);
    }
  }
  return {};
}

}  // namespace zenith::ZENITH_ISA
