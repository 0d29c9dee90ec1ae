// What the attention passes share: rows, which keys they see, capped, masked and biased logits.
//
// The rows of one kv head are its (group, t) pairs in one sequence, row = group * q_len + t. A
// block of rows shares keys and values whatever its groups, so decoding with grouped queries fills
// lanes. Logits are kept in units of log 2: scale * log2(e) goes into the packed query, exp becomes
// exp2. Scores live as lane tiles (transpose.h), scores[s * kBlockRows + row], rows in lanes.
#pragma once

#include "ffi/cpu/gemm.h"
#include "ffi/cpu/math.h"
#include "ffi/cpu/parallel.h"
#include "ffi/cpu/transpose.h"
#include "ffi/kernels/attention.h"

namespace zenith::ZENITH_ISA {

/// Query rows in one block and keys in one step: three 64 x 64 float tiles are one level 1 cache.
inline constexpr int64_t kBlockRows = 64;
inline constexpr int64_t kBlockKeys = 64;
static_assert(kBlockRows % kLanes == 0 && kBlockKeys % kLanes == 0);

/// Multiply-adds that cost about what an element of an elementwise kernel does.
inline constexpr int64_t kProductsPerElement = 16;

inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr float kLn2 = 0.69314718055994531f;

struct KeyRange {
  int64_t first, last;  // [first, last), empty where last <= first
  bool empty() const { return last <= first; }
};

/// Rows [first, first + count) of one (batch, kv head).
struct RowBlock {
  int64_t batch = 0, kv_head = 0, first = 0, count = 0;
  KeyRange some{}, all{};  // keys that band and interval allow to some row; to every row

  RowBlock() = default;
  RowBlock(const AttentionProblem& p, int64_t batch_index, int64_t kv_head_index, int64_t block)
      : batch(batch_index), kv_head(kv_head_index), first(block * kBlockRows) {
    count = Min(kBlockRows, p.groups * p.q_len - first);
    const bool one_group = first / p.q_len == (first + count - 1) / p.q_len;
    const int64_t min_t = one_group ? first % p.q_len : 0;
    const int64_t max_t = one_group ? min_t + count - 1 : p.q_len - 1;
    some = {Max<int64_t>(0, min_t - p.left), Min(p.kv_len, max_t + p.right + 1)};
    all = {max_t - p.left, min_t + p.right + 1};
    if (p.interval == nullptr) return;
    KeyRange hull{p.kv_len, 0};
    for (int64_t r = 0; r < count; ++r) {
      const KeyRange row = Row(p, r);
      all = {Max(all.first, row.first), Min(all.last, row.last)};
      if (!row.empty()) hull = {Min(hull.first, row.first), Max(hull.last, row.last)};
    }
    some = hull;
  }
  int64_t group(const AttentionProblem& p, int64_t r) const { return (first + r) / p.q_len; }
  int64_t t(const AttentionProblem& p, int64_t r) const { return (first + r) % p.q_len; }
  int64_t head(const AttentionProblem& p, int64_t r) const {
    return kv_head * p.groups + group(p, r);
  }
  /// Position in the dense (batch, head, t) arrays, where a kv head's rows are contiguous.
  int64_t flat(const AttentionProblem& p, int64_t r) const {
    return (batch * p.kv_heads + kv_head) * p.groups * p.q_len + first + r;
  }
  template <typename T>
  T* Pointer(const AttentionProblem& p, T* base, const HeadStrides& strides, int64_t r) const {
    return base + batch * strides.batch + head(p, r) * strides.head + t(p, r) * strides.length;
  }
  int64_t Score(const AttentionProblem& p, const ScoreStrides& strides, int64_t r) const {
    return batch * strides.batch + kv_head * strides.kv_head + group(p, r) * strides.group +
           t(p, r) * strides.query;
  }

