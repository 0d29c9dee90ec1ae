// Attention forward: online softmax over blocks of keys, Dao et al. 2022, arXiv:2205.14135.
//
// A task is a few blocks of rows of one head. It copies each block of keys and values into dense
// float32 rows once: read in place, with a stride of 3 KiB as (batch, length, head, feature) arrays
// have, they cost the products 30 % in cache and TLB misses. The scores of a block of keys never
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

/// What a row without an allowed key is.
enum class EmptyRow { kNan, kMean, kZero };

/// Neighbours in memory among the keys of a head.
template <typename T>
struct KeyRun {
  int64_t first, count;
  const T *key, *value;  // the first; null also where there are no features
  bool are_nan = false;  // outside of memory: nothing is read
};

/// Keys and values of a head, one behind the other in memory.
template <typename T, typename Args>
class HeadKeys {
 public:
  HeadKeys(const Args& p, int64_t batch, int64_t kv_head)
      : key_(KeyValueHead<T>(p.key, p.key_strides, batch, kv_head)),
        value_(KeyValueHead<T>(p.value, p.value_strides, batch, kv_head)),
        key_stride_(p.key_strides.length),
        value_stride_(p.value_strides.length),
        empty_row_(p.masked_row == MaskedRow::kMean ? EmptyRow::kMean : EmptyRow::kNan) {}

  /// Calls body(KeyRun<T>) for the runs that `keys` consist of.
  template <typename Body>
  ZENITH_INLINE void ForRuns(KeyRange keys, Body body) const {
    body(KeyRun<T>{keys.first, keys.last - keys.first, key_ + keys.first * key_stride_,
                   value_ + keys.first * value_stride_});
  }
  EmptyRow empty_row() const { return empty_row_; }

 private:
  const T *key_, *value_;
  int64_t key_stride_, value_stride_;
  EmptyRow empty_row_;
};

/// mean[e] over all keys of a head's values; NaN without keys.
template <typename T, typename Keys>
ZENITH_NOINLINE void MeanValue(const AttentionProblem& p, const Keys& keys, float* mean) {
  ForVectors(p.v_dim, [&](int64_t e, auto part) {
    F32 total{};
    for (int64_t first = 0; first < p.kv_len; first += kBlockKeys) {
      F32 block{};  // sums of sums: the error grows with their number, not with kv_len
      keys.ForRuns({first, Min(first + kBlockKeys, p.kv_len)}, [&](const KeyRun<T>& run) {
        if (run.are_nan) block += kNaN;
        for (int64_t s = 0; !run.are_nan && s < run.count; ++s) {
          block += Load(run.value + s * p.value_strides.length + e, part);
        }
      });
      total += block;
    }
    Store(mean + e, total / static_cast<float>(p.kv_len), part);
  });
}

/// Scratch of one step, shared by the blocks of rows of a task.
struct ForwardStep {
  float *key, *value;  // (kBlockKeys, qk_dim) and (kBlockKeys, v_dim), dense
  float *scores, *factor, *mean, *editor;

  static int64_t ScratchSize(const AttentionProblem& p) {
    return Scratch::Size(kBlockKeys * p.qk_dim) + Scratch::Size(kBlockKeys * p.v_dim) +
           kBlockKeys * kBlockRows + kBlockRows + Scratch::Size(p.v_dim) + ScoreEditor::kStepFloats;
  }
  ForwardStep(const AttentionProblem& p, Scratch& scratch)
      : key(scratch.Take(kBlockKeys * p.qk_dim)),
        value(scratch.Take(kBlockKeys * p.v_dim)),
        scores(scratch.Take(kBlockKeys * kBlockRows)),
        factor(scratch.Take(kBlockRows)),
        mean(scratch.Take(p.v_dim)),
        editor(scratch.Take(ScoreEditor::kStepFloats)) {}
};

/// One block of rows on its way over the keys.
template <typename T>
class ForwardRows {
 public:
  static int64_t ScratchSize(const AttentionProblem& p) {
    return Scratch::Size(p.qk_dim * kBlockRows) + Scratch::Size(p.v_dim * kBlockRows) +
           2 * kBlockRows + ScoreEditor::kRowFloats;
  }
  ForwardRows(const AttentionForwardArgs& args, const ForwardStep& step, Scratch& scratch)
      : args_(args),
        step_(step),
        query_(scratch.Take(args.qk_dim * kBlockRows)),
        out_(scratch.Take(args.v_dim * kBlockRows)),
        max_(scratch.Take(kBlockRows)),
        sum_(scratch.Take(kBlockRows)),
        editor_(args, scratch.Take(ScoreEditor::kRowFloats), step.editor) {}

