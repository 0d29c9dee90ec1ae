// Attention backward: probabilities recomputed from lse, Dao 2023, arXiv:2307.08691.
//
// A task is a chunk of the keys of one kv head. It passes over panels of keys whose K, V, dK and dV
// stay in the level 2 cache, and for each over all blocks of rows: five products per block of
// scores. dquery needs the sum over chunks: each writes its own part, added in order at the end.
// The cut into chunks depends on the problem only, so results do not depend on the number of
// threads.
#pragma once

#include "ffi/cpu/attention.h"

namespace zenith::ZENITH_ISA {

/// Floats per row of a float32 copy: whole vectors for any instruction set.
inline int64_t Padded(int64_t features) { return RoundUp(features, 16); }

/// Keys whose float32 K, V, dK and dV take at most 512 KiB: 512 keys at 64 features.
inline int64_t PanelKeys(const AttentionProblem& p) {
  constexpr int64_t kFloats = 512 * 1024 / 4;
  const int64_t keys = kFloats / Max<int64_t>(1, 2 * (Padded(p.qk_dim) + Padded(p.v_dim)));
  return Min(RoundUp(p.kv_len, kBlockKeys),
             Max<int64_t>(1, Min<int64_t>(keys, 1024) / kBlockKeys) * kBlockKeys);
}

/// How the keys of each kv head are cut.
struct KeyChunks {
  int64_t count, keys;
  explicit KeyChunks(const AttentionProblem& p) {
    constexpr int64_t kWantedTasks = 32;  // enough for many threads
    constexpr int64_t kMaxCount = 8;      // each costs a float32 copy of dquery
    const int64_t heads = Max<int64_t>(1, p.batch * p.kv_heads);
    const int64_t panel = Max<int64_t>(1, PanelKeys(p)), panels = CeilDiv(p.kv_len, panel);
    const int64_t wanted = Min(Min(CeilDiv(kWantedTasks, heads), kMaxCount), panels);
    keys = CeilDiv(panels, Max<int64_t>(1, wanted)) * panel;
    count = CeilDiv(p.kv_len, Max<int64_t>(1, keys));
  }
};

/// Beyond it float32 has no digits left in lse for the logarithm of a sum: 3e-4 at 2^12. Logits are
/// so far from 0 in rows all of whose keys a finite bias masks.
inline constexpr float kFarLse = 4096.0f;

/// scores become p = exp2(score - lse), dp becomes dlogits = p * (dp - delta).
ZENITH_NOINLINE inline void Probabilities(int64_t keys, int64_t rows, const float* lse,
                                          const float* delta, float* scores, float* dp) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const F32 row_lse = Load(lse + r), row_delta = Load(delta + r);
    for (int64_t s = 0; s < keys; ++s) {
      const int64_t at = s * kBlockRows + r;
      const F32 p = Exp2(Load(scores + at) - row_lse);
      Store(scores + at, p);
      Store(dp + at, p * (Load(dp + at) - row_delta));
    }
  }
}

/// delta = sum_e dout * out - dlse, summed in the order of the product of value and dout: where one
/// key has all the weight, out is its value, dp - delta is 0 and with it the row's part of dquery
/// and dkey. Any other order leaves a rounding of dout * out in place of that 0.
template <typename T>
void ComputeDelta(const AttentionBackwardArgs& p, const Launch& launch) {
  const int64_t heads = p.kv_heads * p.groups;
  ForRows(launch, p.batch * heads * p.q_len, p.v_dim, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t at = i / p.q_len / heads * p.out_strides.batch +
                         i / p.q_len % heads * p.out_strides.head +
                         i % p.q_len * p.out_strides.length;
      const T* const out = static_cast<const T*>(p.out) + at;
      const T* const dout = static_cast<const T*>(p.dout) + at;
      float sum = 0.0f;
      ForVectors(p.v_dim, [&](int64_t e, auto part) {
        const F32 o = Load(out + e, part), d = Load(dout + e, part);  // zeros past the end
        for (int lane = 0; lane < kLanes; ++lane) sum = o[lane] * d[lane] + sum;
      });
      p.delta[i] = sum;
      if (p.dlse != nullptr) p.delta[i] -= p.dlse[i];
    }
  });
}

