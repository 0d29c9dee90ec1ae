// Group normalisation, forward; the contract is ffi/kernels/group_norm.h, the plan group_norm.cuh.
#include "cuda/activation.cuh"
#include "cuda/group_norm.cuh"

namespace zenith {
namespace group_norm {
namespace {

/// In shared memory, after the sums' scratch: of each group of the slab.
struct GroupMoments {
  float *mean, *squares;  // of the block's rows: the mean, the squares about it
  float *sample_mean, *sample_rstd;

  __device__ GroupMoments(float* start, int groups)
      : mean(start),
        squares(start + groups),
        sample_mean(start + 2 * groups),
        sample_rstd(start + 3 * groups) {}
};

template <typename T, int kSize>
int SumsBytes(int slab_width, int channels) {
  const int floats = SumScratch::Floats<kSize>(slab_width) + 4 * (slab_width / channels);
  return (floats * 4 + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
}

/// Mean and squares about it are merged from means of threads, then of blocks (Chan, Golub and
/// LeVeque 1983); a thread sums about the first value it sees.
template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads, 3)
    group_norm_forward_kernel(GroupNormForwardArgs args, Tiling tiling) {
  using Values = Vector<T, kSize>;
  extern __shared__ __align__(kVectorBytes) float sFloats[];
  const int slab_width = tiling.slab_width();
  const SumScratch scratch{sFloats, sFloats + kThreads * kSize};
  const GroupMoments moments(sFloats + kThreads * kSize + SumScratch::FewFloats(slab_width),
                             tiling.slab_groups);
  const int floats = kThreads * kSize + SumScratch::FewFloats(slab_width) + 4 * tiling.slab_groups;
  Values* sRows = reinterpret_cast<Values*>(sFloats + (floats + 3) / 4 * 4);
  Exchange exchange;

  const Slab<kSize> slab(tiling);
  const int width = tiling.width(), channels = tiling.channels;
  const T* gX = static_cast<const T*>(args.x) + slab.offset;
  T* gY = static_cast<T*>(args.y) + slab.offset;

  const int kept = slab.turns(min(slab.rows, tiling.kept_rows)), turns = slab.turns(slab.rows);
  const auto in_memory = [&](int turn) { return int64_t{slab.row(turn)} * width; };
  float shift[kSize] = {}, sum[kSize] = {}, squares[kSize] = {};
  const auto add = [&](int turn, const Values& x) {
    float values[kSize];
    ToFloat(x, values);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (turn == 0) shift[i] = values[i];
      const float off = values[i] - shift[i];
      sum[i] += off;
      squares[i] += off * off;
    }
  };
  Stream(
      kept, [&](int turn) { Fetch(sRows + slab.kept(slab.row(turn)), gX + in_memory(turn)); },
      [&](int turn) { add(turn, sRows[slab.kept(slab.row(turn))]); });
#pragma unroll 4
  for (int turn = kept; turn < turns; ++turn) add(turn, LoadReadOnly<kSize>(gX + in_memory(turn)));

  const float count = static_cast<float>(turns);
  const float inverse_count = count > 0 ? 1.0f / count : 0.0f;
  const float block_size = static_cast<float>(slab.rows) * static_cast<float>(channels);
  float terms[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) terms[i] = sum[i] + count * shift[i];
  int parts = SumRows(slab, terms, scratch);
  SumGroups(slab, channels, parts, scratch.few, moments.mean);
  for (int g = static_cast<int>(threadIdx.x); g < slab.groups; g += kThreads) {
    moments.mean[g] = slab.rows > 0 ? moments.mean[g] / block_size : 0.0f;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float off = sum[i] * inverse_count;
    const float from_mean = shift[i] + off - moments.mean[slab.group(tiling, i)];
    terms[i] = count > 0 ? squares[i] - sum[i] * off + count * from_mean * from_mean : 0.0f;
  }
  parts = SumRows(slab, terms, scratch);
  SumGroups(slab, channels, parts, scratch.few, moments.squares);

