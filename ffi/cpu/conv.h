// A convolution in float32, channels last: an implicit matrix product. See ffi/kernels/conv.h.
//
// A row of the product is a pixel of y, a column a feature, and its depth goes over the filter's
// elements and channels. Work is cut as in linear.h: tiles of kTileRows pixels by kTileVectors
// registers of features, the first of which packs a chunk of the weights for those after it. No
// image of patches is made: along a row of the filter the pixels that it touches lie one behind the
// other in x, and so a tile reads them there, one pointer a pixel. Only where such a run passes
// the image's edge is it copied, with zeros.
#pragma once

#include "ffi/cpu/gemm.h"
#include "ffi/cpu/linear.h"
#include "ffi/cpu/parallel.h"
#include "ffi/kernels/conv.h"

namespace zenith::ZENITH_ISA {

/// What is contiguous in x for one pixel of y: a row of the filter, or, where that is dilated, one
/// element of it.
struct ConvRun {
  int64_t elements;  // of the filter
  int64_t size;      // floats
};

inline ConvRun ConvRunOf(const ConvForwardArgs& args) {
  const int64_t elements = args.width.dilation == 1 ? args.width.kernel : 1;
  return {elements, elements * args.channels};
}

/// A pixel of y: its image, and the place of the filter's first element there.
struct ConvPixel {
  const float* image;
  int64_t row, column;
};

/// One chunk of one panel, for a block of pixels.
struct ConvChunk {
  const ConvForwardArgs& args;
  ConvRun run;
  int64_t column, columns;      // of the panel; columns <= kPanel
  float* packed;                // (depth, kVectors * kLanes)
  float* values;                // sums so far, (pixels of the block, kVectors * kLanes)
  float* copied;                // (kTileRows, kChunk)
  const float* zeros;           // (kChunk,)
  int64_t first_k = 0;          // first row of w, as a matrix of `features` columns
  int64_t depth = 0;            // rows of w
  bool is_last = false;         // of its panel
  const float* w = nullptr;     // the chunk's first element
  const float* next = nullptr;  // that of the chunk which this thread takes next
  int64_t next_depth = 0;       // rows of it that are fetched
};

/// Where floats [first, first + size) of run `run` of each pixel lie.
template <int kRows>
ZENITH_INLINE void ConvSources(const ConvChunk& chunk, const ConvPixel* pixels, int64_t run,
                               int64_t first, int64_t size, const float** sources) {
  const ConvForwardArgs& args = chunk.args;
  const int64_t runs = args.width.kernel / chunk.run.elements;  // in a row of the filter
  const int64_t down = run / runs * args.height.dilation;
  const int64_t right = run % runs * args.width.dilation;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = pixels[i].row + down, column = pixels[i].column + right;
    const int64_t at = (row * args.width.size + column) * args.channels + first;
    if (row < 0 || row >= args.height.size) {
      sources[i] = chunk.zeros;
    } else if (column >= 0 && column + chunk.run.elements <= args.width.size) [[likely]] {
      sources[i] = pixels[i].image + at;
    } else {
      const int64_t begin = Min(size, Max<int64_t>(0, -column * args.channels - first));
      const int64_t end = Max(begin, Min(size, (args.width.size - column) * args.channels - first));
      float* const copy = chunk.copied + i * kChunk;
      for (int64_t k = 0; k < begin; ++k) copy[k] = 0;
      ForVectors(end - begin, [&](int64_t k, auto part) {
        Store(copy + begin + k, Load(pixels[i].image + at + begin + k, part), part);
      });
      for (int64_t k = end; k < size; ++k) copy[k] = 0;
      sources[i] = copy;
    }
  }
}

/// y = f(scale * sums + bias + residual) of one vector.
template <typename Part>
ZENITH_INLINE void ConvFinish(const ConvForwardArgs& args, int64_t at, int64_t column, F32 sums,
                              Part part) {
  const F32 bias = Load(args.bias + column, part);
  F32 v = args.scale ? Fma(sums, Load(args.scale + column, part), bias) : sums + bias;
  if (args.residual != nullptr) v += Load(args.residual + at, part);
  if (args.relu) v = Max(F32{}, v);
  Store(args.y + at, v, part);
}

