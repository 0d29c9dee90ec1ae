// Attention forward: online softmax over blocks of keys, Dao et al. 2022, arXiv:2205.14135.
//
// A task is a block of rows. K and V are read once per task, the scores of a block of keys never
// leave the cache. All tiles have rows in lanes: out is built transposed.
#pragma once

#include "ffi/cpu/attention.h"

namespace zenith::ZENITH_ISA {

/// One step of the online softmax on `keys` rows of scores: they become exp2(score - max), and what
/// was accumulated before must be multiplied by `factor`.
ZENITH_NOINLINE inline void OnlineSoftmax(int64_t keys, int64_t rows, float* scores, float* max,
                                          float* sum, float* factor) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    float* const column = scores + r;
    const F32 old_max = Load(max + r);
    F32 a = old_max, b = a, c = a, d = a;
    int64_t s = 0;
    for (; s + 4 <= keys; s += 4) {
      a = Max(a, Load(column + s * kBlockRows));
      b = Max(b, Load(column + (s + 1) * kBlockRows));
      c = Max(c, Load(column + (s + 2) * kBlockRows));
      d = Max(d, Load(column + (s + 3) * kBlockRows));
    }
    for (; s < keys; ++s) a = Max(a, Load(column + s * kBlockRows));
    const F32 new_max = Max(Max(a, b), Max(c, d));
    // Before the first logit above -inf, subtract 0: -inf - -inf would be NaN.
    const F32 base = Select(new_max == -kInfinity, F32{}, new_max);
    const F32 correction = Exp2(old_max - base);
    F32 total{};
    for (s = 0; s < keys; ++s) {
      const F32 e = Exp2(Load(column + s * kBlockRows) - base);
      Store(column + s * kBlockRows, e);
      total += e;
    }
    Store(max + r, new_max);
    Store(sum + r, Fma(Load(sum + r), correction, total));
    Store(factor + r, correction);
  }
}

/// mean[e] over all keys of a head's values; NaN without keys.
template <typename T>
ZENITH_NOINLINE void MeanValue(const AttentionProblem& p, const T* value, float* mean) {
  ForVectors(p.v_dim, [&](int64_t e, auto part) {
    F32 total{};
    for (int64_t first = 0; first < p.kv_len; first += kBlockKeys) {
      F32 block{};  // sums of sums: the error grows with their number, not with kv_len
      for (int64_t s = first; s < Min(first + kBlockKeys, p.kv_len); ++s) {
        block += Load(value + s * p.value_strides.length + e, part);
      }
      total += block;
    }
    Store(mean + e, total / static_cast<float>(p.kv_len), part);
  });
}

template <typename T>
class AttentionForwardTask {
 public:
  static int64_t ScratchSize(const AttentionProblem& p) {
    return Scratch::Size(p.qk_dim * kBlockRows) + Scratch::Size(p.v_dim * kBlockRows) +
           kBlockKeys * kBlockRows + 3 * kBlockRows + ScoreEditor::ScratchSize() +
           (kConverts ? Scratch::Size(kBlockKeys * p.qk_dim) + Scratch::Size(kBlockKeys * p.v_dim)
                      : 0) +
           Scratch::Size(p.v_dim);
  }

  AttentionForwardTask(const AttentionForwardArgs& args, Scratch& scratch)
      : args_(args),
        query_(scratch.Take(args.qk_dim * kBlockRows)),
        out_(scratch.Take(args.v_dim * kBlockRows)),
        scores_(scratch.Take(kBlockKeys * kBlockRows)),
        max_(scratch.Take(kBlockRows)),
        sum_(scratch.Take(kBlockRows)),
        factor_(scratch.Take(kBlockRows)),
        key_copy_(kConverts ? scratch.Take(kBlockKeys * args.qk_dim) : nullptr),
        value_copy_(kConverts ? scratch.Take(kBlockKeys * args.v_dim) : nullptr),
        mean_(scratch.Take(args.v_dim)),
        editor_(args, scratch) {}

  void Run(const RowBlock& block) {
    const AttentionForwardArgs& p = args_;
    const T* const key = KeyValueHead<T>(p.key, p.key_strides, block.batch, block.kv_head);
    const T* const value = KeyValueHead<T>(p.value, p.value_strides, block.batch, block.kv_head);
    PackLanes<T>(p, block, p.query, p.query_strides, p.qk_dim, p.scale * kLog2E, query_);
    for (int64_t i = 0; i < p.v_dim * kBlockRows; ++i) out_[i] = 0.0f;
    for (int64_t r = 0; r < kBlockRows; ++r) {
      max_[r] = -kInfinity;
      sum_[r] = 0.0f;
    }
    editor_.Start(block);
    const KeyRange range = block.Keys(p);
    for (int64_t s = range.first; s < range.last; s += kBlockKeys) {
      Step(block, key, value, {s, Min(s + kBlockKeys, range.last)});
    }
    Finish(block, value);
  }

