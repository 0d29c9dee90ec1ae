// PagedAttention against cuda/attention/naive_paged.cu. How to build and run: CMakeLists.txt.
// `--time` measures instead. Axes as in ffi/kernels/paged_attention.h.
//
// Tolerance of out: 16-bit kernels round p before the second product, and both results are rounded:
// 8 roundoffs of an element, or of its row's root mean square, if that is more.
#include <algorithm>
#include <climits>

#include "cuda/attention/paged.h"
#include "tests/cuda/harness.cuh"

namespace zenith::test {
namespace {

struct Problem {
  int64_t page_size = 16;
  int64_t pools = 1, sequences = 3, kv_heads = 2, groups = 4, q_len = 1, entries = 20;
  int64_t qk_dim = 128, v_dim = 128;
  int heads_axis = 2;  // ffi/paged_attention.cc's HeadsAxis
  float softcap = 0;
  bool of_heads = false;  // a table and an interval for each head
  bool outside = false;   // entries outside of the pool
  bool nan_outside = false, zero_rows = true, mean_rows = false;
  int64_t window = 0;

  int64_t batch() const { return pools * sequences; }
  int64_t rows() const { return batch() * kv_heads * groups * q_len; }
  std::string Text() const {
    std::string text = "page " + std::to_string(page_size) + " x" + std::to_string(entries) + " b" +
                       std::to_string(pools) + "x" + std::to_string(sequences) + " k" +
                       std::to_string(kv_heads) + " g" + std::to_string(groups) + " t" +
                       std::to_string(q_len) + " d" + std::to_string(qk_dim) + "/" +
                       std::to_string(v_dim) + " axis " + std::to_string(heads_axis);
    return text + (softcap > 0 ? " cap" : "") + (of_heads ? " of heads" : "") +
           (outside ? nan_outside ? " nan outside" : " outside" : "") + (mean_rows ? " mean" : "");
  }
};

/// Strides of pages [*o k p c d] that lie as `heads_axis` says; returns the page's.
int64_t SetStrides(const Problem& p, int64_t pages, int64_t features, HeadStrides& strides) {
  strides.batch = p.kv_heads * pages * p.page_size * features;
  strides.head = p.heads_axis == 0   ? pages * p.page_size * features
                 : p.heads_axis == 1 ? p.page_size * features
                                     : features;
  strides.length = p.heads_axis == 2 ? p.kv_heads * features : features;
  return (p.heads_axis == 0 ? 1 : p.kv_heads) * p.page_size * features;
}

Array Integers(const std::vector<int32_t>& values) {
  std::vector<float> bits(values.size());
  std::memcpy(bits.data(), values.data(), values.size() * 4);
  return Array(DType::kF32, bits);
}

/// Pages 0 and the last are NaN, as are those that no sequence uses, unless entries outside of the
/// pool stand for them.
void Test(Report& report, DType dtype, const Problem& p) {
  report.Problem(dtype, p.Text());
  Random random(3);
  const int64_t table_heads = p.of_heads ? p.kv_heads : 1;
  const int64_t pages = p.sequences * table_heads * p.entries + 3;
  const int64_t kv_len = p.entries * p.page_size;
  const auto draw = [&](int64_t n) {
    return static_cast<int64_t>(random.Bits() % static_cast<uint64_t>(n));
  };

  std::vector<int32_t> table, interval;
  std::vector<bool> used(static_cast<size_t>(p.pools * pages), p.mean_rows);
  for (int64_t b = 0; b < p.batch(); ++b) {
    for (int64_t h = 0; h < table_heads; ++h) {
      const int64_t row = (b % p.sequences) * table_heads + h;
      const int64_t length = row == 1 ? 0 : row == 2 ? kv_len : 1 + draw(kv_len);
      int64_t begin = length;
      for (int64_t t = 0; t < p.q_len; ++t) {
        const int64_t last = length - p.q_len + t + 1;
        const int64_t first = p.window > 0 ? std::max<int64_t>(0, last - p.window) : 0;
        interval.push_back(static_cast<int32_t>(first));
        interval.push_back(static_cast<int32_t>(last));
        begin = std::min(begin, first);
      }
      for (int64_t i = 0; i < p.entries; ++i) {
        // Pages of a row go backwards and are disjoint from those of others.
        const int64_t page = 1 + row * p.entries + (p.entries - 1 - i);
        const bool seen = (i + 1) * p.page_size > begin && i * p.page_size < length;
        int64_t entry = draw(2) ? page : page - pages;
        if (!seen && !p.mean_rows) {
          constexpr int64_t kAnything[] = {INT_MAX, INT_MIN, 0, -1};
          entry = kAnything[draw(4)];
        } else {
          used[static_cast<size_t>(b / p.sequences * pages + page)] = true;
          if (p.outside && i % 5 == 3) entry = draw(2) ? pages + draw(9) : -pages - 1 - draw(9);
        }
        table.push_back(static_cast<int32_t>(entry));
      }
    }
  }

  PagedAttentionArgs args = {};
  args.dtype = dtype, args.batch = p.batch(), args.kv_heads = p.kv_heads, args.groups = p.groups;
  args.q_len = p.q_len, args.kv_len = kv_len, args.qk_dim = p.qk_dim, args.v_dim = p.v_dim;
  args.scale = 1.5f / std::sqrt(static_cast<float>(p.qk_dim)), args.softcap = p.softcap;
  args.left = args.right = kUnbounded;
  args.masked_row = p.mean_rows ? MaskedRow::kMean : MaskedRow::kNan;
  args.zero_masked_row = p.zero_rows && !p.mean_rows, args.nan_outside = p.nan_outside;
  args.pages = pages, args.page_size = p.page_size, args.sequences = p.sequences;
  args.key_page_stride = SetStrides(p, pages, p.qk_dim, args.key_strides);
  args.value_page_stride = SetStrides(p, pages, p.v_dim, args.value_strides);
  const int64_t heads = p.kv_heads * p.groups;
  args.query_strides = {p.q_len * heads * p.qk_dim, p.qk_dim, heads * p.qk_dim};
  args.out_strides = {p.q_len * heads * p.v_dim, p.v_dim, heads * p.v_dim};
  args.interval_strides = {.batch = table_heads * p.q_len * 2,
                           .kv_head = p.of_heads ? p.q_len * 2 : 0,
                           .query = 2,
                           .key = 1};
  args.table_batch_stride = table_heads * p.entries;
  args.table_head_stride = p.of_heads ? p.entries : 0;

  const auto make_pages = [&](const HeadStrides& strides, int64_t page_stride, int64_t features) {
    std::vector<float> values = random.Normals(p.pools * strides.batch, 1, 4);
    for (int64_t o = 0; o < p.pools; ++o)
      for (int64_t page = 0; page < pages; ++page) {
        if (used[static_cast<size_t>(o * pages + page)]) continue;
        if (p.outside && (page == 0 || page == pages - 1)) continue;
        for (int64_t h = 0; h < p.kv_heads; ++h)
          for (int64_t c = 0; c < p.page_size; ++c)
            for (int64_t d = 0; d < features; ++d)
              values[static_cast<size_t>(o * strides.batch + page * page_stride + h * strides.head +
                                         c * strides.length + d)] = NAN;
      }
    return Array(dtype, values);
  };
  const Array query(dtype, random.Normals(p.rows() * p.qk_dim));
  const Array key = make_pages(args.key_strides, args.key_page_stride, p.qk_dim);
  const Array value = make_pages(args.value_strides, args.value_page_stride, p.v_dim);
  const Array table_array = Integers(table), interval_array = Integers(interval);
  Array out(dtype, p.rows() * p.v_dim), want(dtype, p.rows() * p.v_dim);
  Array lse(DType::kF32, p.rows()), want_lse(DType::kF32, p.rows());
  Array rest(DType::kF32, p.rows()), want_rest(DType::kF32, p.rows());
  args.query = query.data(), args.key = key.data(), args.value = value.data();
  args.table = table_array.data<int32_t>(), args.interval = interval_array.data<int32_t>();
  args.out = out.data(), args.lse = lse.data<float>(), args.lse_rest = rest.data<float>();
  PagedAttentionArgs oracle = args;
  oracle.out = want.data(), oracle.lse = want_lse.data<float>();
  oracle.lse_rest = want_rest.data<float>();
  RunOracle(report, "paged attention", {&want, &want_lse, &want_rest},
            [&](Launch l) { return attention::NaivePaged(oracle, l); });
  RunTwice(report, "paged attention", {&out, &lse, &rest},
           [&](Launch l) { return PagedAttention(args, l); });

  const std::vector<float> exact = want.Values(), exact_lse = want_lse.Values();
  std::vector<double> rms(static_cast<size_t>(p.rows()));
  for (size_t i = 0; i < exact.size(); ++i) {
    const size_t row = i / static_cast<size_t>(p.v_dim);
    rms[row] += double{exact[i]} * exact[i] / static_cast<double>(p.v_dim);
  }
  const double roundoff = std::max(Roundoff(dtype), 16 * kFloatRoundoff);
  report.Compare("paged attention", "out", out, want, [&](int64_t i) {
    const auto at = static_cast<size_t>(i);
    return 8 * roundoff *
               std::max<double>(std::fabs(exact[at]),
                                std::sqrt(rms[at / static_cast<size_t>(p.v_dim)])) +
           Smallest(dtype);
  });
  report.Compare("paged attention", "lse", lse, want_lse, [&](int64_t i) {
    return kFloatRoundoff * (256 + 4 * std::fabs(double{exact_lse[static_cast<size_t>(i)]}));
  });
}

int Main(bool small) {
  Report report;
  for (const DType dtype : kDTypes) {
    std::vector<Problem> problems;
    for (const int64_t d : {64, 128, 256}) {
      for (const int64_t page_size : {16, 32, 64, 128, 256}) {
        if (small && page_size != 16 && page_size != 64) continue;
        Problem p;
        p.page_size = page_size, p.qk_dim = p.v_dim = d;
        p.entries = std::max<int64_t>(2, (small ? 512 : 1024) / page_size);
        problems.push_back(p);
        p.heads_axis = page_size == 16 ? 0 : 1, p.q_len = 3, p.pools = 2, p.window = 90;
        problems.push_back(p);
        p.v_dim = d - 8, p.softcap = 2, p.of_heads = true, p.outside = true, p.window = 0;
        problems.push_back(p);
        p.nan_outside = true;
        problems.push_back(p);
        p.softcap = 0, p.heads_axis = 2, p.mean_rows = true;
        problems.push_back(p);
      }
      if (small) continue;
      // Clusters of several sizes: few sequences with many keys; many; more rows than a tile has.
      problems.push_back({.page_size = 16,
                          .sequences = 1,
                          .kv_heads = 1,
                          .entries = 512,
                          .qk_dim = d,
                          .v_dim = d});
      problems.push_back({.page_size = 64,
                          .sequences = 40,
                          .kv_heads = 4,
                          .groups = 1,
                          .entries = 3,
                          .qk_dim = d,
                          .v_dim = d});
      problems.push_back({.page_size = 32, .groups = 8, .q_len = 8, .qk_dim = d, .v_dim = d});
      problems.push_back({.page_size = 256,
                          .sequences = 2,
                          .groups = 1,
                          .q_len = 16,
                          .qk_dim = d,
                          .v_dim = d,
                          .zero_rows = false});
    }
    // For the naive kernel, which is then its own oracle.
    problems.push_back({.page_size = 5, .qk_dim = 20, .v_dim = 33});
    for (const Problem& problem : problems) Test(report, dtype, problem);
  }
  return report.Finish();
}

/// bfloat16, 32 query heads to 8 of keys, d128; caches that take turns, 1 GB of them at least, in
/// one CUDA graph.
/// shuffled: the pages in random order, or one behind the other.
void Time(int64_t batch, int64_t kv_len, int64_t page_size, bool shuffled) {
  const int64_t heads = 8, groups = 4, d = 128, entries = kv_len / page_size;
  const int64_t pages = batch * entries, size = heads * kv_len * batch * d;
  const int64_t bytes = 2 * size * 2;
  const auto caches = static_cast<size_t>(std::max<int64_t>(2, (int64_t{1} << 30) / bytes));
  Random random(1);
  std::vector<int32_t> table(static_cast<size_t>(pages)), interval;
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  for (size_t i = table.size(); shuffled && i > 1; --i)
    std::swap(table[i - 1], table[random.Bits() % static_cast<uint64_t>(i)]);
  for (int64_t b = 0; b < batch; ++b) {
    interval.push_back(0);
    interval.push_back(static_cast<int32_t>(kv_len));
  }
  const Array table_array = Integers(table), interval_array = Integers(interval);
  const Array query(DType::kBF16, random.Normals(batch * heads * groups * d));
  Array out(DType::kBF16, query.size());
  Array lse(DType::kF32, batch * heads * groups), rest(DType::kF32, batch * heads * groups);
  std::vector<Array> keys, values;
  for (size_t i = 0; i < caches; ++i) {
    keys.emplace_back(DType::kBF16, size), values.emplace_back(DType::kBF16, size);
    keys.back().Fill(0x3c), values.back().Fill(0x3c);
  }
  PagedAttentionArgs args = {};
  args.dtype = DType::kBF16, args.batch = batch, args.kv_heads = heads, args.groups = groups;
  args.q_len = 1, args.kv_len = kv_len, args.qk_dim = args.v_dim = d, args.scale = 0.1f;
  args.left = args.right = kUnbounded, args.masked_row = MaskedRow::kNan;
  args.pages = pages, args.page_size = page_size, args.sequences = batch;
  args.key_strides = args.value_strides = {.batch = size, .head = d, .length = heads * d};
  args.key_page_stride = args.value_page_stride = heads * page_size * d;
  args.query_strides = args.out_strides = {heads * groups * d, d, heads * groups * d};
  args.interval_strides = {.batch = 2, .kv_head = 0, .query = 2, .key = 1};
  args.table_batch_stride = entries;
  args.query = query.data(), args.out = out.data(), args.lse = lse.data<float>();
  args.lse_rest = rest.data<float>(), args.table = table_array.data<int32_t>();
  args.interval = interval_array.data<int32_t>();

  cudaStream_t stream;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  const auto microseconds = [&](auto&& body) {  // of one cache's turn
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
    const size_t turns = caches * std::max<size_t>(1, 24 / caches);
    for (size_t i = 0; i < turns; ++i) body(i % caches);
    Check(cudaStreamEndCapture(stream, &graph), "capture");
    Check(cudaGraphInstantiate(&executable, graph, 0), "graph");
    cudaEvent_t start, end;
    Check(cudaEventCreate(&start), "event");
    Check(cudaEventCreate(&end), "event");
    float best = HUGE_VALF;
    for (int i = 0; i < 6; ++i) {
      Check(cudaEventRecord(start, stream), "event");
      Check(cudaGraphLaunch(executable, stream), "graph");
      Check(cudaEventRecord(end, stream), "event");
      Check(cudaEventSynchronize(end), "event");
      float ms = 0;
      Check(cudaEventElapsedTime(&ms, start, end), "event");
      best = std::min(best, ms);
    }
    return 1e3 * best / static_cast<double>(turns);
  };
  const double ours = microseconds([&](size_t i) {
    PagedAttentionArgs turn = args;
    turn.key = keys[i].data(), turn.value = values[i].data();
    if (!PagedAttention(turn, Launch{stream}).ok()) std::exit(1);
  });
  const double copy = microseconds([&](size_t i) {  // reads and writes as many bytes as ours reads
    Check(cudaMemcpyAsync(values[i].data(), keys[i].data(), static_cast<size_t>(bytes / 2),
                          cudaMemcpyDeviceToDevice, stream),
          "copy");
  });
  std::printf("b%lld s%lld page %lld%s: %.1f us, %.0f GB/s; a copy %.1f us: %.3f of its speed\n",
              static_cast<long long>(batch), static_cast<long long>(kv_len),
              static_cast<long long>(page_size), shuffled ? "" : " in order", ours,
              static_cast<double>(bytes) / ours * 1e-3, copy, copy / ours);
}

}  // namespace
}  // namespace zenith::test

int main(int argc, char** argv) {
  const bool small = zenith::test::IsSmall(argc, argv);
  if (argc > 1 && std::strcmp(argv[1], "--time") == 0) {
    for (const int64_t page_size : {16, 64, 256}) {
      for (const bool shuffled : {false, true}) {
        zenith::test::Time(1, 131072, page_size, shuffled);
        zenith::test::Time(1, 16384, page_size, shuffled);
        zenith::test::Time(64, 8192, page_size, shuffled);
      }
    }
    return 0;
  }
  return zenith::test::Main(small);
}