/// sums += patches @ w for kRows pixels; `row` is the number of the first. fetched: which 16
/// columns of the next chunk are fetched meanwhile.
template <Source kSource, int kRows, int kVectors, bool kWhole>
ZENITH_NOINLINE void ConvProducts(const ConvChunk& chunk, const ConvPixel* pixels, int64_t row,
                                  float* values, int fetched) {
  const ConvForwardArgs& args = chunk.args;
  const int64_t w_stride = args.features;
  const float *w = chunk.w, *next = nullptr;
  float* packed = chunk.packed;
  int64_t fetches = 0;
  if (kSource == Source::kPacked && fetched < kPanel / 16) {
    fetches = chunk.next_depth;
    next = chunk.next + fetched * 16;
  }
  F32 acc[kRows][kVectors] = {};
  if (chunk.first_k != 0) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[i][j] = Load(values + (i * kVectors + j) * kLanes);
    }
  }
  int64_t run = chunk.first_k / chunk.run.size, first = chunk.first_k % chunk.run.size;
  for (int64_t left = chunk.depth, size; left > 0; left -= size, first = 0, ++run) {
    size = Min(left, chunk.run.size - first);
    const float* x[kRows];
    ConvSources<kRows>(chunk, pixels, run, first, size, x);
    for (int64_t k = 0; k < size; ++k) {
      F32 b[kVectors];
      if constexpr (kSource == Source::kPacked) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) b[j] = Load(packed + j * kLanes);
        if (fetches > 0) {
          __builtin_prefetch(next, 0, 2);
          next += w_stride;
          --fetches;
        }
      } else {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
          if (kWhole || j < kVectors - 1) {
            b[j] = Load(w + j * kLanes);
          } else {
            b[j] = Load(w + j * kLanes, Part{chunk.columns - j * kLanes});
          }
        }
#pragma GCC unroll 8
        for (int j = 0; j < kVectors * kLanes; j += 16) {
          __builtin_prefetch(w + kAhead * w_stride + j, 0, 2);
        }
        w += w_stride;
      }
      if constexpr (kSource == Source::kWeightsToPack) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) Store(packed + j * kLanes, b[j]);
      }
      if constexpr (kSource != Source::kWeights) packed += kVectors * kLanes;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const F32 a = Splat(x[i][k]);
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) acc[i][j] = Fma(a, b[j], acc[i][j]);
      }
    }
  }
  const int64_t at = row * args.features + chunk.column;
  if (chunk.is_last && chunk.columns == kVectors * kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        const int64_t column = j * kLanes;
        ConvFinish(args, at + i * args.features + column, chunk.column + column, acc[i][j],
                   Whole{});
      }
    }
    return;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) Store(values + (i * kVectors + j) * kLanes, acc[i][j]);
  }
  if (!chunk.is_last) return;
  for (int i = 0; i < kRows; ++i) {
    ForVectors(chunk.columns, [&](int64_t j, auto part) {
      ConvFinish(args, at + i * args.features + j, chunk.column + j,
                 Load(values + i * kVectors * kLanes + j), part);
    });
  }
}

template <Source kSource, int kVectors, bool kWhole>
ZENITH_INLINE void ConvTile(const ConvChunk& chunk, const ConvPixel* pixels, int64_t row,
                            int64_t rows, float* values, int fetched) {
  if (rows == kTileRows) {
    ConvProducts<kSource, kTileRows, kVectors, kWhole>(chunk, pixels, row, values, fetched);
  } else if (rows == 4) {
    ConvProducts<kSource, 4, kVectors, kWhole>(chunk, pixels, row, values, fetched);
  } else if (rows == 2) {
    ConvProducts<kSource, 2, kVectors, kWhole>(chunk, pixels, row, values, fetched);
  } else {
    ConvProducts<kSource, 1, kVectors, kWhole>(chunk, pixels, row, values, fetched);
  }
}

