// Attention by its definition, in float64: the oracle of the attention kernels.
#pragma once

#include "tests/cpp/harness.h"

namespace zenith::test {

/// A problem with its tensors. Layout of query, key, value, out: (batch, length, head, feature).
struct AttentionCase {
  std::string name;
  DType dtype = DType::kF32;
  int64_t batch = 1, kv_heads = 1, groups = 1, q_len = 1, kv_len = 1, qk_dim = 1, v_dim = 1;
  float scale = 1.0f, softcap = 0.0f;
  int64_t left = kUnbounded, right = kUnbounded;
  MaskedRow masked_row = MaskedRow::kNan;
  Tensor query{}, key{}, value{};
  std::vector<char> mask{};  // empty: none
  ScoreStrides mask_strides{};
  Tensor bias{};  // empty: none
  ScoreStrides bias_strides{};
  std::vector<int32_t> interval{};  // of each (batch, t), first and last; empty: none
  std::vector<int32_t> query_segments{}, key_segments{};  // of each (batch, t) and (batch, s)
  Tensor dlse{};                                          // (batch, head, t); empty: none

  int64_t heads() const { return kv_heads * groups; }
  int64_t rows() const { return batch * heads() * q_len; }  // in the order (batch, head, t)
  AttentionProblem problem() const;
  int64_t QueryAt(int64_t b, int64_t h, int64_t t, int64_t dim) const {
    return ((b * q_len + t) * heads() + h) * dim;
  }
  int64_t KeyAt(int64_t b, int64_t h, int64_t s, int64_t dim) const {
    return ((b * kv_len + s) * kv_heads + h / groups) * dim;
  }
  bool Allowed(int64_t b, int64_t h, int64_t t, int64_t s) const;
  double Bias(int64_t b, int64_t h, int64_t t, int64_t s) const;
};

/// A result and, for each element, the size of the terms it is the sum of times their conditioning:
/// what an error is relative to.
struct Exact {
  std::vector<double> value, magnitude;
  explicit Exact(int64_t size)
      : value(static_cast<size_t>(size)), magnitude(static_cast<size_t>(size)) {}
  void Add(int64_t i, double term, double size) {
    value[static_cast<size_t>(i)] += term;
    magnitude[static_cast<size_t>(i)] += size;
  }
};

struct AttentionResults {
  Exact out, lse;
};
AttentionResults ExactAttention(const AttentionCase& c);

struct AttentionGradients {
  Exact dquery, dkey, dvalue, dbias;
};
/// `out` as the forward kernel rounded it: delta is defined by it.
AttentionGradients ExactAttentionGradients(const AttentionCase& c, const Tensor& out,
                                           const Tensor& dout);

}  // namespace zenith::test