template <typename T>
class AttentionBackwardTask {
 public:
  static int64_t ScratchSize(const AttentionProblem& p) {
    const int64_t panel = PanelKeys(p);
    return Scratch::Size(p.qk_dim * kBlockRows) + Scratch::Size(p.v_dim * kBlockRows) +
           (2 * panel + kBlockRows) * (Padded(p.qk_dim) + Padded(p.v_dim)) +
           2 * kBlockKeys * kBlockRows + 2 * kBlockRows + Padded(p.v_dim) +
           kBlockKeys * Padded(p.qk_dim) + ScoreEditor::kRowFloats + ScoreEditor::kStepFloats;
  }

  AttentionBackwardTask(const AttentionBackwardArgs& args, Scratch& scratch)
      : args_(args),
        qk_stride_(Padded(args.qk_dim)),
        v_stride_(Padded(args.v_dim)),
        query_lanes_(scratch.Take(args.qk_dim * kBlockRows)),
        dout_lanes_(scratch.Take(args.v_dim * kBlockRows)),
        query_(scratch.Take(kBlockRows * qk_stride_)),
        dout_(scratch.Take(kBlockRows * v_stride_)),
        scores_(scratch.Take(kBlockKeys * kBlockRows)),
        dscores_(scratch.Take(kBlockKeys * kBlockRows)),
        lse_(scratch.Take(kBlockRows)),
        delta_(scratch.Take(kBlockRows)),
        masked_dvalue_(scratch.Take(v_stride_)),
        far_key_(scratch.Take(kBlockKeys * qk_stride_)),
        editor_(args, scratch.Take(ScoreEditor::kRowFloats),
                scratch.Take(ScoreEditor::kStepFloats)) {
    const int64_t panel = PanelKeys(args);
    key_ = scratch.Take(panel * qk_stride_);
    dkey_ = scratch.Take(panel * qk_stride_);
    value_ = scratch.Take(panel * v_stride_);
    dvalue_ = scratch.Take(panel * v_stride_);
  }

  /// `dquery`: the chunk's part, (batch, head, t, Padded(qk_dim)).
  void Run(float* dquery, int64_t batch, int64_t kv_head, KeyRange chunk) {
    const int64_t rows = args_.groups * args_.q_len;
    dquery_ = dquery;
    dquery += (batch * args_.kv_heads + kv_head) * rows * qk_stride_;
    for (int64_t i = 0; i < rows * qk_stride_; ++i) dquery[i] = 0.0f;
    const bool poisoned = GatherMaskedRows(batch, kv_head);
    const int64_t panel = PanelKeys(args_);
    for (int64_t s = chunk.first; s < chunk.last; s += panel) {
      RunPanel(batch, kv_head, {s, Min(s + panel, chunk.last)}, poisoned);
    }
  }

 private:
  /// masked_dvalue_ = sum over rows without an allowed key of their even share of dout; true where
  /// such rows make everything NaN.
  bool GatherMaskedRows(int64_t batch, int64_t kv_head) {
    for (int64_t e = 0; e < v_stride_; ++e) masked_dvalue_[e] = 0.0f;
    const int64_t rows = args_.groups * args_.q_len;
    const float* const lse = args_.lse + (batch * args_.kv_heads + kv_head) * rows;
    for (int64_t row = 0; row < rows; ++row) {
      if (lse[row] != -kInfinity) continue;
      if (args_.masked_row == MaskedRow::kNan) return true;
      const RowBlock block(args_, batch, kv_head, row / kBlockRows);
      const T* const dout = block.Pointer(args_, static_cast<const T*>(args_.dout),
                                          args_.out_strides, row % kBlockRows);
      ForVectors(args_.v_dim, [&](int64_t e, auto part) {
        Store(masked_dvalue_ + e,
              Load(masked_dvalue_ + e) + Load(dout + e, part) / static_cast<float>(args_.kv_len));
      });
    }
    return false;
  }

