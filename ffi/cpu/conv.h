// A convolution in float32, channels last: an implicit matrix product. See ffi/kernels/conv.h.
//
// A row of the product is a pixel of y, a column a feature, and its depth goes over the filter's
// elements and channels. Work is cut as in linear.h: tiles of kTileRows pixels by kTileVectors
// registers of features, the first of which packs a chunk of the weights for those after it. No
// image of patches is made: along a row of the filter the pixels that it touches lie one behind the
// other in x, and so a tile reads them there, one pointer a pixel. Only where such a run passes
// the image's edge is it copied, with zeros; where runs are short, a task copies the part of the
// images that it reads, with the zeros around. Pixels that share a maximum follow each other, and
// their values wait for it in scratch.
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

/// Where images have an edge to pass, runs below so many floats are read from a copy with zeros.
inline constexpr int64_t kShortRun = 32;

/// From a filter's first element to behind its last.
inline int64_t Reach(const ConvAxis& axis) { return (axis.kernel - 1) * axis.dilation + 1; }

/// What the filter sees along an axis, zeros included.
inline int64_t Seen(const ConvAxis& axis) { return (axis.out - 1) * axis.stride + Reach(axis); }

/// Whether the filter passes no edge.
inline bool IsInside(const ConvAxis& axis) {
  return axis.before <= 0 && Seen(axis) - axis.before <= axis.size;
}

/// Pixels that share a maximum.
inline int64_t WindowOf(const ConvForwardArgs& args) { return args.height.pool * args.width.pool; }

/// What a chunk has of a run. row, column: of the run's first element, from a filter's first one
/// on.
struct ConvPart {
  int64_t first, size;  // floats of the run
  int64_t row, column;
  int64_t offset;  // in x, from where a filter's first element lies
};

/// A pixel before the maximum: the row and column of the filter's first element, and where that
/// lies in x, or would.
struct ConvPixel {
  int64_t at, row, column;
};

/// Goes over the pixels before the maximum: image by image, window by window, row by row in these.
class ConvPixels {
 public:
  ConvPixels(const ConvForwardArgs& args, int64_t first) : args_(args) {
    const ConvAxis &height = args.height, &width = args.width;
    const int64_t columns = width.out / width.pool, rows = height.out / height.pool;
    const int64_t inside = first % WindowOf(args), window = first / WindowOf(args);
    right_ = inside % width.pool;
    down_ = inside / width.pool;
    left_ = window % columns * width.pool;
    top_ = window / columns % rows * height.pool;
    image_ = window / columns / rows;
  }

  ConvPixel Next() {
    const ConvAxis &height = args_.height, &width = args_.width;
    const int64_t row = (top_ + down_) * height.stride - height.before;
    const int64_t column = (left_ + right_) * width.stride - width.before;
    const int64_t at = ((image_ * height.size + row) * width.size + column) * args_.channels;
    if (++right_ == width.pool) {
      right_ = 0;
      if (++down_ == height.pool) {
        down_ = 0;
        left_ += width.pool;
        if (left_ == width.out) {
          left_ = 0;
          top_ += height.pool;
          if (top_ == height.out) {
            top_ = 0;
            ++image_;
          }
        }
      }
    }
    return {at, row, column};
  }

 private:
  const ConvForwardArgs& args_;
  int64_t image_, top_, left_, down_, right_;
};

/// One chunk of one panel, for a block of pixels.
struct ConvChunk {
  const ConvForwardArgs& args;
  ConvRun run;
  bool is_inside;               // of the images: no run passes an edge
  int64_t column, columns;      // of the panel; columns <= kPanel
  float* packed;                // (depth, kVectors * kLanes)
  float* values;                // sums so far, (pixels of the block, kVectors * kLanes)
  ConvPart* parts;              // (kChunk,), with depth in all
  float* copied;                // (kTileRows, kChunk)
  const float* zeros;           // (kChunk,)
  int64_t first_k = 0;          // first row of w, as a matrix of `features` columns
  int64_t depth = 0;            // rows of w
  bool is_last = false;         // of its panel
  const float* w = nullptr;     // the chunk's first element
  const float* next = nullptr;  // that of the chunk which this thread takes next
  int64_t next_depth = 0;       // rows of it that are fetched
};