/// Pixels [first, last) of all images.
template <int kVectors, bool kWhole>
ZENITH_NOINLINE void ConvBlock(const ConvChunk& chunk, int64_t first, int64_t last) {
  const ConvForwardArgs& args = chunk.args;
  const ConvAxis &height = args.height, &width = args.width;
  int64_t column = first % width.out, row = first / width.out % height.out;
  const float* image =
      args.x + first / (width.out * height.out) * height.size * width.size * args.channels;
  int tiles = 0;  // that the packed copy served
  bool packed = false;
  for (int64_t pixel = first, rows; pixel < last; pixel += rows) {
    rows = last - pixel;
    rows = rows >= kTileRows ? kTileRows : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
    ConvPixel pixels[kTileRows];
    for (int64_t i = 0; i < rows; ++i) {
      pixels[i] = {image, row * height.stride - height.before,
                   column * width.stride - width.before};
      if (++column < width.out) continue;
      column = 0;
      if (++row < height.out) continue;
      row = 0;
      image += height.size * width.size * args.channels;
    }
    float* const values = chunk.values + (pixel - first) * kVectors * kLanes;
    if (packed) {
      ConvTile<Source::kPacked, kVectors, true>(chunk, pixels, pixel, rows, values, tiles++);
    } else if (pixel + rows < last) {
      ConvTile<Source::kWeightsToPack, kVectors, kWhole>(chunk, pixels, pixel, rows, values, 0);
      packed = true;
    } else {
      ConvTile<Source::kWeights, kVectors, kWhole>(chunk, pixels, pixel, rows, values, 0);
    }
  }
}

template <int kVectors>
ZENITH_INLINE void ConvBlock(const ConvChunk& chunk, int64_t first, int64_t last) {
  if (chunk.columns == kVectors * kLanes) {
    ConvBlock<kVectors, true>(chunk, first, last);
  } else {
    ConvBlock<kVectors, false>(chunk, first, last);
  }
}

inline void ConvBlock(const ConvChunk& chunk, int64_t first, int64_t last) {
  const int64_t vectors = CeilDiv(chunk.columns, kLanes);
  if (vectors == kTileVectors) {
    ConvBlock<kTileVectors>(chunk, first, last);
  } else if constexpr (kTileVectors > 2) {
    if (vectors == 3) ConvBlock<3>(chunk, first, last);
    if (vectors == 2) ConvBlock<2>(chunk, first, last);
    if (vectors == 1) ConvBlock<1>(chunk, first, last);
  } else {
    ConvBlock<1>(chunk, first, last);
  }
}

inline Status ConvForward(const ConvForwardArgs& args, const Launch& launch) {
  const int64_t pixels = args.images * args.height.out * args.width.out;
  if (pixels == 0 || args.features == 0) return {};
  const int64_t k_size = args.height.kernel * args.width.kernel * args.channels;
  const int64_t panels = CeilDiv(args.features, kPanel);
  // Blocks of one size, and as many for each thread.
  const int64_t blocks =
      RoundUp(CeilDiv(pixels, kLinearRows), panels % launch.threads ? launch.threads : 1);
  const int64_t block = RoundUp(CeilDiv(pixels, blocks), kTileRows);
  Flag out_of_memory;
  launch.ParallelFor(panels * blocks, [&](int64_t task) {
    const int64_t first = task / panels * block, last = Min(first + block, pixels);
    if (first >= last) return;
    const int64_t packed = kChunk * kPanel, values = block * kPanel, copied = kTileRows * kChunk;
    Scratch scratch(Scratch::Size(packed) + Scratch::Size(values) + Scratch::Size(copied) +
                    Scratch::Size(kChunk));
    if (!scratch.ok()) return out_of_memory.Set();
    const int64_t column = task % panels * kPanel, next_column = column + launch.threads * kPanel;
    float* const at = scratch.Take(packed);
    float* const sums = scratch.Take(values);
    float* const copies = scratch.Take(copied);
    float* const zeros = scratch.Take(kChunk);
    for (int64_t k = 0; k < kChunk; ++k) zeros[k] = 0;
    ConvChunk chunk{args, ConvRunOf(args), column, Min(kPanel, args.features - column), at,
                    sums, copies,          zeros};
    for (int64_t k = 0; k < k_size; k += kChunk) {
      chunk.first_k = k;
      chunk.depth = Min(kChunk, k_size - k);
      chunk.is_last = k + kChunk >= k_size;
      chunk.w = args.w + k * args.features + column;
      chunk.next = chunk.is_last ? args.w + next_column : chunk.w + kChunk * args.features;
      chunk.next_depth = Min(kChunk, chunk.is_last ? k_size : k_size - k - kChunk);
      if (chunk.is_last && next_column >= args.features) chunk.next_depth = 0;
      ConvBlock(chunk, first, last);
    }
  });
  return out_of_memory.is_set() ? kOutOfMemory : Status{};
}

}  // namespace zenith::ZENITH_ISA
