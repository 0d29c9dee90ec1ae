#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/cpp/attention_oracle.h"

namespace zenith::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Shape {
  int64_t batch, kv_heads, groups, q_len, kv_len, qk_dim, v_dim;
};
constexpr Shape kShapes[] = {
    {1, 1, 1, 1, 1, 1, 1},      {2, 2, 1, 64, 64, 64, 64},
    {1, 2, 2, 65, 129, 33, 17}, {1, 1, 4, 1, 300, 64, 64},  // decoding with grouped queries
    {1, 2, 1, 130, 70, 80, 48}, {1, 1, 1, 100, 100, 128, 111},
    {2, 1, 3, 5, 7, 3, 9},  // three groups in one block of rows
    {1, 1, 1, 150, 700, 16, 8}, {0, 1, 1, 4, 4, 4, 4},
    {1, 1, 1, 0, 5, 4, 4},      {1, 1, 2, 5, 0, 4, 4},
    {1, 1, 1, 5, 5, 0, 4},      {1, 1, 1, 5, 5, 4, 0},
};
constexpr const char* kModes[] = {
    "plain", "causal",        "window",      "empty rows", "random mask", "padding", "strided mask",
    "bias",  "row bias -inf", "all at once", "capped",     "intervals",   "segments"};

/// Fills mask and bias for a mode. Row 1 of a random mask allows nothing.
AttentionCase MakeCase(const Shape& shape, const std::string& mode, DType dtype) {
  std::mt19937_64 random(4);
  AttentionCase c{mode,        dtype,        shape.batch,  shape.kv_heads, shape.groups,
                  shape.q_len, shape.kv_len, shape.qk_dim, shape.v_dim};
  c.scale = 1.0f / std::sqrt(static_cast<float>(shape.qk_dim + 1));
  c.query = Tensor(dtype, RandomValues(random, c.rows() * c.qk_dim, 5.0));
  c.key = Tensor(dtype, RandomValues(random, c.batch * c.kv_heads * c.kv_len * c.qk_dim, 5.0));
  c.value = Tensor(dtype, RandomValues(random, c.batch * c.kv_heads * c.kv_len * c.v_dim, 5.0));
  const bool all = mode == "all at once";
  if (mode == "causal" || all) c.right = 0;
  if (mode == "window") c.left = 10, c.right = 3;
  if (mode == "empty rows") c.left = 20, c.right = -2;
  if (mode == "row bias -inf" || mode == "random mask" || mode == "causal" || mode == "intervals" ||
      mode == "segments") {
    c.masked_row = MaskedRow::kMean;
  }
  const int64_t t = c.q_len, s = c.kv_len;
  if (mode == "random mask" || all) {
    c.mask.resize(static_cast<size_t>(c.kv_heads * c.groups * t * s));
    c.mask_strides = {0, c.groups * t * s, t * s, s, 1};
    for (size_t i = 0; i < c.mask.size(); ++i) {
      c.mask[i] = random() % 3 != 0 && (static_cast<int64_t>(i) / s % t != 1);
    }
  } else if (mode == "padding") {
    c.mask.resize(static_cast<size_t>(c.batch * s));
    c.mask_strides = {s, 0, 0, 0, 1};
    for (size_t i = 0; i < c.mask.size(); ++i) c.mask[i] = static_cast<int64_t>(i) % s < s / 2 + 1;
  } else if (mode == "strided mask") {
    c.mask.resize(static_cast<size_t>(t * s));
    c.mask_strides = {0, 0, 0, 1, t};
    for (char& bit : c.mask) bit = random() % 2 == 0;
  }
  if (mode == "bias") {
    c.bias = Tensor(DType::kF32, RandomValues(random, c.batch * t * s));
    c.bias_strides = {t * s, 0, 0, s, 1};
  } else if (mode == "row bias -inf" || all) {
    std::vector<double> values = RandomValues(random, c.kv_heads * c.groups * t * s);
    for (size_t i = 0; i < values.size(); ++i) {
      if (static_cast<int64_t>(i) / s % t == 2 || i % 7 == 0) values[i] = -kInf;
    }
    c.bias = Tensor(dtype, values);
    c.bias_strides = {0, c.groups * t * s, t * s, s, 1};
  }
  if (mode == "capped" || all) c.softcap = 1.5f;
  if (mode == "intervals" || all) {
    c.right = std::max<int64_t>(c.right, s / 2);
    for (int64_t row = 0; row < c.batch * t; ++row) {
      const int64_t first = row % 5 == 0 ? s - 1 - row % (s + 1) : -3,
                    last = row % 7 == 0 ? 0 : s / 2 + row;
      c.interval.push_back(static_cast<int32_t>(first));
      c.interval.push_back(static_cast<int32_t>(last));
    }
  }
  if (mode == "segments" || all) {  // of 40, so that whole blocks of 64 share none
    for (int64_t i = 0; i < c.batch * t; ++i) {
      c.query_segments.push_back(static_cast<int32_t>(i % t / 40));
    }
    for (int64_t i = 0; i < c.batch * s; ++i) {
      c.key_segments.push_back(static_cast<int32_t>(i % s / 40));
    }
  }
  if (mode == "capped" || mode == "segments") {
    c.dlse = Tensor(DType::kF32, RandomValues(random, c.rows()));
  }
  return c;
}

