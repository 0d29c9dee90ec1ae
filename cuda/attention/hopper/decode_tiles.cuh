// The sizes of decode.cuh's kernel, and a warp's buffers of keys and values.
#pragma once

#include <type_traits>

#include "cuda/attention/hopper/tile.cuh"
#include "cuda/attention/kernels.h"
#include "ffi/kernels/paged_attention.h"

namespace zenith::attention::hopper {

/// Keys that share a page, at least: a page is a power of two of them.
inline constexpr int kPageUnit = 16;

/// kScores: bias, mask, segments or a cap, which are half of the code. kPaged: a cap alone of
/// these.
template <typename T_, int kDim_, int kCols_, int kStages_, int kWarps_, int kBlocksPerSm_,
          bool kScores_, bool kPaged_>
struct DecodeConfig {
  using T = T_;
  using Args = std::conditional_t<kPaged_, PagedAttentionArgs, AttentionForwardArgs>;
  static constexpr int kDim = kDim_;        // features, padded; of query, key and value
  static constexpr int kCols = kCols_;      // keys per tile of a warp, a multiple of 16
  static constexpr int kStages = kStages_;  // tiles of keys and values that a warp has room for
  static constexpr int kWarps = kWarps_, kThreads = kWarps * kWarpSize;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr bool kScores = kScores_, kPaged = kPaged_;
  static constexpr bool kQueryInRegisters = kDim <= 128;
  static constexpr int kRows = 16;
  static constexpr int kMaxCluster = 16;  // above 8 a kernel must ask for it
  static constexpr int kTileBytes = kCols * kDim * int{sizeof(T)};
  static constexpr int kWarpBytes = kStages * 2 * kTileBytes;
  static constexpr int kQueryBytes = kRows * kDim * int{sizeof(T)};
  static constexpr int kTilesBytes = kQueryBytes + kWarps * kWarpBytes;
  static constexpr int kStatisticsBytes = kWarps * kRows * int{sizeof(float2)};
  // Sums are handed on in parts of four features, each with its row's maximum and sum.
  static constexpr int kPartsPerRow = kDim / 4, kMostParts = kRows * kPartsPerRow + kMaxCluster;
  static constexpr int kInboxBytes = kMostParts * int{sizeof(float4) + sizeof(float2)};
  static constexpr int kBarriersBytes = 8 * (kWarps * kStages + 1);
  static constexpr int kSharedBytes = kTilesBytes + kStatisticsBytes + kInboxBytes + kBarriersBytes;
  // A warp's partial sums take the place of its buffers.
  static_assert(kRows * kDim * int{sizeof(float)} <= kWarpBytes);
};

/// What the kernel takes.
template <typename Args>
struct DecodeParams {
  CUtensorMap key, value;  // with pages: of (page, head, token, feature)
  // With pages: what is added to a page's and to a head's number from pool to pool; one of them 0.
  int pool_pages, pool_heads;
  Args args;
};

/// Tiles of keys or values as TMA fills them: blocks of 64 features, one behind the other.
template <typename T, int kDim, int kCols>
struct DecodeLayout {
  using Block = TileLayout<T, kBoxFeatures>;
  static constexpr int kBlockBytes = kCols * kBlockRowBytes;
  static constexpr int kStepsPerBlock = Block::kSteps;

  /// As TileLayout's.
  static __device__ __forceinline__ uint32_t Move(uint32_t lane_address, int row, int step) {
    return Block::Move(lane_address, row, step % kStepsPerBlock) +
           step / kStepsPerBlock * kBlockBytes;
  }
};

/// The buffers of a warp, filled and read in turn. All lanes.
template <typename Config>
class DecodeRing {
 public:
  __device__ __forceinline__ DecodeRing(uint32_t tiles, uint32_t barriers)
      : tiles_(tiles), barriers_(barriers) {
    if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
      for (int i = 0; i < Config::kStages; ++i) BarrierInit(barriers_ + 8 * i, 1);
      BarrierInitFence();
    }
    __syncwarp();
  }
  /// `copy(tile, barrier)`, in one lane, starts to fill a tile of keys and one of values behind it.
  template <typename Copy>
  __device__ __forceinline__ void Fill(Copy copy) {
    if (threadIdx.x % kWarpSize == 0) {
      const uint32_t barrier = barriers_ + 8 * fill_;
      BarrierExpect(barrier, 2 * Config::kTileBytes);
      copy(tiles_ + fill_ * 2 * Config::kTileBytes, barrier);
    }
    if (++fill_ == Config::kStages) fill_ = 0;
    ++filled_;
  }
  /// Waits for the oldest tile that has not been read.
  __device__ __forceinline__ uint32_t Next() {
    BarrierWait(barriers_ + 8 * read_.stage, read_.parity);
    const uint32_t tile = tiles_ + read_.stage * 2 * Config::kTileBytes;
    read_.Advance();
    --filled_;
    return tile;
  }
  __device__ __forceinline__ void Drain() {
    while (filled_ > 0) (void)Next();
  }
  /// The number of the buffer that is filled, or read, next.
  __device__ __forceinline__ int fill_stage() const { return fill_; }
  __device__ __forceinline__ int read_stage() const { return static_cast<int>(read_.stage); }

 private:
  uint32_t tiles_, barriers_;
  Ring<Config::kStages> read_;
  int fill_ = 0, filled_ = 0;  // filled_: and not read
};

}  // namespace zenith::attention::hopper
