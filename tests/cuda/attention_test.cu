// AttentionForward and AttentionBackward against cuda/attention/naive_*.cu. How to build and run:
// CMakeLists.txt. Axes as in ffi/kernels/attention.h.
//
// Tolerances, by row of features (of keys in dbias): |got - want| <= relative * |want| + absolute,
// Euclidean norms. A wrong element of a row of 64 stands out 30 times above bfloat16's.
//   relative: for 16-bit types 4 roundoffs: fast and naive result are rounded, and the fast
//     kernels round p and dlogits before the products of tensor cores. In float32 both kernels err:
//     p relatively by the absolute error of a logit, and sums of n terms by sqrt(n) roundoffs.
//     TensorFloat-32 is tried on numbers that it holds, so that it is one more narrow type.
//     With L the largest logit that |query| |key| allows:
//       2^-23 * (16 + 2 sqrt(n) + 4 L)
//   absolute: dlogits = p * (dp - delta) may cancel to nothing (one key: always), which leaves the
//     rounding errors of dp and delta: 2^-23 * 16 |dout| |value|.
//   |want| counts as at least a tenth of the tensor's root mean square of rows: a row whose terms
//     cancel by chance, or that 16-bit p underflows in, is not held to its own size.
#include <algorithm>
#include <bit>
#include <limits>
#include <tuple>

#include "cuda/attention/kernels.h"
#include "tests/cuda/attention_problems.cuh"
#include "tests/cuda/harness.cuh"

namespace zenith::test {
namespace {

HeadStrides StridesOf(const Problem& p, int64_t heads, int64_t length, int64_t features) {
  return p.length_first ? HeadStrides{length * heads * features, features, heads * features}
                        : HeadStrides{heads * length * features, length * features, features};
}

/// A tensor that is broadcast to the scores.
struct ScoreLayout {
  ScoreStrides strides;
  int64_t size = 1;

