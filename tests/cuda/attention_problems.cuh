// The problems that attention_test.cu tries: sizes, bands, masks and biases for each kernel. Axes
// as in ffi/kernels/attention.h.
#pragma once

#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ffi/kernels/attention.h"
#include "tests/cuda/harness.cuh"

namespace zenith::test {

struct Problem {
  DType dtype = DType::kBF16;
  int64_t batch = 1, kv_heads = 1, groups = 1, q_len = 1, kv_len = 1, qk_dim = 64, v_dim = 64;
  int64_t left = kUnbounded, right = kUnbounded;
  MaskedRow masked_row = MaskedRow::kMean;
  /// A digit per axis of (batch, kv_head, group, query, key): 1 full, 0 broadcast. Then 'd': every
  /// third query is allowed no key; 'b': whole blocks are masked, or open; 't': the key axis is not
  /// the innermost in memory.
  std::string mask = "", bias = "";
  DType bias_dtype = DType::kF32;
  float fill = 0;             // if not 0: the bias of all keys of every third query
  float softcap = 0;          // 0: none
  bool lse_used = false;      // lse has a cotangent
  std::string interval = "";  // a digit per axis of (batch, kv_head, group, query)
  bool segments = false;
  bool length_first = false;  // (batch, length, head, feature) in memory, else head before length
  float scale = NAN;          // NaN: 1 / sqrt(qk_dim)
  double amplitude = 1;       // of query, key and value
  int64_t offset = 0;         // in elements
  bool mask_scratch = true;   // there is some
  bool allow_tf32 = false;    // with inputs of TensorFloat-32's 10 bits of mantissa

  int64_t heads() const { return kv_heads * groups; }
  /// Of p and dlogits, where a kernel rounds them.
  double roundoff() const {
    return dtype != DType::kF32 ? Roundoff(dtype) : allow_tf32 ? 0x1p-11 : 0;
  }
  int64_t scores() const { return batch * heads() * q_len * kv_len; }

