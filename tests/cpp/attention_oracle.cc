#include "tests/cpp/attention_oracle.h"

#include <cmath>
#include <limits>

namespace zenith::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

struct Row {
  std::vector<double> probability, slope;  // of the cap
  double lse = -kInf;
  double conditioning = 1;  // size of the logits: exp multiplies their rounding by it
  bool masked = true;
};

Row ExactRow(const AttentionCase& c, int64_t b, int64_t h, int64_t t) {
  Row row;
  std::vector<double> logits(static_cast<size_t>(c.kv_len), -kInf);
  double max = -kInf;
  for (int64_t s = 0; s < c.kv_len; ++s) {
    row.slope.push_back(1);
    if (!c.Allowed(b, h, t, s)) continue;
    row.masked = false;
    double logit = 0, size = 0;
    for (int64_t d = 0; d < c.qk_dim; ++d) {
      const double term = c.query[c.QueryAt(b, h, t, c.qk_dim) + d] *
                          c.key[c.KeyAt(b, h, s, c.qk_dim) + d] * double{c.scale};
      logit += term;
      size += std::fabs(term);
    }
    if (c.softcap > 0) {
      const double tanh = std::tanh(logit / double{c.softcap});
      logit = double{c.softcap} * tanh;
      row.slope.back() = 1 - tanh * tanh;
    }
    logit += c.Bias(b, h, t, s);
    if (std::isfinite(c.Bias(b, h, t, s))) size += std::fabs(c.Bias(b, h, t, s));
    logits[static_cast<size_t>(s)] = logit;
    max = std::fmax(max, logit);
    row.conditioning = std::fmax(row.conditioning, 1 + size);
  }
  double sum = 0;
  for (const double logit : logits) sum += std::exp(logit - max);
  for (const double logit : logits) {
    const double even = c.masked_row == MaskedRow::kMean && c.kv_len > 0
                            ? 1.0 / static_cast<double>(c.kv_len)
                            : std::nan("");
    row.probability.push_back(row.masked ? even : std::exp(logit - max) / sum);
  }
  // NaN, not -inf, where logits are allowed but all -inf: the gradient must know.
  if (!row.masked) row.lse = std::isinf(max) ? std::nan("") : max + std::log(sum);
  return row;
}

int64_t At(const ScoreStrides& strides, int64_t groups, int64_t b, int64_t h, int64_t t,
           int64_t s) {
  return b * strides.batch + h / groups * strides.kv_head + h % groups * strides.group +
         t * strides.query + s * strides.key;
}

}  // namespace

AttentionProblem AttentionCase::problem() const {
  AttentionProblem p{};
  p.dtype = dtype;
  p.batch = batch, p.kv_heads = kv_heads, p.groups = groups;
  p.q_len = q_len, p.kv_len = kv_len, p.qk_dim = qk_dim, p.v_dim = v_dim;
  p.scale = scale, p.softcap = softcap, p.left = left, p.right = right, p.masked_row = masked_row;
  p.query = query.data(), p.key = key.data(), p.value = value.data();
  p.query_strides = {q_len * heads() * qk_dim, qk_dim, heads() * qk_dim};
  p.key_strides = {kv_len * kv_heads * qk_dim, qk_dim, kv_heads * qk_dim};
  p.value_strides = {kv_len * kv_heads * v_dim, v_dim, kv_heads * v_dim};
  p.out_strides = {q_len * heads() * v_dim, v_dim, heads() * v_dim};
  if (!mask.empty()) p.mask = reinterpret_cast<const bool*>(mask.data());
  p.mask_strides = mask_strides;
  if (bias.size() > 0) p.bias = bias.data();
  p.bias_dtype = bias.dtype();
  p.bias_strides = bias_strides;
  if (!interval.empty()) p.interval = interval.data();
  p.interval_strides = {.batch = 2 * q_len, .query = 2, .key = 1};
  if (!key_segments.empty()) {
    p.query_segments = query_segments.data();
    p.key_segments = key_segments.data();
  }
  p.query_segments_strides = {.batch = q_len, .query = 1};
  p.key_segments_strides = {.batch = kv_len, .key = 1};
  return p;
}