void Compare(const Tensor& got, const Exact& want, Error& error) {
  for (int64_t i = 0; i < got.size(); ++i) {
    error.Add(got, i, want.value[static_cast<size_t>(i)], want.magnitude[static_cast<size_t>(i)]);
  }
}

struct Forward {
  Tensor out, lse, lse_rest;
};
Forward RunForward(const CpuKernels& kernels, const AttentionCase& c, const Launch& launch,
                   Report& report) {
  Forward result{Tensor(c.dtype, c.rows() * c.v_dim), Tensor(DType::kF32, c.rows()),
                 Tensor(DType::kF32, c.rows())};
  AttentionForwardArgs args{c.problem(), result.out.data(), static_cast<float*>(result.lse.data()),
                            static_cast<float*>(result.lse_rest.data())};
  report.Require(kernels.attention_forward(args, launch).ok(), "attention forward returns ok");
  return result;
}

/// Without it, blocks of keys without a common segment are skipped.
bool WantsDbias(const AttentionCase& c) { return c.name != "segments"; }

struct Backward {
  Tensor dquery, dkey, dvalue, dbias;
};
Backward RunBackward(const CpuKernels& kernels, const AttentionCase& c, const Forward& forward,
                     const Tensor& dout, const Launch& launch, Report& report) {
  Backward result{Tensor(c.dtype, c.query.size()), Tensor(c.dtype, c.key.size()),
                  Tensor(c.dtype, c.value.size()), Tensor(DType::kF32, c.rows() * c.kv_len)};
  Tensor delta(DType::kF32, c.rows());
  AttentionBackwardArgs args{c.problem(),
                             forward.out.data(),
                             dout.data(),
                             static_cast<const float*>(forward.lse.data()),
                             static_cast<const float*>(forward.lse_rest.data()),
                             c.dlse.size() > 0 ? static_cast<const float*>(c.dlse.data()) : nullptr,
                             static_cast<float*>(delta.data()),
                             result.dquery.data(),
                             result.dkey.data(),
                             result.dvalue.data(),
                             WantsDbias(c) ? static_cast<float*>(result.dbias.data()) : nullptr};
  report.Require(kernels.attention_backward(args, launch).ok(), "attention backward returns ok");
  return result;
}

}  // namespace