/// Takes chunk.depth rows of w from chunk.first_k on apart.
inline void ConvTakeApart(const ConvChunk& chunk) {
  const ConvForwardArgs& args = chunk.args;
  const int64_t runs = args.width.kernel / chunk.run.elements;  // in a row of the filter
  ConvPart* part = chunk.parts;
  for (int64_t left = chunk.depth, k = chunk.first_k; left > 0; ++part) {
    const int64_t run = k / chunk.run.size, first = k % chunk.run.size;
    const int64_t size = Min(left, chunk.run.size - first);
    const int64_t row = run / runs * args.height.dilation;
    const int64_t column = run % runs * args.width.dilation;
    *part = {first, size, row, column, (row * args.width.size + column) * args.channels + first};
    left -= size;
    k += size;
  }
}

/// Where the part lies for each pixel, of which some run passes an edge.
template <int kRows>
ZENITH_INLINE void ConvSources(const ConvChunk& chunk, const ConvPixel* pixels,
                               const ConvPart& part, const float** sources) {
  const ConvForwardArgs& args = chunk.args;
  const int64_t first = part.first, size = part.size;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = pixels[i].row + part.row, column = pixels[i].column + part.column;
    sources[i] = args.x + pixels[i].at + part.offset;
    if (row < 0 || row >= args.height.size) {
      sources[i] = chunk.zeros;
    } else if (column < 0 || column + chunk.run.elements > args.width.size) [[unlikely]] {
      const int64_t begin = Min(size, Max<int64_t>(0, -column * args.channels - first));
      const int64_t end = Max(begin, Min(size, (args.width.size - column) * args.channels - first));
      float* const copy = chunk.copied + i * kChunk;
      for (int64_t k = 0; k < begin; ++k) copy[k] = 0;
      ForVectors(end - begin, [&](int64_t k, auto part) {
        Store(copy + begin + k, Load(sources[i] + begin + k, part), part);
      });
      for (int64_t k = end; k < size; ++k) copy[k] = 0;
      sources[i] = copy;
    }
  }
}