  /// Keys that some row may see.
  KeyRange keys() const { return keys_; }

  void Start(const RowBlock& block) {
    const AttentionForwardArgs& p = args_;
    block_ = block;
    keys_ = block.some;
    PackLanes<T>(p, block, p.query, p.query_strides, p.qk_dim, p.scale * kLog2E, query_);
    for (int64_t i = 0; i < p.v_dim * kBlockRows; ++i) out_[i] = 0.0f;
    for (int64_t r = 0; r < kBlockRows; ++r) {
      max_[r] = -kInfinity;
      sum_[r] = 0.0f;
    }
    editor_.Start(block);
    // Out is written with a stride, where nothing prefetches: ask for its lines long before.
    for (int64_t r = 0; r < block.count; ++r) {
      const T* const row = block.Pointer(p, static_cast<const T*>(p.out), p.out_strides, r);
      for (int64_t e = 0; e < p.v_dim; e += 64 / sizeof(T)) __builtin_prefetch(row + e, 1);
    }
  }

  /// `keys`: within one block of keys whose copies, from `copied` on, are in the step's scratch.
  void Step(KeyRange keys, int64_t copied) {
    const AttentionForwardArgs& p = args_;
    if (editor_.Skips(block_, keys)) return;
    const int64_t count = keys.last - keys.first, vectors = CeilDiv(block_.count, kLanes);
    const float* const key = step_.key + (keys.first - copied) * p.qk_dim;
    const float* const value = step_.value + (keys.first - copied) * p.v_dim;
    Gemm<ALayout::kRowMajor, Update::kStore>(
        count, vectors, {p.qk_dim, key, p.qk_dim, query_, kBlockRows, step_.scores, kBlockRows});
    editor_.Edit(block_, keys, step_.scores);
    OnlineSoftmax(count, block_.count, step_.scores, max_, sum_, step_.factor);
    Gemm<ALayout::kColMajor, Update::kScaleAdd>(
        p.v_dim, vectors,
        {count, value, p.v_dim, step_.scores, kBlockRows, out_, kBlockRows, step_.factor});
  }

  template <typename Keys>
  ZENITH_NOINLINE void Finish(const Keys& keys) {
    const AttentionForwardArgs& p = args_;
    T* rows[kBlockRows];
    bool masked[kBlockRows], any_masked = false;
    float* const factor = step_.factor;
    for (int64_t r = 0; r < block_.count; ++r) {
      rows[r] = block_.Pointer(p, static_cast<T*>(p.out), p.out_strides, r);
      masked[r] = !editor_.RowIsAllowed(block_, r);
      any_masked |= masked[r];
      // Allowed logits that are all -inf: 0 / 0 here, and NaN in lse, which tells the backward
      // pass.
      factor[r] = sum_[r] == 0.0f ? kNaN : 1.0f / sum_[r];
      p.lse_rest[block_.flat(p, r)] = 0.0f;
      p.lse[block_.flat(p, r)] = masked[r]         ? -kInfinity
                                 : sum_[r] == 0.0f ? kNaN
                                                   : (max_[r] + __builtin_log2f(sum_[r])) * kLn2;
    }
    ScatterLaneTile(
        block_.count, p.v_dim, out_, kBlockRows,
        [&](int64_t r, int64_t e, F32 v, auto part) { Store(rows[r] + e, v * factor[r], part); });
    if (!any_masked || keys.empty_row() == EmptyRow::kNan) return;  // those rows are NaN already
    if (keys.empty_row() == EmptyRow::kZero) {
      for (int64_t e = 0; e < p.v_dim; ++e) step_.mean[e] = 0.0f;
    } else {
      MeanValue<T>(p, keys, step_.mean);
    }
    for (int64_t r = 0; r < block_.count; ++r) {
      if (!masked[r]) continue;
      ForVectors(p.v_dim, [&](int64_t e, auto part) {
        Store(rows[r] + e, Load(step_.mean + e, part), part);
      });
    }
  }

 private:
  const AttentionForwardArgs& args_;
  const ForwardStep& step_;
  RowBlock block_;
  KeyRange keys_{};
  float *query_, *out_, *max_, *sum_;
  ScoreEditor editor_;
};

/// Blocks of rows that share a task's copies: with 8, copying costs 5 %.
inline constexpr int64_t kMaxBlocksPerTask = 8;