  std::string text() const {
    const auto n = [](int64_t value) { return std::to_string(value); };
    std::string s;
    const std::pair<const char*, int64_t> sizes[] = {
        {"b", batch},   {" h", kv_heads}, {"x", groups}, {" t", q_len},
        {" s", kv_len}, {" d", qk_dim},   {" e", v_dim}};
    for (const auto& [axis, size] : sizes) s.append(axis).append(n(size));
    if (left != kUnbounded || right != kUnbounded) {
      s += " band " + (left == kUnbounded ? "all" : n(left)) + ".." +
           (right == kUnbounded ? "all" : n(right));
    }
    if (!mask.empty()) s += " mask " + mask;
    if (!bias.empty()) s += " bias " + bias + " " + Name(bias_dtype);
    if (fill != 0) s += " fill " + std::to_string(fill);
    if (softcap != 0) s += " cap " + std::to_string(softcap);
    if (lse_used) s += " dlse";
    if (!interval.empty()) s += " interval " + interval;
    if (segments) s += " segments";
    if (masked_row == MaskedRow::kNan) s += " nan";
    if (length_first) s += " bthd";
    if (!std::isnan(scale)) s += " scale " + std::to_string(scale);
    if (amplitude != 1) s += " amplitude " + std::to_string(amplitude);
    if (offset) s += " unaligned";
    if (!mask_scratch) s += " without scratch";
    if (allow_tf32) s += " tf32";
    return s;
  }
};

inline constexpr MaskedRow kMaskedRows[] = {MaskedRow::kNan, MaskedRow::kMean};
inline constexpr int64_t kOpen = kUnbounded;

/// More tiles than a GPU has multiprocessors, for kernels whose blocks take several: of equal and
/// of unequal length, and with query heads that share keys.
inline void AddManyTiles(std::vector<Problem>& problems, DType dtype) {
  constexpr int64_t kDims[][2] = {{64, 64},   {96, 96},   {128, 128},
                                  {192, 128}, {192, 192}, {256, 256}};
  constexpr int64_t kBands[][2] = {{kOpen, kOpen}, {kOpen, 0}, {150, 20}};
  for (const auto& [d, e] : kDims) {
    for (const auto& [left, right] : kBands) {
      problems.push_back({.dtype = dtype,
                          .batch = 2,
                          .kv_heads = 11,
                          .groups = 4,
                          .q_len = 523,
                          .kv_len = 523,
                          .qk_dim = d,
                          .v_dim = e,
                          .left = left,
                          .right = right,
                          .length_first = d != 96});
    }
  }
  for (const int64_t d : {64, 128}) {
    for (const char* bias : {"", "00011"}) {
      problems.push_back({.dtype = dtype,
                          .batch = 2,
                          .kv_heads = 11,
                          .groups = 4,
                          .q_len = 523,
                          .kv_len = 520,
                          .qk_dim = d,
                          .v_dim = d,
                          .mask = "00011d",
                          .bias = bias,
                          .bias_dtype = dtype,
                          .interval = "1001",
                          .segments = *bias == 0});
    }
  }
  // A hundred tiles of keys: an error that is made once a tile, below the tolerance, adds up.
  problems.push_back({.dtype = dtype,
                      .kv_heads = 2,
                      .groups = 2,
                      .q_len = 130,
                      .kv_len = 9000,
                      .qk_dim = 128,
                      .v_dim = 128});
  for (const auto& [t, s] :
       {std::pair{1700, 1700}, {70, 4200}}) {  // other tiles from some length on
    for (const int64_t d : {64, 128}) {
      for (const int64_t right : {kOpen, int64_t{0}}) {
        problems.push_back({.dtype = dtype,
                            .kv_heads = 2,
                            .q_len = t,
                            .kv_len = s,
                            .qk_dim = d,
                            .v_dim = d,
                            .right = right});
      }
    }
  }
}

/// Head sizes: tiles of 64, 128 and 256 features, full and not, equal or not, and what only the
/// naive kernel takes (20, 111 and 300 features, pointers that are not aligned).
inline void AddSizes(std::vector<Problem>& problems, DType dtype) {
  for (const int64_t d : {8, 20, 32, 40, 64, 96, 111, 128, 192, 256, 300}) {
    problems.push_back({.dtype = dtype,
                        .batch = 2,
                        .kv_heads = 2,
                        .q_len = 129,
                        .kv_len = 257,
                        .qk_dim = d,
                        .v_dim = d});
    problems.push_back({.dtype = dtype,
                        .kv_heads = 2,
                        .groups = 2,
                        .q_len = 200,
                        .kv_len = 200,
                        .qk_dim = d,
                        .v_dim = d,
                        .right = 0,
                        .length_first = true});
  }
  constexpr int64_t kUnequal[][2] = {{64, 32},  {32, 128}, {192, 128}, {128, 64},
                                     {64, 256}, {72, 136}, {4, 12},    {33, 64}};
  for (const auto& [d, e] : kUnequal) {
    problems.push_back({.dtype = dtype,
                        .kv_heads = 2,
                        .groups = 3,
                        .q_len = 150,
                        .kv_len = 140,
                        .qk_dim = d,
                        .v_dim = e,
                        .right = 0,
                        .length_first = true});
  }
  problems.push_back({.dtype = dtype, .kv_heads = 2, .q_len = 65, .kv_len = 70, .offset = 1});
  constexpr int64_t kLengths[][2] = {{1, 1},     {1, 1000}, {17, 17},    {127, 129},
                                     {129, 127}, {1000, 1}, {300, 1000}, {1000, 300}};
  for (const auto& [t, s] : kLengths) {
    for (const int64_t d : {64, 128}) {
      problems.push_back(
          {.dtype = dtype, .groups = 2, .q_len = t, .kv_len = s, .qk_dim = d, .v_dim = d});
      problems.push_back(
          {.dtype = dtype, .q_len = t, .kv_len = s, .qk_dim = d, .v_dim = d, .right = 0});
      for (const MaskedRow row : kMaskedRows) {  // causal from the end: without keys where t > s
        problems.push_back({.dtype = dtype,
                            .kv_heads = 2,
                            .q_len = t,
                            .kv_len = s,
                            .qk_dim = d,
                            .v_dim = d,
                            .right = s - t,
                            .masked_row = row});
      }
    }
  }
  AddManyTiles(problems, dtype);
  for (const MaskedRow row : kMaskedRows) {
    const Problem empty{.dtype = dtype, .groups = 2, .q_len = 5, .kv_len = 7, .masked_row = row};
    for (const auto size : {&Problem::batch, &Problem::kv_heads, &Problem::groups, &Problem::q_len,
                            &Problem::kv_len, &Problem::qk_dim, &Problem::v_dim}) {
      problems.push_back(empty);
      problems.back().*size = 0;
    }
  }
}

/// Bands, masks, biases and scales for one tile size.
inline void AddScores(std::vector<Problem>& problems, DType dtype, int64_t d) {
  constexpr int64_t kBands[][2] = {{16, 0},   {100, 100},    {0, 0},        {-5, 20},
                                   {30, -10}, {kOpen, -130}, {-130, kOpen}, {5, -6}};
  for (const auto& [left, right] : kBands) {
    for (const MaskedRow row : kMaskedRows) {
      problems.push_back({.dtype = dtype,
                          .groups = 2,
                          .q_len = 260,
                          .kv_len = 250,
                          .qk_dim = d,
                          .v_dim = d,
                          .left = left,
                          .right = right,
                          .masked_row = row});
    }
  }
  for (const char* mask : {"10001", "11111", "00010", "00011", "00011t", "11111d", "10010d"}) {
    for (const MaskedRow row : kMaskedRows) {
      problems.push_back({.dtype = dtype,
                          .batch = 2,
                          .kv_heads = 2,
                          .groups = 2,
                          .q_len = 133,
                          .kv_len = 150,
                          .qk_dim = d,
                          .v_dim = d,
                          .masked_row = row,
                          .mask = mask,
                          .mask_scratch = row == MaskedRow::kMean});
    }
  }
  for (const char* bias : {"00111", "11111", "10001", "01010", "00011t"}) {
    for (const DType bias_dtype : {dtype, DType::kF32}) {
      problems.push_back({.dtype = dtype,
                          .batch = 2,
                          .kv_heads = 2,
                          .groups = 2,
                          .q_len = 133,
                          .kv_len = 150,
                          .qk_dim = d,
                          .v_dim = d,
                          .bias = bias,
                          .bias_dtype = bias_dtype});
      problems.push_back({.dtype = dtype,
                          .groups = 2,
                          .q_len = 300,
                          .kv_len = 310,
                          .qk_dim = d,
                          .v_dim = d,
                          .right = 0,
                          .mask = "11111d",
                          .bias = bias,
                          .bias_dtype = bias_dtype,
                          .length_first = true});
    }
  }
  for (const char* interval : {"1000", "0001", "1111", "0010"}) {
    for (const MaskedRow row : kMaskedRows) {
      problems.push_back({.dtype = dtype,
                          .batch = 2,
                          .kv_heads = 2,
                          .groups = 2,
                          .q_len = 150,
                          .kv_len = 300,
                          .qk_dim = d,
                          .v_dim = d,
                          .right = 200,
                          .masked_row = row,
                          .bias = *interval == '0' ? "" : "00011",
                          .interval = interval,
                          .segments = row == MaskedRow::kNan});
      problems.push_back(problems.back());
      problems.back().mask_scratch = false, problems.back().bias = "";
    }
  }
  for (const float fill : {-1e9f, std::numeric_limits<float>::lowest()}) {
    for (const char* bias : {"00011", "11111"}) {
      problems.push_back({.dtype = dtype,
                          .batch = 2,
                          .groups = 2,
                          .q_len = 133,
                          .kv_len = 150,
                          .qk_dim = d,
                          .v_dim = d,
                          .bias = bias,
                          .fill = fill});
    }
  }
  for (const char* bias : {"", "00011"}) {
    problems.push_back({.dtype = dtype,
                        .kv_heads = 2,
                        .groups = 2,
                        .q_len = 200,
                        .kv_len = 210,
                        .qk_dim = d,
                        .v_dim = d,
                        .right = 10,
                        .mask = *bias ? "" : "10001",
                        .bias = bias,
                        .softcap = 2,
                        .lse_used = true});
  }
  problems.push_back(
      {.dtype = dtype, .q_len = 300, .kv_len = 200, .qk_dim = d, .v_dim = d, .lse_used = true});
  for (const float scale : {-0.2f, 0.f, 3.f}) {
    problems.push_back(
        {.dtype = dtype, .q_len = 100, .kv_len = 130, .qk_dim = d, .v_dim = d, .scale = scale});
  }
  problems.push_back({.dtype = dtype,
                      .q_len = 300,
                      .kv_len = 300,
                      .qk_dim = d,
                      .v_dim = d,
                      .scale = 0.3f,
                      .amplitude = 4});
}

/// Masks and biases that lie so that they are copied to shared memory in tiles (lengths of keys
/// that are multiples of 16, elements of 16 bits), broadcast along each axis, alone, together, with
/// a band and with what is not copied; more tiles than buffers, and groups of heads.
inline void AddScoreTiles(std::vector<Problem>& problems, DType dtype, int64_t d) {
  const DType other = dtype == DType::kF16 ? DType::kBF16 : DType::kF16;
  constexpr std::pair<const char*, const char*> kMasksAndBiases[] = {
      {"11111d", ""},      {"10011d", ""},      {"00010", ""},      {"10001", ""},
      {"11111b", ""},      {"10011b", ""},      {"10001b", ""},     {"10010b", "00011"},
      {"10111b", "11011"}, {"", "11111"},       {"", "01111"},      {"", "00011"},
      {"", "10011"},       {"", "11101"},       {"", "00111"},      {"11011", "00111"},
      {"10011d", "10001"}, {"00011t", "11111"}, {"00111", "00011t"}};
  for (const auto& [mask, bias] : kMasksAndBiases) {
    for (const auto& [t, s, right] :
         {std::tuple{133, 144, kOpen}, {450, 464, kOpen}, {450, 464, int64_t{14}}}) {
      problems.push_back({.dtype = dtype,
                          .batch = 2,
                          .kv_heads = 2,
                          .groups = 2,
                          .q_len = t,
                          .kv_len = s,
                          .qk_dim = d,
                          .v_dim = d - (right == kOpen ? 0 : 8),
                          .right = right,
                          .mask = mask,
                          .bias = bias,
                          .bias_dtype = right == kOpen ? dtype : other,
                          .length_first = t == 450});
    }
  }
  // More tiles of keys and of queries than a warp has lanes, most of them masked.
  if (d == 64)
    problems.push_back({.dtype = dtype,
                        .groups = 2,
                        .q_len = 3300,
                        .kv_len = 4200,
                        .qk_dim = d,
                        .v_dim = d,
                        .masked_row = MaskedRow::kNan,
                        .mask = "00011b"});
  problems.push_back({.dtype = dtype,
                      .batch = 2,
                      .kv_heads = 3,
                      .q_len = 300,
                      .kv_len = 320,
                      .qk_dim = d,
                      .v_dim = d,
                      .left = 200,
                      .masked_row = MaskedRow::kNan,
                      .mask = "10011d",
                      .bias = "01011",
                      .bias_dtype = dtype,
                      .interval = "1001",
                      .segments = true});
  // No fill of -60000, float16's: logits there are multiples of 2^-8, to which two kernels' may be
  // rounded differently.
  problems.push_back({.dtype = dtype,
                      .batch = 2,
                      .groups = 2,
                      .q_len = 133,
                      .kv_len = 160,
                      .qk_dim = d,
                      .v_dim = d,
                      .bias = "11111",
                      .bias_dtype = DType::kBF16,
                      .fill = -1e9f});
  problems.push_back({.dtype = dtype,
                      .q_len = 200,
                      .kv_len = 256,
                      .qk_dim = d,
                      .v_dim = d,
                      .mask = "00011",
                      .bias = "00011",
                      .bias_dtype = dtype,
                      .scale = -0.3f});
}

/// Few queries and many keys: clusters of all sizes, and more rows than a tile has.
inline void AddDecoding(std::vector<Problem>& problems, DType dtype, int64_t d) {
  for (const auto& [t, groups] : {std::pair{1, 1}, {1, 8}, {3, 4}, {16, 1}, {16, 3}}) {
    for (const int64_t s : {1, 300, 1000, 4200}) {
      Problem p{.dtype = dtype,
                .batch = 2,
                .kv_heads = 3,
                .groups = groups,
                .q_len = t,
                .kv_len = s,
                .qk_dim = d - 8,
                .v_dim = d};
      problems.push_back(p);
      if (s == 4200) continue;
      p.right = s - t, p.length_first = true, p.interval = "1001", p.mask = "10001d";
      problems.push_back(p);
      p.right = kOpen, p.interval = "", p.mask = "", p.masked_row = MaskedRow::kNan;
      p.segments = true, p.bias = "00111", p.softcap = 5;
      problems.push_back(p);
    }
  }
  problems.push_back({.dtype = dtype, .batch = 40, .kv_heads = 4, .kv_len = 600});
}

/// Every kernel with partial tiles, a band, a mask and a bias, for compute-sanitizer.
inline void AddSmall(std::vector<Problem>& problems, DType dtype) {
  for (const int64_t d : {64, 128, 256}) {
    problems.push_back(
        {.dtype = dtype, .q_len = 70, .kv_len = 133, .qk_dim = d, .v_dim = d - 32, .right = 0});
    problems.push_back({.dtype = dtype,
                        .groups = 2,
                        .q_len = 67,
                        .kv_len = 37,
                        .qk_dim = d - 8,
                        .v_dim = d,
                        .left = 9,
                        .right = 9,
                        .masked_row = MaskedRow::kNan,
                        .mask = "00111d",
                        .bias = "01011",
                        .bias_dtype = dtype,
                        .softcap = 3,
                        .lse_used = true,
                        .length_first = true});
    problems.push_back({.dtype = dtype,
                        .groups = 2,
                        .q_len = 66,
                        .kv_len = 131,
                        .qk_dim = d,
                        .v_dim = d,
                        .interval = "0001",
                        .segments = true});
    problems.push_back({.dtype = dtype,
                        .groups = 3,
                        .q_len = 2,
                        .kv_len = 1037,
                        .qk_dim = d,
                        .v_dim = d,
                        .interval = "1001"});
    problems.push_back({.dtype = dtype,
                        .groups = 3,
                        .q_len = 2,
                        .kv_len = 525,
                        .qk_dim = d,
                        .v_dim = d - 8,
                        .mask = "00001",
                        .interval = "1001",
                        .length_first = true});
  }
  for (const int64_t d : {64, 128}) {  // buffers that are filled again
    problems.push_back({.dtype = dtype,
                        .groups = 2,
                        .q_len = 260,
                        .kv_len = 272,
                        .qk_dim = d,
                        .v_dim = d,
                        .mask = "11011d",
                        .bias = "01111",
                        .bias_dtype = dtype});
    for (const char* bias : {"01111", "10101"})  // alone: a kernel of its own
      problems.push_back({.dtype = dtype,
                          .batch = 2,
                          .groups = 2,
                          .q_len = 260,
                          .kv_len = 560,
                          .qk_dim = d,
                          .v_dim = d,
                          .right = 300,
                          .bias = bias,
                          .bias_dtype = dtype});
    problems.push_back({.dtype = dtype,
                        .batch = 2,
                        .q_len = 260,
                        .kv_len = 560,
                        .qk_dim = d,
                        .v_dim = d,
                        .mask = "10011b"});
  }
  for (const auto& [d, e] : {std::pair{192, 128}, {256, 256}}) {
    problems.push_back({.dtype = dtype,
                        .groups = 2,
                        .q_len = 300,
                        .kv_len = 290,
                        .qk_dim = d,
                        .v_dim = e,
                        .right = 100});
  }
  problems.push_back({.dtype = dtype, .qk_dim = 8, .v_dim = 8});
  problems.push_back({.dtype = dtype,
                      .q_len = 17,
                      .kv_len = 19,
                      .qk_dim = 20,
                      .v_dim = 33,
                      .mask = "00001",
                      .bias = "00010"});
}

}  // namespace zenith::test