  ScoreLayout(const Problem& p, const std::string& pattern) {
    int64_t* const stride[] = {&strides.batch, &strides.kv_head, &strides.group, &strides.query,
                               &strides.key};
    const int64_t sizes[] = {p.batch, p.kv_heads, p.groups, p.q_len, p.kv_len};
    const bool key_outside = pattern.find('t') != std::string::npos;
    for (const int axis : {4, 3, 2, 1, 0}) {
      const int stored = key_outside && axis >= 3 ? 7 - axis : axis;
      if (pattern[static_cast<size_t>(stored)] != '1') continue;
      if (sizes[stored] != 1) *stride[stored] = size;
      size *= sizes[stored];
    }
  }
};

std::vector<char> RandomMask(Random& random, const Problem& p, const ScoreLayout& layout) {
  std::vector<char> mask(static_cast<size_t>(layout.size));
  if (p.mask.find('b') != std::string::npos) {
    const int64_t cols = std::max<int64_t>(layout.strides.query, 1);
    std::vector<char> blocks(static_cast<size_t>(layout.size));  // of 64 queries and 32 keys
    for (int64_t i = 0; i < layout.size; ++i) {
      const int64_t t = i / cols % p.q_len, s = i % cols;
      char& kind = blocks[static_cast<size_t>(i - t % 64 * cols - s % 32)];
      if (kind == 0) kind = random.Chance(0.6) ? 1 : random.Chance(0.6) ? 2 : 3;
      mask[static_cast<size_t>(i)] = kind != 1 && (kind == 2 || (s + t) % 3 != 0);
    }
    return mask;
  }
  const bool dead_rows = p.mask.find('d') != std::string::npos && layout.strides.query != 0;
  for (int64_t i = 0; i < layout.size; ++i) {
    const bool dead = dead_rows && i / layout.strides.query % p.q_len % 3 == 0;
    mask[static_cast<size_t>(i)] = !dead && random.Chance(0.7);
  }
  return mask;
}

Array Integers(const std::vector<int32_t>& values) {
  std::vector<char> bytes(values.size() * sizeof(int32_t));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return Array(bytes);
}

/// Bounds in any place, some behind the keys, some intervals empty.
Array RandomIntervals(Random& random, const Problem& p, int64_t size) {
  std::vector<int32_t> bounds;
  const auto up_to = [&](int64_t end) {
    return static_cast<int32_t>(std::fabs(random.Normals(1, static_cast<double>(end) / 2)[0]));
  };
  for (int64_t i = 0; i < size / 2; ++i) {
    bounds.push_back(up_to(p.kv_len) / 2 - 3);
    bounds.push_back(bounds.back() + up_to(p.kv_len) - 2);
  }
  return Integers(bounds);
}

/// Three runs of a number each over `length` positions, and at times another between them.
Array RandomSegments(Random& random, int64_t batch, int64_t length) {
  std::vector<int32_t> segments;
  for (int64_t i = 0; i < batch * length; ++i)
    segments.push_back(random.Chance(0.02) ? -1 : static_cast<int32_t>(i % length * 3 / length));
  return Integers(segments);
}

std::vector<double> RowNorms(const std::vector<float>& values, int64_t cols) {
  std::vector<double> norms;
  for (size_t i = 0; i < values.size(); ++i) {
    if (static_cast<int64_t>(i) % cols == 0) norms.push_back(0);
    if (std::isfinite(values[i])) norms.back() += double{values[i]} * values[i];
  }
  for (double& norm : norms) norm = std::sqrt(norm);
  return norms;
}

double Largest(const std::vector<double>& values) {
  return values.empty() ? 0 : *std::max_element(values.begin(), values.end());
}

/// See the tolerances above.
void CompareRows(Report& report, const char* family, const char* what, const Array& got,
                 const Array& want, int64_t cols, double relative, double absolute) {
  const std::vector<float> g = got.Values(), w = want.Values();
  const std::vector<double> norms = RowNorms(w, cols);
  double mean_square = 0;
  for (const double norm : norms) mean_square += norm * norm / static_cast<double>(norms.size());
  double worst = 0;
  for (size_t row = 0; row < norms.size(); ++row) {
    double square = 0;
    for (size_t i = row * static_cast<size_t>(cols); i < (row + 1) * static_cast<size_t>(cols);
         ++i) {
      if (std::isfinite(g[i]) && std::isfinite(w[i])) {
        square += (double{g[i]} - w[i]) * (double{g[i]} - w[i]);
      } else if (!(std::isnan(g[i]) && std::isnan(w[i])) && g[i] != w[i]) {
        square = HUGE_VAL;
      }
    }
    const double size = std::fmax(norms[row], 0.1 * std::sqrt(mean_square));
    worst = std::fmax(worst, std::sqrt(square) / (relative * size + absolute + 1e-30));
  }
  report.Add(family, what, worst);
}

/// delta[b,h,t] = sum_e dout * out - dlse in float64.
std::vector<float> Delta(const Problem& p, const Array& out, const Array& dout, const Array& dlse) {
  const std::vector<float> o = out.Values(), d = dout.Values(), l = dlse.Values();
  const HeadStrides strides = StridesOf(p, p.heads(), p.q_len, p.v_dim);
  std::vector<float> delta;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads(); ++h) {
      for (int64_t t = 0; t < p.q_len; ++t) {
        double sum = 0;
        const int64_t row = b * strides.batch + h * strides.head + t * strides.length;
        for (int64_t i = row; i < row + p.v_dim; ++i) {
          sum += double{o[static_cast<size_t>(i)]} * d[static_cast<size_t>(i)];
        }
        if (!l.empty()) sum -= l[delta.size()];
        delta.push_back(static_cast<float>(sum));
      }
    }
  }
  return delta;
}

float RoundedToTf32(float value) {
  const uint32_t bits = (std::bit_cast<uint32_t>(value) + 0x1000) & ~uint32_t{0x1fff};
  return std::bit_cast<float>(bits);
}

