// A linear layer in float32: y = epilogue(x @ w + bias) + residual. See ffi/kernels/linear.h.
//
// The columns of w are cut into panels of kTileVectors registers, the rows of x into blocks; a
// panel of a block is a task, which goes down the panel in chunks. The first tile of rows takes a
// chunk as it lies in w, where its rows are far apart, and leaves a packed copy for the tiles after
// it, which find that in the second-level cache and fetch the next chunk meanwhile. So weights need
// no copy ahead of time, and a product with few rows does not wait for their packing. Weights that
// were brought into panels ahead of time are their own packed copy.
#pragma once

#include "ffi/cpu/activation.h"
#include "ffi/cpu/gemm.h"
#include "ffi/cpu/parallel.h"
#include "ffi/cpu/transpose.h"
#include "ffi/kernels/linear.h"

namespace zenith::ZENITH_ISA {

/// Rows of w that the first tile asks for ahead: its products of 16 of them take 400 cycles.
inline constexpr int64_t kAhead = 16;
inline constexpr int64_t kPanel = kTileVectors * kLanes;  // columns of w
/// Rows of w in a chunk: a chunk of a panel (96 KiB with AVX-512) stays in the second-level cache
/// beside the one that is fetched meanwhile.
inline constexpr int64_t kChunk = 384;
/// Rows of x in a task: enough for the chunk's way from memory to be paid, few enough for all
/// threads to have tasks.
inline constexpr int64_t kLinearRows = 32 * kTileRows;

struct LinearOperands {
  Epilogue epilogue;
  WeightLayout layout;
  int64_t k, n;
  const float *x, *w, *bias, *residual;
  float *y, *pre;
  const float* scale = nullptr;  // of each column of x @ w, before the bias is added
};

/// One chunk of one panel, for a block of rows of x.
struct LinearChunk {
  const LinearOperands& args;
  int64_t column, columns;        // of the panel; columns <= kPanel
  float* copy;                    // room for a packed copy
  float* values;                  // x @ w + bias so far, (rows of the block, kVectors * kLanes)
  float* activated;               // (kTileRows, kVectors * kLanes)
  int64_t first_k = 0;            // first row of w
  int64_t depth = 0;              // rows of w
  bool is_last = false;           // of its panel
  const float* packed = nullptr;  // (depth, kVectors * kLanes), if there is one before any tile
  const float* w = nullptr;       // the chunk's first element
  int64_t w_stride = 0;           // from one row of w to the next, where they are read as they lie
  const float* next = nullptr;    // that of the chunk which this thread takes next
  int64_t next_depth = 0;         // rows of it that are fetched
};

/// Rows of the tile that starts where `left` of a block's are left.
inline int64_t TileRows(int64_t left) {
  return left >= kTileRows ? kTileRows : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

/// Calls body.operator()<kVectors, kWhole>() for a panel of so many columns: in registers, and
/// whether they are full.
template <typename Body>
void WithPanel(int64_t columns, Body body) {
  const auto of_size = [&]<int kVectors>() {
    if (columns == kVectors * kLanes) {
      body.template operator()<kVectors, true>();
    } else {
      body.template operator()<kVectors, false>();
    }
  };
  const int64_t vectors = CeilDiv(columns, kLanes);
  if (vectors == kTileVectors) {
    of_size.template operator()<kTileVectors>();
  } else if constexpr (kTileVectors > 2) {
    if (vectors == 3) of_size.template operator()<3>();
    if (vectors == 2) of_size.template operator()<2>();
    if (vectors == 1) of_size.template operator()<1>();
  } else {
    of_size.template operator()<1>();
  }
}

enum class Source {
  kWeights,        // reads w, leaves nothing
  kWeightsToPack,  // reads w, leaves the packed copy
  kPacked,         // reads the packed copy
};

/// values += x @ w for kRows rows of x. fetched: which 16 columns of the next chunk are fetched
/// meanwhile.
template <Source kSource, int kRows, int kVectors, bool kWhole>
ZENITH_NOINLINE void LinearProducts(const LinearChunk& chunk, const float* x, float* values,
                                    int fetched) {
  const int64_t depth = chunk.depth, w_stride = chunk.w_stride, x_stride = chunk.args.k;
  const bool is_transposed = chunk.args.layout == WeightLayout::kColumns;
  const float *w = chunk.w, *packed = chunk.packed, *next = nullptr;
  float* copy = chunk.copy;
  // The next chunk's lines lie w_stride apart; where w is (n, k), one behind the other in columns.
  int64_t fetches = 0, line = 0, lines = 1, line_stride = w_stride, column_stride = 0;
  if (kSource == Source::kPacked && fetched < kPanel / 16) {
    fetches = chunk.next_depth;
    next = chunk.next + fetched * 16 * (is_transposed ? x_stride : 1);
    if (is_transposed) {
      lines = CeilDiv(fetches, 16);
      line_stride = 16;
      column_stride = x_stride - lines * 16;
    }
  }
  F32 acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) acc[i][j] = Load(values + (i * kVectors + j) * kLanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    F32 b[kVectors];
    if constexpr (kSource == Source::kPacked) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) b[j] = Load(packed + j * kLanes);
      packed += kVectors * kLanes;
      if (k < fetches) {
        __builtin_prefetch(next, 0, 2);
        next += line_stride;
        if (++line == lines) {
          line = 0;
          next += column_stride;
        }
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
      for (int j = 0; j < kVectors; ++j) Store(copy + j * kLanes, b[j]);
      copy += kVectors * kLanes;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const F32 a = Splat(x[i * x_stride + k]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[i][j] = Fma(a, b[j], acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) Store(values + (i * kVectors + j) * kLanes, acc[i][j]);
  }
}

/// values = values * scale + bias, for `rows` rows.
template <int kVectors>
ZENITH_NOINLINE void LinearScale(const LinearChunk& chunk, int64_t rows, float* values) {
  const float* const scale = chunk.args.scale + chunk.column;
  const float* const bias = chunk.args.bias;
  for (int64_t i = 0; i < rows; ++i, values += kVectors * kLanes) {
    ForVectors(chunk.columns, [&](int64_t j, auto part) {
      F32 v = Load(values + j) * Load(scale + j, part);
      if (bias != nullptr) v += Load(bias + chunk.column + j, part);
      Store(values + j, v);
    });
  }
}

/// y = epilogue(values) + residual, for `rows` rows from `row` of x on.
template <int kVectors>
ZENITH_NOINLINE void LinearFinish(const LinearChunk& chunk, int64_t row, int64_t rows,
                                  float* values) {
  const int64_t width = kVectors * kLanes, size = rows * width;
  float* const out = chunk.activated;
  if (chunk.args.scale != nullptr) LinearScale<kVectors>(chunk, rows, values);
  const auto each = [=](auto function) {
    for (int64_t i = 0; i < size; i += kLanes) Store(out + i, function(Load(values + i)));
  };
  switch (chunk.args.epilogue) {
    case Epilogue::kNone:
      break;
    case Epilogue::kRelu:
      each([](F32 v) { return Max(F32{}, v); });
      break;
    case Epilogue::kReluSquared:
      each([](F32 v) { return Max(F32{}, v) * Max(F32{}, v); });
      break;
    case Epilogue::kTanh:
      each([](F32 v) { return Tanh(v); });
      break;
    case Epilogue::kSilu:
      ActivationRange<Activation::kSilu>(size, values, out);
      break;
    case Epilogue::kGeluTanh:
      ActivationRange<Activation::kGeluTanh>(size, values, out);
      break;
    case Epilogue::kGeluErf:
      ActivationRange<Activation::kGeluErf>(size, values, out);
      break;
  }
  const float* const from = chunk.args.epilogue == Epilogue::kNone ? values : out;
  const LinearOperands& args = chunk.args;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (row + i) * args.n + chunk.column;
    ForVectors(chunk.columns, [&](int64_t j, auto part) {
      if (args.pre != nullptr) Store(args.pre + at + j, Load(values + i * width + j), part);
      F32 v = Load(from + i * width + j);
      if (args.residual != nullptr) v += Load(args.residual + at + j, part);
      Store(args.y + at + j, v, part);
    });
  }
}

template <Source kSource, int kVectors, bool kWhole>
ZENITH_INLINE void LinearTile(const LinearChunk& chunk, int64_t rows, const float* x, float* values,
                              int fetched) {
  if (rows == kTileRows) {
    LinearProducts<kSource, kTileRows, kVectors, kWhole>(chunk, x, values, fetched);
  } else if (rows == 4) {
    LinearProducts<kSource, 4, kVectors, kWhole>(chunk, x, values, fetched);
  } else if (rows == 2) {
    LinearProducts<kSource, 2, kVectors, kWhole>(chunk, x, values, fetched);
  } else {
    LinearProducts<kSource, 1, kVectors, kWhole>(chunk, x, values, fetched);
  }
}

/// Rows [first, last) of x.
template <int kVectors, bool kWhole>
ZENITH_NOINLINE void LinearBlock(LinearChunk chunk, int64_t first, int64_t last) {
  const int64_t width = kVectors * kLanes;
  int tiles = 0;  // that the packed copy served
  for (int64_t row = first, rows; row < last; row += rows) {
    rows = TileRows(last - row);
    const float* const x = chunk.args.x + row * chunk.args.k + chunk.first_k;
    float* const values = chunk.values + (row - first) * width;
    if (chunk.first_k == 0) {
      for (int64_t i = 0; i < rows; ++i) {
        ForVectors(chunk.columns, [&](int64_t j, auto part) {
          const float* const bias = chunk.args.scale ? nullptr : chunk.args.bias;
          Store(values + i * width + j, bias ? Load(bias + chunk.column + j, part) : F32{});
        });
      }
    }
    if (chunk.packed != nullptr) {
      LinearTile<Source::kPacked, kVectors, true>(chunk, rows, x, values, tiles++);
    } else if (row + rows < last) {
      LinearTile<Source::kWeightsToPack, kVectors, kWhole>(chunk, rows, x, values, 0);
      chunk.packed = chunk.copy;
    } else {
      LinearTile<Source::kWeights, kVectors, kWhole>(chunk, rows, x, values, 0);
    }
    if (chunk.is_last) LinearFinish<kVectors>(chunk, row, rows, values);
  }
}

inline void LinearBlock(const LinearChunk& chunk, int64_t first, int64_t last) {
  WithPanel(chunk.columns, [&]<int kVectors, bool kWhole>() {
    LinearBlock<kVectors, kWhole>(chunk, first, last);
  });
}

/// panel(column, the column that this thread takes next, first row, last row, scratch as in
/// LinearChunk) for all panels of all blocks of rows.
template <typename Panel>
Status LinearTasks(int64_t rows, int64_t n, const Launch& launch, Panel panel) {
  const int64_t panels = CeilDiv(n, kPanel), blocks = CeilDiv(rows, kLinearRows);
  const int64_t block = RoundUp(CeilDiv(rows, blocks), kTileRows);
  Flag out_of_memory;
  launch.ParallelFor(panels * blocks, [&](int64_t task) {
    const int64_t first = task / panels * block, last = Min(first + block, rows);
    if (first >= last) return;
    const int64_t packed = kChunk * kPanel, values = block * kPanel, tile = kTileRows * kPanel;
    Scratch scratch(Scratch::Size(packed) + Scratch::Size(values) + Scratch::Size(tile));
    if (!scratch.ok()) return out_of_memory.Set();
    const int64_t column = task % panels * kPanel;
    float* const at = scratch.Take(packed);
    float* const sums = scratch.Take(values);
    // Where all threads are equally fast, the others take the panels between this one and the next.
    panel(column, column + launch.threads * kPanel, first, last, at, sums, scratch.Take(tile));
  });
  return out_of_memory.is_set() ? kOutOfMemory : Status{};
}

/// Where w(row, column) lies.
inline const float* WeightAt(const LinearOperands& args, int64_t row, int64_t column) {
  if (args.layout == WeightLayout::kRows) return args.w + row * args.n + column;
  if (args.layout == WeightLayout::kColumns) return args.w + column * args.k + row;
  const int64_t inside = column % kPanelColumns;
  return args.w + (column - inside) * args.k + row * kPanelColumns + inside;
}

/// Rows [first, last) of the panel at `column`, chunk by chunk. next_column: of the panel that this
/// thread takes next. Scratch as in LinearChunk.
inline void LinearPanel(const LinearOperands& args, int64_t column, int64_t next_column,
                        int64_t first, int64_t last, float* copy, float* values, float* activated) {
  LinearChunk chunk{args, column, Min(kPanel, args.n - column), copy, values, activated};
  chunk.w_stride = args.layout == WeightLayout::kPanels ? kPanelColumns : args.n;
  for (int64_t k = 0; k == 0 || k < args.k; k += kChunk) {
    const bool is_last = k + kChunk >= args.k;
    chunk.first_k = k;
    chunk.depth = Min(kChunk, args.k - k);
    chunk.is_last = is_last;
    chunk.w = WeightAt(args, k, column);
    chunk.next = is_last ? WeightAt(args, 0, next_column) : WeightAt(args, k + kChunk, column);
    chunk.next_depth = Min(kChunk, is_last ? args.k : args.k - k - kChunk);
    if (is_last && next_column >= args.n) chunk.next_depth = 0;
    if (args.layout == WeightLayout::kPanels && kPanel == kPanelColumns) {
      chunk.packed = chunk.w;
    } else if (args.layout == WeightLayout::kColumns) {
      GatherLaneTile(chunk.columns, chunk.depth, copy, RoundUp(chunk.columns, kLanes),
                     [&](int64_t column, int64_t k, auto part) {
                       return Load(chunk.w + column * chunk.args.k + k, part);
                     });
      chunk.packed = copy;
    }
    LinearBlock(chunk, first, last);
  }
}

inline Status LinearForward(const LinearForwardArgs& args, const Launch& launch) {
  if (args.dtype != DType::kF32 || args.bias_dtype != DType::kF32) {
    return {"the CPU's linear layer computes float32 only"};
  }
  if (args.rows == 0 || args.n == 0) return {};
  const LinearOperands operands{args.epilogue,
                                args.layout,
                                args.k,
                                args.n,
                                static_cast<const float*>(args.x),
                                static_cast<const float*>(args.w),
                                static_cast<const float*>(args.bias),
                                static_cast<const float*>(args.residual),
                                static_cast<float*>(args.y),
                                static_cast<float*>(args.pre)};
  return LinearTasks(args.rows, args.n, launch,
                     [&](auto... of_panel) { LinearPanel(operands, of_panel...); });
}

/// A group is a task: its sums are added up by one thread.
inline Status LinearBackward(const LinearBackwardArgs& args, const Launch& launch) {
  WithStorage(args.dtype, [&]<typename T>(T) {
    WithActivation(args.kind, [&]<typename Kind>(Kind) {
      ForRows(launch, args.groups, args.rows_per_group * args.n, [=](int64_t first, int64_t last) {
        const int64_t n = args.n;
        for (int64_t group = first; group < last; ++group) {
          float* const sums = args.dbias + group * n;
          for (int64_t i = 0; i < n; ++i) sums[i] = 0;
          for (int64_t row = group * args.rows_per_group; row < (group + 1) * args.rows_per_group;
               ++row) {
            T* const dpre = static_cast<T*>(args.dpre) + row * n;
            ActivationBackwardRange<Kind::kValue>(n, static_cast<const T*>(args.pre) + row * n,
                                                  static_cast<const T*>(args.dy) + row * n, dpre);
            ForVectors(n, [=](int64_t i, auto part) {
              Store(sums + i, Load(sums + i, part) + Load(dpre + i, part), part);
            });
          }
        }
      });
    });
  });
  return {};
}

}  // namespace zenith::ZENITH_ISA