  /// Keys that band and interval allow to row r.
  KeyRange Row(const AttentionProblem& p, int64_t r) const {
    KeyRange keys{Max<int64_t>(0, t(p, r) - p.left), Min(p.kv_len, t(p, r) + p.right + 1)};
    if (p.interval != nullptr) {
      const int32_t* const bounds = p.interval + Score(p, p.interval_strides, r);
      keys = {Max<int64_t>(keys.first, bounds[0]), Min<int64_t>(keys.last, bounds[1])};
    }
    return keys;
  }
  /// Whether band and interval allow all of these keys to all rows.
  bool Allows(KeyRange keys) const { return keys.first >= all.first && keys.last <= all.last; }
};

inline int64_t RowBlocks(const AttentionProblem& p) {
  return CeilDiv(p.groups * p.q_len, kBlockRows);
}

template <typename T>
const T* KeyValueHead(const void* base, const HeadStrides& strides, int64_t batch,
                      int64_t kv_head) {
  return static_cast<const T*>(base) + batch * strides.batch + kv_head * strides.head;
}
/// to[i * stride + j] = from[i * from_stride + j]; columns up to `stride` become 0.
template <typename T>
ZENITH_NOINLINE void CopyRows(int64_t rows, int64_t cols, const T* from, int64_t from_stride,
                              float* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    float* const row = to + i * stride;
    ForVectors(cols, [&](int64_t j, auto part) {
      Store(row + j, Load(from + i * from_stride + j, part), part);
    });
    for (int64_t j = cols; j < stride; ++j) row[j] = 0.0f;
  }
}

/// The rows of a block as a lane tile, times `scale`.
template <typename T>
ZENITH_NOINLINE void PackLanes(const AttentionProblem& p, const RowBlock& block, const void* base,
                               const HeadStrides& strides, int64_t features, float scale,
                               float* tile) {
  const T* rows[kBlockRows];
  for (int64_t r = 0; r < block.count; ++r) {
    rows[r] = block.Pointer(p, static_cast<const T*>(base), strides, r);
  }
  GatherLaneTile(block.count, features, tile, kBlockRows,
                 [&](int64_t r, int64_t j, auto part) { return Load(rows[r] + j, part) * scale; });
}

/// tile[s * kBlockRows + r] = element(pointer of row r, s), for a tensor broadcast over scores.
/// `Vector` loads keys side by side, `Scalar` one.
template <typename T, typename Vector, typename Scalar>
ZENITH_INLINE void PackScores(const AttentionProblem& p, const RowBlock& block, KeyRange keys,
                              const void* base, const ScoreStrides& strides, float* tile,
                              Vector vector, Scalar scalar) {
  const int64_t count = keys.last - keys.first;
  const T* rows[kBlockRows];
  for (int64_t r = 0; r < block.count; ++r) {
    rows[r] = static_cast<const T*>(base) + block.Score(p, strides, r) + keys.first * strides.key;
  }
  if (strides.query == 0 && rows[0] == rows[block.count - 1]) {
    // The same for all rows, as padding masks are.
    for (int64_t s = 0; s < count; ++s) {
      const F32 value = Splat(scalar(rows[0] + s * strides.key));
      for (int64_t r = 0; r < block.count; r += kLanes) Store(tile + s * kBlockRows + r, value);
    }
  } else if (strides.key == 1) {
    GatherLaneTile(block.count, count, tile, kBlockRows,
                   [&](int64_t r, int64_t s, auto part) { return vector(rows[r] + s, part); });
  } else {
    for (int64_t s = 0; s < count; ++s) {
      for (int64_t r = 0; r < block.count; ++r) {
        tile[s * kBlockRows + r] = scalar(rows[r] + s * strides.key);
      }
      for (int64_t r = block.count; r < RoundUp(block.count, kLanes); ++r) {
        tile[s * kBlockRows + r] = 0.0f;
      }
    }
  }
}

/// In units of log 2, where that does not overflow: the lowest float32, which fills masks, stays
/// finite.
ZENITH_INLINE F32 BiasInLog2(F32 bias) {
  const F32 scaled = bias * kLog2E;
  return Select(Abs(scaled) < Splat(kInfinity), scaled, bias);
}