bool AttentionCase::Allowed(int64_t b, int64_t h, int64_t t, int64_t s) const {
  if (s - t < -left || s - t > right) return false;
  const auto row = static_cast<size_t>(b * q_len + t), key_at = static_cast<size_t>(b * kv_len + s);
  if (!interval.empty() && (s < interval[2 * row] || s >= interval[2 * row + 1])) return false;
  if (!key_segments.empty() && query_segments[row] != key_segments[key_at]) return false;
  return mask.empty() || mask[static_cast<size_t>(At(mask_strides, groups, b, h, t, s))] != 0;
}

double AttentionCase::Bias(int64_t b, int64_t h, int64_t t, int64_t s) const {
  return bias.size() == 0 ? 0 : bias[At(bias_strides, groups, b, h, t, s)];
}

AttentionResults ExactAttention(const AttentionCase& c) {
  AttentionResults result{Exact(c.rows() * c.v_dim), Exact(c.rows())};
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < c.heads(); ++h) {
      for (int64_t t = 0; t < c.q_len; ++t) {
        const Row row = ExactRow(c, b, h, t);
        result.lse.Add((b * c.heads() + h) * c.q_len + t, row.lse, row.conditioning);
        for (int64_t e = 0; e < c.v_dim; ++e) {
          const int64_t at = c.QueryAt(b, h, t, c.v_dim) + e;
          if (c.kv_len == 0) result.out.Add(at, std::nan(""), 0);
          for (int64_t s = 0; s < c.kv_len; ++s) {
            const double term =
                row.probability[static_cast<size_t>(s)] * c.value[c.KeyAt(b, h, s, c.v_dim) + e];
            result.out.Add(at, term, std::fabs(term) * row.conditioning);
          }
        }
      }
    }
  }
  return result;
}

AttentionGradients ExactAttentionGradients(const AttentionCase& c, const Tensor& out,
                                           const Tensor& dout) {
  AttentionGradients result{Exact(c.query.size()), Exact(c.key.size()), Exact(c.value.size()),
                            Exact(c.rows() * c.kv_len)};
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < c.heads(); ++h) {
      for (int64_t t = 0; t < c.q_len; ++t) {
        const Row row = ExactRow(c, b, h, t);
        const int64_t q = c.QueryAt(b, h, t, c.qk_dim), o = c.QueryAt(b, h, t, c.v_dim);
        double delta = 0, delta_size = 0;
        for (int64_t e = 0; e < c.v_dim; ++e) {
          delta += dout[o + e] * out[o + e];
          delta_size += std::fabs(dout[o + e] * out[o + e]);
        }
        if (c.dlse.size() > 0) {
          const double dlse = c.dlse[(b * c.heads() + h) * c.q_len + t];
          delta -= dlse;
          delta_size += std::fabs(dlse);
        }
        const bool nan_row = row.masked && c.masked_row == MaskedRow::kNan;
        for (int64_t d = 0; d < c.qk_dim && nan_row && c.kv_len == 0; ++d) {
          result.dquery.Add(q + d, std::nan(""), 0);
        }
        for (int64_t s = 0; s < c.kv_len; ++s) {
          const double p = row.probability[static_cast<size_t>(s)];
          const int64_t k = c.KeyAt(b, h, s, c.qk_dim), v = c.KeyAt(b, h, s, c.v_dim);
          double dp = 0, dp_size = 0;
          for (int64_t e = 0; e < c.v_dim; ++e) {
            dp += dout[o + e] * c.value[v + e];
            dp_size += std::fabs(dout[o + e] * c.value[v + e]);
            result.dvalue.Add(v + e, p * dout[o + e],
                              p * std::fabs(dout[o + e]) * row.conditioning);
          }
          // kNan poisons dquery and dkey too; dbias stays 0 where nothing is allowed.
          const bool allowed = c.Allowed(b, h, t, s);
          const double dlogits = nan_row ? std::nan("") : allowed ? p * (dp - delta) : 0;
          const double size = allowed ? p * (dp_size + delta_size) * row.conditioning : 0;
          result.dbias.Add(((b * c.heads() + h) * c.q_len + t) * c.kv_len + s,
                           allowed ? dlogits : 0, size);
          for (int64_t d = 0; d < c.qk_dim; ++d) {
            const double scale = double{c.scale} * row.slope[static_cast<size_t>(s)];
            result.dquery.Add(q + d, scale * dlogits * c.key[k + d],
                              std::fabs(scale * c.key[k + d]) * size);
            result.dkey.Add(k + d, scale * dlogits * c.query[q + d],
                            std::fabs(scale * c.query[q + d]) * size);
          }
        }
      }
    }
  }
  return result;
}

}  // namespace zenith::test