template <typename T, typename Args>
class AttentionForwardTask {
 public:
  static int64_t ScratchSize(const AttentionProblem& p) {
    return ForwardStep::ScratchSize(p) + kMaxBlocksPerTask * ForwardRows<T>::ScratchSize(p);
  }
  AttentionForwardTask(const Args& args, Scratch& scratch)
      : args_(args), step_(args, scratch), rows_{{args, step_, scratch}, {args, step_, scratch},
                                                 {args, step_, scratch}, {args, step_, scratch},
                                                 {args, step_, scratch}, {args, step_, scratch},
                                                 {args, step_, scratch}, {args, step_, scratch}} {}

  /// Blocks [first, first + count) of rows, count <= kMaxBlocksPerTask.
  void Run(int64_t batch, int64_t kv_head, int64_t first, int64_t count) {
    const Args& p = args_;
    const HeadKeys<T, Args> head(p, batch, kv_head);
    KeyRange all{p.kv_len, 0};
    for (int64_t i = 0; i < count; ++i) {
      rows_[i].Start(RowBlock(p, batch, kv_head, first + i));
      all.first = Min(all.first, rows_[i].keys().first);
      all.last = Max(all.last, rows_[i].keys().last);
    }
    // Blocks of keys start at multiples of their size, so that a row's sums do not depend on the
    // rows beside it.
    for (int64_t s = all.first / kBlockKeys * kBlockKeys; s < all.last; s += kBlockKeys) {
      Copy(head, {Max(s, all.first), Min(s + kBlockKeys, all.last)}, s);
      for (int64_t i = 0; i < count; ++i) {
        const KeyRange mine = {Max(s, rows_[i].keys().first),
                               Min(s + kBlockKeys, rows_[i].keys().last)};
        if (!mine.empty()) rows_[i].Step(mine, s);
      }
    }
    for (int64_t i = 0; i < count; ++i) rows_[i].Finish(head);
  }

 private:
  /// Keys and values into the step's scratch, which begins with key `start`. Of keys that are NaN
  /// the scores become so, and the values are 0.
  void Copy(const HeadKeys<T, Args>& head, KeyRange keys, int64_t start) {
    const Args& p = args_;
    head.ForRuns(keys, [&](const KeyRun<T>& run) {
      float* const key = step_.key + (run.first - start) * p.qk_dim;
      float* const value = step_.value + (run.first - start) * p.v_dim;
      if (run.are_nan) {
        for (int64_t i = 0; i < run.count * p.qk_dim; ++i) key[i] = kNaN;
        for (int64_t i = 0; i < run.count * p.v_dim; ++i) value[i] = 0.0f;
        return;
      }
      CopyRows(run.count, p.qk_dim, run.key, p.key_strides.length, key, p.qk_dim);
      CopyRows(run.count, p.v_dim, run.value, p.value_strides.length, value, p.v_dim);
    });
  }

  const Args& args_;
  const ForwardStep step_;
  ForwardRows<T> rows_[kMaxBlocksPerTask];
};

template <typename Args>
Status RunAttentionForward(const Args& args, const Launch& launch) {
  const int64_t heads = args.batch * args.kv_heads, blocks = RowBlocks(args);
  // Results do not depend on the grouping, so it may depend on the threads: 4 tasks for each.
  const int64_t group =
      Max<int64_t>(1, Min(kMaxBlocksPerTask, heads * blocks / (4 * launch.threads)));
  const int64_t tasks = CeilDiv(blocks, group);
  const int64_t products = group * kBlockRows * args.kv_len * (args.qk_dim + args.v_dim);
  Flag out_of_memory;
  WithStorage(args.dtype, [&]<typename T>(T) {
    ForRows(
        launch, heads * tasks, products / kProductsPerElement, [&](int64_t first, int64_t last) {
          Scratch scratch(AttentionForwardTask<T, Args>::ScratchSize(args));
          if (!scratch.ok()) return out_of_memory.Set();
          AttentionForwardTask<T, Args> task(args, scratch);
          for (int64_t i = first; i < last; ++i) {
            // Heads one after the other, so that K and V stay in the level 2 cache. Of a head, the
            // last rows first: in a causal problem they have the most keys.
            const int64_t head = i / tasks, start = (tasks - 1 - i % tasks) * group;
            task.Run(head / args.kv_heads, head % args.kv_heads, start, Min(group, blocks - start));
          }
        });
  });
  return out_of_memory.is_set() ? kOutOfMemory : Status{};
}

inline Status AttentionForward(const AttentionForwardArgs& args, const Launch& launch) {
  return RunAttentionForward(args, launch);
}

}  // namespace zenith::ZENITH_ISA
