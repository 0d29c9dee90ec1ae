// What the tests of the CUDA kernels share: arrays on the device, the two runs that every launcher
// goes through, comparison with an oracle's result, the report.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <map>
#include <numbers>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/core/launch.h"

namespace zenith::test {

inline constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBF16};
inline const char* Name(DType dtype) {
  return dtype == DType::kF32 ? "f32" : dtype == DType::kF16 ? "f16" : "bf16";
}
inline int64_t SizeOf(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

/// Largest relative error of rounding to the type: half the distance of 1 to the next value.
inline double Roundoff(DType dtype) {
  return dtype == DType::kF32 ? 0x1p-24 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
}
inline constexpr double kFloatRoundoff = 0x1p-24;

/// What a result may be off by where it is next to zero: f16's smallest step, float32's and
/// bfloat16's smallest normal value (fast exponentials flush what is below).
inline double Smallest(DType dtype) { return dtype == DType::kF16 ? 0x1p-24 : 0x1p-126; }

/// Leaves the program: after an error of the device every later result is void.
inline void Check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  std::printf("FAILED: %s: %s\n", what.c_str(), cudaGetErrorString(error));
  std::exit(1);
}

/// Values of mean 0 and deviation 1, nearly normal; one in fifty times `outlier`.
class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}

  std::vector<float> Normals(int64_t size, double scale = 1, double outlier = 1, double shift = 0) {
    std::vector<float> values(static_cast<size_t>(size));
    for (float& value : values) {
      const double factor = bits_() % 50 == 0 ? outlier : 1;
      value = static_cast<float>(shift + scale * factor * Normal());
    }
    return values;
  }
  uint64_t Bits() { return bits_(); }
  bool Chance(double probability) { return static_cast<double>(bits_()) < probability * 0x1p64; }

 private:
  /// Four uniform numbers from one draw, of deviation 1 / sqrt(12) each. A logarithm and a cosine
  /// for each value would be half of the tests' time.
  double Normal() {
    const uint64_t draw = bits_();
    const uint64_t sum =
        (draw & 0xffff) + (draw >> 16 & 0xffff) + (draw >> 32 & 0xffff) + (draw >> 48);
    return (static_cast<double>(sum) / 65535 - 2) * std::numbers::sqrt3;
  }

  std::mt19937_64 bits_;
};

/// Bytes around each array that no kernel may write. With --small there are none: then an array is
/// an allocation to the byte, and compute-sanitizer sees reads beyond it too.
inline int64_t guard_bytes = 256;

/// Elements on the device. Default: absent, a null pointer.
class Array {
 public:
  Array() = default;
  /// `offset`: how many elements the data lies behind a 256-byte boundary.
  Array(DType dtype, int64_t size, int64_t offset = 0)
      : dtype_(dtype), size_(size), start_(guard_bytes + offset * SizeOf(dtype)) {
    Allocate(size * SizeOf(dtype));
  }
  Array(DType dtype, const std::vector<float>& values, int64_t offset = 0)
      : Array(dtype, static_cast<int64_t>(values.size()), offset) {
    std::vector<char> bytes(static_cast<size_t>(size_ * SizeOf(dtype)));
    for (size_t i = 0; i < values.size(); ++i) {
      if (dtype == DType::kF32) {
        std::memcpy(&bytes[4 * i], &values[i], 4);
      } else if (dtype == DType::kF16) {
        const __half value = __float2half_rn(values[i]);
        std::memcpy(&bytes[2 * i], &value, 2);
      } else {
        const __nv_bfloat16 value = __float2bfloat16_rn(values[i]);
        std::memcpy(&bytes[2 * i], &value, 2);
      }
    }
    Upload(bytes.data(), bytes.size());
  }
  /// Of bool.
  explicit Array(const std::vector<char>& bits) : start_(guard_bytes) {
    Allocate(static_cast<int64_t>(bits.size()));
    Upload(bits.data(), bits.size());
  }
  Array(Array&& other) noexcept { *this = std::move(other); }
  Array& operator=(Array&& other) noexcept {
    std::swap(dtype_, other.dtype_);
    std::swap(size_, other.size_);
    std::swap(start_, other.start_);
    std::swap(bytes_, other.bytes_);
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~Array() {
    if (memory_ != nullptr) Check(cudaFree(memory_), "cudaFree");
  }

  DType dtype() const { return dtype_; }
  int64_t size() const { return size_; }
  template <typename T = void>
  T* data() const {
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + start_);
  }