/// Bias in units of log 2.
template <typename T>
ZENITH_NOINLINE void PackBias(const AttentionProblem& p, const RowBlock& block, KeyRange keys,
                              float* tile) {
  PackScores<T>(
      p, block, keys, p.bias, p.bias_strides, tile,
      [](const T* at, auto part) { return BiasInLog2(Load(at, part)); },
      [](const T* at) { return BiasInLog2(Load(at, Part{1}))[0]; });
}

/// Mask as all ones and zeros.
ZENITH_NOINLINE inline void PackMask(const AttentionProblem& p, const RowBlock& block,
                                     KeyRange keys, float* tile) {
  typedef uint8_t U8 __attribute__((vector_size(kLanes)));
  PackScores<uint8_t>(
      p, block, keys, p.mask, p.mask_strides, tile,
      [](const uint8_t* at, auto part) {
        U8 bytes{};
        if constexpr (sizeof(part) == sizeof(Part)) {
          for (int64_t i = 0; i < part.n; ++i) bytes[i] = at[i];
        } else {
          __builtin_memcpy(&bytes, at, sizeof bytes);
        }
        return (F32)(__builtin_convertvector(bytes, I32) != 0);
      },
      [](const uint8_t* at) { return __builtin_bit_cast(float, *at != 0 ? -1 : 0); });
}

/// Caps logits, adds the bias, and puts -inf where they are forbidden.
class ScoreEditor {
 public:
  /// Scratch of one block of rows, and scratch for a step, which blocks may share.
  static constexpr int64_t kRowFloats = 4 * kBlockRows;
  static constexpr int64_t kStepFloats = 3 * kBlockKeys * kBlockRows;

  ScoreEditor(const AttentionProblem& p, float* row_scratch, float* step_scratch)
      : p_(p),
        bias_(step_scratch),
        mask_(step_scratch + kBlockKeys * kBlockRows),
        slope_(step_scratch + 2 * kBlockKeys * kBlockRows),
        first_(row_scratch),
        last_(row_scratch + kBlockRows),
        segment_(row_scratch + 2 * kBlockRows),
        allowed_(row_scratch + 3 * kBlockRows) {}

  void Start(const RowBlock& block) {
    // Integers as bits. Below 2^31 as lengths are: a key has more than one byte.
    const auto store = [](float* to, int64_t value) {
      const int32_t bits = static_cast<int32_t>(value);
      __builtin_memcpy(to, &bits, sizeof bits);
    };
    min_segment_ = INT32_MAX, max_segment_ = INT32_MIN;
    for (int64_t r = 0; r < kBlockRows; ++r) {
      const int64_t row = Min(r, block.count - 1);
      const KeyRange keys = block.Row(p_, row);
      store(first_ + r, Min(keys.first, p_.kv_len));
      store(last_ + r, Max<int64_t>(keys.last, 0));
      allowed_[r] = 0.0f;
      if (p_.query_segments == nullptr) continue;
      const int32_t segment = p_.query_segments[block.Score(p_, p_.query_segments_strides, row)];
      store(segment_ + r, segment);
      min_segment_ = Min(min_segment_, segment), max_segment_ = Max(max_segment_, segment);
    }
  }

  /// Whether no row has the segment of any of these keys, as their ranges show.
  ZENITH_NOINLINE bool Skips(const RowBlock& block, KeyRange keys) const {
    if (p_.key_segments == nullptr) return false;
    int32_t low = INT32_MAX, high = INT32_MIN;
    const int32_t* const segments = KeySegments(block);
    for (int64_t s = keys.first; s < keys.last; ++s) {
      const int32_t segment = segments[s * p_.key_segments_strides.key];
      low = Min(low, segment), high = Max(high, segment);
    }
    return high < min_segment_ || low > max_segment_;
  }

  /// True where logits had to be looked at. `keys`: at most kBlockKeys.
  bool Edit(const RowBlock& block, KeyRange keys, float* scores) {
    if (p_.softcap > 0) Cap(block, keys, scores);
    if (block.Allows(keys) && p_.mask == nullptr && p_.bias == nullptr &&
        p_.key_segments == nullptr) {
      return false;
    }
    if (p_.mask != nullptr) PackMask(p_, block, keys, mask_);
    if (p_.bias != nullptr) {
      WithStorage(p_.bias_dtype, [&]<typename T>(T) { PackBias<T>(p_, block, keys, bias_); });
    }
    Forbid(block, keys, scores);
    return true;
  }