 private:
  static constexpr bool kConverts = sizeof(T) != sizeof(float);

  struct Rows {
    const float* data;
    int64_t stride;
  };
  static Rows AsFloat(const T* from, int64_t from_stride, KeyRange keys, int64_t cols,
                      float* copy) {
    from += keys.first * from_stride;
    if constexpr (kConverts) {
      CopyRows(keys.last - keys.first, cols, from, from_stride, copy, cols);
      return {copy, cols};
    } else {
      return {from, from_stride};
    }
  }

  void Step(const RowBlock& block, const T* key, const T* value, KeyRange keys) {
    const AttentionForwardArgs& p = args_;
    const int64_t count = keys.last - keys.first, vectors = CeilDiv(block.count, kLanes);
    const Rows k = AsFloat(key, p.key_strides.length, keys, p.qk_dim, key_copy_);
    Gemm<ALayout::kRowMajor, Update::kStore>(
        count, vectors, {p.qk_dim, k.data, k.stride, query_, kBlockRows, scores_, kBlockRows});
    editor_.Edit(block, keys, scores_);
    OnlineSoftmax(count, block.count, scores_, max_, sum_, factor_);
    const Rows v = AsFloat(value, p.value_strides.length, keys, p.v_dim, value_copy_);
    Gemm<ALayout::kColMajor, Update::kScaleAdd>(
        p.v_dim, vectors,
        {count, v.data, v.stride, scores_, kBlockRows, out_, kBlockRows, factor_});
  }

  ZENITH_NOINLINE void Finish(const RowBlock& block, const T* value) {
    const AttentionForwardArgs& p = args_;
    T* rows[kBlockRows];
    bool masked[kBlockRows], any_masked = false;
    for (int64_t r = 0; r < block.count; ++r) {
      rows[r] = block.Pointer(p, static_cast<T*>(p.out), p.out_strides, r);
      masked[r] = !editor_.RowIsAllowed(block, r);
      any_masked |= masked[r];
      // Allowed logits that are all -inf: 0 / 0 here, and NaN in lse, which tells the backward
      // pass.
      factor_[r] = sum_[r] == 0.0f ? kNaN : 1.0f / sum_[r];
      p.lse[block.flat(p, r)] = masked[r]         ? -kInfinity
                                : sum_[r] == 0.0f ? kNaN
                                                  : (max_[r] + __builtin_log2f(sum_[r])) * kLn2;
    }
    ScatterLaneTile(
        block.count, p.v_dim, out_, kBlockRows,
        [&](int64_t r, int64_t e, F32 v, auto part) { Store(rows[r] + e, v * factor_[r], part); });
    if (!any_masked || p.masked_row == MaskedRow::kNan) return;  // those rows are NaN already
    MeanValue(p, value, mean_);
    for (int64_t r = 0; r < block.count; ++r) {
      if (!masked[r]) continue;
      ForVectors(p.v_dim,
                 [&](int64_t e, auto part) { Store(rows[r] + e, Load(mean_ + e, part), part); });
    }
  }

  const AttentionForwardArgs& args_;
  float *query_, *out_, *scores_, *max_, *sum_, *factor_, *key_copy_, *value_copy_, *mean_;
  ScoreEditor editor_;
};

inline Status AttentionForward(const AttentionForwardArgs& args, const Launch& launch) {
  const int64_t heads = args.batch * args.kv_heads, blocks = RowBlocks(args);
  Flag out_of_memory;
  const int64_t products = kBlockRows * args.kv_len * (args.qk_dim + args.v_dim);
  WithStorage(args.dtype, [&]<typename T>(T) {
    ForRows(launch, heads * blocks, products / kProductsPerElement,
            [&](int64_t first, int64_t last) {
              Scratch scratch(AttentionForwardTask<T>::ScratchSize(args));
              if (!scratch.ok()) return out_of_memory.Set();
              AttentionForwardTask<T> task(args, scratch);
              for (int64_t i = first; i < last; ++i) {
                // Heads one after the other, so that K and V stay in the level 2 cache. Of a head,
                // the last
                // blocks first: in a causal problem they are the longest.
                const int64_t head = i / blocks, block = blocks - 1 - i % blocks;
                task.Run(RowBlock(args, head / args.kv_heads, head % args.kv_heads, block));
              }
            });
  });
  return out_of_memory.is_set() ? kOutOfMemory : Status{};
}

}  // namespace zenith::ZENITH_ISA