  void Fill(unsigned char byte) {
    if (memory_ != nullptr) Check(cudaMemset(memory_, byte, static_cast<size_t>(bytes_)), "fill");
  }
  /// The data, and whether the bytes around it are all `filled_with`.
  std::pair<std::vector<char>, bool> Download(unsigned char filled_with) const {
    std::vector<char> all(static_cast<size_t>(bytes_));
    Check(cudaMemcpy(all.data(), memory_, all.size(), cudaMemcpyDeviceToHost), "download");
    const int64_t end = bytes_ - guard_bytes;
    bool holds = true;
    for (int64_t i = 0; i < bytes_; ++i) {
      if (i == start_ && end > start_) i = end;
      if (i < bytes_)
        holds &= static_cast<unsigned char>(all[static_cast<size_t>(i)]) == filled_with;
    }
    return {std::vector<char>(all.begin() + start_, all.begin() + end), holds};
  }
  std::vector<float> Values() const {
    if (memory_ == nullptr) return {};
    const std::vector<char> bytes = Download(0).first;
    std::vector<float> values(static_cast<size_t>(size_));
    for (size_t i = 0; i < values.size(); ++i) {
      if (dtype_ == DType::kF32) {
        std::memcpy(&values[i], &bytes[4 * i], 4);
      } else if (dtype_ == DType::kF16) {
        __half value;
        std::memcpy(&value, &bytes[2 * i], 2);
        values[i] = __half2float(value);
      } else {
        __nv_bfloat16 value;
        std::memcpy(&value, &bytes[2 * i], 2);
        values[i] = __bfloat162float(value);
      }
    }
    return values;
  }

 private:
  void Allocate(int64_t data_bytes) {
    bytes_ = start_ + data_bytes + guard_bytes;
    const size_t allocated = bytes_ > 0 ? static_cast<size_t>(bytes_) : 1;
    Check(cudaMalloc(reinterpret_cast<void**>(&memory_), allocated), "cudaMalloc");
  }
  void Upload(const char* bytes, size_t size) {
    Check(cudaMemcpy(data(), bytes, size, cudaMemcpyHostToDevice), "upload");
  }

  DType dtype_ = DType::kF32;
  int64_t size_ = 0, start_ = 0, bytes_ = 0;
  char* memory_ = nullptr;
};

/// A line per family of kernels; what is worse than its tolerance fails the program.
class Report {
 public:
  /// What the following belongs to. dtype: the inputs'; float32 results are counted there too.
  void Problem(DType dtype, std::string text) {
    dtype_ = dtype;
    problem_ = std::move(text);
  }

  void Require(bool holds, const std::string& claim) {
    if (holds) return;
    if (++failures_ <= kShown)
      std::printf("FAILED: %s %s: %s\n", Name(dtype_), problem_.c_str(), claim.c_str());
  }
  void Require(const Status& status, const std::string& what) {
    if (!status.ok()) Require(false, what + ": " + status.message);
  }

  /// |got - want| <= tolerance(i) for each element; NaN and infinity where `want` has them.
  template <typename Tolerance>
  void Compare(const std::string& family, const char* what, const Array& got, const Array& want,
               Tolerance&& tolerance) {
    const std::vector<float> got_values = got.Values(), want_values = want.Values();
    double worst = 0;
    for (size_t i = 0; i < want_values.size(); ++i) {
      const double g = got_values[i], w = want_values[i];
      if (std::isfinite(g) && std::isfinite(w)) {
        const double ratio = std::fabs(g - w) / tolerance(static_cast<int64_t>(i));
        if (!(ratio <= worst)) worst = std::isnan(ratio) ? HUGE_VAL : ratio;
      } else if (!(std::isnan(g) && std::isnan(w)) && g != w) {
        worst = HUGE_VAL;
      }
    }
    Add(family, what, worst);
  }

