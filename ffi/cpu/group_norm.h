// Group norm in three passes: moments of pieces, which are merged, then the result. A piece is some
// rows of all channels where these are last, else one channel. Samples that fit the cache go
// through all three one by one. See ffi/kernels/group_norm.h.
#pragma once

#include "ffi/cpu/activation.h"
#include "ffi/cpu/parallel.h"
#include "ffi/kernels/group_norm.h"

namespace zenith::ZENITH_ISA {

/// How a sample is cut: by sizes of the sample only, so that no sum depends on threads or on the
/// number of samples.
struct GroupNormPieces {
  GroupNormShape shape;
  int64_t count, rows;  // pieces of a sample, rows of a piece

  explicit GroupNormPieces(const GroupNormShape& of) : shape(of) {
    constexpr int64_t kPieceElements = 8192;  // stays in the first-level caches between its passes
    rows = shape.channels_last ? Max<int64_t>(1, kPieceElements / Max<int64_t>(1, shape.width()))
                               : shape.rows;
    count = shape.channels_last ? CeilDiv(shape.rows, rows) : shape.width();
  }

  int64_t first_row(int64_t piece) const { return shape.channels_last ? piece * rows : 0; }
  int64_t rows_of(int64_t piece) const { return Min(rows, shape.rows - first_row(piece)); }
  /// Where a piece's elements begin.
  int64_t offset(int64_t sample, int64_t piece) const {
    return sample * shape.sample_size() + piece * rows * (shape.channels_last ? shape.width() : 1);
  }
  /// Numbers of each kind that the pieces of a sample have: one for each of their channels.
  int64_t partials() const { return shape.channels_last ? count * shape.width() : count; }
  int64_t partial(int64_t sample, int64_t piece) const {
    return sample * partials() + piece * (shape.channels_last ? shape.width() : 1);
  }
};

/// Runs first(sample, piece), then merge(sample), then last(sample, piece) for all of them.
template <typename First, typename Merge, typename Last>
void ForPieces(const Launch& launch, const GroupNormPieces& pieces, First first, Merge merge,
               Last last) {
  constexpr int64_t kCachedElements = 131072;  // 512 KiB of float32
  const int64_t samples = pieces.shape.samples, count = pieces.count;
  const int64_t size = pieces.shape.sample_size();
  if (size <= kCachedElements && (samples >= 2 * launch.threads || size <= kTaskElements / 4)) {
    ForRows(launch, samples, size, [&](int64_t begin, int64_t end) {
      for (int64_t sample = begin; sample < end; ++sample) {
        for (int64_t piece = 0; piece < count; ++piece) first(sample, piece);
        merge(sample);
        for (int64_t piece = 0; piece < count; ++piece) last(sample, piece);
      }
    });
    return;
  }
  const int64_t cost = size / Max<int64_t>(1, count);
  const auto for_each = [&](auto& body) {
    ForRows(launch, samples * count, cost, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) body(task / count, task % count);
    });
  };
  for_each(first);
  ForRows(launch, samples, pieces.partials(), [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) merge(sample);
  });
  for_each(last);
}

/// source, of `dtype`, as float32.
inline void CopyToFloat(DType dtype, int64_t size, const void* source, float* out) {
  WithStorage(dtype, [&]<typename T>(T) {
    ForVectors(size, [&](int64_t i, auto part) {
      Store(out + i, Load(static_cast<const T*>(source) + i, part), part);
    });
  });
}

template <bool kSilu>
struct SiluConstant {
  static constexpr bool kValue = kSilu;
};
/// Calls body with the storage type and whether silu follows.
template <typename Args, typename Body>
void WithGroupNorm(const Args& args, Body body) {
  WithStorage(args.dtype, [&]<typename T>(T x) {
    if (args.silu) {
      body(x, SiluConstant<true>{});
    } else {
      body(x, SiluConstant<false>{});
    }
  });
}

/// Adds body(index, i, part), two registers, of every row into a[i] and b[i], for rows of channels.
template <typename Body>
ZENITH_INLINE void SumRows(int64_t rows, int64_t width, float* a, float* b, Body body) {
  ForVectors(width, [&](int64_t i, auto part) {
    Store(a + i, F32{}, part);
    Store(b + i, F32{}, part);
  });
  for (int64_t row = 0; row < rows; ++row) {
    ForVectors(width, [&](int64_t i, auto part) {
      F32 to_a = Load(a + i, part), to_b = Load(b + i, part);
      body(row * width + i, i, part, to_a, to_b);
      Store(a + i, to_a, part);
      Store(b + i, to_b, part);
    });
  }
}