  void RunPanel(int64_t batch, int64_t kv_head, KeyRange panel, bool poisoned) {
    const AttentionBackwardArgs& p = args_;
    const int64_t keys = panel.last - panel.first;
    const T* const key = KeyValueHead<T>(p.key, p.key_strides, batch, kv_head);
    const T* const value = KeyValueHead<T>(p.value, p.value_strides, batch, kv_head);
    CopyRows(keys, p.qk_dim, key + panel.first * p.key_strides.length, p.key_strides.length, key_,
             qk_stride_);
    CopyRows(keys, p.v_dim, value + panel.first * p.value_strides.length, p.value_strides.length,
             value_, v_stride_);
    for (int64_t i = 0; i < keys * qk_stride_; ++i) dkey_[i] = 0.0f;
    for (int64_t i = 0; i < keys * v_stride_; ++i) {
      dvalue_[i] = poisoned ? kNaN : masked_dvalue_[i % v_stride_];
    }

    for (int64_t i = 0; i < RowBlocks(p); ++i) {
      const RowBlock block(p, batch, kv_head, i);
      const KeyRange range = {Max(block.some.first, panel.first), Min(block.some.last, panel.last)};
      if (p.dbias != nullptr) ZeroDbias(block, panel, range);
      if (range.empty()) continue;
      PackRows(block);
      for (int64_t s = range.first; s < range.last; s += kBlockKeys) {
        Step(block, {s, Min(s + kBlockKeys, range.last)}, panel.first);
      }
    }

    const float dkey_scale = poisoned ? kNaN : p.scale;
    StorePanel(keys, p.qk_dim, dkey_, qk_stride_, dkey_scale, p.key_strides.length,
               HeadPointer(p.dkey, p.key_strides, batch, kv_head, panel.first));
    StorePanel(keys, p.v_dim, dvalue_, v_stride_, 1.0f, p.value_strides.length,
               HeadPointer(p.dvalue, p.value_strides, batch, kv_head, panel.first));
  }

  static T* HeadPointer(void* base, const HeadStrides& strides, int64_t batch, int64_t kv_head,
                        int64_t length) {
    return static_cast<T*>(base) + batch * strides.batch + kv_head * strides.head +
           length * strides.length;
  }

  ZENITH_NOINLINE static void StorePanel(int64_t rows, int64_t cols, const float* from,
                                         int64_t from_stride, float scale, int64_t to_stride,
                                         T* to) {
    for (int64_t i = 0; i < rows; ++i) {
      ForVectors(cols, [&](int64_t j, auto part) {
        Store(to + i * to_stride + j, Load(from + i * from_stride + j) * scale, part);
      });
    }
  }

  ZENITH_NOINLINE void PackRows(const RowBlock& block) {
    const AttentionBackwardArgs& p = args_;
    PackLanes<T>(p, block, p.query, p.query_strides, p.qk_dim, p.scale * kLog2E, query_lanes_);
    PackLanes<T>(p, block, p.dout, p.out_strides, p.v_dim, 1.0f, dout_lanes_);
    bool far = false;
    for (int64_t r = 0; r < block.count; ++r) {
      CopyRows(1, p.qk_dim, block.Pointer(p, static_cast<const T*>(p.query), p.query_strides, r), 0,
               query_ + r * qk_stride_, qk_stride_);
      CopyRows(1, p.v_dim, block.Pointer(p, static_cast<const T*>(p.dout), p.out_strides, r), 0,
               dout_ + r * v_stride_, v_stride_);
      const float lse = p.lse[block.flat(p, r)];
      // Rows without an allowed key have only scores of -inf: p = 0 with any finite lse.
      lse_[r] = lse == -kInfinity ? 0.0f : lse * kLog2E;
      far |= IsFar(lse);
      delta_[r] = p.delta[block.flat(p, r)];
    }
    for (int64_t r = block.count; r < kBlockRows; ++r) lse_[r] = delta_[r] = 0.0f;
    editor_.Start(block);
    if (__builtin_expect(far, 0)) NormaliseFarRows(block);
  }

  static bool IsFar(float lse) {
    const float distance = __builtin_fabsf(lse);
    return distance > kFarLse && distance < kInfinity;
  }