/// f(scale * sums + bias + residual) of one vector.
template <typename Part>
ZENITH_INLINE F32 ConvFinished(const ConvForwardArgs& args, int64_t at, int64_t column, F32 sums,
                               Part part) {
  const F32 bias = Load(args.bias + column, part);
  F32 v = args.scale ? Fma(sums, Load(args.scale + column, part), bias) : sums + bias;
  if (args.residual != nullptr) v += Load(args.residual + at, part);
  if (args.relu) v = Max(F32{}, v);
  return v;
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
  const float* x[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) x[i] = args.x + pixels[i].at;
  const ConvPart* part = chunk.parts;
  for (int64_t left = chunk.depth; left > 0; left -= part->size, ++part) {
    int64_t begin = part->offset;
    if (!chunk.is_inside) {
      ConvSources<kRows>(chunk, pixels, *part, x);
      begin = 0;
    }
    const int64_t end = begin + part->size;
    for (int64_t k = begin; k < end; ++k) {
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
  // To y, or, to wait for the maximum, to the values.
  const int64_t at = row * args.features + chunk.column;
  const bool waits = WindowOf(args) > 1;
  float* const out = waits ? values : args.y + at;
  const int64_t out_stride = waits ? kVectors * kLanes : args.features;
  if (chunk.is_last && chunk.columns == kVectors * kLanes) {
    // Step by step, so that what is asked is asked once.
    const auto each = [&](auto function) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) function(i, j, acc[i][j]);
      }
    };
    F32 bias[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) bias[j] = Load(args.bias + chunk.column + j * kLanes);
    if (args.scale != nullptr) {
      const float* const scale = args.scale + chunk.column;
      each([&](int, int j, F32& v) { v = Fma(v, Load(scale + j * kLanes), bias[j]); });
    } else {
      each([&](int, int j, F32& v) { v += bias[j]; });
    }
    if (args.residual != nullptr) {
      const float* const residual = args.residual + at;
      const int64_t stride = args.features;
      each([&](int i, int j, F32& v) { v += Load(residual + i * stride + j * kLanes); });
    }
    if (args.relu) each([&](int, int, F32& v) { v = Max(F32{}, v); });
    each([&](int i, int j, F32& v) { Store(out + i * out_stride + j * kLanes, v); });
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
      Store(out + i * out_stride + j,
            ConvFinished(args, at + i * args.features + j, chunk.column + j,
                         Load(values + i * kVectors * kLanes + j), part),
            part);
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

/// y = the maximum, or a NaN, of each window's values, for pixels [first, last) before it.
template <int kVectors>
ZENITH_NOINLINE void ConvMaxima(const ConvChunk& chunk, int64_t first, int64_t last) {
  const int64_t window = WindowOf(chunk.args), width = kVectors * kLanes;
  float* y = chunk.args.y + first / window * chunk.args.features + chunk.column;
  const float* values = chunk.values;
  for (int64_t pixel = first; pixel < last; pixel += window) {
    ForVectors(chunk.columns, [&](int64_t j, auto part) {
      F32 maximum = Load(values + j);
      for (int64_t i = 1; i < window; ++i) {
        maximum = Select(maximum == maximum, Max(maximum, Load(values + i * width + j)), maximum);
      }
      Store(y + j, maximum, part);
    });
    values += window * width;
    y += chunk.args.features;
  }
}

/// Pixels [first, last) of all images, before the maximum.
template <int kVectors, bool kWhole>
ZENITH_NOINLINE void ConvBlock(const ConvChunk& chunk, int64_t first, int64_t last) {
  ConvPixels all(chunk.args, first);
  int tiles = 0;  // that the packed copy served
  bool packed = false;
  for (int64_t pixel = first, rows; pixel < last; pixel += rows) {
    rows = TileRows(last - pixel);
    ConvPixel pixels[kTileRows];
    for (int64_t i = 0; i < rows; ++i) pixels[i] = all.Next();
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
  if (chunk.is_last && WindowOf(chunk.args) > 1) ConvMaxima<kVectors>(chunk, first, last);
}

inline void ConvBlock(const ConvChunk& chunk, int64_t first, int64_t last) {
  WithPanel(chunk.columns,
            [&]<int kVectors, bool kWhole>() { ConvBlock<kVectors, kWhole>(chunk, first, last); });
}

/// The part of x that some pixels' filters see, zeros included: rows of all images as if they were
/// one, first up to last.
struct ConvSeen {
  int64_t first = 0, last = 0;
  int64_t rows, columns;  // of an image

  ConvSeen(const ConvForwardArgs& args, int64_t first_pixel, int64_t last_pixel)
      : rows(Seen(args.height)), columns(Seen(args.width)) {
    const int64_t across = args.width.out / args.width.pool * WindowOf(args);
    const int64_t down = args.height.out / args.height.pool;
    const auto row = [&](int64_t pixel, int64_t in_window) {
      const int64_t windows = pixel / across;
      return windows / down * rows +
             (windows % down * args.height.pool + in_window) * args.height.stride;
    };
    first = row(first_pixel, 0);
    last = row(last_pixel - 1, args.height.pool - 1) + Reach(args.height);
  }

  int64_t size(int64_t channels) const { return (last - first) * columns * channels; }
};

/// args with x a copy of what is seen, of which no run passes an edge.
inline ConvForwardArgs WithEdges(const ConvForwardArgs& args, const ConvSeen& seen, float* copy) {
  const ConvAxis &height = args.height, &width = args.width;
  const int64_t begin = Min(seen.columns, Max<int64_t>(0, width.before));
  const int64_t end = Max(begin, Min(seen.columns, width.before + width.size));
  __builtin_memset(copy, 0, static_cast<size_t>(seen.size(args.channels)) * sizeof(float));
  for (int64_t i = seen.first; i < seen.last; ++i) {
    const int64_t row = i % seen.rows - height.before;
    if (row < 0 || row >= height.size) continue;
    float* const to = copy + ((i - seen.first) * seen.columns + begin) * args.channels;
    const int64_t from = (i / seen.rows * height.size + row) * width.size + begin - width.before;
    ForVectors((end - begin) * args.channels, [&](int64_t k, auto part) {
      Store(to + k, Load(args.x + from * args.channels + k, part), part);
    });
  }
  ConvForwardArgs result = args;
  result.x = copy - seen.first * seen.columns * args.channels;
  result.height.size = seen.rows;
  result.width.size = seen.columns;
  result.height.before = result.width.before = 0;
  return result;
}

inline Status ConvForward(const ConvForwardArgs& args, const Launch& launch) {
  const int64_t pixels = args.images * args.height.out * args.width.out;
  if (pixels == 0 || args.features == 0) return {};
  const int64_t k_size = args.height.kernel * args.width.kernel * args.channels;
  const int64_t panels = CeilDiv(args.features, kPanel);
  // Blocks of one size, and as many for each thread.
  const int64_t blocks =
      RoundUp(CeilDiv(pixels, kLinearRows), panels % launch.threads ? launch.threads : 1);
  const int64_t block = RoundUp(CeilDiv(pixels, blocks), kTileRows * WindowOf(args));
  const ConvRun run = ConvRunOf(args);
  const bool is_inside = IsInside(args.height) && IsInside(args.width);
  const bool is_copied = !is_inside && run.size < kShortRun;
  Flag out_of_memory;
  launch.ParallelFor(panels * blocks, [&](int64_t task) {
    const int64_t first = task / panels * block, last = Min(first + block, pixels);
    if (first >= last) return;
    const int64_t packed = kChunk * kPanel, values = block * kPanel, copied = kTileRows * kChunk;
    const ConvSeen seen(args, first, last);
    const int64_t edges = is_copied ? seen.size(args.channels) : 0;
    const int64_t parts = kChunk * static_cast<int64_t>(sizeof(ConvPart) / sizeof(float));
    Scratch scratch(Scratch::Size(packed) + Scratch::Size(values) + Scratch::Size(copied) +
                    Scratch::Size(kChunk) + Scratch::Size(edges) + Scratch::Size(parts));
    if (!scratch.ok()) return out_of_memory.Set();
    const int64_t column = task % panels * kPanel, next_column = column + launch.threads * kPanel;
    float* const at = scratch.Take(packed);
    float* const sums = scratch.Take(values);
    float* const copies = scratch.Take(copied);
    float* const zeros = scratch.Take(kChunk);
    for (int64_t k = 0; k < kChunk; ++k) zeros[k] = 0;
    const ConvForwardArgs of_task = is_copied ? WithEdges(args, seen, scratch.Take(edges)) : args;
    ConvChunk chunk{of_task,
                    run,
                    is_inside || is_copied,
                    column,
                    Min(kPanel, args.features - column),
                    at,
                    sums,
                    reinterpret_cast<ConvPart*>(scratch.Take(parts)),
                    copies,
                    zeros};
    for (int64_t k = 0; k < k_size; k += kChunk) {
      chunk.first_k = k;
      chunk.depth = Min(kChunk, k_size - k);
      chunk.is_last = k + kChunk >= k_size;
      chunk.w = args.w + k * args.features + column;
      chunk.next = chunk.is_last ? args.w + next_column : chunk.w + kChunk * args.features;
      chunk.next_depth = Min(kChunk, chunk.is_last ? k_size : k_size - k - kChunk);
      if (chunk.is_last && next_column >= args.features) chunk.next_depth = 0;
      ConvTakeApart(chunk);
      ConvBlock(chunk, first, last);
    }
  });
  return out_of_memory.is_set() ? kOutOfMemory : Status{};
}

}  // namespace zenith::ZENITH_ISA