// --- Forward.

/// Mean and sum of squares about it for each channel of a piece.
template <typename T>
ZENITH_NOINLINE void GroupNormMoments(const GroupNormPieces& pieces, int64_t piece, const T* x,
                                      float* mean, float* squares) {
  const int64_t rows = pieces.rows_of(piece), width = pieces.shape.width();
  const float per_row = 1.0f / static_cast<float>(rows);
  if (!pieces.shape.channels_last) {
    *mean = SumOver(rows, [&](int64_t i, auto part) { return Load(x + i, part); }) * per_row;
    *squares = SumOver(rows, [&](int64_t i, auto part) {
      const F32 centred = Load(x + i, part) - *mean;
      return centred * centred;
    });
    return;
  }
  ForVectors(width, [&](int64_t i, auto part) {
    F32 sum{};
    for (int64_t row = 0; row < rows; ++row) sum += Load(x + row * width + i, part);
    const F32 centre = sum * per_row;
    F32 total{};
    for (int64_t row = 0; row < rows; ++row) {
      const F32 centred = Load(x + row * width + i, part) - centre;
      total = Fma(centred, centred, total);
    }
    Store(mean + i, centre, part);
    Store(squares + i, total, part);
  });
}

/// Mean and 1/standard deviation of each group of a sample from its pieces. Chan, Golub and LeVeque
/// 1983: squares about the common mean are those about each mean and n * (mean - common mean)^2.
inline void MergeMoments(const GroupNormPieces& pieces, float eps, const float* means,
                         const float* squares, float* mean, float* rstd) {
  const GroupNormShape& shape = pieces.shape;
  const int64_t stride = shape.channels_last ? shape.width() : shape.channels;
  const int64_t repeats = shape.channels_last ? pieces.count : 1;
  const double size = static_cast<double>(shape.rows * shape.channels);
  for (int64_t group = 0; group < shape.groups; ++group) {
    const auto for_each = [&](auto body) {
      for (int64_t piece = 0; piece < repeats; ++piece) {
        const double rows = static_cast<double>(pieces.rows_of(piece));
        for (int64_t channel = 0; channel < shape.channels; ++channel) {
          body(piece * stride + group * shape.channels + channel, rows);
        }
      }
    };
    double sum = 0, total = 0;
    for_each([&](int64_t i, double rows) { sum += rows * means[i]; });
    const double common = sum / size;
    for_each([&](int64_t i, double rows) {
      const double off = means[i] - common;
      total += squares[i] + rows * off * off;
    });
    mean[group] = static_cast<float>(common);
    rstd[group] = static_cast<float>(1 / __builtin_sqrt(total / size + eps));
  }
}

template <typename T, bool kSilu>
ZENITH_NOINLINE void GroupNormResult(const GroupNormPieces& pieces, int64_t piece, const T* x,
                                     const float* centre, const float* gain, const float* bias,
                                     T* y) {
  const auto finish = [&](F32 z) { return kSilu ? Value<Activation::kSilu>(z) : z; };
  const int64_t rows = pieces.rows_of(piece), width = pieces.shape.width();
  if (!pieces.shape.channels_last) {
    const float c = centre[piece], a = gain[piece];
    const F32 b = Splat(bias[piece]);
    ForVectors(rows, [&](int64_t i, auto part) {
      Store(y + i, finish(Fma(Load(x + i, part) - c, a, b)), part);
    });
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    ForVectors(width, [&](int64_t i, auto part) {
      const F32 centred = Load(x + row * width + i, part) - Load(centre + i, part);
      const F32 z = Fma(centred, Load(gain + i, part), Load(bias + i, part));
      Store(y + row * width + i, finish(z), part);
    });
  }
}

