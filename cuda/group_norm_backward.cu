// Group normalisation, backward; the contract is ffi/kernels/group_norm.h, the plan group_norm.cuh.
//
// The sums of a group are those of its channels, times scale; so dscale and dbias, which are sums
// of channels, cost no pass of their own.
#include "cuda/activation.cuh"
#include "cuda/group_norm.cuh"

namespace zenith {
namespace group_norm {
namespace {

/// In shared memory, after the sums' scratch.
struct ChannelSums {
  float *products, *plain;          // of each channel: the block's sums of dz * (x - mean) and dz
  float *scaled_products, *scaled;  // the sample's, times scale
  float *group_products, *group_plain;  // their sums over each group

  __device__ ChannelSums(float* start, int width, int groups)
      : products(start),
        plain(start + width),
        scaled_products(start + 2 * width),
        scaled(start + 3 * width),
        group_products(start + 4 * width),
        group_plain(start + 4 * width + groups) {}
};

template <int kSize>
__host__ __device__ int SumsFloats(int slab_width, int slab_groups) {
  return SumScratch::Floats<kSize>(slab_width) + 4 * slab_width + 2 * slab_groups;
}
inline __host__ __device__ int RoundedUp(int floats) { return (floats + 3) / 4 * 4; }

template <typename T>
__device__ __forceinline__ float BeforeSilu(bool silu, float dy, float z) {
  return silu ? dy * ActivationFunction<Activation::kSilu, T>::Derivative(z) : dy;
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_backward_kernel(GroupNormBackwardArgs args, Tiling tiling) {
  using Values = Vector<T, kSize>;
  extern __shared__ __align__(kVectorBytes) float sFloats[];
  const int slab_width = tiling.slab_width(), slab_groups = tiling.slab_groups;
  const SumScratch scratch{sFloats, sFloats + kThreads * kSize};
  const ChannelSums sums(sFloats + SumScratch::Floats<kSize>(slab_width), slab_width, slab_groups);
  Values* sX =
      reinterpret_cast<Values*>(sFloats + RoundedUp(SumsFloats<kSize>(slab_width, slab_groups)));
  Values* sDy = sX + tiling.kept_rows * (slab_width / kSize);
  Exchange exchange;

  const Slab<kSize> slab(tiling);
  const int width = tiling.width(), channels = tiling.channels;
  const T* gX = static_cast<const T*>(args.x) + slab.offset;
  const T* gDy = static_cast<const T*>(args.dy) + slab.offset;
  T* gDx = static_cast<T*>(args.dx) + slab.offset;
  const bool float_parameters = args.param_dtype == DType::kF32, silu = args.silu;
  const int64_t first_group = int64_t{slab.sample} * tiling.groups + slab.first_group;

  float mean[kSize], rstd[kSize], scale[kSize], bias[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const int group = slab.group(tiling, i), channel = slab.channel(tiling, i);
    mean[i] = args.mean[first_group + group];
    rstd[i] = args.rstd[first_group + group];
    scale[i] = Parameter<T>(args.scale, float_parameters, channel);
    bias[i] = Parameter<T>(args.bias, float_parameters, channel);
  }
  const int kept = slab.turns(min(slab.rows, tiling.kept_rows)), turns = slab.turns(slab.rows);
  const auto in_memory = [&](int turn) { return int64_t{slab.row(turn)} * width; };
  const auto in_shared = [&](int turn) { return slab.kept(slab.row(turn)); };
  float products[kSize] = {}, plain[kSize] = {};
  const auto add = [&](const Values& x, const Values& dy) {
    float x_values[kSize], dy_values[kSize];
    ToFloat(x, x_values);
    ToFloat(dy, dy_values);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float centred = x_values[i] - mean[i];
      const float dz = BeforeSilu<T>(silu, dy_values[i], centred * rstd[i] * scale[i] + bias[i]);
      products[i] += dz * centred;
      plain[i] += dz;
    }
  };
  Stream(
      kept,
      [&](int turn) {
        Fetch(sX + in_shared(turn), gX + in_memory(turn));
        Fetch(sDy + in_shared(turn), gDy + in_memory(turn));
      },
      [&](int turn) { add(sX[in_shared(turn)], sDy[in_shared(turn)]); });
#pragma unroll 2
  for (int turn = kept; turn < turns; ++turn) {
    add(LoadReadOnly<kSize>(gX + in_memory(turn)), LoadReadOnly<kSize>(gDy + in_memory(turn)));
  }

  const auto sum_channels = [&](const float (&values)[kSize], float* out) {
    const int parts = SumRows(slab, values, scratch);
    for (int c = static_cast<int>(threadIdx.x); c < slab.width; c += kThreads) {
      float sum = 0;
      for (int part = 0; part < parts; ++part) sum += scratch.few[part * slab.width + c];
      out[c] = sum;
    }
  };
  sum_channels(products, sums.products);
  sum_channels(plain, sums.plain);

  if (tiling.cluster > 1) {
    exchange.Sync();
  } else {
    __syncthreads();
  }
  const int first_channel = slab.first_group * channels;
  for (int c = static_cast<int>(threadIdx.x); c < slab.width; c += kThreads) {
    float product = 0, sum = 0;
    for (int b = 0; b < tiling.cluster; ++b) {
      product += exchange.Of(b, sums.products)[c];
      sum += exchange.Of(b, sums.plain)[c];
    }
    product *= args.rstd[first_group + c / channels];
    if (slab.rank == 0) {
      const int64_t out = int64_t{slab.sample} * width + first_channel + c;
      args.dscale[out] = product;
      args.dbias[out] = sum;
    }
    const float by = Parameter<T>(args.scale, float_parameters, first_channel + c);
    sums.scaled_products[c] = product * by;
    sums.scaled[c] = sum * by;
  }
  if (tiling.cluster > 1) exchange.Done();
  __syncthreads();
  SumGroups(slab, channels, 1, sums.scaled_products, sums.group_products);
  SumGroups(slab, channels, 1, sums.scaled, sums.group_plain);

  const float inverse_size =
      1.0f / (static_cast<float>(tiling.rows) * static_cast<float>(channels));
  float mean_g[kSize], mean_g_xhat[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const int group = slab.group(tiling, i);
    mean_g[i] = sums.group_plain[group] * inverse_size;
    mean_g_xhat[i] = sums.group_products[group] * inverse_size;
  }
  const auto write = [&](int turn, const Values& x, const Values& dy) {
    float x_values[kSize], dy_values[kSize];
    ToFloat(x, x_values);
    ToFloat(dy, dy_values);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float xhat = (x_values[i] - mean[i]) * rstd[i];
      const float dz = BeforeSilu<T>(silu, dy_values[i], xhat * scale[i] + bias[i]);
      // Not fused into the difference: where all g are equal its rounding would stay, times rstd.
      const float g = __fmul_rn(dz, scale[i]);
      dy_values[i] = rstd[i] * (g - mean_g[i] - xhat * mean_g_xhat[i]);
    }
    StoreVector(gDx + in_memory(turn), FromFloat<T>(dy_values));
  };
#pragma unroll 2
  for (int turn = 0; turn < kept; ++turn) write(turn, sX[in_shared(turn)], sDy[in_shared(turn)]);
#pragma unroll 2
  for (int turn = kept; turn < turns; ++turn) {
    write(turn, LoadReadOnly<kSize>(gX + in_memory(turn)),
          LoadReadOnly<kSize>(gDy + in_memory(turn)));
  }
  if (tiling.cluster > 1) exchange.WaitForOthers();
}

template <typename T, int kSize>
Status LaunchBackward(const GroupNormBackwardArgs& args, const zenith::Launch& launch) {
  const Status unsupported = Unsupported(args.shape, kSize);
  if (!unsupported.ok()) return unsupported;
  const Device device;
  if (device.error != cudaSuccess) return {cudaGetErrorString(device.error)};
  const int channels = static_cast<int>(args.shape.channels);
  const auto sums = [=](int slab_width) {
    return RoundedUp(SumsFloats<kSize>(slab_width, slab_width / channels)) * 4;
  };
  const Tiling tiling = TilingFor<kSize>(args.shape, device, sizeof(T), 2, sums);
  const size_t bytes = static_cast<size_t>(sums(tiling.slab_width())) +
                       2 * sizeof(T) * static_cast<size_t>(tiling.slab_width()) *
                           static_cast<size_t>(tiling.kept_rows);
  return group_norm::Launch(group_norm_backward_kernel<T, kSize>, args, device, tiling, bytes,
                            launch.stream);
}

}  // namespace
}  // namespace group_norm

Status GroupNormBackward(const GroupNormBackwardArgs& args, const Launch& launch) {
  const GroupNormShape& shape = args.shape;
  if (shape.samples * shape.width() == 0) return {};
  if (shape.rows == 0) {
    const size_t bytes = static_cast<size_t>(shape.samples * shape.width()) * sizeof(float);
    (void)cudaMemsetAsync(args.dscale, 0, bytes, launch.stream);
    (void)cudaMemsetAsync(args.dbias, 0, bytes, launch.stream);
    return LastLaunch();
  }
  return DispatchDType(args.dtype, [&]<typename T>() {
    const bool aligned =
        AreAligned(args.x, args.dy, args.dx) && shape.width() % kVectorSize<T> == 0;
    return aligned ? group_norm::LaunchBackward<T, kVectorSize<T>>(args, launch)
                   : group_norm::LaunchBackward<T, 1>(args, launch);
  });
}

}  // namespace zenith