void Test(Report& report, const Problem& p, bool forward_only) {
  report.Problem(p.dtype, p.text());
  Random random(5);
  const int64_t queries = p.batch * p.heads() * p.q_len, keys = p.batch * p.kv_heads * p.kv_len;
  const auto input = [&](int64_t rows, int64_t features, double amplitude) {
    std::vector<float> values = random.Normals(rows * features, amplitude, 4);
    if (p.allow_tf32)
      for (float& value : values) value = RoundedToTf32(value);
    return Array(p.dtype, values, p.offset);
  };
  const Array query = input(queries, p.qk_dim, p.amplitude);
  const Array key = input(keys, p.qk_dim, p.amplitude);
  const Array value = input(keys, p.v_dim, p.amplitude), dout = input(queries, p.v_dim, 1);
  Array mask, mask_scratch, bias, dbias, want_dbias;

  AttentionBackwardArgs args{};
  args.dtype = p.dtype, args.allow_tf32 = p.allow_tf32;
  args.batch = p.batch, args.kv_heads = p.kv_heads, args.groups = p.groups;
  args.q_len = p.q_len, args.kv_len = p.kv_len, args.qk_dim = p.qk_dim, args.v_dim = p.v_dim;
  args.scale = std::isnan(p.scale)
                   ? 1 / std::sqrt(static_cast<float>(std::max<int64_t>(p.qk_dim, 1)))
                   : p.scale;
  args.left = p.left, args.right = p.right, args.masked_row = p.masked_row;
  args.softcap = p.softcap;
  args.query_strides = StridesOf(p, p.heads(), p.q_len, p.qk_dim);
  args.key_strides = StridesOf(p, p.kv_heads, p.kv_len, p.qk_dim);
  args.value_strides = StridesOf(p, p.kv_heads, p.kv_len, p.v_dim);
  args.out_strides = StridesOf(p, p.heads(), p.q_len, p.v_dim);
  args.query = query.data(), args.key = key.data(), args.value = value.data();
  if (!p.mask.empty()) {
    const ScoreLayout layout(p, p.mask);
    mask = Array(RandomMask(random, p, layout));
    args.mask = mask.data<bool>();
    args.mask_strides = layout.strides;
  }
  Array interval, query_segments, key_segments;
  if (!p.interval.empty()) {
    Problem bounds = p;
    bounds.kv_len = 2;
    const ScoreLayout layout(bounds, p.interval + "1");
    interval = RandomIntervals(random, p, layout.size);
    args.interval = interval.data<int32_t>();
    args.interval_strides = layout.strides;
  }
  if (p.segments) {
    query_segments = RandomSegments(random, p.batch, p.q_len);
    key_segments = RandomSegments(random, p.batch, p.kv_len);
    args.query_segments = query_segments.data<int32_t>();
    args.key_segments = key_segments.data<int32_t>();
    args.query_segments_strides = {.batch = p.q_len, .query = 1};
    args.key_segments_strides = {.batch = p.kv_len, .key = 1};
  }
  if (p.mask_scratch) {
    args.mask_scratch_words = MaskScratchWords(args);
    mask_scratch = Array(DType::kF32, args.mask_scratch_words);
    args.mask_scratch = mask_scratch.data<uint32_t>();
  }
  double largest_bias = 0;
  if (!p.bias.empty()) {
    const ScoreLayout layout(p, p.bias);
    std::vector<float> terms = random.Normals(layout.size, 1, 5);
    for (const float term : terms) largest_bias = std::fmax(largest_bias, std::fabs(term));
    for (size_t i = 0; p.fill != 0 && i < terms.size(); ++i)
      if (static_cast<int64_t>(i) / layout.strides.query % p.q_len % 3 == 0) terms[i] = p.fill;
    bias = Array(p.bias_dtype, terms);
    args.bias = bias.data();
    args.bias_dtype = p.bias_dtype;
    args.bias_strides = layout.strides;
    dbias = Array(DType::kF32, p.scores());
    want_dbias = Array(DType::kF32, p.scores());
  }

  const double q = Largest(RowNorms(query.Values(), p.qk_dim));
  const double k = Largest(RowNorms(key.Values(), p.qk_dim));
  const double v = Largest(RowNorms(value.Values(), p.v_dim));
  const double dy = Largest(RowNorms(dout.Values(), p.v_dim));
  const double scale = std::fabs(args.scale), logit = scale * q * k + largest_bias;
  const double rows = static_cast<double>(p.groups * p.q_len);
  const double terms = std::fmax(rows, static_cast<double>(p.kv_len));
  const double relative =
      4 * p.roundoff() + 2 * kFloatRoundoff * (16 + 2 * std::sqrt(terms) + 4 * logit);
  const double noise = 2 * kFloatRoundoff * 16 * dy * v;  // of dlogits

  Array out(p.dtype, queries * p.v_dim, p.offset), want_out(p.dtype, queries * p.v_dim, p.offset);
  Array lse(DType::kF32, queries), want_lse(DType::kF32, queries);
  Array rest(DType::kF32, queries), want_rest(DType::kF32, queries);
  AttentionForwardArgs forward{}, naive{};
  static_cast<AttentionProblem&>(forward) = args;
  naive = forward;
  forward.out = out.data(), forward.lse = lse.data<float>();
  forward.lse_rest = rest.data<float>();
  naive.out = want_out.data(), naive.lse = want_lse.data<float>();
  naive.lse_rest = want_rest.data<float>();
  RunOracle(report, "forward", {&want_out, &want_lse, &want_rest},
            [&](Launch l) { return attention::NaiveForward(naive, l); });
  RunTwice(report, "forward", {&out, &lse, &rest},
           [&](Launch l) { return AttentionForward(forward, l); });
  CompareRows(report, "attention forward", "out", out, want_out, p.v_dim, relative, 0);
  const std::vector<float> lse_values = want_lse.Values();
  report.Compare("attention forward", "lse", lse, want_lse, [&](int64_t i) {
    return 2 * kFloatRoundoff *
           (16 + 2 * std::sqrt(static_cast<double>(p.kv_len)) + 4 * logit +
            std::fabs(double{lse_values[static_cast<size_t>(i)]}));
  });
  if (p.fill != 0)
    report.Compare("attention forward", "lse_rest", rest, want_rest,
                   [&](int64_t) { return 2 * kFloatRoundoff * (32 + 4 * logit); });

  if (forward_only) return;
  // Both kernels get the naive out and lse. Each has its own delta: the naive ones' is float64's.
  Array dlse;
  if (p.lse_used) dlse = Array(DType::kF32, random.Normals(queries));
  Array delta(DType::kF32, queries);
  Array want_delta(DType::kF32, Delta(p, want_out, dout, dlse));
  Array dquery(p.dtype, query.size(), p.offset), want_dquery(p.dtype, query.size(), p.offset);
  Array dkey(p.dtype, key.size(), p.offset), want_dkey(p.dtype, key.size(), p.offset);
  Array dvalue(p.dtype, value.size(), p.offset), want_dvalue(p.dtype, value.size(), p.offset);
  args.out = want_out.data(), args.dout = dout.data(), args.lse = want_lse.data<float>();
  if (!p.bias.empty()) args.lse_rest = want_rest.data<float>();
  args.dlse = dlse.data<float>(), args.delta = delta.data<float>(),
  args.dbias = dbias.data<float>();
  args.dquery = dquery.data(), args.dkey = dkey.data(), args.dvalue = dvalue.data();
  AttentionBackwardArgs oracle = args;
  oracle.delta = want_delta.data<float>(), oracle.dbias = want_dbias.data<float>();
  oracle.dquery = want_dquery.data(), oracle.dkey = want_dkey.data();
  oracle.dvalue = want_dvalue.data();
  RunOracle(report, "backward", {&want_dquery, &want_dkey, &want_dvalue, &want_dbias},
            [&](Launch l) { return attention::NaiveBackward(oracle, l); });
  RunTwice(report, "backward", {&delta, &dquery, &dkey, &dvalue, &dbias},
           [&](Launch l) { return AttentionBackward(args, l); });
  report.Compare("attention backward", "delta", delta, want_delta,
                 [&](int64_t) { return noise + 1e-30; });
  CompareRows(report, "attention backward", "dquery", dquery, want_dquery, p.qk_dim, relative,
              scale * k * noise);
  CompareRows(report, "attention backward", "dkey", dkey, want_dkey, p.qk_dim, relative,
              scale * q * noise * std::sqrt(rows));
  CompareRows(report, "attention backward", "dvalue", dvalue, want_dvalue, p.v_dim, relative, 0);
  if (!p.bias.empty()) {
    CompareRows(report, "attention backward", "dbias", dbias, want_dbias, p.kv_len,
                relative - 4 * p.roundoff(), noise);
  }
}