  if (tiling.cluster > 1) exchange.Sync();
  const float size = static_cast<float>(tiling.rows) * static_cast<float>(channels);
  for (int g = static_cast<int>(threadIdx.x); g < slab.groups; g += kThreads) {
    float mean = 0, total = 0;
    for (int b = 0; b < tiling.cluster; ++b) {
      const float rows = static_cast<float>(tiling.rows_of(b)) * static_cast<float>(channels);
      mean += exchange.Of(b, moments.mean)[g] * (rows / size);
    }
    for (int b = 0; b < tiling.cluster; ++b) {
      const float rows = static_cast<float>(tiling.rows_of(b)) * static_cast<float>(channels);
      const float off = exchange.Of(b, moments.mean)[g] - mean;
      total += exchange.Of(b, moments.squares)[g] + rows * off * off;
    }
    const float rstd = rsqrtf(total / size + args.eps);
    moments.sample_mean[g] = mean;
    moments.sample_rstd[g] = rstd;
    if (slab.rank == 0) {
      const int64_t out = int64_t{slab.sample} * tiling.groups + slab.first_group + g;
      args.mean[out] = mean;
      args.rstd[out] = rstd;
    }
  }
  if (tiling.cluster > 1) exchange.Done();
  __syncthreads();

  const bool float_parameters = args.param_dtype == DType::kF32;
  float mean[kSize], gain[kSize], bias[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const int group = slab.group(tiling, i), channel = slab.channel(tiling, i);
    mean[i] = moments.sample_mean[group];
    gain[i] = moments.sample_rstd[group] * Parameter<T>(args.scale, float_parameters, channel);
    bias[i] = Parameter<T>(args.bias, float_parameters, channel);
  }
  const auto write = [&](int turn, const Values& x) {
    float values[kSize];
    ToFloat(x, values);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      values[i] = (values[i] - mean[i]) * gain[i] + bias[i];
      if (args.silu) values[i] = ActivationFunction<Activation::kSilu, T>::Value(values[i]);
    }
    StoreVector(gY + in_memory(turn), FromFloat<T>(values));
  };
#pragma unroll 4
  for (int turn = 0; turn < kept; ++turn) write(turn, sRows[slab.kept(slab.row(turn))]);
#pragma unroll 4
  for (int turn = kept; turn < turns; ++turn) {
    write(turn, LoadReadOnly<kSize>(gX + in_memory(turn)));
  }
  if (tiling.cluster > 1) exchange.WaitForOthers();
}

template <typename T, int kSize>
Status LaunchForward(const GroupNormForwardArgs& args, const zenith::Launch& launch) {
  const Status unsupported = Unsupported(args.shape, kSize);
  if (!unsupported.ok()) return unsupported;
  const Device device;
  if (device.error != cudaSuccess) return {cudaGetErrorString(device.error)};
  const int channels = static_cast<int>(args.shape.channels);
  const auto sums = [=](int slab_width) { return SumsBytes<T, kSize>(slab_width, channels); };
  const Tiling tiling = TilingFor<kSize>(args.shape, device, sizeof(T), 1, sums);
  const size_t bytes =
      static_cast<size_t>(sums(tiling.slab_width())) +
      sizeof(T) * static_cast<size_t>(tiling.slab_width()) * static_cast<size_t>(tiling.kept_rows);
  return group_norm::Launch(group_norm_forward_kernel<T, kSize>, args, device, tiling, bytes,
                            launch.stream);
}

}  // namespace
}  // namespace group_norm

Status GroupNormForward(const GroupNormForwardArgs& args, const Launch& launch) {
  const GroupNormShape& shape = args.shape;
  if (shape.samples * shape.groups == 0) return {};
  if (shape.rows * shape.channels == 0) {  // nothing to normalise; the statistics are never read
    const size_t bytes = static_cast<size_t>(shape.samples * shape.groups) * sizeof(float);
    (void)cudaMemsetAsync(args.mean, 0xff, bytes, launch.stream);
    (void)cudaMemsetAsync(args.rstd, 0xff, bytes, launch.stream);
    return LastLaunch();
  }
  return DispatchDType(args.dtype, [&]<typename T>() {
    const bool aligned = AreAligned(args.x, args.y) && shape.width() % kVectorSize<T> == 0;
    return aligned ? group_norm::LaunchForward<T, kVectorSize<T>>(args, launch)
                   : group_norm::LaunchForward<T, 1>(args, launch);
  });
}

}  // namespace zenith