inline Status GroupNormForward(const GroupNormForwardArgs& args, const Launch& launch) {
  const GroupNormPieces pieces(args.shape);
  const int64_t samples = args.shape.samples, width = args.shape.width();
  const int64_t channels = args.shape.channels, groups = args.shape.groups;
  if (samples * groups == 0) return {};
  const int64_t partials = samples * pieces.partials();
  Scratch scratch(2 * Scratch::Size(width) + 2 * Scratch::Size(partials) +
                  2 * Scratch::Size(samples * width));
  if (!scratch.ok()) return kOutOfMemory;
  float *const scale = scratch.Take(width), *const bias = scratch.Take(width);
  float *const means = scratch.Take(partials), *const squares = scratch.Take(partials);
  float *const centre = scratch.Take(samples * width), *const gain = scratch.Take(samples * width);
  CopyToFloat(args.param_dtype, width, args.scale, scale);
  CopyToFloat(args.param_dtype, width, args.bias, bias);
  WithGroupNorm(args, [&]<typename T, typename Silu>(T, Silu) {
    const T* const x = static_cast<const T*>(args.x);
    T* const y = static_cast<T*>(args.y);
    ForPieces(
        launch, pieces,
        [&](int64_t sample, int64_t piece) {
          const int64_t at = pieces.partial(sample, piece);
          GroupNormMoments(pieces, piece, x + pieces.offset(sample, piece), means + at,
                           squares + at);
        },
        [&](int64_t sample) {
          float *const mean = args.mean + sample * groups, *const rstd =
                                                               args.rstd + sample * groups;
          const int64_t at = pieces.partial(sample, 0);
          MergeMoments(pieces, args.eps, means + at, squares + at, mean, rstd);
          for (int64_t c = 0; c < width; ++c) {
            centre[sample * width + c] = mean[c / channels];
            gain[sample * width + c] = rstd[c / channels] * scale[c];
          }
        },
        [&](int64_t sample, int64_t piece) {
          const int64_t at = pieces.offset(sample, piece);
          GroupNormResult<T, Silu::kValue>(pieces, piece, x + at, centre + sample * width,
                                           gain + sample * width, bias, y + at);
        });
  });
  return {};
}

// --- Backward.

/// What each channel of a sample needs, each of `width` floats.
struct GroupNormChannels {
  const float *mean, *rstd, *scale, *bias;
};

template <bool kSilu>
ZENITH_INLINE F32 BeforeSilu(F32 dy, F32 xhat, F32 scale, F32 bias) {
  return kSilu ? dy * Derivative<Activation::kSilu>(Fma(xhat, scale, bias)) : dy;
}

/// Sums of dz * xhat and of dz for each channel of a piece.
template <typename T, bool kSilu>
ZENITH_NOINLINE void GroupNormSums(const GroupNormPieces& pieces, int64_t piece, const T* x,
                                   const T* dy, const GroupNormChannels& channels, float* dscale,
                                   float* dbias) {
  const int64_t rows = pieces.rows_of(piece), width = pieces.shape.width();
  if (!pieces.shape.channels_last) {
    const float mean = channels.mean[piece], rstd = channels.rstd[piece];
    const F32 scale = Splat(channels.scale[piece]), bias = Splat(channels.bias[piece]);
    F32 products{}, sum{};
    ForVectors(rows, [&](int64_t i, auto part) {
      const F32 xhat = (Load(x + i, part) - mean) * rstd;
      // Lanes past a tail hold dy = 0, so they add nothing.
      const F32 dz = BeforeSilu<kSilu>(Load(dy + i, part), xhat, scale, bias);
      products = Fma(dz, xhat, products);
      sum += dz;
    });
    *dscale = Sum(products);
    *dbias = Sum(sum);
    return;
  }
  SumRows(
      rows, width, dscale, dbias, [&](int64_t at, int64_t i, auto part, F32& products, F32& sum) {
        const F32 xhat =
            (Load(x + at, part) - Load(channels.mean + i, part)) * Load(channels.rstd + i, part);
        const F32 dz = BeforeSilu<kSilu>(Load(dy + at, part), xhat, Load(channels.scale + i, part),
                                         Load(channels.bias + i, part));
        products = Fma(dz, xhat, products);
        sum += dz;
      });
}

template <typename T, bool kSilu>
ZENITH_NOINLINE void GroupNormGradient(const GroupNormPieces& pieces, int64_t piece, const T* x,
                                       const T* dy, const GroupNormChannels& channels,
                                       const float* mean_g, const float* mean_gx, T* dx) {
  const auto gradient = [](F32 x_value, F32 dy_value, F32 mean, F32 rstd, F32 scale, F32 bias,
                           F32 of_g, F32 of_gx) {
    const F32 xhat = (x_value - mean) * rstd;
    const F32 g = BeforeSilu<kSilu>(dy_value, xhat, scale, bias) * scale;
    return (g - of_g - xhat * of_gx) * rstd;
  };
  const int64_t rows = pieces.rows_of(piece), width = pieces.shape.width();
  if (!pieces.shape.channels_last) {
    const F32 mean = Splat(channels.mean[piece]), rstd = Splat(channels.rstd[piece]);
    const F32 scale = Splat(channels.scale[piece]), bias = Splat(channels.bias[piece]);
    const F32 of_g = Splat(mean_g[piece]), of_gx = Splat(mean_gx[piece]);
    ForVectors(rows, [&](int64_t i, auto part) {
      Store(dx + i,
            gradient(Load(x + i, part), Load(dy + i, part), mean, rstd, scale, bias, of_g, of_gx),
            part);
    });
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    ForVectors(width, [&](int64_t i, auto part) {
      const int64_t at = row * width + i;
      Store(
          dx + at,
          gradient(Load(x + at, part), Load(dy + at, part), Load(channels.mean + i, part),
                   Load(channels.rstd + i, part), Load(channels.scale + i, part),
                   Load(channels.bias + i, part), Load(mean_g + i, part), Load(mean_gx + i, part)),
          part);
    });
  }
}