/// `only`: the name of a dtype, or null for all.
int Main(bool small, bool decoding, const char* only) {
  Report report;
  for (const DType dtype : kDTypes) {
    if (only && std::strcmp(only, Name(dtype)) != 0) continue;
    std::vector<Problem> problems;
    if (decoding) {
      if (dtype == DType::kF32) continue;
      for (const int64_t d : {64, 128, 256}) AddDecoding(problems, dtype, d);
    } else if (small) {
      AddSmall(problems, dtype);
    } else {
      AddSizes(problems, dtype);
      for (const int64_t d : {64, 128, 256}) {
        AddScores(problems, dtype, d);
        AddScoreTiles(problems, dtype, d);
        AddDecoding(problems, dtype, d);
      }
    }
    for (Problem& problem : problems) {
      Test(report, problem, decoding);
      problem.allow_tf32 = dtype == DType::kF32 && problem.offset == 0;  // else no tensor cores
      if (problem.allow_tf32) Test(report, problem, decoding);
    }
  }
  return report.Finish();
}

}  // namespace
}  // namespace zenith::test

/// `--decoding`: few queries over many keys alone, forward. The name of a dtype: its problems
/// alone.
int main(int argc, char** argv) {
  const bool small = zenith::test::IsSmall(argc, argv);
  const bool decoding = argc > 1 && std::strcmp(argv[1], "--decoding") == 0;
  return zenith::test::Main(small, decoding, argc > 1 && !small && !decoding ? argv[1] : nullptr);
}