void TestAttention(const CpuKernels& kernels, Report& report) {
  Pool pool(4);
  const Launch launch = pool.launch(), serial{nullptr, 1, nullptr};
  for (const DType dtype : kDTypes) {
    for (const char* mode : kModes) {
      Error out, lse, dquery, dkey, dvalue, dbias;
      for (const Shape& shape : kShapes) {
        const AttentionCase c = MakeCase(shape, mode, dtype);
        const Forward forward = RunForward(kernels, c, launch, report);
        const AttentionResults exact = ExactAttention(c);
        Compare(forward.out, exact.out, out);
        Compare(forward.lse, exact.lse, lse);

        std::mt19937_64 random(5);
        const Tensor dout(dtype, RandomValues(random, c.rows() * c.v_dim, 5.0));
        const Backward backward = RunBackward(kernels, c, forward, dout, launch, report);
        const AttentionGradients gradients = ExactAttentionGradients(c, forward.out, dout);
        Compare(backward.dquery, gradients.dquery, dquery);
        Compare(backward.dkey, gradients.dkey, dkey);
        Compare(backward.dvalue, gradients.dvalue, dvalue);
        if (WantsDbias(c)) Compare(backward.dbias, gradients.dbias, dbias);

        const Forward forward2 = RunForward(kernels, c, serial, report);
        const Backward backward2 = RunBackward(kernels, c, forward, dout, serial, report);
        report.Require(forward.out.SameBits(forward2.out) && forward.lse.SameBits(forward2.lse) &&
                           backward.dquery.SameBits(backward2.dquery) &&
                           backward.dkey.SameBits(backward2.dkey) &&
                           backward.dvalue.SameBits(backward2.dvalue) &&
                           backward.dbias.SameBits(backward2.dbias),
                       "attention does not depend on threads");
      }
      const std::string name = std::string("attention ") + mode;
      const double limit = dtype == DType::kF32 ? 4.0 : 0.6;
      report.Add(name + ": out", kernels, dtype, out.max(), limit);
      report.Add(name + ": lse", kernels, DType::kF32, lse.max(), 4.0);
      report.Add(name + ": dquery", kernels, dtype, dquery.max(), limit);
      report.Add(name + ": dkey", kernels, dtype, dkey.max(), limit);
      report.Add(name + ": dvalue", kernels, dtype, dvalue.max(), limit);
      report.Add(name + ": dbias", kernels, DType::kF32, dbias.max(), 4.0);
    }
  }
}

void TimeAttention(const CpuKernels& kernels, const Launch& launch, Report& report) {
  constexpr Shape kTimed[] = {
      {1, 12, 1, 1024, 1024, 64, 64}, {1, 8, 1, 4096, 4096, 64, 64}, {1, 16, 1, 512, 512, 128, 128},
      {32, 12, 1, 128, 128, 64, 64},  {1, 8, 4, 1, 4096, 128, 128},
  };
  for (const DType dtype : kDTypes) {
    for (const Shape& shape : kTimed) {
      for (const char* mode : {"plain", "causal"}) {
        const bool causal = mode == std::string("causal");
        if (causal && shape.q_len != shape.kv_len) continue;
        const AttentionCase c = MakeCase(shape, mode, dtype);
        const std::string name = std::string("attention ") + mode + " h" +
                                 std::to_string(c.heads()) + " t" + std::to_string(c.q_len) + " d" +
                                 std::to_string(c.qk_dim);
        const double gflop = static_cast<double>(c.rows() * c.kv_len) *
                             static_cast<double>(c.qk_dim + c.v_dim) * (causal ? 1e-9 : 2e-9);
        Forward forward{Tensor(dtype, c.rows() * c.v_dim), Tensor(DType::kF32, c.rows()),
                        Tensor(DType::kF32, c.rows())};
        AttentionForwardArgs args{c.problem(), forward.out.data(),
                                  static_cast<float*>(forward.lse.data()),
                                  static_cast<float*>(forward.lse_rest.data())};
        const double ms = BestTime([&] { (void)kernels.attention_forward(args, launch); });
        report.Time(name, kernels, dtype, ms, gflop / ms * 1e3, "GFLOP/s");

        const Tensor dout(forward.out);
        Tensor delta(DType::kF32, c.rows()), dquery(c.query), dkey(c.key), dvalue(c.value);
        AttentionBackwardArgs backward_args{c.problem(),
                                            forward.out.data(),
                                            dout.data(),
                                            static_cast<const float*>(forward.lse.data()),
                                            static_cast<const float*>(forward.lse_rest.data()),
                                            nullptr,
                                            static_cast<float*>(delta.data()),
                                            dquery.data(),
                                            dkey.data(),
                                            dvalue.data()};
        const double backward_ms =
            BestTime([&] { (void)kernels.attention_backward(backward_args, launch); });
        report.Time(name + " backward", kernels, dtype, backward_ms,
                    2.5 * gflop / backward_ms * 1e3, "GFLOP/s");
      }
    }
  }
}

}  // namespace zenith::test