/// out[c] = sum over pieces of partial[piece, c], in order.
inline void AddPieces(const GroupNormPieces& pieces, const float* partial, float* out) {
  const int64_t width = pieces.shape.width();
  const int64_t repeats = pieces.shape.channels_last ? pieces.count : 1;
  ForVectors(width, [&](int64_t i, auto part) {
    F32 sum{};
    for (int64_t piece = 0; piece < repeats; ++piece) {
      sum += Load(partial + piece * width + i, part);
    }
    Store(out + i, sum, part);
  });
}

inline Status GroupNormBackward(const GroupNormBackwardArgs& args, const Launch& launch) {
  const GroupNormPieces pieces(args.shape);
  const int64_t samples = args.shape.samples, width = args.shape.width();
  const int64_t channels = args.shape.channels, groups = args.shape.groups;
  if (samples * width == 0) return {};
  const int64_t partials = samples * pieces.partials();
  Scratch scratch(2 * Scratch::Size(width) + 2 * Scratch::Size(partials) +
                  4 * Scratch::Size(samples * width));
  if (!scratch.ok()) return kOutOfMemory;
  float *const scale = scratch.Take(width), *const bias = scratch.Take(width);
  float *const dscales = scratch.Take(partials), *const dbiases = scratch.Take(partials);
  float *const mean = scratch.Take(samples * width), *const rstd = scratch.Take(samples * width);
  float* const mean_g = scratch.Take(samples * width);
  float* const mean_gx = scratch.Take(samples * width);
  CopyToFloat(args.param_dtype, width, args.scale, scale);
  CopyToFloat(args.param_dtype, width, args.bias, bias);
  for (int64_t sample = 0; sample < samples; ++sample) {
    for (int64_t c = 0; c < width; ++c) {
      mean[sample * width + c] = args.mean[sample * groups + c / channels];
      rstd[sample * width + c] = args.rstd[sample * groups + c / channels];
    }
  }
  const auto channels_of = [&](int64_t sample) {
    return GroupNormChannels{mean + sample * width, rstd + sample * width, scale, bias};
  };
  WithGroupNorm(args, [&]<typename T, typename Silu>(T, Silu) {
    const T* const x = static_cast<const T*>(args.x);
    const T* const dy = static_cast<const T*>(args.dy);
    T* const dx = static_cast<T*>(args.dx);
    ForPieces(
        launch, pieces,
        [&](int64_t sample, int64_t piece) {
          const int64_t from = pieces.offset(sample, piece), to = pieces.partial(sample, piece);
          GroupNormSums<T, Silu::kValue>(pieces, piece, x + from, dy + from, channels_of(sample),
                                         dscales + to, dbiases + to);
        },
        [&](int64_t sample) {
          float *const dscale = args.dscale + sample * width, *const dbias =
                                                                  args.dbias + sample * width;
          const int64_t at = pieces.partial(sample, 0);
          AddPieces(pieces, dscales + at, dscale);
          AddPieces(pieces, dbiases + at, dbias);
          const double size = static_cast<double>(args.shape.rows * channels);
          for (int64_t first = 0; first < width; first += channels) {
            double of_g = 0, of_gx = 0;
            for (int64_t c = first; c < first + channels; ++c) {
              of_g += static_cast<double>(scale[c]) * dbias[c];
              of_gx += static_cast<double>(scale[c]) * dscale[c];
            }
            for (int64_t c = first; c < first + channels; ++c) {
              mean_g[sample * width + c] = static_cast<float>(of_g / size);
              mean_gx[sample * width + c] = static_cast<float>(of_gx / size);
            }
          }
        },
        [&](int64_t sample, int64_t piece) {
          const int64_t at = pieces.offset(sample, piece);
          GroupNormGradient<T, Silu::kValue>(pieces, piece, x + at, dy + at, channels_of(sample),
                                             mean_g + sample * width, mean_gx + sample * width,
                                             dx + at);
        });
  });
  return {};
}

}  // namespace zenith::ZENITH_ISA