  /// `ratio`: an error as a multiple of its tolerance.
  void Add(const std::string& family, const char* what, double ratio) {
    Line& line = lines_[family + " " + Name(dtype_)];
    if (line.last_problem != problem_) ++line.problems;
    line.last_problem = problem_;
    if (ratio >= line.worst) line.worst = ratio, line.where = std::string(what) + ", " + problem_;
    if (ratio <= 1) return;
    char text[80];
    std::snprintf(text, sizeof(text), "%s is off by %.3g times the tolerance", what, ratio);
    Require(false, text);
  }

  /// Prints the lines; the program's exit status.
  int Finish() const {
    for (const auto& [family, line] : lines_) {
      std::printf("%-26s %5lld problems, largest error %5.2f of its tolerance: %s\n",
                  family.c_str(), static_cast<long long>(line.problems), line.worst,
                  line.where.c_str());
    }
    std::printf(failures_ == 0 ? "all right\n" : "%d FAILED\n", failures_);
    return failures_ == 0 ? 0 : 1;
  }

 private:
  static constexpr int kShown = 30;
  struct Line {
    int64_t problems = 0;
    double worst = 0;
    std::string where, last_problem;
  };
  std::map<std::string, Line> lines_;
  DType dtype_ = DType::kF32;
  std::string problem_;
  int failures_ = 0;
};

/// Calls `launch(Launch)`, which must write every element of `outputs` and no byte around them,
/// twice: directly, and as a captured CUDA graph (under compute-sanitizer directly too). The
/// results must agree to the bit although the outputs were filled with NaN before the first run and
/// with threes before the second: an element that is left alone differs.
template <typename Function>
void RunTwice(Report& report, const std::string& what, std::initializer_list<Array*> outputs,
              Function&& launch) {
  static const cudaStream_t stream = [] {
    cudaStream_t made;
    Check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "cudaStreamCreate");
    return made;
  }();
  constexpr unsigned char kFills[] = {0xff, 0x40};
  std::vector<std::vector<char>> first;
  for (const unsigned char fill : kFills) {
    const bool is_first = fill == kFills[0];
    for (Array* output : outputs) output->Fill(fill);
    Check(cudaDeviceSynchronize(), what);  // the stream does not wait for the fills
    if (is_first || guard_bytes == 0) {
      report.Require(launch(Launch{stream}), what);
    } else {
      cudaGraph_t graph;
      cudaGraphExec_t executable;
      Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), what + ", capture");
      report.Require(launch(Launch{stream}), what + ", captured");
      Check(cudaStreamEndCapture(stream, &graph), what + ", capture");
      Check(cudaGraphInstantiate(&executable, graph, 0), what + ", graph");
      Check(cudaGraphLaunch(executable, stream), what + ", graph");
      Check(cudaStreamSynchronize(stream), what + ", graph");
      Check(cudaGraphExecDestroy(executable), what + ", graph");
      Check(cudaGraphDestroy(graph), what + ", graph");
    }
    Check(cudaStreamSynchronize(stream), what);
    size_t index = 0;
    for (Array* output : outputs) {
      if (output->data() == nullptr) continue;
      auto [bytes, guards_hold] = output->Download(fill);
      report.Require(guards_hold, what + " writes outside of an output");
      if (is_first) {
        first.push_back(std::move(bytes));
      } else {
        report.Require(bytes == first[index], what + " gives other bits, or leaves some unwritten");
      }
      ++index;
    }
  }
}

/// The oracle's run.
template <typename Function>
void RunOracle(Report& report, const std::string& what, std::initializer_list<Array*> outputs,
               Function&& launch) {
  for (Array* output : outputs) output->Fill(0xff);
  report.Require(launch(Launch{nullptr}), what + ", naive");
  Check(cudaDeviceSynchronize(), what + ", naive");
}

/// Whether --small is given; sets up accordingly. Without a GPU the program ends here.
inline bool IsSmall(int argc, char** argv) {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    std::printf("no GPU to test on: %s\n", cudaGetErrorString(error));
    std::exit(2);
  }
  const bool small = argc > 1 && std::strcmp(argv[1], "--small") == 0;
  if (small) guard_bytes = 0;
  return small;
}

}  // namespace zenith::test
