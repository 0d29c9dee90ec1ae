#include <algorithm>

#include "cuda/attention/forward.cuh"

namespace zenith::attention {

/// Blocks from which tiles of 128 queries are faster than tiles of 64, us of d64: 96 of them 9.9 /
/// 8.9 (b8 h12 t128), 192 65 / 52 (b2 h12 t1024, causal), 384 56 / 68 (b8 h12 t512), 512 125 / 159
/// (b4 h16 t1024) on the 132 multiprocessors of an H100, 2026-11-27.
constexpr int64_t kManyBlocks = 256;

Status ForwardTf32(const AttentionForwardArgs& args, const Launch& launch) {
  const int64_t dim = std::max(args.qk_dim, args.v_dim);
  if (dim > 128) return LaunchForward<ForwardConfig<Tf32, 256, 4, 1, 16, 1>>(args, launch);
  if (dim > 64) return LaunchForward<ForwardConfig<Tf32, 128, 4, 1, 32, 2>>(args, launch);
  using Large = ForwardConfig<Tf32, 64, 4, 2, 64, 2>;
  const int64_t tiles = (args.q_len + Large::kRows - 1) / Large::kRows;
  return args.batch * args.kv_heads * args.groups * tiles >= kManyBlocks
             ? LaunchForward<Large>(args, launch)
             : LaunchForward<ForwardConfig<Tf32, 64, 4, 1, 64, 2>>(args, launch);
}

}  // namespace zenith::attention