  /// Far rows have their largest logit in place of lse, and 1 / sum(exp(logit - largest)) in dout
  /// and delta, in all of which the gradients are linear: the probabilities that come out of the
  /// steps lack it.
  ZENITH_NOINLINE void NormaliseFarRows(const RowBlock& block) {
    const AttentionBackwardArgs& p = args_;
    float largest[kBlockRows], sum[kBlockRows];
    for (int64_t r = 0; r < kBlockRows; ++r) {
      largest[r] = -kInfinity;
      sum[r] = 0.0f;
    }
    const T* const key = KeyValueHead<T>(p.key, p.key_strides, block.batch, block.kv_head);
    const KeyRange band = block.some;
    for (int64_t first = band.first; first < band.last; first += kBlockKeys) {
      const KeyRange keys = {first, Min(first + kBlockKeys, band.last)};
      const int64_t count = keys.last - keys.first;
      CopyRows(count, p.qk_dim, key + first * p.key_strides.length, p.key_strides.length, far_key_,
               qk_stride_);
      Gemm<ALayout::kRowMajor, Update::kStore>(
          count, CeilDiv(block.count, kLanes),
          {p.qk_dim, far_key_, qk_stride_, query_lanes_, kBlockRows, scores_, kBlockRows});
      editor_.Edit(block, keys, scores_);
      for (int64_t s = 0; s < count; ++s) {
        for (int64_t r = 0; r < block.count; ++r) {
          const float score = scores_[s * kBlockRows + r];
          if (score == -kInfinity) continue;
          const float before = largest[r];
          largest[r] = Max(before, score);
          sum[r] =
              sum[r] * __builtin_exp2f(before - largest[r]) + __builtin_exp2f(score - largest[r]);
        }
      }
    }
    for (int64_t r = 0; r < block.count; ++r) {
      if (!IsFar(p.lse[block.flat(p, r)])) continue;
      const float factor = 1.0f / sum[r];
      lse_[r] = largest[r];
      delta_[r] *= factor;
      for (int64_t e = 0; e < p.v_dim; ++e) {
        dout_[r * v_stride_ + e] *= factor;
        dout_lanes_[e * kBlockRows + r] *= factor;
      }
    }
  }

  void Step(const RowBlock& block, KeyRange keys, int64_t panel_first) {
    const AttentionBackwardArgs& p = args_;
    if (p.dbias == nullptr && editor_.Skips(block, keys)) return;
    const int64_t count = keys.last - keys.first, vectors = CeilDiv(block.count, kLanes);
    const int64_t qk_vectors = CeilDiv(p.qk_dim, kLanes), v_vectors = CeilDiv(p.v_dim, kLanes);
    const int64_t key_at = (keys.first - panel_first) * qk_stride_;
    const int64_t value_at = (keys.first - panel_first) * v_stride_;
    constexpr ALayout kRow = ALayout::kRowMajor, kCol = ALayout::kColMajor;
    // scores = K . Q^T, dp = V . dout^T
    Gemm<kRow, Update::kStore>(
        count, vectors,
        {p.qk_dim, key_ + key_at, qk_stride_, query_lanes_, kBlockRows, scores_, kBlockRows});
    Gemm<kRow, Update::kStore>(
        count, vectors,
        {p.v_dim, value_ + value_at, v_stride_, dout_lanes_, kBlockRows, dscores_, kBlockRows});
    const bool edited = editor_.Edit(block, keys, scores_);
    Probabilities(count, block.count, lse_, delta_, scores_, dscores_);
    // What a forbidden key's value holds, NaN too, has no influence.
    if (edited) editor_.ZeroForbidden(block, keys, dscores_);
    if (p.dbias != nullptr) StoreDbias(block, keys);
    editor_.BeforeCap(block, keys, dscores_);
    // dV += P . dout, dK += dlogits . Q, dQ += dlogits^T . K
    Gemm<kRow, Update::kAdd>(
        count, v_vectors,
        {block.count, scores_, kBlockRows, dout_, v_stride_, dvalue_ + value_at, v_stride_});
    Gemm<kRow, Update::kAdd>(
        count, qk_vectors,
        {block.count, dscores_, kBlockRows, query_, qk_stride_, dkey_ + key_at, qk_stride_});
    Gemm<kCol, Update::kAdd>(block.count, qk_vectors,
                             {count, dscores_, kBlockRows, key_ + key_at, qk_stride_,
                              dquery_ + block.flat(p, 0) * qk_stride_, qk_stride_});
  }