  /// Zeros in `dlogits` where the last Edit, of the same keys, found logits forbidden.
  ZENITH_NOINLINE void ZeroForbidden(const RowBlock& block, KeyRange keys, float* dlogits) const {
    ForAllowed(block, keys, [&](int64_t at, I32 allowed) {
      Store(dlogits + at, Select(allowed, Load(dlogits + at), F32{}));
    });
  }

  /// Cotangents of the products, from those of the logits that the last Edit, of the same keys,
  /// saw.
  ZENITH_NOINLINE void BeforeCap(const RowBlock& block, KeyRange keys, float* dlogits) const {
    if (!(p_.softcap > 0)) return;
    for (int64_t s = 0; s < keys.last - keys.first; ++s) {
      for (int64_t at = s * kBlockRows; at < s * kBlockRows + block.count; at += kLanes) {
        Store(dlogits + at, Load(dlogits + at) * Load(slope_ + at));
      }
    }
  }

  /// Whether any key of row r is allowed, after Edit on all blocks of keys.
  bool RowIsAllowed(const RowBlock& block, int64_t r) const {
    if (p_.mask != nullptr || p_.key_segments != nullptr) {
      return ((I32)Load(allowed_ + r / kLanes * kLanes))[r % kLanes] != 0;
    }
    return !block.Row(p_, r).empty();
  }

 private:
  const int32_t* KeySegments(const RowBlock& block) const {
    return p_.key_segments + block.batch * p_.key_segments_strides.batch +
           block.kv_head * p_.key_segments_strides.kv_head;
  }

  ZENITH_NOINLINE void Cap(const RowBlock& block, KeyRange keys, float* scores) {
    const float cap = p_.softcap * kLog2E, inverse = 1.0f / cap;
    for (int64_t s = 0; s < keys.last - keys.first; ++s) {
      for (int64_t at = s * kBlockRows; at < s * kBlockRows + block.count; at += kLanes) {
        const F32 tanh = Tanh(Load(scores + at) * inverse);
        Store(scores + at, tanh * cap);
        Store(slope_ + at, 1.0f - tanh * tanh);
      }
    }
  }

  ZENITH_NOINLINE void Forbid(const RowBlock& block, KeyRange keys, float* scores) {
    ForAllowed(block, keys, [&](int64_t at, I32 allowed) {
      const int64_t r = at % kBlockRows;
      Store(allowed_ + r, (F32)((I32)Load(allowed_ + r) | allowed));
      F32 logits = Load(scores + at);
      if (p_.bias != nullptr) logits += Load(bias_ + at);
      Store(scores + at, Select(allowed, logits, Splat(-kInfinity)));
    });
  }

  /// Calls body(position in the tile, which lanes are allowed).
  template <typename Body>
  ZENITH_INLINE void ForAllowed(const RowBlock& block, KeyRange keys, Body body) const {
    const bool cut = !block.Allows(keys);
    const int32_t* const segments = p_.key_segments == nullptr ? nullptr : KeySegments(block);
    for (int64_t s = keys.first; s < keys.last; ++s) {
      for (int64_t r = 0; r < block.count; r += kLanes) {
        const int64_t at = (s - keys.first) * kBlockRows + r;
        I32 allowed = SplatI(-1);
        if (cut) {
          const I32 key = SplatI(static_cast<int32_t>(s));
          allowed = (key >= (I32)Load(first_ + r)) & (key < (I32)Load(last_ + r));
        }
        if (segments != nullptr) {
          allowed &= (I32)Load(segment_ + r) == SplatI(segments[s * p_.key_segments_strides.key]);
        }
        if (p_.mask != nullptr) allowed &= (I32)Load(mask_ + at);
        body(at, allowed);
      }
    }
  }

  const AttentionProblem& p_;
  float *bias_, *mask_, *slope_, *first_, *last_, *segment_, *allowed_;
  int32_t min_segment_ = 0, max_segment_ = 0;
};

}  // namespace zenith::ZENITH_ISA