  /// Zeros where the panel has keys outside of `written`.
  ZENITH_NOINLINE void ZeroDbias(const RowBlock& block, KeyRange panel, KeyRange written) {
    for (int64_t r = 0; r < block.count; ++r) {
      float* const row = args_.dbias + block.flat(args_, r) * args_.kv_len;
      for (int64_t s = panel.first; s < panel.last; ++s) {
        if (s < written.first || s >= written.last) row[s] = 0.0f;
      }
    }
  }
  ZENITH_NOINLINE void StoreDbias(const RowBlock& block, KeyRange keys) {
    float* const rows = args_.dbias + block.flat(args_, 0) * args_.kv_len + keys.first;
    ScatterLaneTile(block.count, keys.last - keys.first, dscores_, kBlockRows,
                    [&](int64_t r, int64_t s, F32 v, auto part) {
                      Store(rows + r * args_.kv_len + s, v, part);
                    });
  }

  const AttentionBackwardArgs& args_;
  const int64_t qk_stride_, v_stride_;
  float *query_lanes_, *dout_lanes_, *query_, *dout_, *scores_, *dscores_, *lse_, *delta_,
      *masked_dvalue_, *far_key_, *dquery_, *key_, *dkey_, *value_, *dvalue_;
  ScoreEditor editor_;
};

/// dquery = scale * sum over chunks of their parts, in order.
template <typename T>
void AddDquery(const AttentionBackwardArgs& p, int64_t chunks, const float* parts,
               const Launch& launch) {
  const int64_t heads = p.kv_heads * p.groups, rows = p.batch * heads * p.q_len;
  const int64_t stride = Padded(p.qk_dim);
  ForRows(launch, rows, p.qk_dim * (chunks + 1), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      T* const to = static_cast<T*>(p.dquery) + i / p.q_len / heads * p.query_strides.batch +
                    i / p.q_len % heads * p.query_strides.head +
                    i % p.q_len * p.query_strides.length;
      const bool poisoned = p.lse[i] == -kInfinity && p.masked_row == MaskedRow::kNan;
      const float scale = poisoned ? kNaN : p.scale;
      ForVectors(p.qk_dim, [&](int64_t d, auto part) {
        F32 sum{};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          sum += Load(parts + (chunk * rows + i) * stride + d);
        }
        Store(to + d, sum * scale, part);
      });
    }
  });
}

inline Status AttentionBackward(const AttentionBackwardArgs& args, const Launch& launch) {
  const int64_t heads = args.batch * args.kv_heads;
  const KeyChunks chunks(args);
  Flag out_of_memory;
  WithStorage(args.dtype, [&]<typename T>(T) {
    using Task = AttentionBackwardTask<T>;
    const int64_t part_size = heads * args.groups * args.q_len * Padded(args.qk_dim);
    Scratch parts(chunks.count * part_size);
    if (!parts.ok()) return out_of_memory.Set();
    float* const dquery = parts.Take(chunks.count * part_size);
    ComputeDelta<T>(args, launch);
    const int64_t products =
        args.groups * args.q_len * chunks.keys * (3 * args.qk_dim + 2 * args.v_dim);
    ForRows(launch, heads * chunks.count, products / kProductsPerElement,
            [&](int64_t first, int64_t last) {
              Scratch scratch(Task::ScratchSize(args));
              if (!scratch.ok()) return out_of_memory.Set();
              Task task(args, scratch);
              for (int64_t i = first; i < last; ++i) {
                // The first chunks of a causal problem have the most rows: they start first.
                const int64_t chunk = i / heads, head = i % heads;
                task.Run(dquery + chunk * part_size, head / args.kv_heads, head % args.kv_heads,
                         {chunk * chunks.keys, Min((chunk + 1) * chunks.keys, args.kv_len)});
              }
            });
    if (!out_of_memory.is_set()) AddDquery<T>(args, chunks.count, dquery, launch);
  });
  return out_of_memory.is_set() ? kOutOfMemory : Status{};
}

}  // namespace zenith::ZENITH_ISA
